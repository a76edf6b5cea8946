"""What a fit says of each coefficient: estimate, standard error, test and confidence interval."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from dpreg.solvers.tsqr import Fit

LEVEL = 0.95  # of confidence intervals


class Coefficient(NamedTuple):
    """One coefficient of a linear model.

    Attributes:
      name: that of its column, or of the intercept.
      estimate: in the units of the fit.
      std_error: the standard error; like all that follows NaN where it is unknown.
      statistic: the estimate over its standard error: z where the dispersion is known, else t.
      p: how probable an estimate as far from 0 is where the truth is 0.
      low, high: the confidence interval.
      used: False for a column that is constant, or a combination of others.
    """

    name: str
    estimate: float
    std_error: float
    statistic: float
    p: float
    low: float
    high: float
    used: bool = True


def intercept_name(features: Iterable[str]) -> str:
    """What the intercept is called beside features of these names: "(intercept)", with "_" behind it where needed."""
    names, name = {*features}, "(intercept)"
    while name in names:
        name += "_"
    return name


def coefficients(fit: Fit, names: Sequence[str], target: int = 0, level: float = LEVEL) -> list[Coefficient]:
    """The coefficients of one target, the intercept first where there is one.

    Args:
      names: of the d columns.
      target: its number, from 0.
      level: of the confidence intervals.
    """
    (w, b), (p_of_w, p_of_b) = fit.standard_errors, fit.p_values
    estimates, errors, p = (
        np.append(of_b[target], of_w[:, target]) for of_w, of_b in ((fit.w, fit.b), (w, b), (p_of_w, p_of_b))
    )
    freedom = max(fit.degrees_of_freedom, 1)
    above = (1 + level) / 2
    reach = errors * (scipy.special.ndtri(above) if fit.known_variance else scipy.special.stdtrit(freedom, above))
    with np.errstate(divide="ignore", invalid="ignore"):
        statistics = estimates / errors
    columns = np.stack([estimates, errors, statistics, p, estimates - reach, estimates + reach], axis=1).tolist()
    used = [True, *(j in fit.kept for j in range(len(names)))]
    rows = zip([intercept_name(names), *names], columns, used, strict=True)
    return [Coefficient(name, *row)._replace(used=own) for name, row, own in rows][0 if fit.intercept else 1 :]


def describe(fit: Fit, names: Sequence[str], target: int = 0, level: float = LEVEL) -> str:
    """A table of the `coefficients`, and a line on the fit."""
    rows = coefficients(fit, names, target, level)
    wide = max(len(row.name) for row in rows)
    test, interval = "z" if fit.known_variance else "t", f"{level:.0%} interval"
    lines = [f"{'':{wide}} {'estimate':>13} {'std error':>12} {test:>10} {'p':>9} {interval:>27}"]
    for row in rows:
        line = f"{row.name:{wide}} {row.estimate:>13.6g}"
        if np.isnan(row.std_error):
            lines.append(line + ("" if row.used else "   not used: constant, or a combination of others"))
            continue
        interval = f"{row.low:.6g} .. {row.high:.6g}"
        lines.append(f"{line} {row.std_error:>12.6g} {row.statistic:>10.4g} {row.p:>9.3g} {interval:>27}")
    facts = [f"{fit.triangle.rows:,} rows, {fit.degrees_of_freedom:,} degrees of freedom"]
    if fit.dispersion is None:
        facts += [f"R2 {fit.r2[target]:.6g}", f"residual deviation {fit.residual_deviation[target]:.6g}"]
    elif not fit.known_variance:
        facts.append(f"dispersion {fit.dispersion:.6g}")
    lines.append("; ".join([*facts, f"condition {fit.condition_number:.3g}"]))
    return "\n".join(lines)
