"""Results of an exact fit as data: its table, its intervals, numbers of rows, and means of logarithmic models."""

import csv
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys

import forked
import numpy as np
import pandas as pd
import pytest
import scipy
import statsmodels.api as sm
from markdown_it import MarkdownIt

import dpreg
from dpreg.config import Config
from dpreg.outputs.export import load_model
from dpreg.outputs.fit_table import FORMATS
from dpreg.solvers.inference import Coefficient, Summary
from dpreg.tables import standalone
from dpreg.train import defaults
from dpreg.train.defaults import read_rows

KINDS = np.array(["red", "green", "blue"])
FAMILIES = {
    "logistic": sm.families.Binomial(),
    "poisson": sm.families.Poisson(),
    "gamma": sm.families.Gamma(sm.families.links.Log()),
}


def table_of(rows, seed):
    """Returns columns far from 0, a category, weights, and targets; some values are missing and some weights are 0."""
    rng = np.random.default_rng(seed)
    kind, year, size = rng.integers(0, 3, rows), rng.integers(1990, 2020, rows).astype(float), rng.normal(5, 2, rows)
    z = 0.05 * (year - 2005) + 0.2 * size + 0.3 * kind - 1
    frame = pd.DataFrame({"kind": KINDS[kind], "year": year, "size": size, "w": rng.integers(0, 4, rows)})
    frame["squared"] = 3 * z + rng.normal(size=rows)
    frame["price"] = np.exp(z + 0.7 * rng.normal(size=rows))
    frame["logistic"] = (rng.random(rows) < scipy.special.expit(z)) * 1
    frame["yes"] = np.where(frame["logistic"], "yes", "no")
    frame["poisson"] = rng.poisson(np.exp(z))
    frame["gamma"] = rng.gamma(2.0, np.exp(z) / 2)
    return frame


def design(frame):
    """The columns of statsmodels for the same model."""
    columns = [frame["year"] - 2000, frame["size"], *(frame["kind"] == kind for kind in KINDS[1:])]
    return np.column_stack([np.ones(len(frame)), *columns]).astype(float)


TRAIN, NEW = table_of(503, 0), table_of(211, 1)
TRAIN.loc[[3, 77, 130], "size"] = np.nan
USED = TRAIN.dropna().query("w > 0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    TRAIN.to_csv(folder / "train.csv", index=False)
    NEW.to_csv(folder / "new.csv", index=False)
    return folder


def command(*flags):
    return forked.run("-m", "dpreg.main", *flags)


def run(folder, workdir, *flags, rows="train.csv"):
    """Trains in float64, unless the workdir has a model; returns (summary, stdout, stderr)."""
    done = command(
        *("--platform=cpu", "--precision=float64", f"--dataset={folder / rows}", "--features=kind,year,size"),
        *("--categorical=kind", "--weight_column=w", "--missing=drop", f"--workdir={folder / workdir}", *flags),
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / workdir / "summary.json").read_text()), done.stdout, done.stderr


def predicted(folder, workdir, *flags):
    output = folder / f"{workdir}.csv"
    done = command(
        *("--platform=cpu", "--mode=predict", f"--workdir={folder / workdir}", f"--dataset={folder / 'new.csv'}"),
        *(f"--output={output}", *flags),
    )
    assert done.returncode == 0, done.stderr
    return pd.read_csv(output), output.read_bytes()


def refused(*flags):
    """Returns the line with which a command is refused."""
    done = command("--platform=cpu", *flags)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def logs(folder):
    """Trains models of the logarithm of prices: exactly, by steps, and a network; returns their summaries."""
    log, more = ("--target=price", "--target_transform=log"), ("--reduction=ordered", "--validation_fraction=0")
    found = {
        "exact": run(folder, "exact", *log),
        "one device": run(folder, "one", *log, "--num_devices=1"),
        "steps": run(folder, "log_steps", *log, *more, "--max_epochs=40"),
        "mlp": run(folder, "mlp", *log, *more, "--model=mlp", "--hidden=8", "--max_epochs=3"),
    }
    return {name: summary for name, (summary, *_) in found.items()} | {"lines": found["exact"][2]}


@pytest.fixture(scope="module")
def fitted(folder):
    return run(folder, "squared", "--target=squared")


def test_the_rows_that_are_left_out_are_counted_at_each_reading(folder, fitted):
    weightless = int((TRAIN["w"] == 0).sum())
    counts = {"fitted": len(USED), "held_out": 0, "missing": 503 - len(USED) - weightless, "weight_0": weightless}
    assert 0 < counts["missing"] <= 3
    assert fitted[0]["rows"] == counts
    assert f"{len(USED):,} rows, none held out, in 8 shards" in fitted[2]
    assert f"rows left out: {counts['missing']} since values are missing, {weightless} of weight 0" in fitted[2]
    columns = dpreg.Columns(
        target=("squared",), features=("size",), weight_column="w", missing="drop", validation_fraction=0.2
    )
    for _ in ("read", "from the cache"):
        data = dpreg.read_table(str(folder / "train.csv"), columns, cache_dir=str(folder / "cache"))
        assert data.left_out == {"missing": counts["missing"], "weight_0": weightless}
        assert len(data.train) + len(data.val) == len(USED)
    assert dpreg.RegressionData(dpreg.ArraySource([1.0], [2.0])).left_out == {"missing": 0, "weight_0": 0}


def test_the_model_keeps_the_summary_of_its_exact_fit(folder, fitted):
    theirs = sm.WLS(USED["squared"], design(USED), USED["w"]).fit()
    (found,) = load_model(folder / "squared" / "model").summaries()
    written = fitted[0]["fit"][0]
    kept = json.loads(json.dumps(found.to_json()).replace("NaN", "null"))
    np.testing.assert_allclose(kept.pop("covariance"), written["covariance"], rtol=1e-6, atol=1e-12)
    assert kept == {name: value for name, value in written.items() if name != "covariance"}
    assert (found.rows, found.degrees_of_freedom) == (len(USED), theirs.df_resid)
    assert [found.dispersion, found.deviance, found.r2] == pytest.approx([theirs.scale, theirs.ssr, theirs.rsquared])
    # The slopes of numbers do not depend on how a category is coded.
    at = [[c.name for c in found.coefficients if c.used].index(name) for name in ("year", "size")]
    np.testing.assert_allclose(found.covariance[np.ix_(at, at)], theirs.cov_params().to_numpy()[1:3, 1:3], rtol=1e-6)
    for level in (0.5, 0.9, 0.999):
        ours = found.conf_int(level)[[[c.name for c in found.coefficients].index(name) for name in ("year", "size")]]
        np.testing.assert_allclose(ours, theirs.conf_int(alpha=1 - level).to_numpy()[1:3], rtol=1e-6)
    for level in (0, 1, -1, 1.5):
        with pytest.raises(dpreg.InputError, match=f"level={level}: use a value between 0 and 1"):
            found.conf_int(level)
    json.loads((folder / "squared" / "model" / "model.json").read_text(), parse_constant=pytest.fail)


def test_a_fit_of_other_columns_is_refused(folder, fitted, tmp_path):
    model = shutil.copytree(folder / "squared" / "model", tmp_path / "model")
    description, _ = standalone.read_model(model)
    for change in (
        lambda fit: fit[0]["coefficients"].pop(),
        lambda fit: fit[0].pop("rows"),
        lambda fit: fit.append(fit[0]),
        lambda fit: fit.clear(),
        lambda fit: fit[0]["coefficients"][1].update(used=not fit[0]["coefficients"][1]["used"]),
    ):
        changed = json.loads(json.dumps(description))
        change(changed["fit"])
        (model / "model.json").write_text(json.dumps(standalone.add_checksum(changed)))
        with pytest.raises(dpreg.InputError, match="the model cannot be used"):
            load_model(model)


def test_the_mode_summary_prints_the_table_of_the_run_without_devices_or_rows(folder, fitted):
    _, stdout, _ = fitted
    workdir = f"--workdir={folder / 'squared'}"
    again = command("--mode=summary", workdir, "--platform=tpu")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0].split() == ["estimate", "std", "error", "t", "p", "95%", "interval"]
    assert again.stdout.strip() in stdout
    wider = command("--mode=summary", workdir, "--interval=0.999", f"--output={folder / 'table.txt'}")
    assert (wider.returncode, wider.stdout) == (0, f"table in {folder / 'table.txt'}\n")
    (found,) = load_model(folder / "squared" / "model").summaries()
    assert (folder / "table.txt").read_text() == f"{found.with_level(0.999)}\n"
    assert "99.9% interval" in (folder / "table.txt").read_text()


HOSTILE = ["a|b", "back\\slash", "$x_1^2$ & 5% #1 ~{}", "*bold* _it_ `code` <b>x</b>", "[kg](http://x)", "*", "Größe"]


def hostile_summary():
    row = (1.5, 2e-7, -7.5e6, 0.0, -1e-30, np.inf)
    coefficients = (*(Coefficient(name, *row) for name in HOSTILE), Coefficient("c", 0.0, *[np.nan] * 5, used=False))
    known = {"target": "y|&z", "coefficients": coefficients, "test": "z", "level": 0.9, "rows": 30}
    known |= {"degrees_of_freedom": 20, "dispersion": 1.0, "deviance": 3.0, "condition_number": 2.0}
    known |= {"covariance_type": "classic"}
    return Summary(**dict.fromkeys(field.name for field in dataclasses.fields(Summary)) | known)


def test_names_are_escaped_in_markdown():
    text = "\n".join(FORMATS[".md"]([hostile_summary()]))
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [token for before, token in itertools.pairwise(tokens) if before.type in ("td_open", "th_open")]
    assert all({child.type for child in cell.children} <= {"text", "text_special"} for cell in cells)
    rows = np.reshape(["".join(child.content for child in cell.children) for cell in cells], (-1, 6))
    assert rows[0].tolist() == ["y|&z", "estimate", "std error", "z", "p", "90% interval"]
    assert rows[1:, 0].tolist() == [*HOSTILE, "c"]
    assert rows[1].tolist()[1:] == ["1.5", "2e-07", "-7.5e+06", "0", "-1e-30 .. inf"]
    assert rows[-1].tolist() == ["c", "0", "", "", "", "not used: constant, or a combination of others"]
    assert text.endswith("\n\n30 rows, 20 degrees of freedom; condition 2")


def test_names_are_escaped_in_latex():
    lines = FORMATS[".tex"]([hostile_summary()])
    assert lines[0] == r"\begin{tabular}{lrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    rows = [line.removesuffix(r" \\") for line in lines if line.endswith(r" \\") and not line.startswith(r"\multi")]
    for name, row in zip(["y|&z", *HOSTILE, "c"], rows, strict=True):
        first, *others = re.split(r" (?<!\\)& ", row)
        assert len(others) == 5
        assert not first.startswith(("[", "*"))  # A line break before them would take them as its argument.
        plain = first
        for command_of, character in (
            ("backslash", "\\"),
            ("asciicircum", "^"),
            ("asciitilde", "~"),
            ("less", "<"),
            ("greater", ">"),
            ("bar", "|"),
        ):
            plain = plain.replace(f"\\text{command_of}{{}}", f"\0{ord(character)};")
        plain = re.sub(r"\{([\[\]*])\}", r"\1", plain)
        assert not re.search(r"(?<!\\)[{}$&#_%]", plain)
        plain = re.sub(r"\\(.)", r"\1", plain)
        assert re.sub(r"\0(\d+);", lambda found: chr(int(found[1])), plain) == name
    assert rows[1].split(" & ")[1:] == [
        "$1.5$",
        r"$2 \times 10^{-7}$",
        r"$-7.5 \times 10^{6}$",
        "$0$",
        r"$-1 \times 10^{-30}$ .. $\infty$",
    ]


@pytest.mark.parametrize("covariance", ["classic", "HC3"])
def test_intervals_for_squared_loss_agree_with_statsmodels(folder, fitted, covariance):
    workdir, options = "squared", {}
    if covariance == "HC3":
        workdir, options = "HC3", {"cov_type": "HC3", "use_t": True}
        run(folder, workdir, "--target=squared", "--covariance=HC3")
    theirs = sm.WLS(USED["squared"], design(USED), USED["w"]).fit(**options).get_prediction(design(NEW))
    theirs = theirs.summary_frame(alpha=0.1)
    (found, content), (_, other) = (predicted(folder, workdir, "--interval=0.9", f"--num_devices={n}") for n in (1, 8))
    assert content == other
    names = {
        "predicted_squared": "mean",
        "low_squared": "mean_ci_lower",
        "high_squared": "mean_ci_upper",
        "new_low_squared": "obs_ci_lower",
        "new_high_squared": "obs_ci_upper",
    }
    assert [*found] == ["row", *names]
    for ours, wanted in names.items():
        np.testing.assert_allclose(found[ours], theirs[wanted], rtol=1e-6, err_msg=ours)


@pytest.mark.parametrize("loss", FAMILIES)
def test_intervals_of_generalised_models_agree_with_statsmodels(folder, loss):
    target = "yes" if loss == "logistic" else loss  # The same target as labels.
    run(folder, loss, f"--target={target}", f"--loss={loss}")
    weights = {"freq_weights": USED["w"].to_numpy()}
    if loss == "gamma":  # Degrees of freedom are counted in rows.
        weights = {"var_weights": USED["w"].to_numpy()}
    model = sm.GLM(USED[loss].to_numpy(), design(USED), family=FAMILIES[loss], **weights)
    model = model.fit(tol=1e-14, use_t=loss == "gamma")
    theirs = model.get_prediction(design(NEW)).summary_frame(alpha=0.05)
    (kept,) = load_model(folder / loss / "model").summaries()
    at = [[c.name for c in kept.coefficients].index(name) for name in ("year", "size")]
    limits = model.conf_int(alpha=0.2)[1:3]
    np.testing.assert_allclose(kept.conf_int(0.8)[at], limits, rtol=1e-6)
    found, _ = predicted(folder, loss, "--interval=0.95")
    mean = ["probability_no", "probability_yes"] if loss == "logistic" else []
    assert [*found] == ["row", f"predicted_{target}", *mean, f"low_{target}", f"high_{target}"]
    for ours, wanted in (("predicted", "mean"), ("low", "mean_ci_lower"), ("high", "mean_ci_upper")):
        name = mean[1] if mean and ours == "predicted" else f"{ours}_{target}"
        np.testing.assert_allclose(found[name], theirs[wanted], rtol=1e-6, err_msg=ours)


def test_models_without_standard_errors_have_no_table_or_intervals(folder, logs):
    run(folder, "ridge", "--target=squared", "--l2=0.1")
    run(folder, "robust", "--target=squared", "--loss=huber")
    predict = ("--mode=predict", f"--dataset={folder / 'new.csv'}", f"--output={folder / 'p.csv'}", "--interval=0.9")
    for workdir, message in (
        ("log_steps", "--interval=0.9: the model has no exact fit with standard errors; train it with --solver=exact"),
        ("robust", "the model has no exact fit"),
        ("ridge", "--interval=0.9: a fit with --l2=0.1 has no standard errors; train it without a penalty"),
    ):
        assert message in refused(f"--workdir={folder / workdir}", *predict)
    for workdir in ("mlp", "robust"):
        assert "the model has no exact fit with a table" in refused("--mode=summary", f"--workdir={folder / workdir}")
    assert "not used" in command("--mode=summary", f"--workdir={folder / 'ridge'}").stdout
    nowhere = refused("--mode=summary", f"--workdir={folder / 'nowhere'}")
    assert "there is no model; train with that --workdir first" in nowhere
    assert not (folder / "p.csv").exists()


def test_the_smearing_factor_is_the_mean_of_the_exponentiated_residuals(folder, logs):
    assert "what is predicted is the median of the target; for its mean use --predict_mean with" in logs["lines"]
    y, weight = np.log(USED["price"]), USED["w"]
    theirs = sm.WLS(y, design(USED), weight).fit()
    assert logs["exact"]["smearing"] == [pytest.approx(np.average(np.exp(theirs.resid), weights=weight), rel=1e-9)]
    assert logs["one device"]["smearing"] == logs["exact"]["smearing"]
    w, b = (logs["steps"]["parameters"][name] for name in "wb")
    z = b + w["year"] * USED["year"] + w["size"] * USED["size"] + USED["kind"].map(lambda kind: w[f"kind={kind}"])
    assert logs["steps"]["smearing"] == [pytest.approx(np.average(np.exp(y - z), weights=weight), rel=1e-9)]
    USED.to_csv(folder / "used.csv", index=False)
    output = folder / "of_used.csv"
    done = command(
        *("--platform=cpu", "--mode=predict", f"--workdir={folder / 'mlp'}", f"--dataset={folder / 'used.csv'}"),
        f"--output={output}",
    )
    assert done.returncode == 0, done.stderr
    ratio = USED["price"].to_numpy() / pd.read_csv(output)["predicted_price"]
    assert logs["mlp"]["smearing"] == [pytest.approx(np.average(ratio, weights=weight), rel=1e-9)]


def test_means_are_predicted_and_evaluated_on_request(folder, logs, tmp_path):
    theirs = sm.WLS(np.log(USED["price"]), design(USED), USED["w"]).fit()
    medians = np.exp(theirs.predict(design(NEW)))
    means = medians * logs["exact"]["smearing"][0]
    assert means.mean() > 1.1 * medians.mean()
    found, _ = predicted(folder, "exact")
    np.testing.assert_allclose(found["predicted_price"], medians, rtol=1e-6)
    found, _ = predicted(folder, "exact", "--predict_mean", "--interval=0.9")
    np.testing.assert_allclose(found["predicted_price"], means, rtol=1e-6)
    ends = np.exp(theirs.get_prediction(design(NEW)).summary_frame(alpha=0.1))
    for ours, wanted in (("low", "mean_ci_lower"), ("high", "mean_ci_upper"), ("new_high", "obs_ci_upper")):
        np.testing.assert_allclose(found[f"{ours}_price"], ends[wanted], rtol=1e-6)  # those of the median
    evaluate = ("--mode=evaluate", f"--workdir={folder / 'exact'}", f"--dataset={folder / 'new.csv'}")
    for flags, predictions in (((), medians), (("--predict_mean",), means)):
        scores = json.loads(command("--platform=cpu", *evaluate, *flags).stdout)
        error = predictions - NEW["price"]
        assert scores["rmse"] == pytest.approx(np.sqrt(np.average(error**2, weights=NEW["w"])), rel=1e-6)
        assert scores["mae"] == pytest.approx(np.average(np.abs(error), weights=NEW["w"]), rel=1e-6)
    script = subprocess.run(
        [sys.executable, folder / "exact" / "model" / "predict.py", "--mean", folder / "new.csv"],
        capture_output=True,
        text=True,
        check=True,
    )
    alone = [float(row["predicted_price"]) for row in csv.DictReader(script.stdout.splitlines())]
    np.testing.assert_allclose(alone, means, rtol=1e-6)
    given = {name: NEW[name].tolist() for name in ("kind", "year", "size")}
    alone = standalone.predict(given, folder / "exact" / "model", mean=True)
    np.testing.assert_allclose(alone[:, 0], means, rtol=1e-6)


def test_means_of_other_models_are_refused(folder, fitted):
    evaluate = ("--mode=evaluate", f"--workdir={folder / 'squared'}", f"--dataset={folder / 'new.csv'}")
    message = "--predict_mean: it applies only to a model with --target_transform=log; leave it out"
    assert message in refused(*evaluate, "--predict_mean")
    with pytest.raises(ValueError, match="no factor by which predicted medians become means"):
        standalone.predict({}, folder / "squared" / "model", mean=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interval": 0.9}, "interval=0.9: it applies only to mode='predict' or 'summary'; leave it out"),
        ({"predict_mean": True}, "predict_mean=True: it applies only to mode='evaluate' or 'predict'; leave it out"),
        ({"mode": "summary"}, "mode='summary': name the folder of the run, with workdir"),
        ({"mode": "summary", "workdir": "w", "output": "t.csv"}, "with output='FILE.txt', 'FILE.md' or 'FILE.tex'"),
        ({"mode": "summary", "workdir": "w", "interval": 1.0}, "interval=1.0: use a value under 1"),
    ],
)
def test_settings_of_results_are_refused_where_they_do_not_apply(wrong, message):
    with pytest.raises(dpreg.InputError, match=re.escape(message)):
        Config(**wrong)


def test_all_rows_are_fitted_where_no_step_is_stopped_by_others_unless_they_are_asked_for(folder, monkeypatch):
    asked = {"dataset": str(folder / "new.csv"), "target": ("squared",), "features": ("year", "size")}
    asked |= {"cache_dir": str(folder / "cache")}

    def read(**settings):
        config, data, _ = read_rows(Config(**asked | settings))
        return config.solver, config.validation_fraction, len(data.val or ()), len(data.train), data.fingerprint()

    whole = read()
    assert whole[:4] == ("exact", 0.0, 0, 211)
    assert read(seed=7) == read(solver="exact") == whole
    assert read(loss="huber")[:4] == ("exact", 0.0, 0, 211)
    assert read(model="mlp")[:4] == ("sgd", 0.0, 0, 211)  # A tenth of the rows is too few to stop by.
    for expected, settings in (
        ("exact", {"given": frozenset({"validation_fraction"})}),
        ("sgd", {"lr": 0.1}),
        ("sgd", {"solver": "sgd"}),
        ("sgd", {"model": "mlp", "patience": 5, "given": frozenset({"patience"})}),
    ):
        solver, fraction, held_out, fitted, _ = read(**settings)
        assert (solver, fraction) == (expected, 0.1)
        assert 5 < held_out < 40
        assert held_out + fitted == 211
    assert read(validation_dataset=str(folder / "new.csv"))[2:4] == (211, 211)
    monkeypatch.setattr(defaults, "_ROWS_OF_PATIENCE", 5)
    assert read(model="mlp")[:2] == ("sgd", 0.1)
    monkeypatch.setattr("dpreg.solvers.solver._WIDEST", 2)
    solver, fraction, held_out, *_ = read()
    assert (solver, fraction) == ("sgd", 0.1)
    assert held_out > 5
