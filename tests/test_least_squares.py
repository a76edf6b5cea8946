"""The exact solution: to the digits of certified values and of statsmodels, the same on any devices and processes."""

import json
import pathlib

import jax
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from cluster import alone, ended, outcome, start
from jax.sharding import Mesh
from models import Rows
from sklearn.linear_model import Ridge

import dpreg
from dpreg.models.least_squares import Triangle
from dpreg.solver import triangle_of

DIAMONDS = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "diamonds.parquet"


def digits(found, certified):
    """Log relative errors, the measure of NIST's StRD."""
    found, certified = np.ravel(found), np.ravel(certified)
    return -np.log10(np.maximum(np.abs(found - certified) / np.abs(certified), 1e-16)).min()


@pytest.mark.parametrize("cuts", [(), (5,), range(1, 16)])
def test_longley_has_the_certified_values_of_nist(cuts):
    data = sm.datasets.longley.load_pandas()
    x, y = data.exog.to_numpy(np.float64), data.endog.to_numpy(np.float64)[:, None]
    blocks = zip(np.split(x, list(cuts)), np.split(y, list(cuts)), strict=True)
    triangles = [Triangle.of(x, y, np.ones(len(x))) for x, y in blocks]
    fit = sum(triangles[1:], triangles[0]).solve()
    coefficients = [15.0618722713733, -0.358191792925910e-01, -2.02022980381683, -1.03322686717359]
    coefficients += [-0.511041056535807e-01, 1829.15146461355]
    errors = [84.9149257747669, 0.334910077722432e-01, 0.488399681651699, 0.214274163161675]
    errors += [0.226073200069370, 455.478499142212]
    assert digits(fit.w, coefficients) > 10
    assert digits(fit.b, -3482258.63459582) > 10
    assert digits(fit.standard_errors[0], errors) > 10
    assert digits(fit.standard_errors[1], 890420.383607373) > 10
    assert digits(fit.residual_deviation, 304.854073561965) > 10
    assert digits(fit.r2, 0.995479004577296) > 12


@pytest.mark.parametrize("base", [1.0, 0.1])
def test_the_polynomials_of_wampler_keep_the_digits_of_numpy(base):
    """Wampler 1 and 2 of NIST's StRD: y = sum of base^i x^i, exactly."""
    powers = np.arange(21.0)[:, None] ** np.arange(1, 6)
    certified = base ** np.arange(6)
    y = certified[0] + powers @ certified[1:]
    fit = Triangle.of(powers, y[:, None], np.ones(21)).solve()
    theirs = np.linalg.lstsq(np.column_stack([np.ones(21), powers]), y, rcond=None)[0]
    assert digits([fit.b[0], *fit.w[:, 0]], certified) > min(9, digits(theirs, certified) - 0.5)


def diamonds():
    frame = pd.read_parquet(DIAMONDS)
    kinds = pd.get_dummies(frame[["cut", "color", "clarity"]], drop_first=True).to_numpy(np.float64)
    x = np.column_stack([frame[["carat", "depth", "table", "x", "y", "z"]].to_numpy(np.float64), kinds])
    return x, frame["price"].to_numpy(np.float64)


@pytest.mark.skipif(not DIAMONDS.exists(), reason="the table of diamonds is not here")
@pytest.mark.parametrize("weighted", [False, True])
def test_diamonds_are_fitted_as_statsmodels_fits_them(weighted):
    x, y = diamonds()
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y)) if weighted else np.ones(len(y))
    theirs = sm.WLS(y, sm.add_constant(x), weight).fit()
    parts = [Triangle.of(x[i::7], y[i::7, None], weight[i::7]) for i in range(7)]
    fit = sum(parts[1:], parts[0]).solve()
    np.testing.assert_allclose([fit.b[0], *fit.w[:, 0]], theirs.params, rtol=1e-6)
    errors, error = fit.standard_errors
    np.testing.assert_allclose([error[0], *errors[:, 0]], theirs.bse, rtol=1e-6)
    assert fit.r2[0] == pytest.approx(theirs.rsquared, rel=1e-9)
    told = fit.describe([f"x{j}" for j in range(x.shape[1])]).splitlines()
    for line, p in zip(told[1:-1], theirs.pvalues, strict=True):
        assert float(line.split()[4]) == pytest.approx(p, rel=0.006, abs=1e-300)


def test_collinear_and_constant_columns_are_named_and_change_nothing():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 3)) * [1, 1e4, 1e-4] + [0, 1e6, 0]
    y = x @ [1, 1e-3, 5e3] + 2 + rng.normal(size=200)
    whole = np.column_stack([x, np.full(200, 7.0), x[:, 0] - 2 * x[:, 2] * 1e4, x[:, 1] * 3])
    fit = Triangle.of(whole, y[:, None], np.ones(200)).solve()
    assert len(fit.kept) == 3
    assert 3 not in fit.kept
    best = np.linalg.lstsq(np.column_stack([x, np.ones(200)]), y)[0]
    np.testing.assert_allclose(whole @ fit.w[:, 0] + fit.b[0], np.column_stack([x, np.ones(200)]) @ best, rtol=1e-9)
    few = Triangle.of(whole[:3], y[:3, None], np.ones(3)).solve()
    np.testing.assert_allclose(whole[:3] @ few.w[:, 0] + few.b[0], y[:3], rtol=1e-9)


def test_a_penalty_is_ridge_and_a_loss_is_that_of_the_rows():
    source = Rows(300, weighted=True).source()
    x, y, weight = source.x.astype(np.float64), source.y.astype(np.float64), source.weight.astype(np.float64)
    triangle = Triangle.of(x, y, weight)
    theirs = Ridge(alpha=0.3 * weight.sum()).fit(x, y[:, 0], weight)
    fit = triangle.solve(l2=0.3)
    np.testing.assert_allclose(fit.w[:, 0], theirs.coef_, rtol=1e-9)
    np.testing.assert_allclose(fit.b[0], theirs.intercept_, rtol=1e-9)
    w, b = np.array([[1.0], [2.0], [3.0]]), np.array([0.5])
    mean = weight @ np.square(x @ w + b - y)[:, 0] / 2 / weight.sum()
    assert triangle.loss(w, b) == pytest.approx(mean, rel=1e-12)
    assert triangle.rows == (weight > 0).sum()


@pytest.mark.parametrize("rows", [3, 37, 5000])
def test_devices_do_not_change_a_bit(rows):
    source = Rows(rows, num_inputs=2, weighted=rows > 3).source()
    found = [
        triangle_of(source, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8).r.tobytes() for devices in (1, 3, 8)
    ]
    assert len(set(found)) == 1
    whole = Triangle.of(source.x, source.y, source.weight)
    ours = triangle_of(source, Mesh(np.array(jax.devices()[:2]), ("data",)), 8)
    np.testing.assert_allclose(np.abs(ours.r), np.abs(whole.r), atol=1e-9)
    assert (ours.rows, ours.weight) == (whole.rows, pytest.approx(whole.weight, rel=1e-12))


def test_a_run_by_the_exact_solver_on_any_processes(tmp_path):
    work = ("--platform=cpu", "--solver=exact", "--num_train=1003", "--noise=0.5", "--w=1,-2,3")
    alone(tmp_path / "one", devices=3, work=work)
    assert ended(start(2, tmp_path / "two", devices=2, work=work))[0] == 0
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


def test_a_run_by_sgd_says_how_far_it_is_from_the_best(tmp_path):
    done = alone(tmp_path, "--max_epochs=1", devices=2, work=("--platform=cpu", "--noise=1"))
    found = json.loads((tmp_path / "summary.json").read_text())
    rows = dpreg.SyntheticRegressionData([2, -3.4], 4.2, 1.0).train[np.arange(1000)]
    x, y = rows["x"].astype(np.float64), rows["y"][:, 0].astype(np.float64)
    loss = np.square(x @ found["parameters"]["w"] + found["parameters"]["b"] - y).mean() / 2
    best = np.linalg.lstsq(np.column_stack([x, np.ones(1000)]), y)[1][0] / 2000
    assert found["optimality"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["optimality"]["best"] == pytest.approx(best, rel=1e-6)
    assert f"best possible {best:.6g}: {loss / best - 1:.2%} above" in done.stdout
