"""Settings of how the loss is minimised: solver, optimizer, schedule, penalties, epochs."""

import dataclasses

from dpreg.config.settings import Settings, setting
from dpreg.spelling import spell

SOLVERS = ("auto", "exact", "irls", "sgd")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "lbfgs")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Settings):
    """How the loss is minimised."""

    solver: str = setting(
        "auto",
        "exact: the least loss of a linear model (irls: of a GLM); sgd: the optimizer's steps; "
        "auto: exact for tables, unless a setting of steps is given.",
        affects_result=True,
        choices=SOLVERS,
    )
    optimizer: str = setting(
        "sgd",
        f"{', '.join(OPTIMIZERS)}; all but sgd (from scratch) are optax's.",
        affects_result=True,
        choices=OPTIMIZERS,
    )
    lr: float = setting(0.03, "Learning rate, per step of the global batch.", affects_result=True, gt=0)
    lr_schedule: str = setting(
        "constant",
        f"How the learning rate continues after warmup_steps: {', '.join(SCHEDULES)}.",
        affects_result=True,
        choices=SCHEDULES,
    )
    warmup_steps: int = setting(
        0, "Steps in which the learning rate rises from 0; 0 for none.", affects_result=True, min=0, lt=2**31
    )
    l1: float = setting(
        0.0,
        "Weight of a penalty on the loss, the sum of |w|, not of biases; with the optimizer sgd.",
        affects_result=True,
        min=0,
    )
    l2: float = setting(
        0.0,
        "Weight of a penalty on the loss, the sum of w^2 / 2, not of biases (weight decay).",
        affects_result=True,
        min=0,
    )
    gradient_clip_val: float = setting(
        0.0, "Largest norm of a step's gradient; longer ones are scaled to it. 0: no limit.", affects_result=True, min=0
    )
    accumulate_steps: int = setting(
        1, "Batches whose gradients are added up for one step, as if they were one.", affects_result=True, min=1
    )
    max_epochs: int = setting(3, "How often every row is used.", min=1)
    patience: int = setting(
        0,
        "Epochs without a lower validation loss after which a run ends, with the best parameters; 0: never.",
        affects_result=True,
        min=0,
    )
    optimality: bool = setting(
        True,
        "Report how far a linear model is from the least possible squared loss: one more pass over the training rows; "
        "not with more than 512 features.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1 and self.optimizer != "sgd":
            self._refuse("l1", f"only {spell('optimizer', 'sgd')} reaches its optimum; use that, or {spell('l2')}")
        if self.patience and self.solver in ("exact", "irls"):
            self._refuse("patience", f"it is for {spell('solver', 'sgd')}; leave one out")
