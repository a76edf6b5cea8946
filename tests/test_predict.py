"""Prediction: each row once, in order, in original units, on any devices."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from datetime import date

import forked
import jax.numpy as jnp
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from cluster import ROOT, free_address, run_processes
from models import Net, Rows
from optax import sgd

import dpreg
from dpreg.config import Config
from dpreg.config.model import LOSSES
from dpreg.models.losses import make_loss
from dpreg.predict import predict, threads_of
from dpreg.tables import standalone

KINDS = np.array(["red", "green", "blue", "never seen"])


def table_of(rows, seed=0, kinds=3):
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, kinds, rows)
    a, b = rng.normal(1e5, 3, rows), rng.normal(size=rows)
    y = 7 + 0.02 * (a - 1e5) + 0.3 * b + 0.2 * kind + 0.1 * rng.normal(size=rows)
    return {"a": a, "kind": KINDS[kind], "b": b, "w": rng.integers(0, 4, rows), "y": y}


def write(columns, path):
    table = pa.table(columns)
    (pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table)(table, path)


@pytest.fixture(scope="module", params=["none", "standardize", "log"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write(table_of(1003), folder / "t.parquet")
    flags = ("--features=kind,a,b", "--categorical=kind", "--target=y", "--weight_column=w", "--missing=drop")
    done = forked.run(
        *("-m", "dpreg.main", "--platform=cpu", "--num_devices=2", "--reduction=ordered"),
        *(f"--dataset={folder / 't.parquet'}", *flags, f"--target_transform={request.param}", "--lr=0.1"),
        *("--max_epochs=20", f"--workdir={folder / 'w'}", f"--cache_dir={folder / 'cache'}"),
    )
    assert done.returncode == 0, done.stderr
    return folder


def config_of(folder, dataset, mode="predict", **flags):
    output = str(folder / "p.parquet") if mode == "predict" else None
    config = Config(mode=mode, workdir=str(folder / "w"), dataset=str(dataset), output=output)
    return dataclasses.replace(config, **flags)


def expected(folder, columns):
    """Computes the predictions in float64 from the parameters in the summary."""
    summary = json.loads((folder / "w" / "summary.json").read_text())
    w, b = summary["parameters"]["w"], summary["parameters"]["b"]
    kind = json.loads((folder / "w" / "model" / "model.json").read_text())["schema"]["inputs"][0]
    assert kind["others"] == 0  # An unseen category therefore gets the mean of the known ones.
    mean = np.average([w[f"kind={value}"] for value in kind["values"]], weights=kind["counts"])
    kinds = {kind: w.get(f"kind={kind}", mean) for kind in KINDS}
    linear = b + w["a"] * columns["a"] + w["b"] * columns["b"] + np.array([kinds[kind] for kind in columns["kind"]])
    return np.exp(linear) if summary.get("target_transform") == "log" else linear


@pytest.mark.parametrize("rows", [1, 7, 8192, 20_011])
def test_each_row_is_predicted_once_and_in_order(trained, rows, tmp_path):
    columns = table_of(rows, seed=1, kinds=4)
    given = {name: columns[name] for name in ("b", "kind", "a")}  # The table has no target and another column order.
    write(given, tmp_path / "new.parquet")
    files = set()
    for devices in (1, 3, 8):
        predict(config_of(trained, tmp_path / "new.parquet", num_devices=devices))
        files.add((trained / "p.parquet").read_bytes())
    assert len(files) == 1
    found = pyarrow.parquet.read_table(trained / "p.parquet")
    assert found.column_names == ["row", "predicted_y"]
    np.testing.assert_array_equal(found["row"], np.arange(1, rows + 1))
    np.testing.assert_allclose(found["predicted_y"], expected(trained, columns), rtol=1e-5)


def test_evaluation_is_in_original_units_and_weighted(trained, tmp_path, capsys):
    columns = table_of(5003, seed=2)
    write(columns, tmp_path / "new.csv")
    error, weight = expected(trained, columns) - columns["y"], columns["w"]
    mean = weight @ columns["y"] / weight.sum()
    for devices in (1, 8):
        predict(config_of(trained, tmp_path / "new.csv", "evaluate", num_devices=devices, batch_size=16 * devices))
        found = json.loads(capsys.readouterr().out)
        assert found["rows"] == np.count_nonzero(weight)
        assert found["rmse"] == pytest.approx(np.sqrt(weight @ error**2 / weight.sum()), rel=1e-4)
        assert found["mae"] == pytest.approx(weight @ np.abs(error) / weight.sum(), rel=1e-4)
        assert found["r2"] == pytest.approx(1 - weight @ error**2 / (weight @ (columns["y"] - mean) ** 2), rel=1e-4)
    summary = json.loads((trained / "w" / "summary.json").read_text())
    assert set(summary["metrics"]) == {"rmse", "mae", "r2"}
    assert summary["metrics"]["rmse"] == pytest.approx(found["rmse"], rel=0.3)


def test_rows_with_missing_values_have_no_prediction(trained, tmp_path, capsys):
    columns = table_of(50, seed=3)
    columns["b"][[3, 49]] = np.nan
    write(columns, tmp_path / "new.parquet")
    predict(config_of(trained, tmp_path / "new.parquet", output=str(tmp_path / "p.csv")))
    assert "2 have none, since values are missing" in capsys.readouterr().out
    found = pyarrow.csv.read_csv(tmp_path / "p.csv")
    wanted = expected(trained, columns)
    assert [i for i, value in enumerate(found["predicted_y"].to_pylist()) if value is None] == [3, 49]
    present = ~np.isnan(wanted)
    np.testing.assert_allclose(np.array(found["predicted_y"].to_pylist(), float)[present], wanted[present], rtol=1e-5)
    predict(config_of(trained, tmp_path / "new.parquet", "evaluate"))
    assert json.loads(capsys.readouterr().out)["rows"] == np.count_nonzero(columns["w"][present])


@pytest.mark.parametrize("trained", ["log"], indirect=True)
def test_two_processes_predict_the_same_file(trained, tmp_path):
    write(table_of(9001, seed=4, kinds=4), tmp_path / "new.parquet")
    predict(config_of(trained, tmp_path / "new.parquet"))
    common = ("--mode=predict", "--platform=cpu", "--num_devices=2", f"--workdir={trained / 'w'}", free_address())
    flags = (*common, f"--dataset={tmp_path / 'new.parquet'}", f"--output={tmp_path / 'p.parquet'}")
    starts = [(("-m", "dpreg.main"), (*flags, "--num_processes=2", f"--process_id={i}"), ROOT) for i in range(2)]
    for code, lines, _, _ in run_processes(*starts):
        assert code == 0, lines
    assert (tmp_path / "p.parquet").read_bytes() == (trained / "p.parquet").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"workdir": None}, "with workdir"),
        ({"workdir": "{}"}, "there is no model"),
        ({"dataset": "synthetic"}, "name a table"),
        ({"output": None}, "output='FILE.csv' or"),
        ({"output": "{}/p.txt"}, "output='FILE.csv' or"),
        ({"output": "{}/no/p.csv", "dataset": "{}/table.csv"}, "output=.*cannot be written"),
        ({"output": "{}/table.csv", "dataset": "{}/table.csv"}, "that is a file of dataset="),
        ({"output": "{}/parts/../table.csv", "dataset": "{}/table.csv"}, "that is a file of dataset="),
        ({"output": "{}/parts/p.csv", "dataset": "{}/parts"}, "that is a file of dataset="),
        ({"output": "{}/table2.csv", "dataset": "{}/table*.csv"}, "that is a file of dataset="),
        ({"lr": 0.03, "given": frozenset({"lr"})}, "lr=0.03: the model was trained with lr=0.1"),
        ({"validation_dataset": "{}/table.csv"}, "name the table there"),
        ({"lr": 0.2}, "lr=0.2: the model was trained with lr=0.1"),
        ({"num_shards": 4}, "num_shards=4: the model was trained with num_shards=8"),
        ({"missing": "mean"}, "the model was trained without"),
        ({"dataset": "{}/short.csv"}, "column 'a' is not there"),
        ({"dataset": "{}/words.csv"}, "words.csv, row 9,000: column 'a' has 'x', which is no number"),
        ({"dataset": "{}/huge.parquet"}, "row 9,000: 'a' is not finite once it is scaled|not finite as float32"),
        ({"dataset": "{}/none.csv"}, "there are no rows"),
    ],
)
def test_a_prediction_that_is_impossible_is_refused_in_one_line_without_a_file(trained, tmp_path, flags, message):
    columns = table_of(9000)
    write({"kind": columns["kind"], "b": columns["b"]}, tmp_path / "short.csv")
    (tmp_path / "none.csv").write_text("a,b,kind\n")
    (tmp_path / "parts").mkdir()
    write(columns, tmp_path / "table.csv")
    write(columns, tmp_path / "parts" / "1.csv")
    columns["a"][-1] = 1e300
    write(columns, tmp_path / "huge.parquet")
    columns["a"] = np.array(["x" if i == 8999 else str(i) for i in range(9000)])
    write(columns, tmp_path / "words.csv")
    flags = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(dpreg.InputError, match=message) as caught:
        predict(config_of(trained, **{"dataset": tmp_path / "words.csv", "output": str(tmp_path / "p.csv"), **flags}))
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if "p.csv" in path.name]
    assert pyarrow.csv.read_csv(tmp_path / "table.csv").num_rows == 9000


def test_a_damaged_model_is_refused(trained, tmp_path):
    (tmp_path / "w" / "model").mkdir(parents=True)
    for path in (trained / "w" / "model").iterdir():
        (tmp_path / "w" / "model" / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "w" / "model" / "parameters.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w" / "model" / "parameters.npz").write_bytes(content)
    with pytest.raises(dpreg.InputError, match="the model cannot be used"):
        predict(config_of(tmp_path, "new.csv"))
    (tmp_path / "w" / "model" / "model.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(dpreg.InputError, match="another version of dpreg wrote it"):
        predict(config_of(tmp_path, "new.csv"))


def reseal(folder, change, arrays=None):
    """Changes the description or the arrays of a model, and updates the checksums."""
    model, before = standalone.read_model(folder)
    np.savez(folder / "parameters.npz", **(before if arrays is None else arrays(before)))
    model["parameters.npz"] = hashlib.sha256((folder / "parameters.npz").read_bytes()).hexdigest()
    change(model)
    (folder / "model.json").write_text(json.dumps(standalone.add_checksum(model)))


def tampered(folder):
    """Tampers with a model in each way, and yields the name of the way."""
    (text, content), files = (path.read_bytes() for path in files_of(folder)), files_of(folder)
    model = json.loads(text)
    first = model["schema"]["inputs"][1]
    for name, new in (
        ("another mean", text.replace(json.dumps(first["mean"]).encode(), b"7.0", 1)),
        ("another flag", text.replace(b'"missing": "drop"', b'"missing": "mean"')),
        ("a cut file", text[:-9]),
        ("NULs", text[:-99] + bytes(99)),
        ("no object", b"[]"),
        ("lists in lists", b"[" * 10**5),
        ("no UTF-8", b"\xff" + text),
        ("nothing", b""),
        ("another member", text.replace(b'"format"', b'"also": 1, "format"')),
    ):
        files[0].write_bytes(new)
        yield name
    files[0].write_bytes(text)
    changes = {
        "no schema": lambda m: m.pop("schema"),
        "a schema of text": lambda m: m.update(schema="s"),
        "no flags": lambda m: m.pop("flags"),
        "an unknown flag": lambda m: m["flags"].update(luck=1),
        "a flag less": lambda m: m["flags"].pop("loss"),
        "a flag of another type": lambda m: m["flags"].update(batch_size="32"),
        "a flag of another value": lambda m: m["flags"].update(loss="none"),
        "a mean of text": lambda m: m["schema"]["inputs"][1].update(mean="0"),
        "an infinite mean": lambda m: m["schema"]["inputs"][1].update(mean=math.inf),
        "a mean of many digits": lambda m: m["schema"]["inputs"][1].update(mean=10**400),
        "a scale of 0": lambda m: m["schema"]["inputs"][1].update(scale=0.0),
        "a column less": lambda m: m["schema"]["inputs"].pop(),
        "no columns": lambda m: m["schema"].update(inputs=[]),
        "a category twice": lambda m: m["schema"]["inputs"][0].update(values=["red"] * 3),
        "a category less": lambda m: m["schema"]["inputs"][0]["values"].pop(),
        "counts below 0": lambda m: m["schema"]["inputs"][0].update(counts=[-1, 2, 3]),
        "more inputs": lambda m: m.update(num_inputs=m["num_inputs"] + 1),
        "a target less": lambda m: m["schema"]["targets"].pop(),
        "logarithms of text": lambda m: m["schema"].update(log_targets="no"),
    }
    for name, change in changes.items():
        reseal(folder, change)
        yield name
        files[0].write_bytes(text)
        files[1].write_bytes(content)
    others = {
        "a weight less": lambda arrays: {name: array[:-1] for name, array in arrays.items()},
        "no weights": lambda arrays: {},
        "an array more": lambda arrays: arrays | {"params/also": np.ones((2, 2))},
        "a weight that is no number": lambda arrays: {name: array * np.nan for name, array in arrays.items()},
        "a pickle": lambda arrays: {"params/w": np.array([{}])},
        "texts": lambda arrays: {name: array.astype(str) for name, array in arrays.items()},
    }
    for name, other in others.items():
        reseal(folder, lambda model: None, other)
        yield name
        files[0].write_bytes(text)
        files[1].write_bytes(content)
    files[1].write_bytes(content[: len(content) // 2])
    yield "cut arrays"
    files[1].unlink()
    yield "no arrays"


def files_of(folder):
    return [folder / name for name in ("model.json", "parameters.npz")]


@pytest.mark.parametrize("trained", ["none"], indirect=True)
def test_a_tampered_model_is_refused_in_one_line_by_dpreg_and_by_its_script(trained, tmp_path, capsys):
    shutil.copytree(trained / "w", tmp_path / "w")
    write(table_of(20), tmp_path / "new.csv")
    folder = tmp_path / "w" / "model"
    given = {name: column.tolist() for name, column in table_of(5).items()}
    assert np.isfinite(standalone.predict(given, folder)).all()
    for name in tampered(folder):
        with pytest.raises(dpreg.InputError, match=r"w/model.*; run the training command again") as caught:
            predict(config_of(tmp_path, tmp_path / "new.csv"))
        assert str(caught.value).isprintable(), name
        if "flag" in name and name not in ("no flags", "another flag"):  # The script reads only two of the flags.
            continue
        with pytest.raises(ValueError, match="run the training command again"):
            standalone.predict(given, folder)
    shutil.rmtree(folder)
    shutil.copytree(trained / "w" / "model", folder)
    reseal(folder, lambda model: model.update(schema=None))  # as of rows without a table, which have no script
    with pytest.raises(ValueError, match="run the training command again"):
        standalone.predict(given, folder)
    shutil.rmtree(folder)
    shutil.copytree(trained / "w" / "model", folder)
    (folder / "model.json").write_text((folder / "model.json").read_text().replace('"days": false', '"days": true', 1))
    done = subprocess.run([sys.executable, folder / "predict.py", "new.csv"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, "")
    assert "model.json is not what was written" in done.stderr


def test_an_evaluation_without_rows_is_refused(trained, tmp_path):
    columns = table_of(20)
    write(columns | {"a": np.full(20, np.nan)}, tmp_path / "gone.parquet")
    write(columns | {"w": np.zeros(20)}, tmp_path / "weightless.parquet")
    for name in ("gone", "weightless"):
        with pytest.raises(dpreg.InputError, match="no rows with a weight"):
            predict(config_of(trained, tmp_path / f"{name}.parquet", "evaluate"))


@pytest.mark.parametrize("trained", ["none"], indirect=True)
def test_prediction_uses_the_number_of_threads_of_the_training(trained, tmp_path):
    shutil.copytree(trained / "w", tmp_path / "w")
    asked = Config(mode="evaluate", dataset="new.csv", workdir="nowhere")
    assert threads_of(asked) is None
    asked = dataclasses.replace(asked, workdir=str(tmp_path / "w"))
    for reduction, threads in (("pmean", None), ("ordered", 16)):
        reseal(
            tmp_path / "w" / "model",
            lambda model, reduction=reduction: model["flags"].update(num_shards=16, reduction=reduction),
        )
        assert threads_of(asked) == threads


def test_targets_outside_the_domain_of_the_loss_are_not_evaluated():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 2)), rng.integers(0, 2, size=(90, 1)).astype(float)
    trainer = dpreg.Trainer(1, 2)
    model = dpreg.LinearRegressionScratch(2, 0.1, objective=make_loss("logistic"))
    trainer.fit(model, dpreg.RegressionData(dpreg.ArraySource(x, y), None, 16))
    y[70] = 2
    weight = np.ones(90)
    with pytest.raises(dpreg.InputError, match="loss='logistic': the target in row 71 is 2 and has to be 0 or 1"):
        trainer.evaluate(dpreg.ArraySource(x, y, weight))
    weight[70] = 0
    assert np.isfinite(trainer.evaluate(dpreg.ArraySource(x, y, weight))[0])


@pytest.mark.parametrize("trained", ["none"], indirect=True)
def test_processes_with_different_models_or_no_output_folder_end_with_one_line(trained, tmp_path):
    write(table_of(30_000, seed=4), tmp_path / "new.parquet")
    other = tmp_path / "other"
    shutil.copytree(trained / "w", other)
    reseal(other / "model", lambda model: model["schema"]["inputs"][1].update(scale=2.0))

    def both(*workdirs, output):
        common = ("--mode=predict", "--platform=cpu", "--num_devices=1", free_address(), "--num_processes=2")
        flags = (*common, f"--dataset={tmp_path / 'new.parquet'}", f"--output={output}")
        starts = [
            (("-m", "dpreg.main"), (*flags, f"--workdir={w}", f"--process_id={i}"), ROOT)
            for i, w in enumerate(workdirs)
        ]
        return run_processes(*starts)

    for code, lines, *_ in both(trained / "w", other, output=tmp_path / "p.csv"):
        assert code == 2, lines
        assert "sees another model" in lines[-1]
    for code, lines, *_ in both(trained / "w", trained / "w", output=tmp_path / "no" / "p.csv"):
        assert code == 2, lines
        assert "cannot be written" in lines[-1]


def test_a_model_does_not_need_its_validation_table_to_predict():
    trained = Config(dataset="t.csv", target=("y",), validation_dataset="v.csv")
    asked = Config(mode="evaluate", dataset="new.csv", workdir="w")
    assert asked.use_model_settings(json.loads(json.dumps(trained.identity()))).validation_dataset is None


@pytest.mark.parametrize("trained", ["none"], indirect=True)
def test_a_stopped_prediction_leaves_no_files(trained, tmp_path):
    write(table_of(3_000_000, seed=4), tmp_path / "new.parquet")
    flags = (f"--workdir={trained / 'w'}", f"--dataset={tmp_path / 'new.parquet'}", f"--output={tmp_path / 'p.csv'}")
    with forked.start("-m", "dpreg.main", "--platform=cpu", "--mode=predict", *flags) as running:
        while running.poll() is None and not list(tmp_path.glob(".p.csv.new-*")):
            time.sleep(0.01)
        running.terminate()
        assert running.wait() == 143, running.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["new.parquet"]


def test_a_trainer_predicts_and_evaluates_from_python():
    data = Rows(300).data(16, num_val=77)
    trainer = dpreg.Trainer(2, 3, reduction="ordered")
    trainer.fit(Net(sgd(0.05)), data)
    loss, metrics = trainer.evaluate(data.val)
    assert (loss, metrics) == (pytest.approx(trainer.val_loss, rel=1e-6), pytest.approx(trainer.metrics, rel=1e-6))
    prediction = trainer.predict(data.val.x)
    assert prediction.shape == (77, 1)
    assert np.sqrt(np.mean((prediction - data.val.y) ** 2)) == pytest.approx(metrics["rmse"], rel=1e-6)


def test_the_prediction_script_needs_only_numpy(trained, tmp_path):
    columns = table_of(203, seed=1, kinds=4)
    given = {name: columns[name].tolist() for name in ("b", "kind", "a")}
    given["a"][5] = given["kind"][7] = None
    write(given, tmp_path / "new.csv")
    predict(config_of(trained, tmp_path / "new.csv", output=str(tmp_path / "p.csv")))
    without = "sys.modules.update(dict.fromkeys(['jax', 'flax', 'dpreg', 'pyarrow', 'pandas', 'scipy']))"
    script = trained / "w" / "model" / "predict.py"
    as_main = f"sys.argv = ['', r'{tmp_path}/new.csv']; runpy.run_path(r'{script}', None, '__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; {without}; {as_main}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "alone.csv").write_text(done.stdout)
    ours, alone = (pyarrow.csv.read_csv(tmp_path / name).to_pydict() for name in ("p.csv", "alone.csv"))
    assert list(ours) == list(alone)
    assert ours["row"] == alone["row"]
    found, wanted = (np.array(table["predicted_y"], float) for table in (alone, ours))
    assert np.flatnonzero(np.isnan(wanted)).tolist() == [5, 7]
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_prediction_script_implements_each_link(loss):
    z = np.random.default_rng(0).normal(size=(20, 3))
    np.testing.assert_allclose(
        standalone.apply_inverse_link(z, loss), make_loss(loss, num_classes=3).mean(jnp.float32(z)), rtol=1e-5
    )


def test_the_prediction_script_recognizes_missing_values_as_csv_files_write_them():
    assert set(pyarrow.csv.ConvertOptions().null_values) <= standalone.MISSING


def test_the_prediction_script_refuses_bad_input_in_one_line(trained, tmp_path):
    script = trained / "w" / "model" / "predict.py"
    for text, message in (
        ("a,b,kind\n1,2\n", "row 1 has 2 values, and there are 3 columns"),
        ("a,b,kind\n", "there are no rows"),
        ("a,b,kind\n1,inf,red\n", "'inf' is not finite"),
        ("a,b,kind\n1,1_0,red\n", "could not convert"),
        ("a,kind\n1,red\n", "'b'"),
        ("a,b,kind,b\n1,2,red,3\n", "two columns 'b'"),
    ):
        (tmp_path / "t.csv").write_text(text)
        done = subprocess.run([sys.executable, script, tmp_path / "t.csv"], capture_output=True, text=True)
        assert (done.returncode, len(done.stderr.splitlines()), done.stdout) == (2, 1, ""), text
        assert message in done.stderr


def test_the_text_none_is_a_category_and_the_value_none_is_missing():
    column = {"kind": "category", "name": "c", "values": ["None", "NaT"], "counts": [3, 2], "others": 1}
    seen = standalone._encode_column(column, ["None", "NaT", None, np.datetime64("NaT"), "NA", "<NA>"], True)
    np.testing.assert_array_equal(seen.argmax(axis=1), [0, 1, 2, 2, 2, 2])
    assert np.isnan(standalone._encode_column(column, ["<NA>", "NA", None], False)).all(axis=1).tolist() == [
        False,
        True,
        True,
    ]


def test_the_prediction_script_reads_long_texts_and_utc_times(trained, tmp_path):
    (tmp_path / "t.csv").write_text("a,b,kind,text\n1,2,red," + "x" * 200_000 + "\n")
    script = trained / "w" / "model" / "predict.py"
    done = subprocess.run([sys.executable, script, tmp_path / "t.csv"], capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 2, "")
    assert standalone._to_number("2026-01-02T12:00:00Z", days=True) == (date(2026, 1, 2) - date(1970, 1, 1)).days + 0.5


def test_the_prediction_script_keeps_all_digits_of_categories():
    column = {"kind": "category", "name": "c", "values": ["1234567", "2.5"], "counts": [3, 2], "others": 1}
    seen = standalone._encode_column(column, [1234567.0, np.float64(1234567), 1234567, 2.5, "2.50", None], True)
    np.testing.assert_array_equal(seen.argmax(axis=1), [0, 0, 0, 1, 2, 2])


@pytest.fixture(scope="module")
def table_trainer(tmp_path_factory):
    """Returns a trainer of a table, and a function that predicts raw columns in float64."""
    folder = tmp_path_factory.mktemp("of_table")
    columns = table_of(400) | {"day": np.arange(400).astype("datetime64[D]")}
    columns["y"] = np.exp(columns["y"] / 10)
    write(columns, folder / "t.parquet")
    asked = {"features": ("kind", "a", "b", "day"), "categorical": ("kind",), "dates": ("day",), "weight_column": "w"}
    data = dpreg.read_table(
        str(folder / "t.parquet"),
        dpreg.Columns(target=("y",), target_transform="log", missing="drop", **asked),
        cache_dir=str(folder),
    )
    trainer = dpreg.Trainer(3, 2)
    trainer.fit(dpreg.LinearRegressionScratch(len(data.schema.features), lr=0.1), data)
    w, b = data.schema.parameters(*(np.float64(trainer.state.params[name]) for name in "wb"))
    named = dict(zip(data.schema.features, w[:, 0], strict=True))
    kinds = data.schema.inputs[0]
    mean = np.average([named[f"kind={value}"] for value in kinds.values], weights=kinds.counts)

    def expected(columns):
        kind = np.array([named.get(f"kind={kind}", mean) for kind in columns["kind"]])
        days = columns["day"].astype(np.int64)
        linear = kind + named["a"] * columns["a"] + named["b"] * columns["b"] + named["day"] * days + b
        return np.exp(linear)

    return trainer, data, columns, expected


def frame_of(columns):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(columns).set_index(np.arange(len(columns["a"])) + 5)


@pytest.mark.parametrize("given", [dict, frame_of, pa.table, lambda columns: pa.table(columns).to_batches()[0]])
def test_a_trainer_of_a_table_accepts_raw_columns(table_trainer, given):
    trainer, _, columns, expected = table_trainer
    columns = {name: values[:40].copy() for name, values in columns.items()}
    columns["kind"][:3] = "never seen"
    columns["b"][7] = np.nan
    wanted = expected(columns)
    found = trainer.predict(given(columns))
    assert np.flatnonzero(np.isnan(found)).tolist() == [7]
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5)
    loss, metrics = trainer.evaluate(given(columns))
    present = ~np.isnan(wanted)
    error, weight = (wanted - columns["y"])[present], columns["w"][present]
    assert metrics["rmse"] == pytest.approx(np.sqrt(weight @ error**2 / weight.sum()), rel=1e-4)
    logs = np.log(wanted / columns["y"])[present]
    assert loss == pytest.approx(weight @ logs**2 / weight.sum() / 2, rel=1e-3)


def test_rows_that_are_already_encoded_are_not_encoded_again(table_trainer):
    trainer, data, *_ = table_trainer
    found = trainer.evaluate(data.val)
    assert found == (pytest.approx(trainer.val_loss, rel=1e-6), pytest.approx(trainer.metrics, rel=1e-6))
    assert trainer.evaluate(dpreg.PermutedSource(data.val))[0] == pytest.approx(trainer.val_loss, rel=1e-6)


def test_an_array_must_have_the_columns_of_the_table_in_their_order(tmp_path):
    x, y = np.arange(50.0, 250.0), 3 * np.arange(50.0, 250.0) + 7
    write({"y": y, "x": x, "store": np.arange(200) % 3}, tmp_path / "t.parquet")
    columns = dpreg.Columns(target=("y",), missing="mean", categorical=("store",), target_transform="standardize")
    data = dpreg.read_table(str(tmp_path / "t.parquet"), columns, cache_dir=str(tmp_path))
    trainer = dpreg.Trainer(200)
    trainer.fit(dpreg.LinearRegressionScratch(len(data.schema.features), lr=0.3), data)
    np.testing.assert_allclose(trainer.predict([[150.0, 2], [1000, 0]]), [[457], [3007]], rtol=1e-4)
    mean = x[data.train.row].mean()
    np.testing.assert_allclose(trainer.predict([[np.nan, 1]]), [[3 * mean + 7]], rtol=1e-4)
    rows = np.stack([x, np.arange(200) % 3], axis=1)
    assert trainer.evaluate(dpreg.ArraySource(rows, y))[1]["rmse"] < 0.1
    weighted = dpreg.ArraySource(rows, y, np.arange(200) % 2)
    np.testing.assert_array_equal(trainer.predict(weighted), trainer.predict(np.float32(rows)))
    other = dpreg.read_table(
        str(tmp_path / "t.parquet"), dataclasses.replace(columns, max_categories=2), cache_dir=str(tmp_path)
    )
    for wrong, message in (
        ([[1.0]], "x: shape [1, 1]; the columns of the table, as they are there, are: 'x', 'store'; give"),
        ({"x": [1.0]}, "x: column 'store' is not there; use one of 'x'"),
        ({"x": [1.0, 2.0], "store": [1]}, "x: the columns are not equally long: 'x' has 2, 'store' has 1"),
        ({"x": ["a"], "store": [1]}, "x, row 1: column 'x' has 'a', which is no number"),
        ({"x": 1.0, "store": 1}, "x: column 'x' is no sequence of values of one type"),
        ([[np.inf, 1]], "x, row 1: column 'x' has a value that is not finite"),
    ):
        with pytest.raises(dpreg.InputError, match=re.escape(message)):
            trainer.predict(wrong)
    for wrong, message in (
        (other.val, "scaled and coded by the columns of another table"),
        ({"x": [1.0], "store": [1]}, "column 'y' is not there"),
        (dpreg.ArraySource([[1.0]], [1.0]), "the rows have 1 columns in x; the columns of the table"),
        (rows, "the rows: shape"),
    ):
        with pytest.raises(dpreg.InputError, match=message):
            trainer.evaluate(wrong)
    without = dpreg.Trainer(1)
    without.fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(20).data(8))
    for call in (without.predict, without.evaluate):
        with pytest.raises(dpreg.InputError, match=r"no table|not a source"):
            call({"x": [1.0]})


class Holding:
    """A source defined by the user: raw columns of a table, with missing values."""

    def __init__(self, x):
        self.x = np.asarray(x, np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, indices):
        ones = np.ones(len(indices), np.float32)
        return {"x": self.x[indices], "y": ones[:, None], "weight": ones}

    def fingerprint(self):
        return "Holding"


def test_a_row_with_a_missing_value_has_no_prediction_in_any_input_format(tmp_path):
    x, z = np.arange(40.0), np.arange(40) % 2
    pyarrow.parquet.write_table(pa.table({"x": x, "z": z, "y": 3 * x + 7 - 2 * z}), tmp_path / "t.parquet")
    data = dpreg.read_table(
        str(tmp_path / "t.parquet"), dpreg.Columns(target=("y",), missing="drop"), cache_dir=str(tmp_path)
    )
    trainer = dpreg.Trainer(1, 1)
    trainer.fit(dpreg.LinearRegressionScratch(2, 0.1), data)
    rows = np.array([[10, 0], [np.nan, 0], [5, 1]])
    expected = trainer.predict(rows)
    assert np.isnan(expected[:, 0]).tolist() == [False, True, False]
    masked = np.ma.masked_array(np.nan_to_num(rows, nan=999.0), np.isnan(rows))
    for given in (Holding(rows), masked, {"x": masked[:, 0], "z": masked[:, 1]}):
        np.testing.assert_array_equal(trainer.predict(given), expected)
    with pytest.raises(dpreg.InputError, match="x: there are two columns 'x'; rename one"):
        trainer.predict(pandas.DataFrame(np.ones((2, 3)), columns=["x", "x", "z"]))
    with pytest.raises(dpreg.InputError, match="x is a masked array, whose missing values would be lost"):
        dpreg.ArraySource(masked, np.zeros(3))
