"""Targets of labels: text, true and false or whole numbers, with the losses logistic and softmax."""

import json
import re
import shutil
import subprocess
import sys

import forked
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import scipy
import statsmodels.api as sm
from cluster import ROOT, free_address, run_processes
from sklearn.linear_model import LogisticRegression

import dpreg
from dpreg.config import Config
from dpreg.models.losses import make_loss
from dpreg.outputs.export import load_model
from dpreg.tables import standalone
from dpreg.tables.labels import MAX_LABELS
from dpreg.train.defaults import read_rows

ROWS = 611
RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(ROWS, 2)) * [1, 30] + [3, -10]).astype(float)
Z = 0.8 * (X[:, 0] - 3) - 0.03 * (X[:, 1] + 10)
IS_YES = RNG.random(ROWS) < scipy.special.expit(Z)
KIND = np.argmax(np.c_[Z, X[:, 0] - 3, -Z] + RNG.gumbel(size=(ROWS, 3)), axis=1)
SPECIES = np.array(["setosa", "versicolor", "virginica"])


def write(path, y, **others):
    """Writes a table with the columns a, b and y; None in y is a missing value."""
    table = pa.table({"a": X[: len(y), 0], "b": X[: len(y), 1], "y": y, **others})
    (pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table)(table, path)
    return str(path)


def read(path, **columns):
    """Reads the labels of a table: (the schema's labels, the model's target by row of the table)."""
    asked = {"target": ("y",), "target_transform": "labels", "validation_fraction": 0, **columns}
    data = dpreg.read_table(str(path), dpreg.Columns(**asked), cache_dir=str(path.parent / "cache"))
    y = np.full(1 + max(data.train.row), np.nan)
    y[data.train.row] = data.train.y[:, 0]
    return data.schema.labels, y


def command(*flags):
    """Runs dpreg to its end: (stdout, stderr)."""
    done = forked.run("-m", "dpreg.main", "--platform=cpu", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Fits yes/no and three species on 1 and 8 devices, and species by a perceptron on 8; returns their folder."""
    folder = tmp_path_factory.mktemp("labels")
    write(folder / "binary.csv", np.where(IS_YES, "yes", "no"))
    write(folder / "species.parquet", pa.array(SPECIES[KIND]).dictionary_encode())
    common = ("--target=y", "--validation_fraction=0", "--reduction=ordered", f"--cache_dir={folder / 'cache'}")
    runs = {
        "binary": ("--loss=logistic", f"--dataset={folder / 'binary.csv'}"),
        "species": ("--loss=softmax", f"--dataset={folder / 'species.parquet'}"),
        "network": ("--loss=softmax", f"--dataset={folder / 'species.parquet'}", "--model=mlp", "--max_epochs=2"),
    }
    for name, flags in runs.items():
        for devices in (8,) if name == "network" else (1, 8):
            workdir = folder / f"{name}{devices}"
            outputs = command(*common, *flags, f"--num_devices={devices}", f"--workdir={workdir}")
            (folder / f"{name}{devices}.txt").write_text("".join(outputs))
    return folder


def summary_of(folder, name):
    return json.loads((folder / name / "summary.json").read_text())


def predict(folder, name, table, output, devices=1):
    flags = (f"--workdir={folder / name}", f"--dataset={table}", f"--output={output}", f"--num_devices={devices}")
    command("--mode=predict", *flags)
    return pd.read_csv(output) if output.suffix == ".csv" else pd.read_parquet(output)


def test_a_table_of_yes_and_no_has_the_logistic_fit_of_statsmodels(trained, tmp_path):
    theirs = sm.Logit(IS_YES * 1.0, sm.add_constant(X)).fit(disp=0, tol=1e-14, method="newton")
    summary = summary_of(trained, "binary1")
    assert summary["labels"] == ["no", "yes"]
    found = [summary["parameters"]["b"], *summary["parameters"]["w"].values()]
    np.testing.assert_allclose(found, theirs.params, rtol=2e-5)
    assert "target 'y': 'no' is 0 and 'yes' is 1, whose probability" in (trained / "binary1.txt").read_text()
    frame = predict(trained, "binary1", trained / "binary.csv", tmp_path / "p.parquet")
    assert [*frame] == ["row", "predicted_y", "probability_no", "probability_yes"]
    probability = theirs.predict(sm.add_constant(X))
    np.testing.assert_allclose(frame["probability_yes"], probability, rtol=2e-5)
    np.testing.assert_allclose(frame["probability_no"] + frame["probability_yes"], 1, rtol=1e-15)
    np.testing.assert_array_equal(frame["predicted_y"], np.where(probability > 0.5, "yes", "no"))
    out, _ = command("--mode=evaluate", f"--workdir={trained / 'binary1'}", f"--dataset={trained / 'binary.csv'}")
    scores = json.loads(out)
    assert scores["accuracy"] == pytest.approx(np.mean((probability > 0.5) == IS_YES), rel=1e-6)
    assert scores["deviance"] == pytest.approx(-2 * theirs.llf / ROWS, rel=1e-5)


def test_a_table_of_species_has_the_multinomial_fit_of_scikit_learn(trained, tmp_path):
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000, solver="newton-cholesky").fit(X, SPECIES[KIND])
    summary = summary_of(trained, "species1")
    assert summary["labels"] == theirs.classes_.tolist() == SPECIES.tolist()
    w, b = summary["parameters"]["w"], summary["parameters"]["b"]
    assert [*w["a"]] == [*b] == SPECIES.tolist()
    # Softmax determines the parameters of classes up to one term in all of them.
    found = np.array([[*of_feature.values()] for of_feature in w.values()])
    np.testing.assert_allclose(
        found - found.mean(axis=1, keepdims=True), (theirs.coef_ - theirs.coef_.mean(axis=0)).T, rtol=1e-3, atol=1e-5
    )
    lines = (trained / "species1.txt").read_text()
    assert "target 'y': 3 labels, 'setosa', 'versicolor', 'virginica'" in lines
    assert "--num_classes=3" in (trained / "species1" / "flags.cfg").read_text()
    frame = predict(trained, "species1", trained / "species.parquet", tmp_path / "p.csv")
    assert [*frame] == ["row", "predicted_y", *(f"probability_{kind}" for kind in SPECIES)]
    np.testing.assert_allclose(frame.to_numpy()[:, 2:].astype(float), theirs.predict_proba(X), atol=1e-4)
    np.testing.assert_array_equal(frame["predicted_y"], theirs.predict(X))


@pytest.mark.parametrize(("name", "table"), [("binary", "binary.csv"), ("species", "species.parquet")])
def test_labels_have_the_same_bits_on_any_number_of_devices(trained, tmp_path, name, table):
    one, eight = (summary_of(trained, f"{name}{devices}") for devices in (1, 8))
    assert one["params_sha256"] == eight["params_sha256"]
    predict(trained, f"{name}1", trained / table, tmp_path / "1.parquet")
    predict(trained, f"{name}8", trained / table, tmp_path / "8.parquet", devices=8)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "8.parquet").read_bytes()


def test_a_network_predicts_labels_with_the_same_bits_on_any_number_of_devices(trained, tmp_path):
    one = predict(trained, "network8", trained / "species.parquet", tmp_path / "1.parquet")
    predict(trained, "network8", trained / "species.parquet", tmp_path / "8.parquet", devices=8)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "8.parquet").read_bytes()
    probability = one.to_numpy()[:, 2:].astype(float)
    np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-15)
    np.testing.assert_array_equal(one["predicted_y"], SPECIES[probability.argmax(axis=1)])


def test_two_processes_have_the_labels_and_bits_of_one(trained, tmp_path):
    flags = ("--platform=cpu", "--target=y", "--loss=softmax", "--validation_fraction=0", "--reduction=ordered")
    flags = (*flags, f"--dataset={trained / 'species.parquet'}", f"--workdir={tmp_path / 'w'}", free_address())
    flags = (*flags, "--num_devices=4", "--num_processes=2", f"--cache_dir={tmp_path}")
    for code, lines, *_ in run_processes(
        *((("-m", "dpreg.main"), (*flags, f"--process_id={i}"), ROOT) for i in (0, 1))
    ):
        assert code == 0, lines
    ours, alone = summary_of(tmp_path, "w"), summary_of(trained, "species1")
    assert (ours["labels"], ours["params_sha256"]) == (alone["labels"], alone["params_sha256"])


@pytest.mark.parametrize(("name", "table"), [("binary1", "binary.csv"), ("species1", "species.parquet")])
def test_the_prediction_script_gives_the_same_labels_and_probabilities(trained, tmp_path, name, table):
    columns = {"a": [*X[:40, 0], None], "b": [*X[:40, 1], 1.0]}
    pd.DataFrame(columns).to_csv(tmp_path / "new.csv", index=False)
    flags = (f"--workdir={trained / name}", f"--dataset={tmp_path / 'new.csv'}", f"--output={tmp_path / 'p.csv'}")
    command("--mode=predict", "--missing=drop", *flags)
    ours = pd.read_csv(tmp_path / "p.csv")
    without = "sys.modules.update(dict.fromkeys(['jax', 'flax', 'dpreg', 'pyarrow', 'pandas', 'scipy']))"
    script = trained / name / "model" / "predict.py"
    code = f"sys.argv = ['', r'{tmp_path}/new.csv']; runpy.run_path(r'{script}', None, '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; {without}; {code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "alone.csv").write_text(done.stdout)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "alone.csv"), ours, rtol=2e-5)
    assert ours.iloc[40, 1:].isna().all()
    labels = standalone.predict(columns, trained / name / "model")
    assert labels.shape == (41, 1)
    assert labels[40, 0] is None
    assert labels[:40, 0].tolist() == ours["predicted_y"][:40].tolist()
    proba = standalone.predict_proba(columns, trained / name / "model")
    np.testing.assert_allclose(proba[:40], ours.to_numpy()[:40, 2:].astype(float), rtol=2e-5)
    assert np.isnan(proba[40]).all()


@pytest.mark.parametrize(
    ("y", "labels"),
    [
        (np.where(IS_YES, "yes", "no"), ("no", "yes")),
        (np.where(IS_YES, "b", "É"), ("b", "É")),  # by code point
        (np.where(IS_YES, "10", "9x"), ("10", "9x")),
        (IS_YES, (False, True)),
        (np.where(IS_YES, "True", "FALSE"), (False, True)),
        (np.where(IS_YES, 1, -1), (-1, 1)),
        (np.where(IS_YES, 10.0, 9.0), (9, 10)),
        (np.where(IS_YES, "01", "02"), ("01", "02")),  # names, as in categories
        (np.where(IS_YES, "a", " a b "), ("a", "a b")),  # without the blanks around them
        (IS_YES * 1, (0, 1)),
        (IS_YES * 1.0, (0, 1)),
        (np.where(IS_YES, "1", "false"), (0, 1)),
        (KIND, (0, 1, 2)),
        (2 * KIND, (0, 2, 4)),
        (np.where(IS_YES, 0.5, 2.0), ()),  # numbers, which the losses refuse
    ],
)
def test_labels_depend_on_no_order_and_on_no_file_format(tmp_path, y, labels):
    texts = [str(value).strip() for value in y]
    codes = {standalone.label_text(label): code for code, label in enumerate(labels)} | {"0.5": 0.5, "2.0": 2.0}
    if labels[:2] in ((False, True), (0, 1)):
        codes |= {"0": 0, "1": 1, "False": 0, "FALSE": 0, "false": 0, "True": 1}
    wanted = [codes[text] if text in codes else codes[text.removesuffix(".0")] for text in texts]
    for order in (slice(None), slice(None, None, -1)):
        for number, values in enumerate((y[order], pa.array(y[order]).dictionary_encode())):
            for suffix in ("csv", "parquet"):
                if suffix == "csv" and number:
                    continue
                path = tmp_path / f"{number}{order.step}.{suffix}"
                write(path, values)
                found, coded = read(path)
                assert (found, [*map(type, found)]) == (labels, [*map(type, labels)])
                np.testing.assert_array_equal(coded, wanted[order])


def test_numbers_from_0_are_fitted_and_predicted_as_before(tmp_path):
    write(tmp_path / "t.csv", IS_YES * 1)
    command(
        *("--loss=logistic", "--target=y", f"--dataset={tmp_path / 't.csv'}", f"--workdir={tmp_path / 'w'}"),
        *("--validation_fraction=0", f"--cache_dir={tmp_path}"),
    )
    frame = predict(tmp_path, "w", tmp_path / "t.csv", tmp_path / "p.csv")
    assert [*frame] == ["row", "predicted_y"]
    assert "labels" not in summary_of(tmp_path, "w")
    theirs = sm.Logit(IS_YES * 1.0, sm.add_constant(X)).fit(disp=0, tol=1e-14, method="newton")
    np.testing.assert_allclose(frame["predicted_y"], theirs.predict(sm.add_constant(X)), rtol=2e-5)


def test_rows_without_weight_or_with_missing_values_add_no_labels(tmp_path):
    y = np.where(IS_YES, "yes", "no").astype(object)
    y[3], y[4], y[5] = "maybe", "unsure", None
    weight, other = np.ones(ROWS), X[:, 0].copy()
    weight[3], other[4] = 0, np.nan
    path = tmp_path / "t.parquet"
    write(path, y.tolist(), w=weight, c=pa.array(other, from_pandas=True))
    labels, coded = read(path, weight_column="w", missing="drop")
    assert labels == ("no", "yes")
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(coded)), [3, 4, 5])
    for missing in ("error", "mean"):
        with pytest.raises(dpreg.InputError, match=r"values are missing: .*column 'y' has 1, the first in .*, row 6"):
            read(path, weight_column="w", missing=missing)


def test_a_label_that_is_not_known_is_refused_where_it_is(trained, tmp_path):
    y = np.where(IS_YES, "yes", "no").astype(object)
    write(tmp_path / "t.csv", y)
    y[[7, 9]] = "maybe", "perhaps"
    weight, other = np.ones(ROWS), X[:, 0].copy()
    write(tmp_path / "v.csv", y)
    message = r"v\.csv, row 8: column 'y' has 'maybe', which is none of the labels 'no', 'yes'; correct it"
    columns = dpreg.Columns(target=("y",), target_transform="labels")
    with pytest.raises(dpreg.InputError, match=message):
        dpreg.read_table(
            str(tmp_path / "t.csv"), columns, validation_dataset=str(tmp_path / "v.csv"), cache_dir=str(tmp_path)
        )
    flags = (f"--workdir={trained / 'binary1'}", "--platform=cpu", "--mode=evaluate")
    done = forked.run("-m", "dpreg.main", *flags, f"--dataset={tmp_path / 'v.csv'}")
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1
    # Rows that are left out may have any label.
    weight[7], other[9] = 0, np.nan
    write(tmp_path / "v.parquet", y.tolist(), w=weight, c=pa.array(other, from_pandas=True))
    write(tmp_path / "t.parquet", np.where(IS_YES, "yes", "no"), w=np.ones(ROWS), c=X[:, 0])
    columns = dpreg.Columns(target=("y",), target_transform="labels", weight_column="w", missing="drop")
    data = dpreg.read_table(
        str(tmp_path / "t.parquet"), columns, validation_dataset=str(tmp_path / "v.parquet"), cache_dir=str(tmp_path)
    )
    assert len(data.val) == ROWS - 2
    np.testing.assert_array_equal(data.val.y[:, 0], IS_YES[data.val.row])


def test_another_loss_does_not_use_the_cached_labels(tmp_path):
    path = tmp_path / "t.csv"
    write(path, np.where(IS_YES, 2, 1))
    assert read(path)[1].tolist() == IS_YES.tolist()
    labels, numbers = read(path, target_transform="none")
    assert (labels, numbers.tolist()) == ((), (IS_YES + 1.0).tolist())
    for loss, largest in (("logistic", 1), ("squared", 2)):
        config = Config(dataset=str(path), target=("y",), loss=loss, cache_dir=str(tmp_path / "cache"))
        config, data, _ = read_rows(config)
        assert config.target_transform == ("labels" if loss == "logistic" else "none")
        assert data.train.y.max() == largest


def test_damaged_labels_of_a_model_are_refused_by_dpreg_and_by_its_script(trained, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(trained / "species1" / "model", folder)
    content = json.loads((folder / "model.json").read_text())
    for labels in (
        [*SPECIES, "other"],
        SPECIES[:2].tolist(),
        ["a", "a", "b"],
        ["a", "b", 3],
        "abc",
        [0.5, 1.5, 2.5],
        None,
    ):
        changed = content | {"schema": content["schema"] | {"labels": labels}}
        (folder / "model.json").write_text(json.dumps(standalone.add_checksum(changed)))
        with pytest.raises(ValueError, match="run the training command again"):
            standalone.predict({"a": [1.0], "b": [2.0]}, folder)
        with pytest.raises(dpreg.InputError, match="run the training command again"):
            load_model(folder)


FEW = 40  # rows of the tables below


@pytest.mark.parametrize(
    ("y", "flags", "message"),
    [
        (
            SPECIES[KIND[:FEW]],
            ("--loss=logistic",),
            "--loss=logistic: column 'y' has 3 labels, 'setosa', 'versicolor', ",
        ),
        (SPECIES[KIND[:FEW]], ("--loss=softmax", "--num_classes=4"), "--num_classes=4: column 'y' has 3 labels, "),
        (KIND[:FEW], ("--loss=softmax", "--num_classes=4"), "--num_classes=4: column 'y' has 3 labels, '0', '1', '2'"),
        (["yes"] * FEW, ("--loss=logistic",), "t.csv: column 'y' has one label, 'yes'; give rows with others"),
        (["yes"] * FEW, ("--loss=softmax",), "t.csv: column 'y' has one label, 'yes'; give rows with others"),
        (SPECIES[KIND[:FEW]], (), "row 1: column 'y' has 'setosa', which is no number; for labels use --loss=logistic"),
        (
            SPECIES[KIND[:FEW]],
            ("--loss=poisson",),
            "for labels use --loss=logistic or softmax (--target_transform=labels",
        ),
        (
            KIND[:FEW] - 1,
            ("--loss=logistic",),
            "--loss=logistic: column 'y' has 3 labels, '-1', '0', '1', and is defined",
        ),
        (KIND[:FEW], ("--loss=logistic",), "is 2 and has to be 0 or 1; correct it, or use another --loss"),
        (
            np.arange(FEW) % 2 * 0.4 + 0.3,
            ("--loss=logistic",),
            "the target in row 1 is 0.3 and has to be 0 or 1; correct",
        ),
        (np.arange(FEW) % 2 + 0.5, ("--loss=softmax",), "the target in row 1 is 0.5 and has to be a label from 0 to 1"),
        (
            SPECIES[KIND[:FEW]],
            ("--target_transform=labels",),
            "--target_transform=labels: --loss=squared is not defined",
        ),
        (
            SPECIES[KIND[:FEW]],
            ("--loss=softmax", "--target=y,b"),
            "column 'y' has the labels 'setosa', 'versicolor', 'vir",
        ),
    ],
)
def test_targets_that_cannot_be_fitted_are_refused_in_one_line(tmp_path, y, flags, message):
    write(tmp_path / "t.csv", y)
    table = (f"--dataset={tmp_path / 't.csv'}", "--target=y", f"--cache_dir={tmp_path}", f"--workdir={tmp_path / 'w'}")
    done = forked.run("-m", "dpreg.main", "--platform=cpu", "--validation_fraction=0", *table, *flags)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dpreg: ")
    assert message in last


def test_too_many_labels_and_labels_without_a_row_to_fit_are_refused(tmp_path):
    names = np.array([f"name {i:04}" for i in range(MAX_LABELS + 1)])
    table = {"a": np.arange(len(names)) % 7, "y": names}
    pyarrow.parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(
        dpreg.InputError, match="column 'y' has 1,001 labels, more than 1,000; merge some, or use another"
    ):
        read(tmp_path / "t.parquet")
    pyarrow.parquet.write_table(pa.table(table | {"y": np.arange(len(names))}), tmp_path / "n.parquet")
    with pytest.raises(dpreg.InputError, match="more than 1,000; use another loss, or target_transform='none'"):
        read(tmp_path / "n.parquet")
    pyarrow.parquet.write_table(pa.table(table).slice(0, MAX_LABELS), tmp_path / "s.parquet")
    assert read(tmp_path / "s.parquet")[0] == tuple(names[:MAX_LABELS])
    with pytest.raises(
        dpreg.InputError, match=r"all rows with the label 'name .*' are held out; use validation_fraction=0"
    ):
        read(tmp_path / "s.parquet", validation_fraction=0.5)


def test_a_trainer_predicts_labels_and_probabilities_from_python(tmp_path):
    path = tmp_path / "t.parquet"
    for y, labels in ((SPECIES[KIND], tuple(SPECIES)), (IS_YES, (False, True)), (np.where(IS_YES, 2, 1), (1, 2))):
        write(path, y)
        asked = dpreg.Columns(target=("y",), target_transform="labels", validation_fraction=0)
        data = dpreg.read_table(str(path), asked, cache_dir=str(tmp_path / "cache"))
        loss = make_loss("softmax" if len(labels) == 3 else "logistic", num_classes=len(labels))
        trainer = dpreg.Trainer(3, 1)
        trainer.fit(dpreg.LinearRegressionScratch(2, 0.1, num_targets=loss.outputs(1), objective=loss), data)
        columns = {"a": [*X[:, 0], np.nan], "b": [*X[:, 1], 0.0]}
        found, proba = trainer.predict(columns), trainer.predict_proba(columns)
        assert (found.shape, proba.shape) == ((ROWS + 1, 1), (ROWS + 1, len(labels)))
        w, b = data.schema.parameters(*(np.float64(trainer.state.params[name]) for name in "wb"))
        z = X @ w + b
        z = z if len(labels) == 3 else np.c_[np.zeros(ROWS), z]
        np.testing.assert_allclose(proba[:-1], scipy.special.softmax(z, axis=1), rtol=1e-4)
        np.testing.assert_array_equal(found[:-1, 0], np.array(labels)[z.argmax(axis=1)])
        assert np.isnan(proba[-1]).all()
        assert np.isnan(found[-1, 0]) if labels == (1, 2) else found[-1, 0] is None
        _, metrics = trainer.evaluate({"a": X[:, 0], "b": X[:, 1], "y": y})
        assert metrics["accuracy"] == pytest.approx(np.mean(found[:-1, 0] == y))
        if len(labels) == 2:  # a table may have 0 and 1 for false and true, and arrays have labels that are numbers
            other = {"a": X[:, 0], "b": X[:, 1], "y": y * 1} if labels == (False, True) else dpreg.ArraySource(X, y)
            assert trainer.evaluate(other)[1] == metrics
        with pytest.raises(dpreg.InputError, match=r"column 'y' has .*, which the loss is not defined for; use loss="):
            dpreg.Trainer(1, 1).fit(dpreg.LinearRegressionScratch(2, 0.1), data)
    numbers = dpreg.Trainer(1, 1)
    numbers.fit(dpreg.LinearRegressionScratch(2, 1e-4), dpreg.RegressionData(dpreg.ArraySource(X, Z), None, 32))
    with pytest.raises(dpreg.InputError, match="the model has no labels; use predict"):
        numbers.predict_proba(X)
