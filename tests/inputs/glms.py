"""Small generalised linear models: dpreg finds the optimum of each, or refuses it because there is none."""

from unittest import mock

import jax
import numpy as np
import scipy
from jax.sharding import Mesh

import dpreg
from dpreg.config import Config
from dpreg.solvers import irls
from dpreg.solvers.glm import family_of
from dpreg.solvers.solver import Solver

from .refusal import check_line

# Of each loss: the first and the second derivative of what a row of target y adds at the prediction z.
LOSSES = {
    "logistic": (
        lambda z, y: scipy.special.expit(z) - y,
        lambda z, y: scipy.special.expit(z) * scipy.special.expit(-z),
    ),
    "poisson": (lambda z, y: np.exp(z) - y, lambda z, y: np.exp(z)),
    "gamma": (lambda z, y: 1 - y * np.exp(-z), lambda z, y: y * np.exp(-z)),
    "tweedie": (
        lambda z, y: np.exp(z / 2) - y * np.exp(-z / 2),
        lambda z, y: np.exp(z / 2) / 2 + y * np.exp(-z / 2) / 2,
    ),
    "negative_binomial": (
        lambda z, y: (np.exp(z) - y) / (1 + np.exp(z) / 2),
        lambda z, y: np.exp(z) * (1 + y / 2) / (1 + np.exp(z) / 2) ** 2,
    ),
}


def run(rng, folder):
    loss, intercept = str(rng.choice([*LOSSES])), bool(rng.random() < 0.8)
    dtype = rng.choice([np.float32, np.float64])
    x, y, weight, offset = (None if values is None else values.astype(dtype) for values in draw(rng, loss, dtype))
    l2 = float(rng.choice([0.0, 0.0, 1e-3, 1.0]))
    columns = [x] if offset is None else [x, offset[:, None]]
    source = dpreg.ArraySource(np.concatenate(columns, axis=1), y, weight, dtype=dtype)
    x, y, weight = (values.astype(np.float64) for values in (x, y, weight))
    family = family_of(
        Config(loss=loss, tweedie_power=1.5, negative_binomial_alpha=0.5 if loss == "negative_binomial" else None)
    )

    def solve(devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        solver = Solver(source, mesh, 8, offset=None if offset is None else x.shape[1])
        return solver.newton(family, l2, intercept)[0]

    with mock.patch.object(irls, "WIDE", int(rng.choice([2, 256]))):  # so that few features are many, at times
        fit, error = attempt(solve, 1)
        other, again = attempt(solve, min(3, jax.device_count()))
    assert (error is None) != has_no_optimum(loss, x, y, weight, l2, intercept), error or "there is no optimum"
    assert str(error) == str(again)
    if error is not None:
        check_line(str(error))
        return "refused"
    assert (fit.w.tobytes(), fit.b.tobytes()) == (other.w.tobytes(), other.b.tobytes())
    a, theta = np.column_stack([np.ones(len(x)), x]), np.append(fit.b, fit.w)
    if not intercept:
        a, theta = a[:, 1:], theta[1:]
    counted = weight > 0
    slope, curvature = LOSSES[loss]
    z = (a @ theta + (0 if offset is None else offset))[counted]
    penalty = np.full(len(theta), l2 * weight.sum())
    penalty[: int(intercept)] = 0
    root = np.sqrt(weight[counted] * curvature(z, y[counted]))
    gradient = a[counted].T @ (weight[counted] * slope(z, y[counted])) + penalty * theta
    # Another of Newton's steps, from a decomposition, changes no prediction.
    scale = np.sqrt(np.square(a).sum(axis=0) + penalty) + 1e-300
    root_of_hessian = np.concatenate([root[:, None] * a[counted], np.diag(np.sqrt(penalty))]) / scale
    left, sizes, _ = np.linalg.svd(root_of_hessian.T, full_matrices=False)
    kept = sizes > 1e-9 * sizes.max()
    decrement = np.square((left[:, kept].T @ (gradient / scale)) / sizes[kept]).sum() / weight.sum()
    assert decrement < 1e-12, f"one more step has a decrement of {decrement:.1e}"
    return "correct"


def attempt(solve, devices):
    """Returns (what `solve` returns, the error that it raises); one of them is None."""
    try:
        return solve(devices), None
    except dpreg.InputError as error:
        return None, error


def draw(rng, loss, dtype):
    """Returns x [n, d], y [n], weight [n] and an offset [n] or None."""
    n, d = int(rng.integers(4, 300)), int(rng.integers(1, 9))
    if rng.random() < 0.3:  # enough rows for a sample
        n, d = int(rng.integers(1500, 4000)), int(rng.integers(1, 4))
    x = rng.normal(size=(n, d)) * rng.choice([0.1, 1.0, 2.0], d) + rng.choice([0.0, 0.0, 1.0, 30.0], d)
    if dtype == np.float32:  # in which combinations of columns are combinations, too
        x = np.round(x * 64) / 64
    for column in range(d):
        kind = rng.random()
        if kind < 0.25:
            x[:, column] = rng.random(n) < rng.choice([0.02, 0.1, 0.5])
        elif kind < 0.3:
            x[:, column] = rng.choice([0.0, 3.0])
        elif kind < 0.35:
            x[:, column] = x @ rng.integers(-1, 2, d)
    offset = rng.normal(0, 0.5, n) if rng.random() < 0.25 else None
    spread = x.std(axis=0) + (x.std(axis=0) == 0)
    z = (x - x.mean(axis=0)) / spread @ rng.normal(0, rng.choice([0.2, 1.0, 2.0]), d) / np.sqrt(d) + rng.normal(0, 1)
    z = np.clip(z + (0 if offset is None else offset), -6, 6)
    if loss == "logistic":
        y = rng.random(n) < scipy.special.expit(z)
    else:
        counts = loss in ("poisson", "negative_binomial")
        y = rng.poisson(np.exp(z)) if counts else rng.gamma(2.0, np.exp(z) / 2) + 1e-6
    if loss == "tweedie":
        y = np.where(rng.random(n) < 0.3, 0, y)
    if loss != "gamma" and rng.random() < 0.1:  # Where a feature is 0 or 1, this leaves no optimum.
        y = np.where(x[:, 0] > np.quantile(x[:, 0], 0.9), 0, y)
    if rng.random() < 0.1:
        x, y = (values[np.lexsort([y, x[:, 0]])] for values in (x, y))
    weight = rng.integers(0, 3, n) if rng.random() < 0.3 else np.ones(n)
    weight[rng.integers(n)] = 1
    return x, y.astype(np.float64), weight.astype(np.float64), offset


def has_no_optimum(loss, x, y, weight, l2, intercept):
    """Whether the loss decreases without end in some direction of the parameters (Albert and Anderson 1984)."""
    x, y = x[weight > 0], y[weight > 0]
    a = np.column_stack([np.ones(len(x)), x])[:, 0 if intercept else 1 : 1 if l2 else None]
    a = a / (np.abs(a).max(axis=0, initial=0) + 1e-300)
    if loss == "gamma":
        return False
    signed, fixed = (a * (2 * y - 1)[:, None], a[:0]) if loss == "logistic" else (-a[y == 0], a[y > 0])
    if not signed.size:
        return False
    found = scipy.optimize.linprog(
        -signed.sum(axis=0), -signed, np.zeros(len(signed)), fixed, np.zeros(len(fixed)), bounds=(-1, 1)
    )
    return bool(found.status == 0 and found.fun < -1e-7)
