"""Times exact solutions of dpreg and other packages: `python tests/benchmarks/solvers.py` (10 minutes).

The time is from rows in memory to the parameters. All packages run in the same process on the same rows, float32 for
dpreg and float64 for the others, which would convert them. Times are the best of several rounds; the ratio of a peer is
its time over that of dpreg. The errors are those of the coefficients against the optimum in float64, relative to the
largest coefficient.

    python tests/benchmarks/solvers.py [--loss=squared] [--size=60000x54] [--rounds=3]
"""

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np
import statsmodels.api as sm
from jax.sharding import Mesh
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge

import dpreg
from dpreg.config import Config
from dpreg.solvers.solver import Solver

SIZES = ((60_000, 54), (6_000, 2_048), (1_000_000, 30), (5_000_000, 30))
LOSSES = ("squared", "logistic", "poisson")
_SLOWEST = 60.0  # A program that takes more seconds gets no further round.


def rows(loss: str, num_rows: int, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns X [n, d] and y [n], float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    z = x @ (rng.standard_normal(num_inputs) / np.sqrt(num_inputs)).astype(np.float32)
    if loss == "logistic":
        return x, (rng.random(num_rows) < 1 / (1 + np.exp(-z))).astype(np.float32)
    if loss == "poisson":
        return x, rng.poisson(np.exp(z)).astype(np.float32)
    return x, z + 0.5 * rng.standard_normal(num_rows, dtype=np.float32)


def fit_dpreg(loss: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that computes dpreg's exact solution, as `--solver=exact` does."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return lambda x, y: Solver(dpreg.ArraySource(x, y), mesh, 8).solve(Config(loss=loss)).w[:, 0]


def fit_sklearn(model: object) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that computes the coefficients of a scikit-learn model."""
    return lambda x, y: np.ravel(model.fit(x, y).coef_)  # type: ignore[attr-defined]


def fit_glum(family: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that fits a GLM of glum without a penalty."""
    from glum import GeneralizedLinearRegressor

    return lambda x, y: GeneralizedLinearRegressor(family=family, alpha=0).fit(x, y).coef_


def fit_statsmodels(family: object) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Returns a function that fits a GLM of statsmodels by iteratively reweighted least squares."""
    return lambda x, y: sm.GLM(y, sm.add_constant(x), family=family).fit().params[1:]


def programs(loss: str, num_inputs: int) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    """Returns the peers by name."""
    if loss == "squared":
        found = {
            "sklearn LinearRegression": fit_sklearn(LinearRegression()),
            "sklearn Ridge(alpha=0)": fit_sklearn(Ridge(alpha=0.0)),
            "numpy lstsq": lambda x, y: np.linalg.lstsq(np.c_[np.ones(len(x)), x], y)[0][1:],
        }
    elif loss == "logistic":
        found = {
            f"sklearn {name}": fit_sklearn(LogisticRegression(C=np.inf, solver=name, tol=1e-8, max_iter=1000))
            for name in ("newton-cholesky", "lbfgs")
        }
        found["LIBLINEAR (C=1e6)"] = fit_sklearn(LogisticRegression(C=1e6, solver="liblinear", tol=1e-8))
    else:
        found = {
            f"sklearn {name}": fit_sklearn(PoissonRegressor(alpha=0, solver=name, tol=1e-8, max_iter=1000))
            for name in ("newton-cholesky", "lbfgs")
        }
    if importlib.util.find_spec("glum"):
        found["glum"] = fit_glum({"squared": "normal", "logistic": "binomial"}.get(loss, loss))
    if loss != "squared" and num_inputs < 100:
        found["statsmodels GLM"] = fit_statsmodels(
            {"logistic": sm.families.Binomial()}.get(loss, sm.families.Poisson())
        )
    return found


def best(program: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray, rounds: int):
    """Returns (seconds of the best round, coefficients)."""
    seconds = np.inf
    for _ in range(rounds):
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            w = program(x, y)
        seconds = min(seconds, time.perf_counter() - began)
        if seconds > _SLOWEST:
            break
    return seconds, w


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES)
    parser.add_argument("--size", help="such as 60000x54")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [tuple(map(int, arguments.size.split("x")))] if arguments.size else SIZES
    for loss in [arguments.loss] if arguments.loss else LOSSES:
        for num_rows, num_inputs in sizes:
            if loss != "squared" and num_inputs > 1000:
                continue
            x, y = rows(loss, num_rows, num_inputs)
            own, w = best(fit_dpreg(loss), x, y, arguments.rounds)
            print(f"\n{loss}, {num_rows:,} x {num_inputs}: dpreg {own:.3f} s", flush=True)
            x, y = x.astype(np.float64), y.astype(np.float64)
            for name, program in programs(loss, num_inputs).items():
                seconds, theirs = best(program, x, y, arguments.rounds)
                apart = np.abs(theirs - w).max() / np.abs(w).max()
                print(
                    f"  {name:<28} {seconds:8.3f} s {seconds / own:7.2f}x   coefficients {apart:.0e} apart", flush=True
                )
