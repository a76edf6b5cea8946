"""Base levels of categories, and levels without events, beside statsmodels."""

import json
import pathlib
import re

import forked
import jax
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from jax.sharding import Mesh

import dpreg
from dpreg.config import Columns, Config
from dpreg.data.schema import Category, Schema
from dpreg.outputs.metrics import to_json
from dpreg.solvers.glm import FAMILIES
from dpreg.solvers.inference import BASE, INFINITE, NOT_USED, Summary, summarize_fit
from dpreg.solvers.solver import Solver
from dpreg.tables.levels import BaseLevels

FAMILY = {"logistic": sm.families.Binomial(), "poisson": sm.families.Poisson()}


@pytest.fixture(scope="module")
def frame():
    """Two categories, of which the most frequent levels come late in the rows and in the alphabet."""
    rng = np.random.default_rng(1)
    n = 1201
    kind = rng.choice(["a", "b", "c:1", "d"], n, p=[0.1, 0.2, 0.3, 0.4])
    size = rng.choice(["large", "medium, or so", "small"], n, p=[0.2, 0.3, 0.5])
    x = rng.normal(size=n)
    z = 0.5 * x + (kind == "a") - 0.7 * (kind == "c:1") + 0.3 * (size == "small") - 1
    return pd.DataFrame(
        {
            "kind": kind,
            "size": size,
            "x": x,
            "y": z + rng.normal(size=n),
            "logistic": (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float),
            "poisson": rng.poisson(np.exp(z)).astype(float),
        }
    )


def read(frame, folder, target, **settings):
    frame.to_parquet(folder / "t.parquet")
    columns = Columns(
        target=(target,),
        features=("kind", "x", "size"),
        categorical=("kind", "size"),
        validation_fraction=0.0,
        **settings,
    )
    return dpreg.read_table(str(folder / "t.parquet"), columns, cache_dir=str(folder), dtype=np.float64)


def solved(data, solve, names=()):
    """Returns the fit in the units of the table; it has the same bits on 1, 3 and 8 devices."""
    levels = BaseLevels.named(data.schema, names)
    fits = [
        solve(Solver(data.train, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8, levels=levels))
        for devices in (1, 3, 8)
    ]
    assert len({(fit.w.tobytes(), fit.b.tobytes()) for fit in fits}) == 1
    return fits[0].in_units(*data.schema.units)


def compare(summary, theirs, rename, rtol=1e-6, skip=()):
    """Compares estimates and standard errors by name with those of statsmodels."""
    own = {c.name: c for c in summary.coefficients if c.used and c.name not in skip}
    assert {rename(name) for name in theirs.params.index} == {*own}
    for name, estimate in theirs.params.items():
        found = own[rename(name)]
        np.testing.assert_allclose(found.estimate, estimate, rtol=rtol, atol=1e-9)
        np.testing.assert_allclose(found.std_error, theirs.bse[name], rtol=rtol)


def renamed(name):
    """The name of dpreg for a coefficient of patsy, such as C(kind, Treatment('a'))[T.b]."""
    if "[" not in name:
        return {"Intercept": "(intercept)"}.get(name, name)
    column, level = name.split("[", 1)
    return f"{column.removeprefix('C(').split(',')[0].rstrip(')')}={level.removeprefix('T.').removesuffix(']')}"


@pytest.mark.parametrize(
    ("names", "kind", "size"),
    [((), "d", "small"), (("kind:b",), "b", "small"), (("size:medium, or so", "kind:c:1"), "c:1", "medium, or so")],
)
@pytest.mark.parametrize("loss", ["y", "logistic", "poisson"])
def test_coefficients_are_contrasts_with_the_base_level_as_in_statsmodels(frame, tmp_path, loss, names, kind, size):
    data = read(frame, tmp_path, loss)
    formula = f"{loss} ~ C(kind, Treatment('{kind}')) + x + C(size, Treatment('{size}'))"
    if loss == "y":
        fit = solved(data, lambda solver: solver.least_squares(), names)
        theirs = smf.ols(formula, frame).fit()
    else:
        fit = solved(data, lambda solver: solver.newton(FAMILIES[loss])[0], names)
        theirs = smf.glm(formula, frame, family=FAMILY[loss]).fit(tol=1e-14)
    summary = summarize_fit(fit, data.schema.features)
    compare(summary, theirs, renamed)
    assert {c.name for c in summary.coefficients if c.note == BASE} == {f"kind={kind}", f"size={size}"}
    assert {c.name for c in summary.coefficients if c.remark == NOT_USED} == {"kind=other", "size=other"}
    assert all(c.estimate == 0 for c in summary.coefficients if not c.used)
    assert summary.deviance == pytest.approx(theirs.ssr if loss == "y" else theirs.deviance, rel=1e-9)


def test_without_an_intercept_the_first_category_keeps_all_its_levels(frame, tmp_path):
    data = read(frame, tmp_path, "y", intercept=False)
    fit = solved(data, lambda solver: solver.least_squares(intercept=False))
    theirs = smf.ols("y ~ 0 + C(kind) + x + C(size, Treatment('small'))", frame).fit()
    compare(summarize_fit(fit, data.schema.features), theirs, renamed)


def test_coefficients_do_not_depend_on_the_order_of_the_rows(frame, tmp_path):
    """Each pivot of a decomposition may depend on it; base levels do not."""
    found = []
    for order in (np.arange(len(frame)), np.arange(len(frame))[::-1]):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        data = read(frame.iloc[order], folder, "y")
        fit = solved(data, lambda solver: solver.least_squares())
        found.append(dict(zip(data.schema.features, fit.w[:, 0], strict=True)))
    assert {*found[0]} == {*found[1]}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_a_penalty_applies_to_all_levels_alike(frame, tmp_path):
    data = read(frame, tmp_path, "y")
    fit = solved(data, lambda solver: solver.least_squares(l2=0.1))
    assert fit.left_out == ()
    assert np.count_nonzero(fit.w) == 8


def test_robust_and_softmax_regression_leave_out_the_base_levels_and_predict_as_before(frame, tmp_path):
    data = read(frame, tmp_path, "y")
    mesh, levels = Mesh(np.array(jax.devices()[:2]), ("data",)), BaseLevels.named(data.schema, ())
    config = Config(dataset="t", target=("y",), loss="huber")
    ours, before = (Solver(data.train, mesh, 8, levels=of).solve(config) for of in (levels, None))
    x = data.train.x
    np.testing.assert_allclose(x @ ours.w + ours.b, x @ before.w + before.b, atol=1e-9)
    assert (ours.w[list(levels.left_out(True))] == 0).all()
    assert (before.w[list(levels.left_out(True))] != 0).all()


SCHEMA = Schema(
    (
        Category("c", ("u", "v", "1"), (3, 2, 1), 1.0),
        Category("c:u", ("v",), (3,)),
    ),
    (),
)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("d:u",), r"base=\('d:u',\): it does not begin with a categorical column and a colon; use one of 'c', 'c:u'"),
        (("c",), r"it does not begin with a categorical column and a colon"),
        (("c:w",), r"column 'c' has no level 'w' in the rows to fit; use one of 'u', 'v', '1', 'other'"),
        (("c:u:other",), r"column 'c' has no level 'u:other' in the rows to fit"),
        (("c:u", "c:v"), r"column 'c' is named twice; name one level"),
    ],
)
def test_unknown_base_levels_are_refused_in_one_line(names, message):
    with pytest.raises(dpreg.InputError, match=message):
        BaseLevels.named(SCHEMA, names)


def test_a_level_is_named_by_any_spelling_and_may_have_colons():
    assert BaseLevels.named(SCHEMA, ("c:1.0", "c:u:v")).chosen == {"c": 2, "c:u": 0}
    assert BaseLevels.named(SCHEMA, ("c:other",)).left_out(True) == (3, 4)
    both = Schema((Category("c", ("u:v",), (3,)), Category("c:u", ("v",), (3,))), ())
    with pytest.raises(dpreg.InputError, match=r"it may name a level of 'c', 'c:u'; rename one of these columns"):
        BaseLevels.named(both, ("c:u:v",))


def run(folder, *flags, rc=0):
    """Runs a fit of the table in a folder; returns (outcome, summary)."""
    done = forked.run(
        "-m",
        "dpreg.main",
        "--platform=cpu",
        f"--dataset={folder}/t.parquet",
        f"--cache_dir={folder}",
        f"--workdir={folder}/run",
        "--features=kind,x,size",
        "--categorical=kind,size",
        "--validation_fraction=0",
        *flags,
    )
    assert done.returncode == rc, done.stderr
    return done, json.loads((folder / "run" / "summary.json").read_text()) if not rc else {}


def test_the_command_prints_the_base_level_and_keeps_predictions(frame, tmp_path):
    frame.to_parquet(tmp_path / "t.parquet")
    done, summary = run(tmp_path, "--target=y", '--base="size:medium, or so",kind:c:1', "--precision=float64")
    assert "kind=c:1" in done.stdout
    assert done.stdout.count("the base level") == 2
    assert summary["optimality"]["base_levels"] == ["kind=c:1", "size=medium, or so"]
    assert summary["optimality"]["not_used"] == ["kind=other", "size=other"]
    theirs = smf.ols("y ~ C(kind) + x + C(size)", frame).fit()
    predict = pathlib.Path(tmp_path, "run", "model", "predict.py")
    frame[["kind", "x", "size"]].to_csv(tmp_path / "t.csv", index=False)
    text = forked.run(predict, tmp_path / "t.csv").stdout
    predicted = np.array([float(line.split(",")[1]) for line in text.split()[1:]])
    np.testing.assert_allclose(predicted, theirs.fittedvalues, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--base=kind:z",), "--base=kind:z: column 'kind' has no level 'z' in the rows to fit; use one of 'd', 'c:1'"),
        (("--base=kind:a", "--l2=1"), "--base=kind:a: it applies only to exact solutions of linear models without a"),
        (("--base=kind:a", "--lr=0.1"), "--base=kind:a: it applies only to exact solutions of linear models without a"),
    ],
)
def test_base_levels_that_cannot_be_used_are_refused(frame, tmp_path, flags, message):
    frame.to_parquet(tmp_path / "t.parquet")
    done, _ = run(tmp_path, "--target=y", *flags, rc=2)

    assert message in done.stderr


@pytest.fixture(scope="module")
def eventless(frame):
    """The frame with further levels: "none", with targets 0 alone, the most frequent one; and "all", with targets 1."""
    rng = np.random.default_rng(2)
    more = frame.sample(700, random_state=3).assign(kind="none", logistic=0.0, poisson=0.0)
    ones = frame.sample(20, random_state=4).assign(kind="all", logistic=1.0)
    return pd.concat([frame, more, ones]).iloc[rng.permutation(1921)].reset_index(drop=True)


@pytest.mark.parametrize(("loss", "infinite"), [("logistic", {"none": -1, "all": 1}), ("poisson", {"none": -1})])
def test_a_level_without_events_has_its_row_and_others_are_those_of_the_limit(eventless, tmp_path, loss, infinite):
    data = read(eventless, tmp_path, loss)
    fit = solved(data, lambda solver: solver.newton(FAMILIES[loss])[0])
    kept = eventless[~eventless["kind"].isin(infinite)]
    theirs = smf.glm(
        f"{loss} ~ C(kind, Treatment('d')) + x + C(size, Treatment('small'))", kept, family=FAMILY[loss]
    ).fit(tol=1e-14)
    summary = summarize_fit(fit, data.schema.features)
    without = {c.name: c.estimate for c in summary.coefficients if c.note in INFINITE.values()}
    assert without == {f"kind={level}": sign * np.inf for level, sign in infinite.items()}
    compare(summary, theirs, renamed, skip=without)
    assert summary.deviance == pytest.approx(theirs.deviance, rel=1e-9)
    assert summary.null_deviance == pytest.approx(theirs.null_deviance, rel=1e-9)
    assert summary.log_likelihood == pytest.approx(theirs.llf, rel=1e-9)
    assert (summary.rows, summary.degrees_of_freedom) == (len(kept), theirs.df_resid)
    text = str(summary)
    assert text.count("no finite estimate: the targets of its rows are all ") == len(infinite)
    assert "-inf" in text
    again = Summary.from_json(json.loads(to_json(summary.to_json())))  # which has null for numbers that are not finite
    assert str(again) == text


def test_weights_of_0_and_of_counts_apply_to_levels_without_events(eventless, tmp_path):
    """A row with an event does not count if its weight is 0."""
    event = eventless.iloc[:1].assign(kind="none", logistic=1.0, weight=0.0)
    rows = pd.concat([event, eventless.assign(weight=np.arange(1921) % 2 + 1.0)])
    data = read(rows, tmp_path, "logistic", weight_column="weight")
    fit = solved(data, lambda solver: solver.newton(FAMILIES["logistic"])[0])
    kept = rows[~rows["kind"].isin(["none", "all"])]
    theirs = smf.glm(
        "logistic ~ C(kind, Treatment('d')) + x + C(size, Treatment('small'))",
        kept.loc[kept.index.repeat(kept["weight"].astype(int))],
        family=FAMILY["logistic"],
    ).fit(tol=1e-14)
    compare(summarize_fit(fit, data.schema.features), theirs, renamed, skip=("kind=none", "kind=all"))


@pytest.mark.parametrize("loss", ["poisson", "tweedie", "negative_binomial"])
def test_all_rows_of_a_shard_may_have_a_level_without_events(tmp_path, loss):
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"kind": ["none"] * 40 + ["a", "b"] * 7, "size": "small", "x": rng.normal(size=54)})
    frame["y"] = rng.poisson(2, 54) * (frame["kind"] != "none") + 0.5 * (frame["kind"] == "a") * (loss == "tweedie")
    config = Config(loss=loss, solver="exact", precision="float64", negative_binomial_alpha=0.5)
    kept = frame[frame["kind"] != "none"]
    theirs = smf.glm(
        "y ~ C(kind, Treatment('a')) + x",
        kept,
        family={
            "poisson": sm.families.Poisson(),
            "tweedie": sm.families.Tweedie(sm.families.links.Log(), 1.5),
            "negative_binomial": sm.families.NegativeBinomial(alpha=0.5),
        }[loss],
    ).fit(tol=1e-14)
    for devices in (1, 8):
        data = read(frame, tmp_path, "y")
        mesh, levels = Mesh(np.array(jax.devices()[:devices]), ("data",)), BaseLevels.named(data.schema, ())
        fit = Solver(data.train, mesh, 8, levels=levels).solve(config).fit
        found = {c.name: c.estimate for c in summarize_fit(fit, data.schema.features).coefficients}
        b = found["(intercept)"] + found["kind=a"]
        assert found["kind=none"] == -np.inf
        assert found["x"] == pytest.approx(theirs.params["x"] * frame["x"].std(ddof=0), rel=1e-6)
        assert found["kind=b"] - found["kind=a"] == pytest.approx(theirs.params.iloc[1], rel=1e-6)
        assert b == pytest.approx(theirs.params.iloc[0] + theirs.params["x"] * frame["x"].mean(), rel=1e-6)


def test_a_named_base_level_without_events_is_refused(eventless, tmp_path):
    data = read(eventless, tmp_path, "logistic")
    levels = BaseLevels.named(data.schema, ("kind:none",))
    solver = Solver(data.train, Mesh(np.array(jax.devices()[:1]), ("data",)), 8, levels=levels)
    with pytest.raises(dpreg.InputError, match=r"base=\('kind:none',\): all targets of its rows are alike"):
        solver.newton(FAMILIES["logistic"])


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_predictions_of_a_level_without_events_are_those_of_the_limit(eventless, tmp_path, loss):
    """Rows of a level that is not in the table get the mean of the levels with a finite estimate."""
    eventless.to_parquet(tmp_path / "t.parquet")
    done, summary = run(tmp_path, f"--target={loss}", f"--loss={loss}", "--precision=float64")
    assert "solver exact" in done.stderr
    assert "solved with" not in done.stderr
    assert "no finite estimate" in done.stdout
    assert summary["parameters"]["w"]["kind=none"] == -10000
    infinite = ("none", "all") if loss == "logistic" else ("none",)
    kept = eventless[~eventless["kind"].isin(infinite)]
    theirs = smf.glm(f"{loss} ~ C(kind) + x + C(size)", kept, family=FAMILY[loss]).fit(tol=1e-14)
    assert summary["train_loss"] == pytest.approx(theirs.deviance / 2 / len(eventless), rel=1e-9)
    new = pd.DataFrame({"kind": [*kept["kind"].unique(), *infinite, "unseen"], "x": 0.5, "size": "large"})
    new.to_csv(tmp_path / "new.csv", index=False)
    known = new[: -1 - len(infinite)]
    share = kept["kind"].value_counts(normalize=True)[known["kind"]].to_numpy()
    linear = theirs.predict(known, which="linear").to_numpy()
    mean = theirs.family.link.inverse(share @ linear)
    expected = [*theirs.predict(known), 0.0, *([1.0] if loss == "logistic" else []), mean]
    text = forked.run(tmp_path / "run" / "model" / "predict.py", tmp_path / "new.csv").stdout
    np.testing.assert_allclose([float(line.split(",")[1]) for line in text.split()[1:]], expected, rtol=1e-6)
    done = forked.run(
        "-m",
        "dpreg.main",
        *("--platform=cpu", "--mode=predict", f"--workdir={tmp_path}/run", f"--dataset={tmp_path}/new.csv"),
        f"--output={tmp_path}/p.csv",
        "--interval=0.9",
    )
    assert done.returncode == 0, done.stderr
    low = pd.read_csv(tmp_path / "p.csv")[f"low_{loss}"]
    is_infinite = new["kind"].isin(infinite)
    assert low.isna().tolist() == is_infinite.tolist()
    assert (low[~is_infinite] < np.array(expected)[~is_infinite]).all()
    table = forked.run("-m", "dpreg.main", "--platform=cpu", "--mode=summary", f"--workdir={tmp_path}/run").stdout
    assert re.search(r"^kind=none +-inf   no finite estimate", table, re.MULTILINE)
    np.testing.assert_allclose(pd.read_csv(tmp_path / "p.csv").iloc[:, 1], expected, rtol=1e-6)


def test_levels_that_separate_all_rows_get_a_penalty_as_before(frame, tmp_path):
    frame.assign(logistic=(frame["kind"] == "a") * 1.0).to_parquet(tmp_path / "t.parquet")
    done, summary = run(tmp_path, "--target=logistic", "--loss=logistic", "--base=kind:b")
    assert "no finite weights have the least loss" in done.stderr
    assert f"--l2={1 / len(frame)!r}" in (tmp_path / "run" / "flags.cfg").read_text()
    assert np.isfinite([*summary["parameters"]["w"].values()]).all()


def test_robust_errors_and_other_families_are_those_of_a_fit_without_the_level(eventless, tmp_path):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    kept = eventless[eventless["kind"] != "none"]
    formula = "poisson ~ C(kind, Treatment('d')) + x + C(size, Treatment('small'))"
    data = read(eventless, tmp_path, "poisson")
    for settings, family, covariance in (
        ({"loss": "poisson"}, sm.families.Poisson(), "HC0"),
        ({"loss": "tweedie", "tweedie_power": 1.5}, sm.families.Tweedie(sm.families.links.Log(), 1.5), "nonrobust"),
        (
            {"loss": "negative_binomial", "negative_binomial_alpha": 0.7},
            sm.families.NegativeBinomial(alpha=0.7),
            "nonrobust",
        ),
    ):
        kind = {} if covariance == "nonrobust" else {"covariance": covariance}
        config = Config(dataset="t", target=("poisson",), categorical=("kind", "size"), **settings, **kind)
        solution = Solver(data.train, mesh, 8, levels=BaseLevels.named(data.schema, ())).solve(config)
        theirs = smf.glm(formula, kept, family=family).fit(tol=1e-14, cov_type=covariance)
        summary = summarize_fit(solution.fit.in_units(*data.schema.units), data.schema.features)
        compare(summary, theirs, renamed, rtol=2e-6, skip=("kind=none",))
        assert solution.infinite == (data.schema.features.index("kind=none"),)


def test_the_estimated_shape_of_counts_is_that_without_the_level(eventless, tmp_path):
    mesh, found = Mesh(np.array(jax.devices()[:2]), ("data",)), []
    rng = np.random.default_rng(0)
    mixed = eventless.assign(poisson=eventless["poisson"] * (1 + rng.poisson(1, len(eventless))))
    for frame in (mixed, mixed[mixed["kind"] != "none"]):
        folder = tmp_path / str(len(frame))
        folder.mkdir()
        data = read(frame, folder, "poisson")
        config = Config(dataset="t", target=("poisson",), loss="negative_binomial")
        found.append(Solver(data.train, mesh, 8, levels=BaseLevels.named(data.schema, ())).solve(config).alpha)
    assert found[0] == pytest.approx(found[1], rel=1e-8)
