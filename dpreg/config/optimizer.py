"""Settings of how the loss is minimised: solver, optimizer, schedule, penalties, epochs."""

import dataclasses

from dpreg.config.settings import Settings, setting
from dpreg.spelling import spell

SOLVERS = ("auto", "exact", "irls", "sgd")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "lbfgs")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Settings):
    """The solver, the optimizer with its learning rate, the penalties, and the epochs."""

    solver: str = setting(
        "auto",
        "exact: the least loss of a linear model (irls: of a GLM); sgd: the optimizer's steps; "
        "auto: exact for tables, unless a setting of steps is given.",
        affects_result=True,
        choices=SOLVERS,
    )
    optimizer: str = setting(
        "sgd",
        f"{', '.join(OPTIMIZERS)}; sgd is from scratch, the others are those of optax.",
        affects_result=True,
        choices=OPTIMIZERS,
    )
    lr: float = setting(0.03, "Learning rate for the global batch.", affects_result=True, gt=0)
    lr_schedule: str = setting(
        "constant",
        f"Schedule of the learning rate after warmup_steps: {', '.join(SCHEDULES)}.",
        affects_result=True,
        choices=SCHEDULES,
    )
    warmup_steps: int = setting(
        0, "Steps in which the learning rate rises from 0 to lr; 0 for none.", affects_result=True, min=0, lt=2**31
    )
    l1: float = setting(
        0.0,
        "Weight of the l1 penalty, the sum of |w| without biases: it makes weights exactly 0. Of optimizers, only sgd "
        "takes it.",
        affects_result=True,
        min=0,
    )
    l2: float = setting(
        0.0,
        "Weight of the l2 penalty, the sum of w^2 / 2 without biases (weight decay).",
        affects_result=True,
        min=0,
    )
    folds: int = setting(
        0,
        "Folds of a cross-validation that chooses the strength of the penalty, for squared loss: each is held out of a "
        "fit to the others. 0: none.",
        affects_result=True,
        min=0,
    )
    l1_ratio: float = setting(
        1.0,
        "With folds: the share of l1 in the penalty, and l2 has the rest: 1 for the lasso, 0 for ridge regression.",
        affects_result=True,
        min=0,
    )
    gradient_clip_val: float = setting(
        0.0, "Largest norm of the gradient; larger ones are scaled to it. 0: no limit.", affects_result=True, min=0
    )
    accumulate_steps: int = setting(
        1, "Batches of one step; their gradients are accumulated as for one large batch.", affects_result=True, min=1
    )
    max_epochs: int = setting(3, "Passes over the training rows.", min=1)
    patience: int = setting(
        0,
        "Early stopping: epochs without a lower validation loss before the run ends with the best parameters; 0: off.",
        affects_result=True,
        min=0,
    )
    optimality: bool = setting(
        True,
        "Report how far a linear model is from the minimum of the squared loss, which takes one more pass over the "
        "training rows; not with more than 512 features.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1 and self.optimizer != "sgd" and self.solver not in ("exact", "irls"):
            self._refuse("l1", f"only {spell('optimizer', 'sgd')} reaches its optimum; use that, or {spell('l2')}")
        if self.patience and self.solver in ("exact", "irls"):
            self._refuse("patience", f"it applies only to {spell('solver', 'sgd')}; leave one out")
        self._check_folds()

    def _check_folds(self) -> None:
        """Refuses settings that contradict a cross-validation."""
        if self.folds == 1:
            self._refuse("folds", "use 2 or more, or 0 for no cross-validation")
        if self.l1_ratio > 1:
            self._refuse("l1_ratio", "use 1 or less")
        if self.l1_ratio < 1 and not self.folds:
            both = f"give both, or {spell('l1')} and {spell('l2')}"
            self._refuse("l1_ratio", f"it applies only with {spell('folds')}; {both}")
        if self.folds and (self.l1 or self.l2):
            name = "l1" if self.l1 else "l2"
            self._refuse(name, f"{spell('folds', self.folds)} chooses it; leave one out")
        if self.folds and self.solver in ("sgd", "irls"):
            self._refuse("folds", f"it applies only to {spell('solver', 'exact')}; leave one out")
