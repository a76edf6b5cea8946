"""Formulas beside statsmodels: coefficients, standard errors and predictions, on any number of devices."""

import json
import re

import forked
import jax
import numpy as np
import pandas as pd
import pytest
import scipy
import statsmodels.api as sm
import statsmodels.formula.api as smf
from jax.sharding import Mesh

import dpreg
from dpreg.config import Columns
from dpreg.data import terms
from dpreg.data.schema import Category, Schema
from dpreg.solvers.glm import FAMILIES
from dpreg.solvers.inference import summarize_fit
from dpreg.solvers.solver import Solver
from dpreg.tables import formula
from dpreg.tables.levels import BaseLevels

BASES = ("kind:a", "size:large", "code:1")  # the first levels, as those of patsy


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(5)
    n = 901
    kind, size = rng.choice(["a", "b", "c"], n, p=[0.2, 0.3, 0.5]), rng.choice(["large", "small"], n)
    x, z, w = rng.normal(size=n), 100 + 3 * rng.normal(size=n), rng.lognormal(size=n)
    mean = np.sin(2 * x) + (z - 100) / 3 * (kind == "a") + 0.2 * np.log(w) + (size == "small") * (kind == "c")
    return pd.DataFrame(
        {
            "kind": kind,
            "size": size,
            "code": rng.integers(1, 4, n),
            "x": x,
            "z": z,
            "w": w,
            "y": mean + rng.normal(size=n),
            "count": rng.poisson(np.exp(mean / 2)).astype(float),
        }
    )


def read(frame, folder, text, **settings):
    folder = folder / re.sub(r"\W", "_", text + str(settings))[:60]
    folder.mkdir(exist_ok=True)
    frame.to_csv(folder / "t.csv", index=False, float_format="%.17g")
    settings = {"validation_fraction": 0.0} | settings
    columns = Columns(formula=text, **settings)
    return dpreg.read_table(str(folder / "t.csv"), columns, cache_dir=str(folder), dtype=np.float64)


def fitted(data, loss=None, intercept=True, names=BASES):
    """Returns the summary of the fit, which has the same bits on 1, 3 and 8 devices."""
    columns = {column.name for column in data.schema.inputs if isinstance(column, Category)}
    levels = BaseLevels.named(data.schema, [name for name in names if name.split(":")[0] in columns])
    fits = []
    for devices in (1, 3, 8):
        solver = Solver(data.train, Mesh(np.array(jax.devices()[:devices]), ("data",)), 8, levels=levels)
        fits.append(
            solver.newton(FAMILIES[loss], intercept=intercept)[0]
            if loss
            else solver.least_squares(0.0, intercept, True)
        )
    assert len({(fit.w.tobytes(), fit.b.tobytes()) for fit in fits}) == 1
    fit = fits[0].in_units(*data.schema.units)
    return summarize_fit(fit, data.schema.features)


def renamed(name):
    """The parts of a coefficient's name of patsy, as dpreg calls them."""
    if name == "Intercept":
        return frozenset(["(intercept)"])
    parts = re.split(r":(?![^()\[\]]*[\])])", name)
    return frozenset(
        re.sub(r"\[(?:T\.)?(\w+)\]$", r"=\1", re.sub(r"C\((\w+)\)", r"\1", part)) if "bs(" not in part else part
        for part in parts
    )


def compare(summary, theirs, rtol=1e-6):
    own = {frozenset(c.name.split(":")): c for c in summary.coefficients if c.used}
    assert {renamed(name) for name in theirs.params.index} == {*own}
    for name, estimate in theirs.params.items():
        found = own[renamed(name)]
        np.testing.assert_allclose(found.estimate, estimate, rtol=rtol, atol=1e-8)
        np.testing.assert_allclose(found.std_error, theirs.bse[name], rtol=rtol)


@pytest.mark.parametrize(
    "text",
    [
        "y ~ x + kind",
        "y ~ x * kind",
        "y ~ kind * size",
        "y ~ kind * size * x",
        "y ~ kind + kind:x",
        "y ~ kind:x",
        "y ~ (x + z + kind)**2",
        "y ~ C(code) + x / z",
        "y ~ bs(x, df=5) + I(z**2) + np.log(w)",
        "y ~ bs(x, df=6, degree=2) * kind + I(x * z)",
        "y ~ bs(x, knots=(-0.5, 0.5), degree=1) + np.exp(x) - x",
        "np.log(w) ~ x + kind",
    ],
)
def test_coefficients_and_standard_errors_are_those_of_statsmodels(frame, tmp_path, text):
    data = read(frame, tmp_path, text)
    summary, theirs = fitted(data), smf.ols(text, frame).fit()
    compare(summary, theirs)
    assert summary.degrees_of_freedom == theirs.df_resid
    assert summary.r2 == pytest.approx(theirs.rsquared, rel=1e-9)


@pytest.mark.parametrize("text", ["y ~ 0 + kind + size", "y ~ x:kind - 1", "y ~ 0 + kind:size + x"])
def test_formulas_without_an_intercept_are_those_of_statsmodels(frame, tmp_path, text):
    data = read(frame, tmp_path, text)
    compare(fitted(data, intercept=False), smf.ols(text, frame).fit())


@pytest.mark.filterwarnings("ignore:The design matrix is rank-deficient")
@pytest.mark.parametrize(
    "text",
    ["y ~ kind:size", "y ~ cr(x, df=5) + kind", "y ~ cr(x, df=4) * kind", "y ~ bs(x, df=5, include_intercept=True)"],
)
def test_other_parametrizations_have_the_same_fit(frame, tmp_path, text):
    """The columns of patsy are others, or combinations of each other, and span the same space."""
    data = read(frame, tmp_path, text)
    summary, theirs = fitted(data), smf.ols(text, frame).fit()
    assert summary.deviance == pytest.approx(theirs.ssr, rel=1e-9)
    assert summary.degrees_of_freedom == theirs.df_resid


def test_generalized_linear_models_with_formulas_are_those_of_statsmodels(frame, tmp_path):
    text = "count ~ bs(x, df=4) + kind * size"
    summary = fitted(read(frame, tmp_path, text), "poisson")
    theirs = smf.glm(text, frame, family=sm.families.Poisson()).fit(tol=1e-14)
    compare(summary, theirs)
    assert summary.deviance == pytest.approx(theirs.deviance, rel=1e-9)


@pytest.mark.filterwarnings("ignore:The design matrix is rank-deficient")
def test_natural_splines_of_r_span_those_of_patsy_with_the_same_knots(frame, tmp_path):
    """The knots of ns are quantiles of all rows, those of cr quantiles of distinct values; here all are distinct."""
    summary = fitted(read(frame, tmp_path, "y ~ ns(x, df=4)"))
    theirs = smf.ols("y ~ cr(x, df=5)", frame).fit()
    assert summary.deviance == pytest.approx(theirs.ssr, rel=1e-9)
    assert [c.name for c in summary.coefficients[1:]] == [f"ns(x, df=4)[{k}]" for k in range(4)]
    assert all(c.used for c in summary.coefficients)


def test_a_dot_stands_for_all_other_columns(frame, tmp_path):
    data = read(frame, tmp_path, "y ~ . - z", exclude=("count",))
    assert [column.name for column in data.schema.inputs] == ["kind", "size", "code", "x", "w"]
    data = read(frame, tmp_path, "y ~ .:x", exclude=("count", "size", "w", "code"))
    assert data.schema.features == ("x", "kind=c:x", "kind=b:x", "kind=a:x", "kind=other:x", "z:x")


def test_knots_are_those_of_the_whole_table_with_its_weights(frame, tmp_path, monkeypatch):
    """They do not depend on chunks; a weight of 2 counts as two rows, and one of 0 as none."""
    rng = np.random.default_rng(0)
    weight = rng.integers(0, 3, len(frame))
    rounded = frame.assign(x=frame["x"].round(1))  # ties
    repeated = rounded.loc[rounded.index.repeat(weight)]
    text = "y ~ bs(x, df=7) + cr(z, df=4)"
    monkeypatch.setattr(formula, "_COMPACTED", 100)
    data = read(rounded.assign(weight=weight), tmp_path, text, weight_column="weight")
    knots = {factor.kind: factor.knots for term in data.schema.terms for factor in term.factors}
    x, z = repeated["x"], np.unique(repeated["z"])
    np.testing.assert_allclose(knots["bs"], np.quantile(x, np.linspace(0, 1, 6)), rtol=1e-12)
    np.testing.assert_allclose(knots["cr"], np.quantile(z, np.linspace(0, 1, 4)), rtol=1e-12)
    half = read(rounded.assign(weight=weight / 2 + 0.25 * (weight > 0)), tmp_path, text, weight_column="weight")
    assert half.schema.terms[0].factors[0].knots[0] == x.min()


def test_splines_are_those_of_scipy_also_beyond_the_boundaries():
    rng = np.random.default_rng(0)
    x, knots = rng.uniform(-2, 6, 200), np.array([0.0, 1.0, 1.0, 2.5, 4.0])
    for degree in (0, 1, 2, 3, 5):
        padded = np.concatenate([[0.0] * degree, knots, [4.0] * degree])
        theirs = scipy.interpolate.BSpline(padded, np.eye(len(knots) + degree - 1), degree)(x)
        np.testing.assert_allclose(terms.b_splines(x, knots, degree), theirs, atol=1e-9)
    knots = np.array([0.0, 1.0, 2.5, 4.0])
    natural = scipy.interpolate.CubicSpline(knots, np.eye(4), bc_type="natural")
    inside = np.clip(x, 0, 4)
    expected = natural(inside) + (x - inside)[:, None] * natural(inside, 1)
    np.testing.assert_allclose(terms.natural_splines(x, knots), expected, atol=1e-12)
    np.testing.assert_allclose(terms.natural_splines(x, knots[:2]), np.stack([1 - x, x], axis=1), atol=1e-12)


def run(folder, *flags, rc=0, name="run"):
    done = forked.run(
        "-m",
        "dpreg.main",
        "--platform=cpu",
        f"--dataset={folder}/t.csv",
        f"--cache_dir={folder}",
        f"--workdir={folder}/{name}",
        *flags,
    )
    assert done.returncode == rc, done.stderr
    return done


def test_the_command_fits_predicts_and_evaluates_a_formula(frame, tmp_path):
    text = "y ~ bs(x, df=5) * kind + np.log(w) + C(code)"
    frame.to_csv(tmp_path / "t.csv", index=False, float_format="%.17g")
    done = run(tmp_path, f"--formula={text}", "--precision=float64", "--base=kind:a", "--validation_fraction=0")
    theirs = smf.ols(text, frame).fit()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert lines.count("kind=a") == 1
    assert "bs(x, df=5)[0]:kind=b" in lines
    assert "bs(x, df=5)[0]:kind=a" not in lines  # a combination of others
    assert "has one value" not in done.stderr
    assert summary["parameters"]["w"]["np.log(w)"] == pytest.approx(theirs.params["np.log(w)"], rel=1e-6)
    assert summary["fit"][0]["deviance"] == pytest.approx(theirs.ssr, rel=1e-9)
    run(tmp_path, "--mode=predict", f"--output={tmp_path}/p.csv")
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / "p.csv")["predicted_y"], theirs.fittedvalues, rtol=1e-6, atol=1e-6
    )
    found = json.loads(run(tmp_path, "--mode=evaluate").stdout)
    assert found["r2"] == pytest.approx(theirs.rsquared, rel=1e-6)
    script = tmp_path / "run" / "model" / "predict.py"
    outcome = forked.run(script, tmp_path / "t.csv")
    predicted = [float(line.split(",")[1]) for line in outcome.stdout.split()[1:]]
    np.testing.assert_allclose(predicted, theirs.fittedvalues, rtol=1e-9, atol=1e-9)
    # The script imports nothing but NumPy and the standard library, from any folder.
    blocked = (
        "import importlib.util, sys\n"
        "for name in ('dpreg', 'formulaic', 'pandas', 'scipy', 'jax'):\n    sys.modules[name] = None\n"
        f"spec = importlib.util.spec_from_file_location('own', {str(script)!r})\n"
        "own = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(own)\n"
        "print(own.predict({'x': [0.5], 'kind': ['a'], 'w': [1], 'code': [2]})[0, 0])"
    )
    new = pd.DataFrame({"x": [0.5], "kind": ["a"], "w": [1.0], "code": [2]})
    assert float(forked.run("-c", blocked, cwd=tmp_path).stdout) == pytest.approx(theirs.predict(new)[0], rel=1e-9)
    (tmp_path / "zero.csv").write_text("x,kind,w,code\n0.5,a,1,1\n0.5,a,0,1\n")
    outcome = forked.run(script, tmp_path / "zero.csv")
    assert (outcome.returncode, outcome.stderr) == (
        2,
        "predict.py: row 2: np.log(w) is not finite; correct that value\n",
    )


def test_steps_and_networks_take_the_features_of_a_formula(frame, tmp_path):
    frame.to_csv(tmp_path / "t.csv", index=False, float_format="%.17g")
    formula_flag = "--formula=y ~ x + I(x**2) + kind:x + size"
    run(tmp_path, formula_flag, "--solver=sgd", "--validation_fraction=0")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["optimality"]["gap"] < 0.05
    run(tmp_path, formula_flag, "--model=mlp", "--max_epochs=2", name="mlp")
    run(tmp_path, "--mode=predict", f"--output={tmp_path}/p.csv", name="mlp")
    assert len(pd.read_csv(tmp_path / "p.csv")) == len(frame)


def test_missing_values_are_filled_or_get_no_prediction(frame, tmp_path):
    holed = frame.assign(w=frame["w"].where(frame.index % 7 > 0), kind=frame["kind"].where(frame.index % 11 > 0))
    text = "y ~ np.log(w) + x * kind"
    data = read(holed, tmp_path, text, missing="drop")
    compare(fitted(data), smf.ols(text, holed.dropna()).fit())
    data = read(holed, tmp_path, text, missing="mean")
    filled = holed.assign(w=holed["w"].fillna(holed["w"].mean()), kind=holed["kind"].fillna("other"))
    compare(fitted(data), smf.ols(text, filled).fit())
    data = read(frame, tmp_path, text)
    trainer = dpreg.Trainer(max_epochs=1)
    trainer.fit(dpreg.LinearRegressionScratch(len(data.schema.features), lr=0.01), data)
    columns = {"w": [1.0, None, 2.0], "x": [0.0, 0.0, None], "kind": ["a", "b", "c"]}
    assert np.isnan(trainer.predict(columns)).ravel().tolist() == [False, True, True]
    with pytest.raises(dpreg.InputError, match=r"row 2: 'np.log\(w\)' is not finite once it is scaled; correct that"):
        trainer.predict(columns | {"w": [1.0, 0.0, 1.0]})


def test_columns_of_text_are_categories_wherever_the_first_text_is(frame, tmp_path):
    (tmp_path / "t.csv").write_text("k,y\n" + "".join(f"{'uv'[i % 2]},{i}\n" for i in range(9)) + ",3\n")
    columns = Columns(formula="y ~ k", validation_fraction=0.0, missing="drop")
    data = dpreg.read_table(str(tmp_path / "t.csv"), columns, cache_dir=str(tmp_path))
    assert data.schema.features == ("k=u", "k=v", "k=other")
    for text in ("k,y\n1,2\n2,3\nu,4\n", "k,y\nu,2\n2,3\n1,4\n"):
        (tmp_path / "m.csv").write_text(text)
        with pytest.raises(dpreg.InputError, match=r"column 'k' has numbers such as [12] and texts such as 'u'"):
            dpreg.read_table(str(tmp_path / "m.csv"), columns, cache_dir=str(tmp_path))
    for name, setting in (("C(k)", ()), ("k", ("k",))):
        columns = Columns(formula=f"y ~ {name}", validation_fraction=0.0, categorical=setting)
        data = dpreg.read_table(str(tmp_path / "m.csv"), columns, cache_dir=str(tmp_path))
        assert len(data.schema.features) == 4


def test_names_with_other_characters_are_quoted(frame, tmp_path):
    odd = frame.rename(columns={"x": "x 1", "kind": "kind:of", "z": "z-score"})
    data = read(odd, tmp_path, "y ~ `x 1` * `kind:of` + log(`z-score`) + {Q('x 1') ** 2}")
    theirs = smf.ols("y ~ x * kind + np.log(z) + I(x**2)", frame).fit()
    assert fitted(data).deviance == pytest.approx(theirs.ssr, rel=1e-9)


def test_the_schema_is_the_same_from_its_file(frame, tmp_path):
    data = read(frame, tmp_path, "y ~ bs(x, df=5) * kind + cr(z, df=3) + log(w) + I(-x ** 2)")
    assert Schema.from_json(json.loads(json.dumps(data.schema.to_json()))) == data.schema
    again = read(frame, tmp_path, "y ~ bs(x, df=5) * kind + cr(z, df=3) + log(w) + I(-x ** 2)")
    assert again.schema == data.schema
    assert again.fingerprint() == data.fingerprint()


def test_a_description_of_a_formula_that_dpreg_does_not_write_is_refused(frame, tmp_path):
    schema = read(frame, tmp_path, "y ~ bs(x, df=5) * kind + cr(z, df=3) + log(w) + I(-x ** 2)").schema
    spline, kind, natural, logarithm, *_ = range(len(schema.terms))
    changes = [
        lambda terms: terms[spline].update(mean=[0.0]),
        lambda terms: terms[spline].update(factors=[]),
        lambda terms: terms[spline]["scale"].__setitem__(0, 0.0),
        lambda terms: terms[spline]["mean"].__setitem__(0, float("inf")),
        lambda terms: terms[spline]["constant"].__setitem__(0, 0),
        lambda terms: terms[spline]["factors"][0].update(kind="tp"),
        lambda terms: terms[spline]["factors"][0].update(degree=-1),
        lambda terms: terms[spline]["factors"][0].update(knots=[0.0]),
        lambda terms: terms[spline]["factors"][0].update(more=1),
        lambda terms: terms[spline]["factors"][0]["knots"].reverse(),
        lambda terms: terms[natural]["factors"][0]["knots"].__setitem__(1, terms[natural]["factors"][0]["knots"][0]),
        lambda terms: terms[kind]["factors"][0].update(text="x"),
        lambda terms: terms[logarithm]["factors"][0].update(expression=["system", ["column", "w"]]),
        lambda terms: terms[logarithm]["factors"][0].update(expression=["log", ["column", "kind"]]),
        lambda terms: terms[logarithm]["factors"][0].update(expression=["number", 1]),
        lambda terms: terms[logarithm]["factors"][0].update(expression=["log", ["column", "w"], ["column", "w"]]),
    ]
    for change in changes:
        values = json.loads(json.dumps(schema.to_json()))
        change(values["terms"])
        with pytest.raises((ValueError, TypeError, KeyError)):
            Schema.from_json(values)


def test_a_column_of_one_value_is_not_used(frame, tmp_path):
    data = read(frame.assign(one=7.0), tmp_path, "y ~ x * one + one:kind")
    summary, theirs = fitted(data), smf.ols("y ~ x + kind", frame).fit()
    assert summary.deviance == pytest.approx(theirs.ssr, rel=1e-9)
    assert {c.name for c in summary.coefficients if not c.used and "kind" not in c.name} == {"one", "x:one"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y ~ x +", "cannot be read"),
        ("y ~ x | z", "cannot be read"),
        ("y ~ (x", "cannot be read"),
        ("y + z ~ x", "to the left of the tilde, give one column or the logarithm of one"),
        ("I(y) ~ x", "to the left of the tilde"),
        ("y ~ 2:x", "'2' in a term is not supported"),
        ("y ~ 1", "there is no column to fit on; name one"),
        ("y ~ poly(x, 2)", r"term poly\(x, 2\): poly\(x, 2\) is not supported; use C, bs, cr, ns"),
        ("y ~ x:foo(z)", r"term x:foo\(z\): foo\(z\) is not supported"),
        ("y ~ __import__('os')", "is not supported"),
        ("y ~ x.real", "column 'x.real' is not there"),
        ("y ~ {x.real}", "x.real is not supported"),
        ("y ~ I(1)", r"term I\(1\): there is no column in it"),
        ("y ~ C(kind, Treatment('b'))", "C takes the name of a column alone; name its base level by base="),
        ("y ~ C(x + z)", "C takes the name of a column alone"),
        ("y ~ C(kind) + log(kind)", "kind is a category, which has no value"),
        ("y ~ kind + log(kind)", "kind is a category, which has no value"),
        ("y ~ C(code) + code", "term code: code is a category and a number|code is a category and a number"),
        ("y ~ missing_column", "column 'missing_column' is not there"),
        ("y ~ bs(x)", "give either df, the number of columns, or knots"),
        ("y ~ bs(x, df=2)", "df is a whole number from 3 to 1000"),
        ("y ~ bs(x, df=4, lower_bound=0)", "lower_bound is not supported"),
        ("y ~ bs(x, df=z)", "df is not a number"),
        ("y ~ bs(x, degree=0, knots=())", "with a degree of 0 there is no column without knots"),
        ("y ~ bs(x, knots=(1000,))", r"term bs\(x, knots=\(1000,\)\): its values have no room for the knots"),
        ("y ~ ns(code, df=9)", "two of its knots are equal; use fewer"),
        ("y ~ log(x)", r"row \d+: 'log\(x\)' is not finite once it is scaled"),
        ("y ~ bs(log(x), df=4)", r"row \d+: 'bs\(log\(x\), df=4\)' is of a value that is not finite"),
    ],
)
def test_formulas_that_are_not_supported_are_refused_in_one_line(frame, tmp_path, text, message):
    with pytest.raises(dpreg.InputError, match=message) as caught:
        read(frame, tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_formula_and_settings_that_contradict_it_are_refused(frame, tmp_path):
    for text, settings, message in (
        ("y ~ x", {"target": ("z",)}, r"its target is not target=\('z',\); leave one out"),
        ("y ~ x", {"features": ("x",)}, r"features=\('x',\): formula names them; leave one out"),
        ("log(w) ~ x", {"target_transform": "standardize"}, r"it has target_transform='log'; leave one out"),
    ):
        with pytest.raises(dpreg.InputError, match=message):
            read(frame, tmp_path, text, **settings)
    assert Columns(formula="y ~ x - 1").intercept is False
    assert Columns(formula="log(`y 1`) ~ x").target == ("y 1",)
    assert Columns(formula="~ x", target=("y", "z")).target == ("y", "z")


def test_a_missing_formulaic_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "formulaic", None)
    with pytest.raises(
        dpreg.InputError, match=r"formula: it needs formulaic 1.1 or newer; pip install 'dpreg\[formula\]'"
    ):
        Columns(formula="y ~ x")
