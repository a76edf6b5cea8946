"""What a fit says of a linear model, as data: coefficients, their errors and tests, and how well the model fits."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from dpreg.errors import InputError
from dpreg.solvers.fit import Fit

LEVEL = 0.95  # of confidence intervals
BASE, NOT_USED = "the base level", "not used: constant, or a combination of others"
OFFSET = "the offset, whose weight is 1"
UNSEEN = "a product of levels that is not used, of which there may be many: tables leave it out"
INFINITE = {  # by the sign of the estimate
    sign: f"no finite estimate: the targets of its rows are all {target}; fitted without them"
    for sign, target in ((-1, 0), (1, 1))
}
_MOST_IN_JSON = 128  # coefficients whose covariances are written: there are as many as their square


class Coefficient(NamedTuple):
    """One coefficient of a linear model.

    Attributes:
      name: that of its column, or of the intercept.
      estimate: in the units of the fit.
      std_error: the standard error; NaN where it is unknown, as is all that follows.
      statistic: the estimate over its standard error.
      p: how probable an estimate as far from 0 is where the truth is 0.
      low, high: the confidence interval.
      used: False for a column that is constant, or a combination of others, and for a level without a finite estimate.
      note: `BASE` for a level with which the others of its category are compared; one of `INFINITE` for a level whose
        targets are all alike, the estimate of which is infinite; `UNSEEN` for a coefficient that no table shows.
    """

    name: str
    estimate: float
    std_error: float
    statistic: float
    p: float
    low: float
    high: float
    used: bool = True
    note: str = ""

    @property
    def remark(self) -> str:
        """What a table says in place of the errors of a coefficient that is not used."""
        return self.note or ("" if self.used else NOT_USED)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of one target's linear model. Where a number is unknown, it is None.

    Standard errors and what follows from them are unknown with a penalty. The likelihood is that of Gaussian errors for
    squared loss, and that of the family for the others. It is unknown for weights of importance, for weights of
    precision of least squares, and of a family without a dispersion.

    Attributes:
      target: its name.
      coefficients: the intercept first, where there is one, then one for each column.
      test: "t", or "z" where the dispersion is known: what `Coefficient.statistic` is.
      level: of the confidence intervals.
      rows: those with a weight, that were fitted; for weights of frequency, the sum of the weights.
      degrees_of_freedom: rows less coefficients used.
      degrees_of_test: those of Student's t for `Coefficient.statistic`; None where that is normal.
      dispersion: the variance of a row of weight 1, over the variance function; that of the residuals for squared loss.
      r2, adjusted_r2: the share of the variance of the target, less any offset, that is explained, for squared loss.
      deviance, null_deviance: of the model, and of one with nothing but an intercept.
      log_likelihood, aic, bic: with the natural logarithm, and the coefficients used as parameters.
      condition_number: of the columns used, centred and of one length.
      covariance: [k, k] of the coefficients used, in their order.
      covariance_type: "classic" for errors of one variance, "HC0" to "HC3", or "cluster".
      weights: "frequency", "precision" or "importance"; None if all rows have the weight 1.
    """

    target: str
    coefficients: tuple[Coefficient, ...]
    test: str
    level: float
    rows: float
    degrees_of_freedom: float
    degrees_of_test: float | None
    dispersion: float
    r2: float | None
    adjusted_r2: float | None
    deviance: float
    null_deviance: float | None
    log_likelihood: float | None
    aic: float | None
    bic: float | None
    condition_number: float
    covariance: np.ndarray | None
    covariance_type: str
    weights: str | None

    def conf_int(self, level: float | None = None) -> np.ndarray:
        """[k, 2] the confidence intervals of all coefficients, by default of the level of this summary.

        Raises:
          InputError: for a level that is not between 0 and 1.
        """
        found = self if level is None else self.with_level(level)
        return np.array([[c.low, c.high] for c in found.coefficients])

    def with_level(self, level: float) -> "Summary":
        """This summary with confidence intervals of another level.

        Raises:
          InputError: for a level that is not between 0 and 1.
        """
        reach = self.quantile(level)
        coefficients = (
            c._replace(low=c.estimate - reach * c.std_error, high=c.estimate + reach * c.std_error)
            for c in self.coefficients
        )
        return dataclasses.replace(self, level=level, coefficients=tuple(coefficients))

    def quantile(self, level: float) -> float:
        """The number of standard errors that an interval of a level extends to each side.

        Raises:
          InputError: for a level that is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise InputError(f"level={level!r}: use a value between 0 and 1, such as 0.95")
        return _quantile(self.degrees_of_test, level)

    def to_json(self) -> dict[str, Any]:
        """Plain values, NaN among them. Covariances are left out for more than 128 coefficients."""
        values = vars(self) | {"coefficients": [c._asdict() for c in self.coefficients]}
        small = self.covariance is not None and len(self.covariance) <= _MOST_IN_JSON
        return values | {"covariance": self.covariance.tolist() if small and self.covariance is not None else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], covariance: np.ndarray | None = None) -> "Summary":
        """The summary that `to_json` described, with null for NaN, and another covariance."""

        def with_nan(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
            return {**given, **{name: np.nan for name in names if given[name] is None}}

        infinite = {note: sign * np.inf for sign, note in INFINITE.items()}
        coefficients = tuple(Coefficient(**with_nan(each, each)) for each in values["coefficients"])
        coefficients = tuple(c._replace(estimate=infinite.get(c.note, c.estimate)) for c in coefficients)
        known = with_nan(values, ("dispersion", "deviance", "condition_number"))
        return cls(**known | {"coefficients": coefficients, "covariance": covariance})

    @property
    def facts(self) -> list[str]:
        """Short texts about the fit as a whole: the rows, how well the model fits them, and the condition number."""
        facts = [f"{self.rows:,.15g} rows, {self.degrees_of_freedom:,.15g} degrees of freedom"]
        if self.r2 is not None:
            facts += [f"R2 {self.r2:.6g}", f"residual deviation {np.sqrt(self.dispersion):.6g}"]
        elif self.test == "t":
            facts.append(f"dispersion {self.dispersion:.6g}")
        if self.covariance_type != "classic":
            facts.append(f"covariance {self.covariance_type}")
        return [*facts, f"condition {self.condition_number:.3g}"]

    @property
    def shown(self) -> list[Coefficient]:
        """The coefficients that tables show."""
        return [c for c in self.coefficients if c.note != UNSEEN]

    def __str__(self) -> str:
        wide = max(len(c.name) for c in self.shown)
        interval = f"{100 * self.level:g}% interval"
        lines = [f"{'':{wide}} {'estimate':>13} {'std error':>12} {self.test:>10} {'p':>9} {interval:>27}"]
        for c in self.shown:
            line = f"{c.name:{wide}} {c.estimate:>13.6g}"
            if np.isnan(c.std_error):
                lines.append(f"{line}   {c.remark}".rstrip())
                continue
            interval = f"{c.low:.6g} .. {c.high:.6g}"
            lines.append(f"{line} {c.std_error:>12.6g} {c.statistic:>10.4g} {c.p:>9.3g} {interval:>27}")
        lines.append("; ".join(self.facts))
        return "\n".join(lines)


def intercept_name(features: Iterable[str]) -> str:
    """What the intercept is called beside features of these names: "(intercept)", with "_" behind it where needed."""
    names, name = {*features}, "(intercept)"
    while name in names:
        name += "_"
    return name


def summarize_fit(
    fit: Fit,
    names: Sequence[str],
    target: int = 0,
    name: str = "y",
    level: float = LEVEL,
    weights: str | None = None,
) -> Summary:
    """The summary of one target.

    Args:
      names: of the d columns.
      target: the number of the target, from 0; name: its name.
      level: of the confidence intervals.
      weights: the kind of the rows' weights; None if all are 1.
    """
    rows, freedom, squares = fit.triangle.rows, fit.degrees_of_freedom, None
    used = len(fit.kept) + fit.intercept
    log_likelihood, deviance, null = fit.log_likelihood, fit.deviance, fit.null_deviance
    r2 = adjusted = None
    if fit.dispersion is None:
        squares = float(fit.triangle.squares(fit.w, fit.b)[target])
        deviance, r2 = squares, float(fit.r2[target])
        if np.isfinite(r2):
            null = float(fit.total_squares[target])
            adjusted = 1 - (1 - r2) * (rows - fit.intercept) / freedom if freedom > 0 else None
        if weights in (None, "frequency") and squares > 0:
            log_likelihood = -rows / 2 * (np.log(2 * np.pi * squares / rows) + 1)
    if weights == "importance" or (weights == "precision" and fit.known_variance):
        log_likelihood = None
    return Summary(
        target=name,
        coefficients=tuple(_coefficients(fit, names, target, level)),
        test="z" if fit.known_variance else "t",
        level=level,
        rows=rows,
        degrees_of_freedom=freedom,
        degrees_of_test=fit.degrees_of_test,
        dispersion=float(np.square(fit.residual_deviation[target])),
        r2=r2 if r2 is not None and np.isfinite(r2) else None,
        adjusted_r2=adjusted,
        deviance=float(deviance) if deviance is not None else np.nan,
        null_deviance=null,
        log_likelihood=float(log_likelihood) if log_likelihood is not None else None,
        aic=float(2 * used - 2 * log_likelihood) if log_likelihood is not None else None,
        bic=float(used * np.log(rows) - 2 * log_likelihood) if log_likelihood is not None else None,
        condition_number=fit.condition_number,
        covariance=fit.covariance(target) if fit.has_errors else None,
        covariance_type=fit.sandwich.kind if fit.sandwich else "classic",
        weights=weights,
    )


def _coefficients(fit: Fit, names: Sequence[str], target: int, level: float) -> list[Coefficient]:
    (w, b), (p_of_w, p_of_b) = fit.standard_errors, fit.p_values
    estimates, errors, p = (
        np.append(of_b[target], of_w[:, target]) for of_w, of_b in ((fit.w, fit.b), (w, b), (p_of_w, p_of_b))
    )
    signs = {j: int(np.sign(fit.w[j, target])) for j in fit.infinite}
    estimates[[1 + j for j in signs]] *= np.inf
    reach = errors * _quantile(fit.degrees_of_test, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistics = estimates / errors
    columns = np.stack([estimates, errors, statistics, p, estimates - reach, estimates + reach], axis=1).tolist()
    used = [True, *(bool(fit.l1) or j in fit.kept for j in range(len(names)))]  # with l1, weights of 0 are estimates
    notes = dict.fromkeys(range(len(names)), "") | dict.fromkeys(fit.left_out, BASE) | dict.fromkeys(fit.given, OFFSET)
    notes |= {j: INFINITE[sign] for j, sign in signs.items()}
    rows = zip([intercept_name(names), *names], columns, used, ["", *notes.values()], strict=True)
    found = [Coefficient(name, *row)._replace(used=own, note=note) for name, row, own, note in rows]
    return found if fit.intercept else found[1:]


def _quantile(freedom: float | None, level: float) -> float:
    """The quantile of Student's t (for None, of the normal distribution) within which lies that share around 0."""
    above = (1 + level) / 2
    return float(scipy.special.ndtri(above) if freedom is None else scipy.special.stdtrit(freedom, above))
