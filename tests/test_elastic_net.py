"""Elastic nets are exact: they agree with scikit-learn, meet the conditions of an optimum, and have the same bits."""

import json

import forked
import jax
import numpy as np
import pandas as pd
import pytest
import scipy
from cluster import alone, several
from jax.sharding import Mesh
from sklearn.linear_model import ElasticNet, ElasticNetCV, Lasso, LassoCV, Ridge, lasso_path
from sklearn.model_selection import GroupKFold, KFold, PredefinedSplit, ShuffleSplit

import dpreg
from dpreg.config import Config
from dpreg.config.model import GLM_LOSSES
from dpreg.sklearn import DataParallelClassifier, DataParallelRegressor
from dpreg.solvers import elastic_net
from dpreg.solvers.solver import Solver


def solver_of(x, y, weight=None, devices=1):
    source = dpreg.ArraySource(x, y, weight, np.float64)
    return Solver(source, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8)


def as_lasso(x, y, weight, l2, intercept):
    """Returns rows (x, y) in float64 of which |y - x w|^2 / 2 is the mean squared loss + l2 / 2 sum w^2."""
    share = weight / weight.sum()
    if intercept:
        x, y = x - share @ x, y - share @ y
    x, y = np.sqrt(share)[:, None] * x, np.sqrt(share) * y
    return np.vstack([x, np.sqrt(l2) * np.eye(x.shape[1])]), np.append(y, np.zeros(x.shape[1]))


def duality_gap(x, y, w, l1):
    """The objective of the lasso less a lower bound of it, as a share of the objective at 0."""
    residual = y - x @ w
    feasible = residual * min(1.0, l1 / np.abs(x.T @ residual).max())
    primal = residual @ residual / 2 + l1 * np.abs(w).sum()
    return (primal - (y @ y - (y - feasible) @ (y - feasible)) / 2) / (y @ y / 2)


def rows_of(case):
    """Returns (x, y, weight) of 203 rows, or of 40 with 90 columns."""
    rng = np.random.default_rng(5)
    n, d = (40, 90) if case == "wide" else (203, 12)
    x, weight = rng.normal(size=(n, d)), np.ones(n)
    if case == "correlated":
        x = 0.02 * x + rng.normal(size=(n, 2)) @ rng.normal(size=(2, d))
    elif case == "constant":
        x[:, 2] = 7.0
    elif case == "duplicate":
        x[:, 5] = x[:, 0]
        x[:, 7] = -x[:, 1]
    elif case == "categories":  # of which the columns add up to 1
        x[:, :9] = np.eye(9)[rng.integers(0, 9, n)]
    elif case == "units":
        x *= 10.0 ** rng.integers(-5, 6, d)
        x += 3 * x.std(axis=0)
    elif case == "weights":
        weight = rng.choice([0.0, 0.3, 2.0], n)
    elif case == "near":  # columns that are equal but for a millionth
        x[:, 6:] = x[:, :6] + 1e-6 * x[:, 6:]
    y = 3 + x @ (rng.normal(size=d) * (np.arange(d) % 3 < 2) / x.std(axis=0).clip(1e-6)) + rng.normal(size=n)
    return x, y, weight


CASES = ("plain", "correlated", "constant", "duplicate", "categories", "units", "weights", "near", "wide")


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_elastic_nets_meet_the_conditions_of_an_optimum_on_any_devices(case, intercept):
    x, y, weight = rows_of(case)
    for strength, ratio in ((0.5, 1.0), (0.03, 1.0), (0.001, 1.0), (0.03, 0.4), (0.001, 0.02)):
        scale = x.std(axis=0).clip(1e-9) if case == "units" else 1.0
        l1, l2 = strength * ratio * np.max(scale), strength * (1 - ratio)
        config = Config(l1=l1, l2=l2, intercept=intercept, solver="exact")
        found = [solver_of(x, y, weight, devices).solve(config) for devices in (1, 2, 3, 8)]
        assert len({(one.w.tobytes(), one.b.tobytes()) for one in found}) == 1
        (w,), b = found[0].w.T, found[0].b[0]
        ours_x, ours_y = as_lasso(x, y, weight, l2, intercept)
        assert -1e-15 < duality_gap(ours_x, ours_y, w, l1) < 1e-12
        slope, length = ours_x.T @ (ours_y - ours_x @ w), np.linalg.norm(ours_x, axis=0) * np.linalg.norm(ours_y)
        np.testing.assert_array_less(np.abs(slope) - l1, 1e-10 * length + 1e-300)
        np.testing.assert_allclose(slope[w != 0], l1 * np.sign(w[w != 0]), rtol=0, atol=1e-10 * length.max())
        assert b == pytest.approx(np.average(y - x @ w, weights=weight) if intercept else 0.0, rel=1e-9)
        theirs = ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), tol=1e-13, max_iter=10**6, fit_intercept=intercept)
        if case in ("plain", "constant", "weights", "wide") and strength > 0.001:  # Theirs converges there.
            theirs.fit(x, y, weight)
            np.testing.assert_allclose(w, theirs.coef_, rtol=0, atol=1e-7)
            assert ((w == 0) == (theirs.coef_ == 0)).all()


def test_weights_are_exactly_zero_from_the_documented_strength_on():
    x, y, weight = rows_of("weights")
    share = weight / weight.sum()
    most = np.abs((x - share @ x).T @ (share * (y - share @ y))).max()
    for l1, zeros in ((most * (1 + 1e-9), 12), (most * (1 - 1e-9), 11)):
        assert (solver_of(x, y, weight).solve(Config(l1=l1, solver="exact")).w == 0).sum() == zeros


@pytest.mark.parametrize("case", ["plain", "categories", "wide"])
def test_the_path_is_that_of_scikit_learn(case):
    x, y, _ = rows_of(case)
    alphas, theirs, _ = lasso_path(x - x.mean(axis=0), y - y.mean(), tol=1e-13, max_iter=10**6)
    problem = elastic_net.ElasticNet(solver_of(x, y).triangle())
    ours = np.stack([problem.weights(alpha) for alpha in alphas], axis=1)
    size = np.abs(theirs).max()
    np.testing.assert_allclose((x - x.mean(axis=0)) @ ours, (x - x.mean(axis=0)) @ theirs, rtol=0, atol=1e-5 * size)
    if case == "plain":
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rows", "scale"), [(200, 1.0), (200, 0.0), (60, 1.0)])
def test_folds_choose_the_strength_that_scikit_learn_chooses(rows, scale):
    """Scale 0 makes columns far from 0, for which sums of products do not hold enough digits."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, 20)) + (1 - scale) * 1e4
    y = x[:, :4] @ [1.0, -2.0, 0.5, 0.1] + 2 * rng.normal(size=rows)
    for ratio in (1.0, 0.5):
        theirs = ElasticNetCV(l1_ratio=ratio, cv=KFold(5), tol=1e-12, max_iter=10**6).fit(x, y)
        fits = [
            DataParallelRegressor(cv=5, l1_ratio=ratio, standardize=False, num_devices=devices).fit(x, y)
            for devices in (1, 2, 3, 8)
        ]
        ours = fits[0]
        assert len({(fit.coef_.tobytes(), fit.mse_path_.tobytes()) for fit in fits}) == 1
        np.testing.assert_allclose(ours.alphas_, theirs.alphas_, rtol=1e-9)
        np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-7)
        assert ours.alpha_ == pytest.approx(theirs.alpha_, rel=1e-9)
        np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=0, atol=1e-7)
        assert ours.intercept_ == pytest.approx(theirs.intercept_, abs=1e-6 + 1e-3 * (1 - scale))
        assert ((ours.coef_ == 0) == (theirs.coef_ == 0)).all()


def test_folds_may_be_groups_of_rows_and_rows_may_have_weights():
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(90, 6)), rng.choice([0.0, 1.0, 3.0], 90)
    y, groups = x[:, 0] + rng.normal(size=90), rng.integers(0, 9, 90)
    cv = [*GroupKFold(3).split(x, y, groups)]
    theirs = LassoCV(cv=cv, tol=1e-12).fit(x, y, weight)
    ours = DataParallelRegressor(cv=cv, standardize=False).fit(x, y, weight)
    np.testing.assert_allclose(ours.mse_path_, theirs.mse_path_, rtol=1e-8)
    assert DataParallelRegressor(cv=PredefinedSplit(groups)).fit(x, y).mse_path_.shape == (100, 9)
    best = np.average(ours.mse_path_, axis=1, weights=[weight[own].sum() for _, own in cv]).argmin()
    assert ours.alpha_ == ours.alphas_[best]
    np.testing.assert_allclose(ours.coef_, Lasso(ours.alpha_, tol=1e-13).fit(x, y, weight).coef_, rtol=0, atol=1e-8)


def test_folds_choose_a_ridge_penalty():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 30))
    y = x @ rng.normal(size=30) + 5 * rng.normal(size=60)
    ours = DataParallelRegressor(cv=4, l1_ratio=0.0, standardize=False).fit(x, y)
    assert ours.alphas_[0] > ours.alpha_ > ours.alphas_[-1]
    for number in (0, 50, 99):
        for fold, (others, own) in enumerate(KFold(4).split(x)):
            theirs = Ridge(ours.alphas_[number] * len(others)).fit(x[others], y[others])
            error = np.square(theirs.predict(x[own]) - y[own]).mean()
            assert ours.mse_path_[number, fold] == pytest.approx(error, rel=1e-8)
    assert ours.alpha_ == ours.alphas_[ours.mse_path_.mean(axis=1).argmin()]
    np.testing.assert_allclose(ours.coef_, Ridge(ours.alpha_ * 60).fit(x, y).coef_, rtol=0, atol=1e-9)


def test_a_path_has_standard_errors_and_the_strongest_penalty_within_one():
    losses = np.array([[5.0, 2.0, 1.2, 1.0], [6.0, 3.0, 2.0, 2.2], [7.0, 2.5, 1.6, 1.0]])
    path = elastic_net.Path(np.array([8.0, 4, 2, 1]), 0.25, np.zeros((1, 4)), np.zeros(4), losses, np.ones(3))
    np.testing.assert_allclose(path.losses, losses.mean(axis=0))
    np.testing.assert_allclose(path.standard_errors, losses.std(axis=0, ddof=1) / np.sqrt(3))
    assert (path.best, path.best_within_error) == (3, 2)
    assert path.penalties(2) == (0.5, 1.5)


@pytest.mark.parametrize("loss", GLM_LOSSES)
@pytest.mark.parametrize("intercept", [True, False])
def test_generalised_linear_models_with_l1_meet_the_conditions_of_an_optimum(loss, intercept):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(301, 7))
    x[:, 6] = x[:, 2]
    z, weight = x @ [0.8, -0.5, 0.3, 0.05, 0, 0, 0] + 0.4 * intercept, rng.integers(0, 3, 301)
    y = {
        "logistic": rng.random(301) < scipy.special.expit(z),
        "poisson": rng.poisson(np.exp(z)),
        "gamma": rng.gamma(2, np.exp(z)),
        "tweedie": rng.poisson(np.exp(z)) * rng.gamma(2, 1, 301),
        "negative_binomial": rng.poisson(np.exp(z) * rng.gamma(2, 0.5, 301)),
    }[loss].astype(float)
    for l1, l2 in ((0.1, 0.0), (0.02, 0.05), (0.004, 0.0)):
        config = Config(
            loss=loss, l1=l1, l2=l2, intercept=intercept, solver="exact", tweedie_power=1.5, negative_binomial_alpha=0.5
        )
        found = [solver_of(x, y, weight, devices).solve(config) for devices in (1, 8)]
        assert found[0].w.tobytes() == found[1].w.tobytes()
        (w,), b, fit = found[0].w.T, found[0].b[0], found[0].fit
        z = x @ w + b
        mean = scipy.special.expit(z) if loss == "logistic" else np.exp(z)
        variance = {"gamma": mean, "tweedie": mean**0.5, "negative_binomial": 1 + mean / 2}.get(loss, 1.0)
        slope = (y - mean) / variance  # the derivative of the log-likelihood by z
        share = weight / weight.sum()
        gradient = x.T @ (share * slope) - l2 * w
        np.testing.assert_allclose(gradient[w != 0], l1 * np.sign(w[w != 0]), rtol=0, atol=1e-9)
        assert (np.abs(gradient) <= l1 + 1e-9).all()
        assert not intercept or abs(share @ slope) < 1e-9
        assert l2 or w[2] == 0 or w[6] == 0  # These columns are equal.
        assert np.isnan(fit.standard_errors[0]).all()


def test_classes_that_features_separate_have_weights_with_l1():
    x = np.random.default_rng(0).normal(size=(50, 3))
    model = DataParallelClassifier(l1=0.05, l2=0.0, solver="exact").fit(x, x[:, 0] > 0)
    assert model.score(x, x[:, 0] > 0) > 0.9
    assert (model.coef_ != 0).tolist() == [[True, False, False]]


def test_the_estimator_solves_l1_exactly_with_any_optimizer_argument():
    x, y, _ = rows_of("plain")
    scaled, size = (x - x.mean(axis=0)) / x.std(axis=0), y.std()
    theirs = Lasso(0.05 * size, tol=1e-14).fit(scaled, y)
    ours = DataParallelRegressor(l1=0.05).fit(x, y)
    np.testing.assert_allclose(ours.coef_ * x.std(axis=0), theirs.coef_, rtol=0, atol=1e-8)
    assert ((ours.coef_ == 0) == (theirs.coef_ == 0)).all()
    assert (ours.coef_ == 0).any()
    summary = ours.summary_
    assert summary.degrees_of_freedom == 203 - 1 - (ours.coef_ != 0).sum()
    assert all(np.isnan(c.std_error) for c in summary.coefficients)
    assert all(c.used for c in summary.coefficients)
    both = DataParallelRegressor(l1=0.05).fit(x, np.column_stack([y, x[:, 0]]))
    np.testing.assert_allclose(both.coef_[0], ours.coef_, rtol=0, atol=1e-12)
    assert (both.coef_[1][1:] == 0).all()
    parts = DataParallelRegressor(l1=0.05).partial_fit(x[:90], y[:90]).partial_fit(x[90:], y[90:])
    np.testing.assert_allclose(parts.coef_, ours.coef_, rtol=0, atol=1e-10)
    with pytest.raises(dpreg.InputError, match=r"l1=0\.05: only optimizer='sgd'"):
        DataParallelRegressor(l1=0.05, solver="sgd").fit(x, y)
    with pytest.raises(dpreg.InputError, match=r"l1=0\.05: only optimizer='sgd'"):
        DataParallelRegressor("huber", l1=0.05).fit(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cv": 1}, "cv=1: k-fold cross-validation requires at least one train/test split"),
        ({"cv": 3, "l1": 0.1}, "cv: it chooses the penalty; leave out l1 and l2"),
        ({"cv": 3, "loss": "huber"}, "cv: it applies only to model='linear', loss='squared'"),
        ({"cv": 3, "solver": "sgd"}, "cv: it applies only to model='linear', loss='squared'"),
        ({"cv": 3, "l1_ratio": 1.5}, "l1_ratio=1.5: use a number from 0 to 1"),
        ({"l1_ratio": 0.5}, "l1_ratio=0.5: it applies only with cv"),
        ({"cv": ShuffleSplit(3)}, "cv: it has to hold out every row once"),
        ({"cv": [(np.arange(5), np.arange(5, 10)), (np.arange(5), np.arange(5))]}, "cv: it has to hold out every row"),
    ],
)
def test_folds_that_cannot_be_used_are_refused_in_one_line(arguments, message):
    x = np.random.default_rng(0).normal(size=(10, 2))
    with pytest.raises(dpreg.InputError, match=message) as caught:
        DataParallelRegressor(**arguments).fit(x, x[:, 0])
    assert "\n" not in str(caught.value)


def test_rows_that_no_penalty_can_be_chosen_for_are_refused():
    x = np.random.default_rng(0).normal(size=(10, 2))
    for y, weight, message in (
        (np.column_stack([x, x]), None, "one penalty for one target, and y has 4"),
        (np.ones(10), None, "no feature varies with the target"),
        (x[:, 0], np.repeat([1.0, 0.0], 5), "all rows of fold 1 have the weight 0"),
    ):
        with pytest.raises(dpreg.InputError, match=message):
            DataParallelRegressor(cv=2).fit(x, y, weight)
    with pytest.raises(dpreg.InputError, match="cv: it needs all rows at once"):
        DataParallelRegressor(cv=2).partial_fit(x, x[:, 0])
    with pytest.raises(dpreg.InputError, match="folds=11: there are 10 rows to fit; use so many folds at most"):
        solver_of(x, x[:, 0]).solve(Config(folds=11))
    with pytest.raises(dpreg.InputError, match="folds=2: it chooses one penalty for one target, and there are 2; give"):
        solver_of(x, x).solve(Config(folds=2))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng, folder = np.random.default_rng(7), tmp_path_factory.mktemp("table")
    frame = pd.DataFrame(rng.normal(size=(403, 8)) * [1, 100, 0.01, 1, 1, 1, 1, 1], columns=[*"abcdefgh"])
    frame["kind"] = rng.choice(["red", "green", "blue"], 403)
    frame["y"] = 50 + 4 * frame.a + 0.03 * frame.b + 3 * (frame.kind == "red") + rng.normal(size=403)
    frame.to_csv(folder / "t.csv", index=False)
    work = ("--platform=cpu", f"--dataset={folder}/t.csv", f"--cache_dir={folder}", "--target=y", "--categorical=kind")
    return folder, frame, work


def test_a_run_with_l1_writes_exact_zeros_and_resumes(table):
    folder, frame, work = table
    done = alone(folder / "l1", "--l1=0.3", "--validation_fraction=0", devices=2, work=work)
    assert "solver exact: the least loss, by one pass over the rows" in done.stderr
    found = json.loads((folder / "l1" / "summary.json").read_text())
    w = found["parameters"]["w"]
    assert all(w[name] == 0.0 for name in "cdefgh")
    assert w["a"] != 0
    assert found["optimality"]["gap"] == pytest.approx(0, abs=1e-6)
    assert found["fit"][0]["coefficients"][1]["name"] == "a"
    assert {c["name"]: c["estimate"] for c in found["fit"][0]["coefficients"]}["h"] == 0.0
    numbers, kinds = frame[[*"abcdefgh"]], [name.removeprefix("kind=") for name in w if name.startswith("kind=")]
    scaled = (numbers - numbers.mean()) / numbers.std(ddof=0)
    theirs = Lasso(0.3, tol=1e-12).fit(np.column_stack([scaled, *(frame.kind == kind for kind in kinds)]), frame.y)
    scale = np.append(numbers.std(ddof=0), np.ones(len(kinds)))
    np.testing.assert_allclose([*w.values()], theirs.coef_ / scale, rtol=2e-5, atol=1e-7)
    again = alone(folder / "l1", "--l1=0.3", "--validation_fraction=0", devices=8, work=work)
    assert "solver exact" in again.stderr
    assert json.loads((folder / "l1" / "summary.json").read_text())["parameters"] == found["parameters"]


def test_a_run_with_folds_writes_its_path_with_the_same_bits_in_two_processes(table):
    folder, _, work = table
    for name, devices in (("one", 1), ("three", 3)):
        done = alone(folder / name, "--folds=5", "--l1_ratio=0.9", "--precision=float64", devices=devices, work=work)
    assert "5 folds chose --l1=" in done.stderr
    several(2, folder / "two", "--folds=5", "--l1_ratio=0.9", "--precision=float64", work=work)
    found = [json.loads((folder / name / "summary.json").read_text()) for name in ("one", "three", "two")]
    assert found[0]["path"] == found[1]["path"] == found[2]["path"]
    assert len({each["params_sha256"] for each in found}) == 1
    path = found[0]["path"]
    strengths, losses = path["strengths"], np.array(path["held_out_loss"])
    assert (len(strengths), path["folds"], path["l1_ratio"]) == (100, 5, 0.9)
    best = int(losses.argmin())
    assert path["best"] == strengths[best]
    within = strengths.index(path["best_within_error"])
    assert losses[within] <= losses[best] + path["standard_error"][best] < losses[within - 1]
    assert path["nonzero"][0] == 0 < path["nonzero"][best]
    chosen = {name: w[best] for name, w in path["parameters"]["w"].items()}
    assert chosen == pytest.approx(found[0]["parameters"]["w"], rel=1e-5, abs=1e-9)
    assert [w == 0 for w in chosen.values()] == [w == 0 for w in found[0]["parameters"]["w"].values()]
    assert "held-out loss by strength" in (folder / "one" / "report.html").read_text().lower()
    flags = forked.run("-m", "dpreg.main", f"--flagfile={folder}/one/flags.cfg", f"--workdir={folder}/again")
    assert flags.returncode == 0, flags.stderr
    assert json.loads((folder / "again" / "summary.json").read_text())["path"] == path
