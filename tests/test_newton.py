"""Fits of generalised linear models that begin with a sample of the rows, or with scores alone, find the optimum."""

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import Mesh

import dpreg
from dpreg.config import Columns
from dpreg.solvers import irls
from dpreg.solvers.glm import FAMILIES, family_of
from dpreg.solvers.solver import Config, Solver
from dpreg.tables.levels import BaseLevels

# Of each loss: the mean, its derivative and the variance at a prediction z, and a target with that mean.
MODELS = {
    "logistic": (
        lambda z: 1 / (1 + np.exp(-z)),
        lambda z: np.exp(-z) / (1 + np.exp(-z)) ** 2,
        lambda m: m * (1 - m),
        lambda rng, m: rng.random(len(m)) < m,
    ),
    "poisson": (np.exp, np.exp, lambda m: m, lambda rng, m: rng.poisson(m)),
    "gamma": (np.exp, np.exp, np.square, lambda rng, m: rng.gamma(2.0, m / 2)),
}


def reference(loss, x, y, weight, offset=0.0, l2=0.0, intercept=True):
    """Returns (b and w [1 + d], standard errors but for the dispersion), by Fisher's scoring with a dense matrix."""
    mean, slope, variance, _ = MODELS[loss]
    a = np.column_stack([np.ones(len(x)), x])[:, 0 if intercept else 1 :].astype(np.float64)
    penalty = np.diag(np.r_[0.0, np.full(x.shape[1], l2)][0 if intercept else 1 :]) * weight.sum()
    theta = np.zeros(a.shape[1])
    for _ in range(200):
        z = a @ theta + offset
        m, s = mean(z), slope(z)
        score = a.T @ (weight * (y - m) * s / variance(m)) - penalty @ theta
        information = (a * (weight * s**2 / variance(m))[:, None]).T @ a + penalty
        step = np.linalg.solve(information, score)
        theta += step / max(1, np.abs(a @ step).max() / 3)
        if np.abs(step).max() < 1e-12:
            break
    theta, errors = (
        np.insert(v, 0, 0.0)[-1 - x.shape[1] :] for v in (theta, np.sqrt(np.diag(np.linalg.inv(information))))
    )
    return theta, errors


class Counted(dpreg.ArraySource):
    """Rows that count how many of them were read."""

    def __init__(self, *arrays, **settings):
        super().__init__(*arrays, **settings)
        object.__setattr__(self, "reads", [0])

    def view(self, rows):
        self.reads[0] += rows.stop - rows.start
        return super().view(rows)


def draw(loss, n, d, seed=0):
    """Returns (x, y, weight, offset) of a model of that loss, float64."""
    rng = np.random.default_rng(seed)
    x, offset = rng.standard_normal((n, d)) * np.linspace(0.5, 2, d) + np.linspace(-1, 3, d), rng.normal(0, 0.3, n)
    w = rng.standard_normal(d) / np.sqrt(d) / 3
    y = MODELS[loss][3](rng, MODELS[loss][0]((x - x.mean(axis=0)) @ w + offset + 0.2)).astype(np.float64)
    return x, np.maximum(y, 1e-9) if loss == "gamma" else y, rng.integers(0, 4, n).astype(np.float64), offset


def fits(source, solve, counts=(1, 2, 3, 8), **settings):
    """Returns what `solve` returns on one device; on other numbers of devices it has the same bits."""
    found = [
        solve(Solver(source, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8, **settings)) for devices in counts
    ]
    assert len({(fit.w.tobytes(), fit.b.tobytes(), str(fit.log_likelihood)) for fit, _ in found}) == 1
    return found[0]


def compare(fit, theta, errors, rtol=1e-9):
    """Compares a fit with the results of `reference`."""
    np.testing.assert_allclose(np.append(fit.b, fit.w), theta, rtol=rtol, atol=rtol)
    own = np.append(*fit.standard_errors[::-1]) if fit.intercept else np.append(0.0, fit.standard_errors[0])
    np.testing.assert_allclose(own / fit.residual_deviation, errors, rtol=1e-6)


@pytest.fixture
def sums_of_products(monkeypatch):
    """The number of features at each of Newton's steps on all rows, which take sums of products."""
    evaluate, calls = irls.GeneralizedLinearModels._evaluate, []

    def counted(self, objective, theta, observed=True):
        if self._every == 1:
            calls.append(self._inputs)
        return evaluate(self, objective, theta, observed)

    monkeypatch.setattr(irls.GeneralizedLinearModels, "_evaluate", counted)
    return calls


@pytest.mark.parametrize("loss", MODELS)
def test_many_rows_are_fitted_with_one_sum_of_products(loss, sums_of_products):
    """A sample of the rows, and sums of scores, lead so near the optimum that one of Newton's steps is enough."""
    x, y, weight, offset = draw(loss, 70_003, 3)
    source = Counted(np.column_stack([x, offset]), y, weight, dtype=np.float64)
    fit, mean = fits(source, lambda solver: solver.newton(FAMILIES[loss]), offset=3)
    compare(fit, *reference(loss, x, y, weight, offset))
    assert mean == pytest.approx(fit.deviance / 2 / weight.sum(), rel=1e-12)
    expected = 2 if loss == "gamma" else 1  # For the expected information, where this is not that observed.
    assert sums_of_products.count(3) == 4 * expected  # of four fits
    plain = Counted(x, y, weight, dtype=np.float64)
    fits(plain, lambda solver: solver.newton(FAMILIES[loss]), counts=(1,))
    # Six sums of scores, the products and the log-likelihood; and a sixteenth for each step on the sample.
    assert plain.reads[0] <= (7 + expected + 12 / 16) * len(x)


@pytest.mark.parametrize("order", ["sorted", "without weights", "without events"])
def test_a_sample_that_is_not_like_all_rows_changes_no_result(order):
    x, y, weight, _ = draw("poisson", 40_000, 2, seed=1)
    x = np.column_stack([x, np.arange(len(x)) % 7 == 0]).astype(np.float64)
    sampled = np.arange(len(x)) % 5_000 < 313  # the first sixteenth of each of eight shards
    if order == "sorted":
        x, y, weight = (column[np.lexsort([x[:, 0], y])] for column in (x, y, weight))
    elif order == "without weights":
        weight[sampled] = 0
    else:
        y[sampled] = 0
    fit, _ = fits(dpreg.ArraySource(x, y, weight, dtype=np.float64), lambda solver: solver.newton(FAMILIES["poisson"]))
    compare(fit, *reference("poisson", x, y, weight))


def test_a_sample_without_events_of_a_level_changes_no_result(tmp_path):
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"kind": rng.choice(list("abc"), 40_000, p=[0.6, 0.35, 0.05]), "x": rng.normal(size=40_000)})
    frame["y"] = rng.poisson(np.exp(0.3 * frame["x"] - 1.0 * (frame["kind"] == "c")))
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    columns = Columns(target=("y",), categorical=("kind",), validation_fraction=0.0, standardize=False)
    data = dpreg.read_table(str(tmp_path / "t.parquet"), columns, cache_dir=str(tmp_path), dtype=np.float64)
    rows = data.train[np.arange(40_000)]
    at = data.schema.features.index("kind=c")
    sampled = np.arange(40_000) % 5_000 < 313
    y = np.where(sampled & (rows["x"][:, at] == 1), 0, rows["y"][:, 0])
    source = dpreg.ArraySource(rows["x"], y, dtype=np.float64)
    fit, _ = fits(source, lambda solver: solver.newton(FAMILIES["poisson"]), levels=BaseLevels.named(data.schema, ()))
    kept = list(fit.kept)
    theta, errors = reference("poisson", rows["x"][:, kept], y, np.ones(40_000))
    np.testing.assert_allclose(np.append(fit.b, fit.w[kept]), theta, rtol=1e-9)
    np.testing.assert_allclose(fit.standard_errors[0][kept, 0], errors[1:], rtol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("loss", "l2"), [(loss, l2) for loss in MODELS for l2 in (0.0, 0.01)])
def test_wide_models_take_one_sum_of_products(loss, l2, intercept, sums_of_products):
    """Where features are centred; and one more where the expected information is not that observed."""
    x, y, weight, offset = draw(loss, 2_003, 257, seed=3)
    source = dpreg.ArraySource(np.column_stack([x, offset]), y, weight, dtype=np.float64)
    fit, _ = fits(source, lambda s: s.newton(FAMILIES[loss], l2, intercept), counts=(1, 3, 8), offset=257)
    theta, errors = reference(loss, x, y, weight, offset, l2, intercept)
    np.testing.assert_allclose(np.append(fit.b, fit.w), theta, rtol=1e-7, atol=1e-9)
    if not l2:
        compare(fit, theta, errors, rtol=1e-7)
    if intercept:
        assert sums_of_products.count(257) == (6 if loss == "gamma" else 3)  # of three fits


@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("loss", MODELS)
def test_wide_rows_in_float32_are_fitted_to_the_digits_of_float64(loss, mean):
    """Whether the first products are of float32, or would lose digits in it."""
    x, y, weight, _ = draw(loss, 2_003, 257, seed=7)
    x, y, weight = (np.float32(values) for values in (x + mean, y, weight))
    fit, _ = fits(dpreg.ArraySource(x, y, weight), lambda solver: solver.newton(FAMILIES[loss]))
    x, y, weight = (values.astype(np.float64) for values in (x, y, weight))
    theta, errors = reference(loss, x - mean, y, weight)
    np.testing.assert_allclose(fit.w[:, 0], theta[1:], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(fit.b + mean * fit.w.sum(), theta[:1], rtol=1e-7, atol=1e-7)
    deviation = np.sqrt(fit.dispersion)
    np.testing.assert_allclose(fit.standard_errors[0][:, 0], errors[1:] * deviation, rtol=1e-6)


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_a_wide_model_whose_weight_has_no_best_value_is_refused(loss):
    """All targets are alike where one feature is 1: its weight would stop to grow by rounding alone."""
    x, y, weight, _ = draw(loss, 1_500, 260, seed=9)
    x[:, 3] = np.arange(1_500) % 50 == 0
    y[x[:, 3] == 1] = loss == "logistic"
    source = dpreg.ArraySource(x, y, weight + 0.1)
    with pytest.raises(dpreg.InputError, match="no optimum"):
        Solver(source, Mesh(np.array(jax.devices()[:1]), ("data",)), 8).newton(FAMILIES[loss])


def test_wide_features_that_are_constant_or_combinations_get_no_weight():
    x, y, weight, _ = draw("logistic", 3_000, 260, seed=4)
    x[:, 5], x[:, 6], x[:, 7] = 3.0, x[:, 0] - x[:, 1], 0.0
    fit, _ = fits(dpreg.ArraySource(x, y, weight, dtype=np.float64), lambda solver: solver.newton(FAMILIES["logistic"]))
    kept = list(fit.kept)
    assert len(kept) == 257
    theta, _ = reference("logistic", x[:, kept], y, weight)
    np.testing.assert_allclose(np.append(fit.b, fit.w[kept]), theta, rtol=1e-7, atol=1e-9)


def test_wide_base_levels_get_no_weight(tmp_path):
    rng = np.random.default_rng(5)
    levels = np.array([f"k{number:03}" for number in range(300)])
    frame = pd.DataFrame({"kind": np.concatenate([levels, rng.choice(levels, 5_700)]), "x": rng.normal(size=6_000)})
    frame["y"] = rng.poisson(np.exp(0.3 * frame["x"] + frame["kind"].str[1:].astype(int) % 5 / 3))
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    columns = Columns(
        target=("y",), categorical=("kind",), max_categories=400, validation_fraction=0.0, standardize=False
    )
    data = dpreg.read_table(str(tmp_path / "t.parquet"), columns, cache_dir=str(tmp_path), dtype=np.float64)
    fit, _ = fits(
        data.train,
        lambda solver: solver.newton(FAMILIES["poisson"]),
        counts=(1, 3),
        levels=BaseLevels.named(data.schema, ()),
    )
    rows, kept = data.train[np.arange(6_000)], list(fit.kept)
    assert len(kept) == 300  # 299 contrasts and x
    theta, _ = reference("poisson", rows["x"][:, kept], rows["y"][:, 0], np.ones(6_000))
    np.testing.assert_allclose(np.append(fit.b, fit.w[kept]), theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("inputs", [3, 300])
def test_a_model_without_a_row_that_counts_is_refused(inputs):
    x = np.ones((40_000 if inputs == 3 else 400, inputs))
    solver = Solver(dpreg.ArraySource(x, x[:, 0], 0 * x[:, 0]), Mesh(np.array(jax.devices()[:1]), ("data",)), 8)
    with pytest.raises(dpreg.InputError, match="no row with a weight"):
        solver.newton(FAMILIES["poisson"])


@pytest.mark.parametrize(("inputs", "products"), [(300, 0), (3, 15)])
def test_classes_that_a_plane_separates_are_refused_at_once(inputs, products, sums_of_products):
    x, _, weight, _ = draw("logistic", 1_000, inputs, seed=6)
    solver = Solver(dpreg.ArraySource(x, x[:, 0] > 0, weight + 1), Mesh(np.array(jax.devices()[:1]), ("data",)), 8)
    with pytest.raises(dpreg.InputError, match="the features separate the targets"):
        solver.newton(FAMILIES["logistic"])
    assert solver.passes < 60
    assert len(sums_of_products) <= products


def test_an_offset_separates_no_classes():
    """Predictions that are right because of the offset alone prove nothing: the weights have an optimum."""
    rng = np.random.default_rng(8)
    x, y = rng.standard_normal((400, 2)), rng.random(400) < 0.5
    offset = 3.0 * (2 * y - 1)
    source = dpreg.ArraySource(np.column_stack([x, offset]), y, dtype=np.float64)
    fit, _ = fits(source, lambda solver: solver.newton(FAMILIES["logistic"]), offset=2)
    compare(fit, *reference("logistic", x, y, np.ones(400), offset))


@pytest.mark.parametrize("loss", ["tweedie", "negative_binomial"])
def test_the_other_families_of_many_rows(loss, monkeypatch):
    x, y, weight, _ = draw("poisson", 70_003, 3, seed=7)
    config = Config(loss=loss, negative_binomial_alpha=0.3 if loss == "negative_binomial" else None)
    variance = {
        "tweedie": lambda m: m**config.tweedie_power,
        "negative_binomial": lambda m: m + 0.3 * m**2,
    }[loss]
    monkeypatch.setitem(MODELS, loss, (np.exp, np.exp, variance, None))
    expected = reference(loss, x, y, weight)
    fit, _ = fits(
        dpreg.ArraySource(x, y, weight, dtype=np.float64), lambda s: s.newton(family_of(config)), counts=(1, 8)
    )
    compare(fit, *expected, rtol=1e-8)


def test_families_whose_expected_information_misleads_are_fitted():
    """Steps of Fisher's scoring would shrink so slowly here that 30 of them do not reach the optimum."""
    rng = np.random.default_rng(9)
    x = rng.standard_normal((900, 2))
    y = np.where(rng.random(900) < 0.02, 400.0, 0.0) * (x[:, 0] > 0.5)
    family = family_of(Config(loss="negative_binomial", negative_binomial_alpha=0.5))
    fit, _ = fits(dpreg.ArraySource(x, y, dtype=np.float64), lambda solver: solver.newton(family, l2=0.01))
    mean = np.exp(x @ fit.w[:, 0] + fit.b[0])
    slope = (y - mean) / (1 + 0.5 * mean)
    np.testing.assert_allclose([slope.mean(), *(x.T @ slope / 900 - 0.01 * fit.w[:, 0])], 0, atol=1e-9)
