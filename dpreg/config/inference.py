"""Settings of the standard errors of an exact solution."""

import dataclasses

from dpreg.config.settings import Settings, setting

WEIGHTS = ("frequency", "precision", "importance")
COVARIANCES = ("classic", "HC0", "HC1", "HC2", "HC3", "cluster")


@dataclasses.dataclass(frozen=True)
class InferenceSettings(Settings):
    """The standard errors of the coefficients."""

    weights: str | None = setting(
        None,
        "What the weights of rows are: frequency, numbers of equal rows; precision, inverse variances; importance, as "
        "of a survey. Default: frequency for losses whose variance the mean determines, as logistic; else precision.",
        affects_result=True,
        choices=WEIGHTS,
    )
    covariance: str | None = setting(
        None,
        "Covariance of the coefficients of an exact solution: classic, for rows with variances as in the model; HC0 to "
        "HC3, for any; cluster, for rows that are correlated within groups. Default: classic; HC1 for weights of "
        "importance; cluster with group_column.",
        affects_result=True,
        choices=COVARIANCES,
    )
