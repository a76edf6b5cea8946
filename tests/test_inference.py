"""Standard errors, dispersions and likelihoods of exact solutions, compared with statsmodels and with NumPy."""

import dataclasses
import json
import subprocess
import sys

import forked
import jax
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from jax.sharding import Mesh

import dpreg
from dpreg.config import Config
from dpreg.solvers.inference import summarize_fit
from dpreg.solvers.solver import Solver

LOG = sm.families.links.Log()
FAMILIES = {
    "poisson": sm.families.Poisson(),
    "logistic": sm.families.Binomial(),
    "gamma": sm.families.Gamma(LOG),
    "tweedie": sm.families.Tweedie(LOG, 1.4),
    "negative_binomial": sm.families.NegativeBinomial(LOG, 0.7),
}
SETTINGS = {"tweedie": {"tweedie_power": 1.4}, "negative_binomial": {"negative_binomial_alpha": 0.7}}


@pytest.fixture(scope="module")
def rows():
    """Returns x, integer weights with zeros, and a target for each loss, of 503 rows."""
    rng, n = np.random.default_rng(0), 503
    x = rng.normal(size=(n, 3)) * [1, 1, 20] + [0, 2, -100]
    x[:, 1] += x[:, 0] / 2
    z = (x - [0, 2, -100]) @ [0.3, -0.4, 0.01] + 0.7
    mean = np.exp(z)
    y = {
        "squared": z + rng.normal(size=n) * (0.3 + abs(x[:, 0])),
        "poisson": rng.poisson(mean),
        "logistic": rng.random(n) < 1 / (1 + np.exp(-z)),
        "gamma": rng.gamma(2, mean / 2),
        "tweedie": [rng.gamma(2, m / 2, k).sum() for k, m in zip(rng.poisson(1.0, n), mean, strict=True)],
        "negative_binomial": rng.negative_binomial(2, 2 / (2 + mean)),
    }
    return x, rng.integers(0, 4, n).astype(np.float64), {name: np.asarray(v, np.float64) for name, v in y.items()}


def solve(loss, x, y, weight=None, devices=1, **settings):
    source = dpreg.ArraySource(x, y, weight, np.float64)
    solver = Solver(source, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8)
    config = Config(solver="exact", loss=loss, precision="float64", **SETTINGS.get(loss, {}), **settings)
    weights = None if weight is None else config.kind_of_weights
    return summarize_fit(solver.solve(config).fit, "abc", weights=weights)


def compare(found, theirs, rtol=1e-6):
    np.testing.assert_allclose([c.estimate for c in found.coefficients], theirs.params, rtol)
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), rtol, atol=1e-12)
    np.testing.assert_allclose([c.statistic for c in found.coefficients], theirs.tvalues, rtol)
    np.testing.assert_allclose([c.p for c in found.coefficients], theirs.pvalues, rtol * 10, atol=1e-300)
    np.testing.assert_allclose(found.conf_int(), theirs.conf_int(), rtol)


@pytest.mark.parametrize("kind", ["HC0", "HC1", "HC2", "HC3"])
def test_robust_covariances_of_least_squares_are_those_of_statsmodels(rows, kind):
    x, weight, targets = rows
    y, a, some = targets["squared"], sm.add_constant(x), weight > 0
    compare(solve("squared", x, y, covariance=kind), sm.OLS(y, a).fit(cov_type=kind, use_t=True))
    theirs = sm.WLS(y[some], a[some], weight[some]).fit(cov_type=kind, use_t=True)
    compare(solve("squared", x, y, weight, covariance=kind), theirs)
    repeated = np.repeat(np.arange(len(y)), weight.astype(int))
    theirs = sm.OLS(y[repeated], a[repeated]).fit(cov_type=kind, use_t=True)
    found = solve("squared", x, y, weight, covariance=kind, weights="frequency")
    compare(found, theirs)
    assert (found.rows, found.degrees_of_freedom) == (theirs.nobs, theirs.df_resid)
    assert (found.log_likelihood, found.aic, found.bic) == pytest.approx((theirs.llf, theirs.aic, theirs.bic))
    assert f"covariance {kind}" in str(found)
    without = solve("squared", x, y, covariance=kind, intercept=False, standardize=False)
    compare(without, sm.OLS(y, x).fit(cov_type=kind, use_t=True))


@pytest.mark.parametrize("loss", FAMILIES)
def test_covariances_of_generalised_linear_models_are_those_of_statsmodels(rows, loss):
    x, weight, targets = rows
    y, a, some = targets[loss], sm.add_constant(x), weight > 0
    for kind in ("classic", "HC0"):
        found = solve(loss, x, y, covariance=kind)
        theirs = sm.GLM(y, a, FAMILIES[loss]).fit(cov_type="nonrobust" if kind == "classic" else kind, tol=1e-14)
        compare(found, theirs, 2e-6) if found.test == "z" else None
        np.testing.assert_allclose(found.covariance, theirs.cov_params(), 1e-6, atol=1e-10)
        np.testing.assert_allclose([c.estimate for c in found.coefficients], theirs.params, 1e-6)
        assert found.dispersion == pytest.approx(theirs.scale, rel=1e-6)
        assert (found.deviance, found.null_deviance) == pytest.approx((theirs.deviance, theirs.null_deviance))
        assert found.log_likelihood == pytest.approx(theirs.llf, rel=1e-7)
    larger = solve(loss, x, y, covariance="HC1")
    np.testing.assert_allclose(larger.covariance, found.covariance * 503 / 499, rtol=1e-12)
    found = solve(loss, x, y, weight, weights="frequency", covariance="HC0")
    theirs = sm.GLM(y[some], a[some], FAMILIES[loss], freq_weights=weight[some]).fit(tol=1e-14)
    np.testing.assert_allclose([c.estimate for c in found.coefficients], theirs.params, 1e-6)
    assert (found.rows, found.degrees_of_freedom) == (weight.sum(), weight.sum() - 4)
    assert (found.dispersion, found.log_likelihood) == pytest.approx((theirs.scale, theirs.llf), rel=1e-6)
    repeated = np.repeat(np.arange(len(y)), weight.astype(int))
    theirs = sm.GLM(y[repeated], a[repeated], FAMILIES[loss]).fit(cov_type="HC0", tol=1e-14)
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), 1e-6, atol=1e-10)


@pytest.mark.parametrize("loss", ["gamma", "tweedie"])
def test_weights_of_precision_divide_the_dispersion_of_a_row(rows, loss):
    x, weight, targets = rows
    y, a, some = targets[loss], sm.add_constant(x), weight > 0
    found = solve(loss, x, y, weight)
    theirs = sm.GLM(y[some], a[some], FAMILIES[loss], var_weights=weight[some]).fit(tol=1e-14)
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), 1e-6, atol=1e-10)
    assert (found.rows, found.degrees_of_freedom) == (some.sum(), theirs.df_resid)
    assert found.dispersion == pytest.approx(theirs.scale, rel=1e-6)
    if loss == "gamma":  # statsmodels has no likelihood of Tweedie's distribution with such weights.
        assert found.log_likelihood == pytest.approx(theirs.llf, rel=1e-7)


@pytest.mark.parametrize("kind", ["HC2", "HC3"])
@pytest.mark.parametrize("loss", ["poisson", "gamma"])
def test_leverages_of_generalised_linear_models_correct_their_residuals(rows, loss, kind):
    x, _, targets = rows
    y, a = targets[loss], sm.add_constant(x)
    mean = np.exp(a @ sm.GLM(y, a, FAMILIES[loss]).fit(tol=1e-14).params)
    information, score = (mean, y - mean) if loss == "poisson" else (np.ones_like(y), y / mean - 1)
    expected = np.linalg.inv(a.T @ (information[:, None] * a))
    leverage = information * np.einsum("ij,jk,ik->i", a, expected, a)
    curvature = np.linalg.inv(a.T @ ((mean if loss == "poisson" else y / mean)[:, None] * a))
    squares = score**2 / (1 - leverage) ** (1 if kind == "HC2" else 2)
    np.testing.assert_allclose(
        solve(loss, x, y, covariance=kind).covariance, curvature @ (a.T @ (squares[:, None] * a)) @ curvature, 1e-6
    )


def test_weights_of_importance_have_robust_errors_by_default(rows):
    x, weight, targets = rows
    y, a, some = targets["squared"], sm.add_constant(x), weight > 0
    found = solve("squared", x, y, weight, weights="importance")
    compare(found, sm.WLS(y[some], a[some], weight[some]).fit(cov_type="HC1", use_t=True))
    assert (found.covariance_type, found.weights, found.log_likelihood) == ("HC1", "importance", None)


def test_a_covariance_of_several_targets_of_a_glm_is_refused(rows):
    x, _, targets = rows
    with pytest.raises(dpreg.InputError, match="covariance='HC1': loss='poisson' has it for one target"):
        solve("poisson", x, np.stack([targets["poisson"]] * 2, axis=1), covariance="HC1")


def test_a_row_that_is_fitted_by_its_own_column_leaves_the_leverage_correction_undefined(rows):
    x, _, targets = rows
    x = np.concatenate([x[:, :2], np.eye(len(x))[:, :1]], axis=1)
    assert np.isnan(solve("squared", x, targets["squared"], covariance="HC3").coefficients[0].std_error)
    assert solve("squared", x, targets["squared"], covariance="HC1").coefficients[0].std_error > 0


@pytest.mark.parametrize("weighted", [False, True])
def test_the_most_likely_alpha_of_a_negative_binomial_model_is_found(rows, weighted):
    x, weight, targets = rows
    y, weight = targets["negative_binomial"], weight if weighted else np.ones(503)
    source = dpreg.ArraySource(x, y, weight, np.float64)
    config = Config(solver="exact", loss="negative_binomial", precision="float64")
    found = [Solver(source, Mesh(np.array(jax.devices()[:d]), ("data",)), 8).solve(config) for d in (1, 8)]
    assert found[0].alpha == found[1].alpha
    np.testing.assert_array_equal(found[0].w, found[1].w)
    repeated = np.repeat(np.arange(len(y)), weight.astype(int))
    a = sm.add_constant((x - [0, 2, -100]) / [1, 1, 20])
    theirs = sm.NegativeBinomial(y[repeated], a[repeated]).fit(disp=0, method="newton", maxiter=100, start_params=None)
    assert found[0].alpha == pytest.approx(theirs.params[-1], rel=1e-6)
    np.testing.assert_allclose(found[0].w[:, 0] * [1, 1, 20], theirs.params[1:-1], rtol=1e-6)
    assert found[0].fit.log_likelihood == pytest.approx(theirs.llf, rel=1e-9)
    same = dpreg.ArraySource(np.zeros((400, 1)), np.tile([0.0, 1.0, 2.0, 3.0], 100), dtype=np.float64)
    with pytest.raises(dpreg.InputError, match="vary no more than Poisson counts"):
        Solver(same, Mesh(np.array(jax.devices()[:1]), ("data",)), 8).solve(config)


@pytest.mark.parametrize("loss", ["squared", *FAMILIES])
def test_an_offset_is_a_part_of_each_prediction_with_a_weight_of_1(rows, loss):
    x, weight, targets = rows
    rng, y, some = np.random.default_rng(1), targets[loss], weight > 0
    offset = rng.normal(size=len(y)) / 2
    source = dpreg.ArraySource(np.insert(x, 1, offset, axis=1), y, weight, np.float64)
    config = Config(solver="exact", loss=loss, precision="float64", covariance="HC0", **SETTINGS.get(loss, {}))
    solutions = [
        Solver(source, Mesh(np.array(jax.devices()[:d]), ("data",)), 8, offset=1).solve(config) for d in (1, 8)
    ]
    np.testing.assert_array_equal(solutions[0].w, solutions[1].w)
    np.testing.assert_array_equal(solutions[0].fit.covariance(0), solutions[1].fit.covariance(0))
    assert solutions[0].w[1, 0] == 1
    a, found = sm.add_constant(x)[some], summarize_fit(solutions[0].fit, "aobc", weights=config.kind_of_weights)
    given = found.coefficients[2]
    assert (given.name, given.estimate, given.remark) == ("o", 1, "the offset, whose weight is 1")
    assert np.isnan(given.std_error)
    found = dataclasses.replace(found, coefficients=tuple(c for c in found.coefficients if c.name != "o"))
    if loss == "squared":
        theirs = sm.WLS(y[some] - offset[some], a, weight[some]).fit(cov_type="HC0", use_t=True)
        compare(found, theirs)
        return
    weights = {"freq_weights": weight[some]} if found.weights == "frequency" else {"var_weights": weight[some]}
    theirs = sm.GLM(y[some], a, FAMILIES[loss], offset=offset[some], **weights).fit(tol=1e-14)
    np.testing.assert_allclose([c.estimate for c in found.coefficients], theirs.params, 1e-6)
    # The numerical search of statsmodels for the null model ends at five or six digits.
    assert found.deviance == pytest.approx(theirs.deviance, rel=1e-9)
    assert found.null_deviance == pytest.approx(theirs.null_deviance, rel=1e-5)


@pytest.fixture(scope="module")
def claims(tmp_path_factory):
    """Writes a table of numbers of claims, whose means are proportional to an exposure."""
    rng, folder = np.random.default_rng(2), tmp_path_factory.mktemp("claims")
    table = pd.DataFrame({"exposure": rng.uniform(0.1, 3, 701), "age": rng.normal(40, 10, 701)})
    table["city"] = rng.choice(["a", "b", "c"], 701)
    table["claims"] = rng.poisson(table["exposure"] * np.exp(0.02 * table["age"] - 0.4 * (table["city"] == "b")))
    table.to_csv(folder / "claims.csv", index=False)
    return folder, table


COMMAND = ("-m", "dpreg.main", "--platform=cpu", "--target=claims", "--categorical=city", "--loss=poisson")


@pytest.mark.parametrize("devices", [1, 8])
def test_an_exposure_is_an_offset_of_training_prediction_and_the_script(claims, devices):
    folder, table = claims
    run = (*COMMAND, f"--dataset={folder / 'claims.csv'}", "--offset_column=log(exposure)", "--base=city:a")
    done = forked.run(*run, f"--num_devices={devices}", f"--workdir={folder / 'run'}{devices}")
    assert done.returncode == 0, done.stderr
    assert "log(exposure)" in done.stdout
    assert "the offset, whose weight is 1" in done.stdout
    summary = json.loads((folder / f"run{devices}" / "summary.json").read_text())
    dummies = np.column_stack([table["age"], table["city"] == "b", table["city"] == "c"])
    theirs = sm.GLM(
        table["claims"], sm.add_constant(dummies.astype(float)), sm.families.Poisson(), exposure=table["exposure"]
    ).fit(tol=1e-14)
    (fit,) = summary["fit"]
    of = {c["name"]: c for c in fit["coefficients"]}
    names = ["(intercept)", "age", "city=b", "city=c"]
    np.testing.assert_allclose([of[name]["estimate"] for name in names], theirs.params, 2e-5)  # The rows are float32.
    np.testing.assert_allclose([of[name]["std_error"] for name in names], theirs.bse, 2e-5)
    assert fit["null_deviance"] == pytest.approx(theirs.null_deviance, rel=1e-5)
    assert summary["parameters"]["w"]["log(exposure)"] == 1
    table.drop(columns="claims").to_csv(folder / "new.csv", index=False)
    output = folder / f"predicted{devices}.csv"
    asked = ("--mode=predict", f"--workdir={folder / 'run'}{devices}", f"--dataset={folder / 'new.csv'}")
    done = forked.run("-m", "dpreg.main", "--platform=cpu", *asked, f"--output={output}", "--interval=0.95")
    assert done.returncode == 0, done.stderr
    found = pd.read_csv(output)
    np.testing.assert_allclose(found["predicted_claims"], theirs.fittedvalues, rtol=2e-5)
    frame = theirs.get_prediction(
        sm.add_constant(dummies.astype(float)), exposure=table["exposure"].to_numpy()
    ).summary_frame()
    np.testing.assert_allclose(found["low_claims"], frame["mean_ci_lower"], rtol=5e-5)
    script = subprocess.run(
        [sys.executable, folder / f"run{devices}" / "model" / "predict.py", folder / "new.csv"],
        capture_output=True,
        text=True,
        check=True,
    )
    by_script = [float(line.rpartition(",")[2]) for line in script.stdout.splitlines()[1:]]
    np.testing.assert_allclose(by_script, theirs.fittedvalues, rtol=2e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--offset_column=log(age)",), "column 'age' is not above 0, and has no logarithm; correct it, or leave out"),
        (("--offset_column=exposures",), "column 'exposures' is not there; use one of 'exposure'"),
        (("--offset_column=age", "--features=age,exposure"), "column 'age' is asked for twice; name it once"),
        (("--offset_column=city",), "column 'city' has 'c', which is no number"),
        (("--offset_column=age", "--solver=sgd"), "--offset_column=age: it applies only to --solver=exact"),
        (("--offset_column=age", "--lr=0.1"), "--offset_column=age: it applies only to --solver=exact"),
        (("--offset_column=age", "--loss=huber"), "--offset_column=age: it applies only to --solver=exact"),
        (("--offset_column=age", "--loss=squared", "--target_transform=standardize"), "would change its unit"),
    ],
)
def test_an_offset_that_cannot_be_used_is_refused_in_one_line(claims, tmp_path, flags, message):
    _, table = claims
    table.assign(age=table["age"] - 60).to_csv(tmp_path / "claims.csv", index=False)
    city = () if "--offset_column=city" in flags else ("--categorical=city",)
    asked = [flag for flag in COMMAND if flag != "--categorical=city"]
    if any(flag.startswith("--features") for flag in flags):
        city = ()
    done = forked.run(*asked, *city, f"--dataset={tmp_path / 'claims.csv'}", f"--workdir={tmp_path / 'run'}", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["HC0", "HC3"])
@pytest.mark.parametrize("loss", ["squared", *FAMILIES])
def test_robust_covariances_have_the_same_bits_on_any_number_of_devices(rows, loss, kind):
    x, weight, targets = rows
    one, three, eight = (solve(loss, x, targets[loss], weight, d, covariance=kind) for d in (1, 3, 8))
    np.testing.assert_array_equal(one.covariance, three.covariance)
    np.testing.assert_array_equal(one.covariance, eight.covariance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covariance": "HC1", "l2": 0.1}, "unknown with l2=0.1; leave one out"),
        ({"covariance": "HC1", "loss": "huber"}, "only to the standard errors of solver='exact' of loss='squared'"),
        ({"covariance": "HC1", "solver": "sgd"}, "only to the standard errors of solver='exact'"),
        ({"weights": "frequency", "model": "mlp"}, "only to the standard errors of solver='exact'"),
        (
            {"weights": "importance", "covariance": "classic"},
            "does not hold for weights='importance'; use covariance",
        ),
        ({"loss": "negative_binomial", "solver": "sgd"}, "steps do not estimate alpha; give negative_binomial_alpha"),
        ({"loss": "tweedie", "tweedie_power": 2.0}, "use a value under 2"),
    ],
)
def test_what_has_no_such_errors_is_refused(settings, message):
    with pytest.raises(dpreg.InputError, match=message):
        Config(**settings)
