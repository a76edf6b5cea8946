"""The exact solver agrees with certified values and statsmodels; devices and processes do not change its bits."""

import functools
import json
import pathlib

import jax
import numpy as np
import pandas as pd
import pytest
import scipy
import statsmodels.api as sm
from cluster import alone, outcome, several
from jax.sharding import Mesh
from models import Rows
from sklearn.linear_model import LogisticRegression, Ridge

import dpreg
from dpreg.config import Columns, Config
from dpreg.distributed import processes
from dpreg.models.losses import make_loss
from dpreg.sklearn import DataParallelRegressor
from dpreg.solvers import blas, gram, robust, tiles, tsqr
from dpreg.solvers.glm import FAMILIES
from dpreg.solvers.inference import summarize_fit
from dpreg.solvers.solver import Solver
from dpreg.solvers.tsqr import RFactor

DIAMONDS = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "diamonds.parquet"


def digits(found, certified):
    """Returns the log relative error of the worst value, the measure of NIST's StRD."""
    found, certified = np.ravel(found), np.ravel(certified)
    return -np.log10(np.maximum(np.abs(found - certified) / np.abs(certified), 1e-16).max())


NIST = json.loads((pathlib.Path(__file__).parent / "nist.json").read_text())


@pytest.mark.parametrize("name", [name for name in NIST if name != "source"])
def test_least_squares_reaches_the_certified_digits_of_nist(name, tmp_path):
    """Fits each data set in float64 on 1, 3 and 8 devices; no set may have fewer correct digits than NumPy reaches."""
    given = NIST[name]
    x, y = np.array(given["x"]), np.array(given["y"])
    x = x ** np.arange(1, given["degree"] + 1) if given["degree"] > 1 else x
    pd.DataFrame({**{f"x{j}": column for j, column in enumerate(x.T)}, "y": y}).to_csv(tmp_path / "t.csv", index=False)
    columns = Columns(target=("y",), validation_fraction=0.0, standardize=False)
    data = dpreg.read_table(str(tmp_path / "t.csv"), columns, cache_dir=str(tmp_path), dtype=np.float64)
    fits = [
        Solver(data.train, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8).least_squares(
            intercept=given["intercept"], refine=True
        )
        for devices in (1, 3, 8)
    ]
    assert len({(fit.w.tobytes(), fit.b.tobytes()) for fit in fits}) == 1
    fit, intercept = fits[0], slice(0 if given["intercept"] else 1, None)
    found, errors = ([b[0], *w[:, 0]][intercept] for w, b in ((fit.w, fit.b), fit.standard_errors))
    theirs = np.linalg.lstsq(np.column_stack([np.ones(len(x)), x])[:, intercept], y, rcond=None)[0]
    least = {"Filip": 7, "Wampler3": 10, "Wampler4": 7, "Wampler5": 6}.get(name, 13)
    assert digits(found, given["certified"]) >= max(least, min(digits(theirs, given["certified"]), 13))
    if any(given["standard_deviation"]):  # y is not an exact polynomial.
        assert digits(errors, given["standard_deviation"]) > min(least, 12)


def test_the_command_line_fits_longley_to_the_certified_values(tmp_path):
    given = NIST["Longley"]
    x = np.array(given["x"])
    pd.DataFrame({**{f"x{j}": c for j, c in enumerate(x.T)}, "y": given["y"]}).to_csv(tmp_path / "t.csv", index=False)
    done = alone(
        tmp_path / "run",
        devices=2,
        work=(
            "--platform=cpu",
            f"--dataset={tmp_path}/t.csv",
            f"--cache_dir={tmp_path}",
            "--target=y",
            "--validation_fraction=0",
            "--precision=float64",
            "--solver=exact",
        ),
    )
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    parameters, errors = found["parameters"], found["optimality"]["standard_errors"]
    assert digits([parameters["b"], *parameters["w"].values()], given["certified"]) > 8
    assert digits([errors["b"], *errors["w"].values()], given["standard_deviation"]) > 8
    assert found["optimality"]["gap"] == pytest.approx(0, abs=1e-12)
    assert "-3.48226e+06" in done.stdout


def test_processes_synchronize_before_they_exchange_partial_results(monkeypatch):
    """A process that finishes its rows long before the others must keep sending heartbeats."""
    met = []
    monkeypatch.setattr(processes, "allgather_text", lambda heartbeat: met.append(heartbeat))

    def alive():
        pass

    source, mesh = dpreg.ArraySource(np.eye(3), np.ones(3)), Mesh(np.array(jax.devices()[:1]), ("data",))
    solver = Solver(source, mesh, 8, alive)
    solver.least_squares()
    assert met == [alive] * solver.passes
    assert met


@pytest.mark.parametrize("cuts", [(), (5,), range(1, 16)])
def test_combined_parts_of_longley_give_the_certified_values(cuts):
    given = NIST["Longley"]
    x, y = np.array(given["x"]), np.array(given["y"])[:, None]
    blocks = zip(np.split(x, list(cuts)), np.split(y, list(cuts)), strict=True)
    triangles = [RFactor.of(x, y, np.ones(len(x))) for x, y in blocks]
    fit = sum(triangles[1:], triangles[0]).solve()
    assert digits([fit.b[0], *fit.w[:, 0]], given["certified"]) > 10
    assert digits(fit.residual_deviation, 304.854073561965) > 10
    assert digits(fit.r2, 0.995479004577296) > 12


@pytest.mark.parametrize("loss", ["logistic", "poisson", "gamma"])
@pytest.mark.parametrize("intercept", [True, False])
def test_newton_finds_the_optimum_and_standard_errors_of_statsmodels(loss, intercept):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3001, 3)) * [1, 30, 0.1] + [0, 100 * intercept, 0]
    z = x @ [0.5, 0.02, -3] - 2 * intercept
    y = {
        "logistic": rng.random(3001) < 1 / (1 + np.exp(-z)),
        "poisson": rng.poisson(np.exp(z)),
        "gamma": rng.gamma(2, np.exp(z) / 2),
    }[loss]
    # More rows make the estimate of the dispersion more precise.
    weight = rng.integers(0, 2 if loss == "gamma" else 3, 3001)
    source = dpreg.ArraySource(x, y, weight, np.float64)
    fits = [
        Solver(source, Mesh(np.array(jax.devices()[:d]), ("data",)), 8).newton(FAMILIES[loss], intercept=intercept)
        for d in (1, 8)
    ]
    (fit, mean), (other, _) = fits
    assert (fit.w.tobytes(), fit.b.tobytes()) == (other.w.tobytes(), other.b.tobytes())
    repeated = np.repeat(np.arange(3001), weight)  # Integer weights are equivalent to repeated rows.
    design = sm.add_constant(x[repeated]) if intercept else x[repeated]
    family = {
        "logistic": sm.families.Binomial(),
        "poisson": sm.families.Poisson(),
        "gamma": sm.families.Gamma(sm.families.links.Log()),
    }[loss]
    theirs = sm.GLM(y[repeated].astype(float), design, family=family).fit(tol=1e-14)
    first = 1 - intercept
    np.testing.assert_allclose([fit.b[0], *fit.w[:, 0]][first:], theirs.params, rtol=1e-8)
    errors, error = fit.standard_errors
    np.testing.assert_allclose([error[0], *errors[:, 0]][first:], theirs.bse, rtol=1e-6)
    assert 2 * mean == pytest.approx(theirs.deviance / weight.sum(), rel=1e-9)
    p_values = theirs.pvalues if loss != "gamma" else 2 * scipy.stats.t.sf(abs(theirs.tvalues), theirs.df_resid)
    for line, row, z, p in zip(
        str(summarize_fit(fit, "abc")).splitlines()[1:-1],
        summarize_fit(fit, "abc").coefficients,
        theirs.tvalues,
        p_values,
        strict=True,
    ):
        assert [float(v) for v in line.split()[3:5]] == pytest.approx([z, p], rel=0.006, abs=1e-300)
        assert (row.statistic, row.p) == pytest.approx((z, p), rel=1e-5, abs=1e-300)
    if loss != "gamma":  # Here statsmodels takes the dispersion as known.
        np.testing.assert_allclose(summarize_fit(fit, "abc").conf_int(), theirs.conf_int(), rtol=1e-6)
    found = summarize_fit(fit, "abc")
    assert found.deviance == pytest.approx(theirs.deviance, rel=1e-9)
    assert found.log_likelihood == pytest.approx(theirs.llf, rel=1e-8)
    assert (found.null_deviance is None) == (not intercept)
    if intercept:
        assert found.null_deviance == pytest.approx(theirs.null_deviance, rel=1e-8)
    assert found.dispersion == pytest.approx(theirs.scale, rel=1e-6)
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), rtol=1e-6, atol=1e-12 * found.covariance.max())
    if loss == "gamma":  # The weights are 0 and 1.
        assert (found.aic, found.bic) == pytest.approx((theirs.aic, theirs.bic_llf), rel=1e-8)


@pytest.mark.parametrize("mean", [1e3, 1e6, 1e9])
def test_newton_fits_large_counts(mean):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(500, 2))
        y = rng.poisson(mean * np.exp(0.1 * x[:, 0]))
        source = dpreg.ArraySource(x, y, dtype=np.float64)
        fit, loss = Solver(source, Mesh(np.array(jax.devices()[:1]), ("data",)), 8).newton(FAMILIES["poisson"])
        theirs = sm.GLM(y, sm.add_constant(x), family=sm.families.Poisson()).fit()
        np.testing.assert_allclose([fit.b[0], *fit.w[:, 0]], theirs.params, rtol=1e-6, atol=1e-9)
        m = y * np.exp(-(fit.b[0] + x @ fit.w[:, 0]))  # The loss by y/mean, without subtracting large numbers.
        own = np.exp(fit.b[0] + x @ fit.w[:, 0]) * (m * np.log(m) - m + 1)
        assert loss == pytest.approx(own.mean(), rel=1e-4)
        assert (
            float(make_loss("poisson").rows(np.log(y[:, None] + 0.0).astype(np.float32), np.float32(y[:, None])).max())
            < 1
        )


def test_newton_ignores_rows_of_weight_zero():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=200), rng.poisson(2.0, 200)
    found = [
        Solver(dpreg.ArraySource(*rows, dtype=np.float64), Mesh(np.array(jax.devices()[:2]), ("data",)), 8).newton(
            FAMILIES["poisson"]
        )
        for rows in ((x, y), (np.r_[x, 1e4], np.r_[y, 1], np.r_[np.ones(200), 0]))
    ]
    np.testing.assert_allclose(found[0][0].w, found[1][0].w, rtol=1e-9)


def test_without_degrees_of_freedom_there_is_no_significance():
    fit = RFactor.of(np.array([[1.0], [2.0]]), np.array([[2.0], [4.5]]), np.ones(2)).solve()
    assert all(np.isnan(part).all() for part in (*fit.standard_errors, *fit.p_values))
    assert "not used" not in str(summarize_fit(fit, ["x"]))
    assert "0 degrees of freedom" in str(summarize_fit(fit, ["x"]))


def test_newton_reports_that_no_optimum_exists():
    x = np.linspace(-1, 1, 50)
    solver = Solver(dpreg.ArraySource(x, x > 0), Mesh(np.array(jax.devices()[:1]), ("data",)), 8)
    with pytest.raises(dpreg.InputError, match=r"no optimum: the features separate.*l2"):
        solver.newton(FAMILIES["logistic"])
    # Only one of the two groups has a class that is certain.
    partly = (
        np.repeat([0.0, 0, 1], 20),
        np.repeat([0.0, 1, 1], 20),
    )
    with pytest.raises(dpreg.InputError, match="no optimum"):
        Solver(dpreg.ArraySource(*partly), Mesh(np.array(jax.devices()[:1]), ("data",)), 8).newton(FAMILIES["logistic"])
    with pytest.raises(dpreg.InputError, match=r"no optimum within 28 steps.*l2"):
        solver.softmax(2, l2=0)
    fit, _ = solver.newton(FAMILIES["logistic"], l2=0.01)
    two_classes = solver.softmax(
        2, l2=0.02
    ).w  # Softmax splits the weight in two of opposite sign, each with half of the penalty.
    assert two_classes[0, 1] - two_classes[0, 0] == pytest.approx(fit.w[0, 0], rel=1e-9)
    theirs = LogisticRegression(C=1 / (0.01 * 50), tol=1e-10).fit(x[:, None], x > 0)
    assert fit.w[0, 0] == pytest.approx(theirs.coef_[0, 0], rel=1e-6)
    far = Solver(dpreg.ArraySource(x, np.exp(40 * x)), Mesh(np.array(jax.devices()[:1]), ("data",)), 8)
    # Newton's method must recover from steps that overshoot.
    assert far.newton(FAMILIES["poisson"])[0].w[0, 0] == pytest.approx(40, rel=1e-4)


def diamonds():
    frame = pd.read_parquet(DIAMONDS)
    kinds = pd.get_dummies(frame[["cut", "color", "clarity"]], drop_first=True).to_numpy(np.float64)
    x = np.column_stack([frame[["carat", "depth", "table", "x", "y", "z"]].to_numpy(np.float64), kinds])
    return x, frame["price"].to_numpy(np.float64)


@pytest.mark.skipif(not DIAMONDS.exists(), reason="the table of diamonds is not here")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_of_diamonds_agrees_with_statsmodels(weighted):
    x, y = diamonds()
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else np.ones(len(y))
    theirs = sm.WLS(y, sm.add_constant(x), weight).fit()
    source = dpreg.ArraySource(x, y, weight, np.float64)
    fits = [Solver(source, Mesh(np.array(jax.devices()[:d]), ("data",)), 8).least_squares(refine=True) for d in (1, 8)]
    assert len({(fit.w.tobytes(), fit.b.tobytes()) for fit in fits}) == 1
    fit = fits[0]
    for (w, b), wanted in (
        ((fit.w, fit.b), theirs.params),
        (fit.standard_errors, theirs.bse),
        (fit.p_values, theirs.pvalues),
    ):
        np.testing.assert_allclose([b[0], *w[:, 0]], wanted, rtol=1e-6, atol=1e-300)
    assert fit.r2[0] == pytest.approx(theirs.rsquared, rel=1e-9)
    found = summarize_fit(fit, [f"x{j}" for j in range(x.shape[1])])
    for name, wanted in (
        ("r2", theirs.rsquared),
        ("adjusted_r2", theirs.rsquared_adj),
        ("dispersion", theirs.scale),
        ("deviance", theirs.ssr),
        ("null_deviance", theirs.centered_tss),
        *((("log_likelihood", theirs.llf), ("aic", theirs.aic), ("bic", theirs.bic)) if not weighted else ()),
    ):
        assert getattr(found, name) == pytest.approx(wanted, rel=1e-8), name
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), rtol=1e-6, atol=1e-9 * found.covariance.max())
    np.testing.assert_allclose(found.conf_int(), theirs.conf_int(), rtol=1e-6)
    lines = str(summarize_fit(fit, [f"x{j}" for j in range(x.shape[1])])).splitlines()
    for line, p in zip(lines[1:-1], theirs.pvalues, strict=True):
        assert float(line.split()[4]) == pytest.approx(p, rel=0.006, abs=1e-300)


def products(x, y, weight):
    """Returns the sums of products of rows."""
    columns = gram.columns_of(x, y.shape[1])
    columns[:, 1 + x.shape[1] :] = y
    return gram.products(columns, weight)


@pytest.mark.parametrize("seed", range(8))
def test_the_normal_equations_agree_with_the_decomposition_or_are_rejected(seed):
    """The features have any units, weights, constants, redundant categories and zeros."""
    rng = np.random.default_rng(seed)
    n, d, t = int(rng.integers(20, 400)), int(rng.integers(1, 12)), int(rng.integers(1, 4))
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 10.0 ** rng.integers(-6, 7, d)
    if seed % 2:
        x = np.column_stack([x, np.eye(3)[rng.integers(0, 3, n)], np.zeros(n)])
    x = x.astype(np.float32)
    y = x @ rng.normal(size=(x.shape[1], t)) / np.abs(x).max() + rng.normal(size=(n, t))
    weight = rng.integers(1, 4, n).astype(float)
    epsilon = float(np.spacing(np.float32(1)))
    found = gram.factor(products(x, y, weight), x.shape[1], t, epsilon)
    careful = RFactor.of(x, y, weight)
    if found is None:
        scaled = (x - x.mean(axis=0))[:, x.std(axis=0) > 0]
        condition = np.linalg.svd(scaled / np.linalg.norm(scaled, axis=0))[1]
        assert condition[condition > 1e-6].min() < 0.1 or len(scaled) < 30
        return
    for l2 in (0.0, 0.1):
        for intercept in (True, False):
            fit, other = (r.solve(l2, intercept) for r in (found, careful))
            size = np.abs(x).max(axis=0)[:, None]
            np.testing.assert_allclose(x @ fit.w + fit.b, x @ other.w + other.b, rtol=1e-9, atol=1e-9 * np.abs(y).max())
            assert len(fit.kept) == len(other.kept)
            np.testing.assert_allclose(fit.shortest()[0] * size, other.shortest()[0] * size, rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose(fit.residual_deviation, other.residual_deviation, rtol=1e-11)
            for ours, theirs in zip(fit.standard_errors, other.standard_errors, strict=True):
                if l2 == 0 and fit.kept == other.kept:
                    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("size", [29, 30, 31, 70])
def test_the_factor_of_products_in_several_tiles_is_that_of_the_rows(size, monkeypatch):
    """Also where the targets lie in two tiles, and for columns that are combinations, or nearly."""
    monkeypatch.setattr(tiles, "_TILE", 32)
    rng = np.random.default_rng(size)
    x, y, weight = rng.normal(size=(400, size)), rng.normal(size=(400, 3)), rng.integers(1, 4, 400).astype(float)
    y[:, 1] += y[:, 0]
    near = x[:, :2] @ [1.0, 2.0]
    for columns in (x, np.column_stack([x, near, 0 * near]), np.column_stack([x, near + 0.3 * rng.normal(size=400)])):
        found = gram.factor(products(columns, y, weight), columns.shape[1], 3, 2.0**-24)
        rows = np.sqrt(weight)[:, None] * np.column_stack([np.ones(400), columns, y])
        np.testing.assert_allclose(found.r.T @ found.r, rows.T @ rows, rtol=1e-9, atol=1e-9 * 400)
        if columns is x:
            assert not np.tril(found.r, -1).any()


def test_the_normal_equations_are_rejected_where_they_lose_precision():
    rng = np.random.default_rng(0)
    x, one = rng.normal(size=(300, 3)), np.ones(300)
    y = x @ [[1], [2], [3]] + rng.normal(size=(300, 1))

    def trusted(x, y, epsilon=2.0**-52):
        return gram.factor(products(x, y, one), x.shape[1], 1, epsilon) is not None

    assert trusted(x, y)
    for case in (
        (x + np.array([0, 1e6, 0]), y),  # The mean is far from 0.
        (x, y + 1e6),
        # The last column is nearly a combination of the others.
        (
            np.column_stack([x, x[:, 0] + 1e-5 * rng.normal(size=300)]),
            y,
        ),
        (np.column_stack([x, x[:, 0] + 1e-9 * rng.normal(size=300)]), y),
        (x, x @ [[1], [2], [3]]),  # The fit is perfect.
        (np.column_stack([x, one]), y),
    ):
        assert not trusted(*case)


@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_wide_least_squares_agree_with_the_pivoted_decomposition(l2, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 300)) @ (np.eye(300) + 0.02 * rng.normal(size=(300, 300)))
    r = RFactor.of(x, x[:, :2] + rng.normal(size=(900, 2)), np.ones(900))
    fast = r.solve(l2)
    monkeypatch.setattr(tsqr, "WIDE", 1000)
    careful = r.solve(l2)
    assert fast.kept == careful.kept
    np.testing.assert_allclose(fast.w, careful.w, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fast.b, careful.b, rtol=1e-9, atol=1e-12)
    condition = careful.condition_number
    monkeypatch.undo()
    assert fast.condition_number == pytest.approx(condition, rel=1e-6)
    for ours, theirs in zip(fast.standard_errors, careful.standard_errors, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 32, 33, 100])
def test_matrices_in_tiles_agree_with_numpy(size, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 32)
    x = np.random.default_rng(0).normal(size=(2 * size + 9, size))
    whole, packed = x.T @ x, np.empty(tiles.packed_size(size))
    tiles.products(x, packed)
    for own, values in tiles.unpacked(packed, size):
        np.testing.assert_allclose(values, whole[own, own.start :], rtol=1e-12, atol=1e-12 * size)
    r = tiles.gram(x)
    assert tiles.cholesky(r)
    np.testing.assert_allclose(r, np.linalg.cholesky(whole).T, rtol=1e-10, atol=1e-12 * size)
    np.testing.assert_allclose(tiles.inverse(r), np.linalg.inv(r), rtol=1e-10, atol=1e-12)
    assert tiles.norm(tiles.gram(x)) == pytest.approx(np.linalg.norm(whole, 1), rel=1e-12)
    whole[-1, -1] = -1
    assert not tiles.cholesky(whole)


def test_the_number_of_threads_does_not_change_a_bit_of_the_solution(monkeypatch):
    """Several tiles of a wide problem, and several blocks of rows."""
    monkeypatch.setattr(tiles, "_TILE", 64)
    rng = np.random.default_rng(0)
    x, narrow = rng.normal(size=(700, 260)), rng.normal(size=(20_000, 20))
    y, labels = x[:, 0] + rng.normal(size=700), narrow[:, 0] + rng.logistic(size=20_000) > 0
    found = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(blas, "THREADS", threads)
        wide = solver_on_one_device(x, y).least_squares(refine=True)
        fit, _ = solver_on_one_device(narrow, labels).newton(FAMILIES["logistic"])
        values = (wide.w, wide.b, *wide.standard_errors, fit.w, fit.b, *fit.standard_errors)
        found.add(b"".join(each.tobytes() for each in values))
    assert len(found) == 1
    design = np.column_stack([np.ones(700), x])
    with blas.one_blas_thread():  # The matrices are small, and a loaded machine is slow to synchronize threads.
        inverse = np.linalg.inv(design.T @ design)
    best = inverse @ (design.T @ y)
    errors = np.sqrt(np.diag(inverse) * np.square(y - design @ best).sum() / (700 - 261))
    np.testing.assert_allclose([*wide.b, *wide.w[:, 0]], best, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.append(*wide.standard_errors[::-1]), errors, rtol=1e-9)


def test_collinear_and_constant_columns_are_reported_and_change_nothing():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 3)) * [1, 1e4, 1e-4] + [0, 1e6, 0]
    y = x @ [1, 1e-3, 5e3] + 2 + rng.normal(size=200)
    whole = np.column_stack([x, np.full(200, 7.0), x[:, 0] - 2 * x[:, 2] * 1e4, x[:, 1] * 3])
    fit = RFactor.of(whole, y[:, None], np.ones(200)).solve()
    assert len(fit.kept) == 3
    assert 3 not in fit.kept
    best = np.linalg.lstsq(np.column_stack([x, np.ones(200)]), y)[0]
    np.testing.assert_allclose(whole @ fit.w[:, 0] + fit.b[0], np.column_stack([x, np.ones(200)]) @ best, rtol=1e-9)
    few = RFactor.of(whole[:3], y[:3, None], np.ones(3)).solve()
    np.testing.assert_allclose(whole[:3] @ few.w[:, 0] + few.b[0], y[:3], rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_linear_combination_is_detected_at_any_precision_of_the_rows(dtype):
    rng = np.random.default_rng(2)
    x = rng.normal([1, 5], size=(300, 2))
    x = np.column_stack([x, x.sum(axis=1), x[:, 0] + 1e-4 * rng.normal(size=300)])
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    source = dpreg.ArraySource(x, rng.normal(size=(300, 1)), dtype=dtype)
    fit = Solver(source, Mesh(np.array(jax.devices()[:1]), ("data",)), 8).least_squares()
    assert len(fit.kept) == 3  # The last column is nearly a combination of others, but not exactly.
    assert 3 in fit.kept


def test_the_penalty_is_ridge_and_the_reported_loss_excludes_it():
    source = Rows(300, weighted=True).source()
    x, y, weight = source.x.astype(np.float64), source.y.astype(np.float64), source.weight.astype(np.float64)
    triangle = RFactor.of(x, y, weight)
    theirs = Ridge(alpha=0.3 * weight.sum()).fit(x, y[:, 0], weight)
    fit = triangle.solve(l2=0.3)
    np.testing.assert_allclose(fit.w[:, 0], theirs.coef_, rtol=1e-9)
    np.testing.assert_allclose(fit.b[0], theirs.intercept_, rtol=1e-9)
    w, b = np.array([[1.0], [2.0], [3.0]]), np.array([0.5])
    mean = weight @ np.square(x @ w + b - y)[:, 0] / 2 / weight.sum()
    assert triangle.loss(w, b) == pytest.approx(mean, rel=1e-12)
    assert triangle.rows == (weight > 0).sum()


@pytest.mark.parametrize("rows", [3, 37, 5000])
def test_the_number_of_devices_does_not_change_a_bit_of_the_solution(rows):
    source = Rows(rows, num_inputs=2, weighted=rows > 3).source()
    found = [
        Solver(source, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8).triangle().packed().tobytes()
        for devices in (1, 3, 8)
    ]
    assert len(set(found)) == 1
    whole = RFactor.of(source.x, source.y, source.weight)
    ours = Solver(source, Mesh(np.array(jax.devices()[:2]), ("data",)), 8).triangle()
    np.testing.assert_allclose(np.abs(ours.about(0.0)), np.abs(whole.about(0.0)), atol=1e-9)
    assert (ours.rows, ours.weight) == (whole.rows, pytest.approx(whole.weight, rel=1e-12))


def test_the_exact_solver_gives_the_same_bits_on_any_number_of_processes(tmp_path):
    work = ("--platform=cpu", "--solver=exact", "--num_train=1003", "--noise=0.5", "--w=1,-2,3")
    alone(tmp_path / "one", devices=3, work=work)
    several(2, tmp_path / "two", work=work)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["optimality"] == summaries[1]["optimality"]
    data = dpreg.SyntheticRegressionData([1, -2, 3], 4.2, 0.5, 1003)
    rows = data.train[np.arange(1003)]
    design = np.column_stack([rows["x"], np.ones(1003)]).astype(np.float64)
    best = np.linalg.lstsq(design, rows["y"][:, 0].astype(np.float64))[0]
    found = summaries[0]["optimality"]
    np.testing.assert_allclose(found["parameters"]["w"], best[:3], rtol=1e-9)
    assert found["gap"] < 1e-10
    assert found["not_used"] == []


def test_an_sgd_run_reports_its_distance_from_the_optimum(tmp_path):
    done = alone(tmp_path, "--max_epochs=1", devices=2, work=("--platform=cpu", "--noise=1"))
    found = json.loads((tmp_path / "summary.json").read_text())
    rows = dpreg.SyntheticRegressionData([2, -3.4], 4.2, 1.0).train[np.arange(1000)]
    x, y = rows["x"].astype(np.float64), rows["y"][:, 0].astype(np.float64)
    loss = np.square(x @ found["parameters"]["w"] + found["parameters"]["b"] - y).mean() / 2
    best = np.linalg.lstsq(np.column_stack([x, np.ones(1000)]), y)[1][0] / 2000
    assert found["optimality"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["optimality"]["best"] == pytest.approx(best, rel=1e-6)
    assert f"best possible {best:.6g}: {loss / best - 1:.2%} above" in done.stdout


@pytest.mark.parametrize("cuts", [(), (1,), (7, 500)])
@pytest.mark.parametrize(("mean_of_x", "mean_of_y"), [(0.0, 1e15), (1e12, 0.0), (1e12, 1e15)])
def test_columns_with_large_means_keep_their_digits(mean_of_x, mean_of_y, cuts):
    rng = np.random.default_rng(0)
    offset = np.array([mean_of_x, 0.0, 5.0])
    x = rng.normal(size=(1000, 3)) + offset
    centred = x.astype(np.longdouble) - offset
    y = np.float64(centred @ [3, -2, 1] + mean_of_y)[:, None] + rng.normal(size=(1000, 1))
    weight = rng.integers(1, 4, 1000).astype(np.float64)
    # The reference is computed in extended precision, about the means.
    share = weight / np.longdouble(weight.sum())
    apart, target = centred - share @ centred, y.astype(np.longdouble) - mean_of_y
    mean = share @ target
    target = target - mean
    gram, moment = np.float64(apart.T @ (share[:, None] * apart)), np.float64(apart.T @ (share[:, None] * target))
    expected = np.linalg.solve(gram, moment)
    parts = [RFactor.of(*rows) for rows in zip(*(np.split(a, list(cuts)) for a in (x, y, weight)), strict=True)]
    fit = functools.reduce(RFactor.__add__, parts).solve()
    np.testing.assert_allclose(fit.w, expected, rtol=1e-11)
    squares = np.float64(share @ np.square(target - apart @ expected))
    np.testing.assert_allclose(fit.loss, squares[0] / 2, rtol=1e-11)
    estimator = DataParallelRegressor(standardize=len(cuts) == 1).fit(x, y[:, 0], weight)
    np.testing.assert_allclose(estimator.coef_, expected[:, 0], rtol=1e-11)
    predicted = np.float64(apart @ expected[:, 0] + mean + mean_of_y)
    np.testing.assert_allclose(estimator.predict(x), predicted, rtol=4e-16, atol=1e-6)


def solver_on_one_device(x, y, weight=None):
    source = dpreg.ArraySource(x, y, weight, np.float64)
    return Solver(source, Mesh(np.array(jax.devices()[:1]), ("data",)), 8)


@pytest.mark.parametrize("unit", [1e-300, 1e-22, 1.0, 1e30, 1e300])
def test_gamma_regression_does_not_depend_on_the_unit_of_the_target(unit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2))
    y = rng.gamma(2.0, np.exp(x @ [0.5, -0.3]))
    fit, loss = solver_on_one_device(x, y * unit).newton(FAMILIES["gamma"])
    expected, expected_loss = solver_on_one_device(x, y).newton(FAMILIES["gamma"])
    np.testing.assert_allclose(fit.w, expected.w, rtol=1e-9)
    np.testing.assert_allclose(fit.standard_errors[0], expected.standard_errors[0], rtol=1e-9)
    assert fit.b[0] - expected.b[0] == pytest.approx(np.log(unit), rel=1e-9, abs=1e-9)
    assert loss == pytest.approx(expected_loss, rel=1e-9)


@pytest.mark.parametrize("far", [400.0, 500.0, 600.0, 900.0])
def test_newton_rejects_a_step_that_overflows(far):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 1))
    y = rng.poisson(100 * np.exp(x[:, 0])).astype(float)
    x, y = np.vstack([x, [[far]]]), np.append(y, 0.0)
    fit, _ = solver_on_one_device(x, y).newton(FAMILIES["poisson"])
    theirs = sm.GLM(y, sm.add_constant(x), sm.families.Poisson()).fit(tol=1e-14, start_params=[fit.b[0], fit.w[0, 0]])
    np.testing.assert_allclose([fit.b[0], fit.w[0, 0]], theirs.params, rtol=1e-7)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3, 1e8])
def test_huber_regression_does_not_depend_on_the_unit_of_the_target(unit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(700, 3))
    y = unit * (x @ [1.0, -2.0, 0.5] + rng.standard_t(3, 700))
    w, b, loss, *_ = solver_on_one_device(x, y).robust(robust.Slopes(-1.0, 1.0, 1.0))
    error = y - x @ w[:, 0] - b
    slope = np.clip(error, -1, 1)
    assert abs(np.append(x.T @ slope, slope.sum())).max() / 700 < 1e-8
    assert loss == pytest.approx(np.where(abs(error) < 1, error**2 / 2, abs(error) - 0.5).mean(), rel=1e-9)


def test_null_deviance_of_a_near_perfect_fit_and_likelihood_of_weighted_rows_are_correct():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2))
    y = x @ [1.0, 2.0] + 1e-7 * rng.normal(size=500)
    found = summarize_fit(solver_on_one_device(x, y).least_squares(), "ab")
    assert found.null_deviance == pytest.approx(np.square(y - y.mean()).sum(), rel=1e-12)
    weight = np.tile([0.2, 1.8], 250)  # The mean is 1.
    fit = solver_on_one_device(x, y, weight).least_squares()
    weighted = summarize_fit(fit, "ab", weights="precision")
    assert (weighted.log_likelihood, weighted.aic, weighted.bic) == (None, None, None)
    repeated = np.repeat(np.arange(500), rng.integers(1, 4, 500))
    counts = np.bincount(repeated)
    labels = (y + rng.logistic(size=500) > 0).astype(float)
    one, other = (
        summarize_fit(solver_on_one_device(*rows).newton(FAMILIES["logistic"], counts=True)[0], "ab", weights=w)
        for rows, w in (((x, labels, counts), "frequency"), ((x[repeated], labels[repeated]), None))
    )
    assert (one.log_likelihood, one.aic) == pytest.approx((other.log_likelihood, other.aic), rel=1e-9)
    assert (one.rows, one.degrees_of_freedom) == (other.rows, other.degrees_of_freedom)
    assert one.bic == pytest.approx(other.bic, rel=1e-9)


def test_a_problem_without_an_exact_solution_is_refused():
    for settings in ({"loss": "huber", "intercept": False, "standardize": False}, {"loss": "huber", "l1": 1.0}):
        with pytest.raises(dpreg.InputError, match="no exact solution"):
            solver_on_one_device(np.eye(3), np.ones(3)).solve(Config(**settings))
