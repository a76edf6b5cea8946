"""Settings of the model and of its loss."""

import dataclasses

from dpreg.config.settings import Settings, setting
from dpreg.spelling import spell

MODELS = ("linear", "concise", "mlp")
ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid")
LOG_LINK_LOSSES = ("poisson", "gamma", "tweedie", "negative_binomial")
GLM_LOSSES = ("logistic", *LOG_LINK_LOSSES)  # those of generalised linear models with one prediction a row
DISPERSED_LOSSES = ("squared", "gamma", "tweedie")  # whose variance has a factor that the mean does not give
L1_LOSSES = ("squared", *GLM_LOSSES)  # for which `dpreg.solvers` takes an l1 penalty, and leaves out the intercept
SEPARABLE_LOSSES = ("logistic", "softmax", "poisson")  # without a least value where features tell targets for certain
LABEL_LOSSES = ("logistic", "softmax")  # of targets that are labels
LOCATED_LOSSES = ("squared", "huber", "absolute", "quantile")  # of the difference of target and prediction
LOSSES = (*LOCATED_LOSSES, "logistic", "softmax", *LOG_LINK_LOSSES)


@dataclasses.dataclass(frozen=True)
class ModelSettings(Settings):
    """The model, and the loss that it minimises."""

    model: str = setting(
        "linear",
        "linear (from scratch), concise (flax), mlp; or PACKAGE.MODULE:CLASS, a flax module.",
        affects_result=True,
        completions=MODELS,
    )
    sigma: float | None = setting(
        None,
        "Standard deviation of the initial weights of a linear or concise model. Default: 0.01 for synthetic rows; 0 "
        "for tables, so that no prediction depends on an initial weight that the rows do not determine.",
        affects_result=True,
        min=0,
    )
    hidden: tuple[int, ...] = setting(
        (64, 64), "Units of each hidden layer of an mlp, separated by commas.", affects_result=True, min=1
    )
    dropout: float = setting(
        0.0,
        "Fraction of an mlp's hidden values that dropout sets to 0 in training, 0 or more and below 1.",
        affects_result=True,
        min=0,
        lt=1,
    )
    batch_norm: bool = setting(
        False,
        "Normalise an mlp's hidden values by the mean and variance of the rows of a shard in each batch.",
        affects_result=True,
    )
    sync_batch_norm: bool = setting(
        False,
        "With batch_norm: normalise by the mean and variance of all rows of the batch, which devices exchange in "
        "every layer. Not with the reduction ordered.",
        affects_result=True,
    )
    activation: str = setting(
        "relu",
        f"Activation of an mlp's hidden layers: {', '.join(ACTIVATIONS)}.",
        affects_result=True,
        choices=ACTIVATIONS,
    )
    loss: str = setting("squared", f"{', '.join(LOSSES)}.", affects_result=True, choices=LOSSES)
    huber_delta: float = setting(
        1.0,
        "For the loss huber: the error beyond which the loss is linear instead of quadratic, in units of the target "
        "after any target transform.",
        affects_result=True,
        gt=0,
    )
    quantile: float = setting(
        0.5, "For the loss quantile: the quantile to fit, above 0 and below 1.", affects_result=True, gt=0, lt=1
    )
    tweedie_power: float = setting(
        1.5,
        "For the loss tweedie: the power of the mean that the variance is proportional to, above 1 and below 2.",
        affects_result=True,
        gt=1,
        lt=2,
    )
    negative_binomial_alpha: float | None = setting(
        None,
        "For the loss negative_binomial: the variance is the mean + alpha mean^2. Default: the most likely alpha, by "
        "exact solvers.",
        affects_result=True,
        gt=0,
    )
    num_classes: int = setting(
        2,
        "For the loss softmax: the number of classes; labels are 0 to num_classes - 1. Default: for tables, the number "
        "of labels of the target.",
        affects_result=True,
        min=2,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in MODELS and self.model.count(":") != 1:
            self._refuse("model", f"use {', '.join(MODELS)} or PACKAGE.MODULE:CLASS")
        if self.model == "mlp" and not self.hidden:
            self._refuse("hidden", f"give at least one width, or use {spell('model', 'linear')}")
        if self.sync_batch_norm and not (self.model == "mlp" and self.batch_norm):
            needed = f"{spell('model', 'mlp')} with {spell('batch_norm', True)}"
            self._refuse("sync_batch_norm", f"it applies only to {needed}; give both, or leave it out")

    @property
    def is_linear(self) -> bool:
        """Whether the model is one of dpreg's linear models."""
        return self.model in ("linear", "concise")
