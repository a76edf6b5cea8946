"""Model folders, intact or refused in one line by dpreg and by the prediction script; and rows to predict."""

import contextlib
import csv
import functools
import hashlib
import io
import json
import pathlib
import tempfile
import types
import zipfile

import numpy as np

from dpreg.config import Config
from dpreg.data.schema import Category, Number, Schema
from dpreg.errors import InputError
from dpreg.outputs.export import load_model, save_model
from dpreg.predict import columns_of
from dpreg.tables import standalone
from dpreg.tables.columns import RawReader
from dpreg.tables.table import open_table

from .mutate import damage_bytes, damage_json
from .refusal import check_line


def schema_of(missing):
    """Returns the schema of a table with a number, categories and a date; --missing=mean replaces missing values."""
    fill = missing == "mean"
    return Schema(
        (
            Number("a", 3.0, 2.0, 3.5 if fill else None),
            Category("kind", ("red", "7", "true"), (5, 3, 2), 1 if fill else 0),
            Number("when", 19000.0, 9.0, 19001.0 if fill else None, True),
        ),
        (Number("y", 10.0, 4.0),),
    )


def config_of(missing):
    return Config(dataset="t.csv", target=("y",), categorical=("kind",), dates=("when",), missing=missing)


W, B = np.array([[0.5], [1.0], [-1.0], [2.0], [0.25], [3.0]], np.float32), np.array([0.125], np.float32)
ROWS = "a,kind,when\n1,red,2024-01-31\n2.5,7.0,2024-02-29\n-3,True,2023-12-31\n4,blue,2025-06-01\n"
CELLS = (
    "1",
    "-0",
    "1e5",
    "1e400",
    "nan",
    "NA",
    "",
    " ",
    " 7 ",
    "7.0",
    "red",
    "True",
    "TRUE",
    "2024-02-30",
    "2024-01-31",
)
CELLS += (
    "2024-01-31 12:00:00",
    "2024-01-31T12:00:00Z",
    "1_0",
    "0x10",
    "inf",
    '"red"',
    "é",
    "\x1b[2J",
    "None",
    "1,2",
    "\u0661",
)


def run(rng, folder):
    missing = ("drop", "mean")[rng.integers(2)]
    for name, content in written(missing).items():
        (folder / name).write_bytes(content)
    return (damaged, resealed, rows)[rng.integers(3)](rng, folder, missing)


@functools.cache
def written(missing):
    """Writes a model as a run does, and returns its files."""
    data = types.SimpleNamespace(schema=schema_of(missing), num_inputs=6, num_targets=1)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save_model(folder, config_of(missing), {"params": {"w": W, "b": B}, "batch_stats": {}}, data)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(rng, folder, missing):
    """Damages bytes of one file: each reader refuses it, or reads the model that was written."""
    before = load_model(folder), predict(folder)
    name = ("model.json", "parameters.npz")[rng.integers(2)]
    content = written(missing)[name]
    (folder / name).write_bytes(damage_bytes(content, rng))
    if (folder / name).read_bytes() == content:
        return "correct"
    model, found = load_or_refused(folder), predict_or_refused(folder)
    assert model is None or (model.digest, model.flags, model.schema) == (
        before[0].digest,
        before[0].flags,
        schema_of(missing),
    )
    assert found is None or np.array_equal(found, before[1]), "the predictions differ"
    return "refused" if model is None and found is None else "correct"


def resealed(rng, folder, missing):
    """Changes values and updates the checksums: an accepted model must predict what its numbers imply."""
    model, arrays = standalone.read_model(folder)
    if rng.random() < 0.3:
        content = write_arrays(rng, arrays)
        (folder / "parameters.npz").write_bytes(content)
        model["parameters.npz"] = hashlib.sha256(content).hexdigest()
    else:
        model = damage_json(model, rng)
    sealed = standalone.add_checksum(model) if isinstance(model, dict) else model
    (folder / "model.json").write_text(json.dumps(sealed))
    loaded, found = load_or_refused(folder), predict_or_refused(folder)
    if found is not None:
        np.testing.assert_allclose(found, by_hand(folder), rtol=1e-6, equal_nan=True)
    return "refused" if loaded is None and found is None else "correct"


def write_arrays(rng, arrays):
    other = {
        "shape": lambda: arrays | {"params/w": np.ones(rng.integers(0, 4, rng.integers(0, 4)), np.float32)},
        "value": lambda: arrays | {"params/b": np.array([rng.choice([np.nan, np.inf, 1e30, 2.0])])},
        "kind": lambda: arrays | {"params/w": W.astype(rng.choice(["U9", "c8", "i4", "f2", "M8[s]", "S3"]))},
        "more": lambda: arrays | {"params/also": W},
        "less": lambda: {},
        "pickle": lambda: {"params/w": np.array([{}, None])},
    }
    stream = io.BytesIO()
    np.savez(stream, **other[list(other)[rng.integers(len(other))]]())
    if rng.random() < 0.3:
        return damage_bytes(stream.getvalue(), rng)
    if rng.random() < 0.2:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as members:  # The header announces 8 TB, and there is no data.
            head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
            members.writestr("params/w.npy", head.ljust(127) + b"\n")
    return stream.getvalue()


def by_hand(folder):
    """Computes the predictions for ROWS from the numbers in the files."""
    model = json.loads((folder / "model.json").read_text())
    with np.load(folder / "parameters.npz") as arrays:
        by_size = {array.ndim: array.astype(float) for array in arrays.values()}
    columns = parsed(ROWS)
    x = []
    for column in model["schema"]["inputs"]:
        values = columns[column["name"]]
        if column.get("kind") == "number":
            numbers = [days(v) if column["days"] else float(v) for v in values]
            x.append(
                [[0.0 if column["constant"] else (v - float(column["mean"])) / float(column["scale"]) for v in numbers]]
            )
        else:
            known = [standalone.normalize_category(v) for v in values]
            one = {v: [float(v == c) for c in column["values"]] + [float(v not in column["values"])] for v in known}
            shares = [count / max(1, sum(column["counts"])) for count in column["counts"]] + [0.0]
            x.append(np.array([shares if one[v][-1] and not column["others"] else one[v] for v in known]).T)
    z = np.concatenate(x).T @ by_size[2] + by_size.get(1, 0.0)
    target = model["schema"]["targets"][0]
    loss = model["flags"]["loss"]
    z = 1 / (1 + np.exp(-z)) if loss == "logistic" else np.exp(z) if loss in ("poisson", "gamma") else z
    z = z.argmax(axis=1, keepdims=True) if loss == "softmax" else z
    z = z * target["scale"] + target["mean"]
    return np.exp(z) if model["schema"]["log_targets"] else z


def days(text):
    return (np.datetime64(text, "D") - np.datetime64("1970-01-01", "D")).astype(int)


def rows(rng, folder, missing):
    """Writes a damaged or unusual table: the script and dpreg must predict the same, or refuse it."""
    if rng.random() < 0.5:
        content = damage_bytes(ROWS.encode(), rng)
    else:
        lines = [line.split(",") for line in ROWS.splitlines()]
        for _ in range(rng.integers(1, 4)):
            lines[rng.integers(1, 5)][rng.integers(3)] = CELLS[rng.integers(len(CELLS))]
        content = "".join(",".join(line) + "\n" for line in lines).encode()
    (folder / "new.csv").write_bytes(content)
    script, ours = by_script(folder), by_dpreg(folder, missing)
    if script is None or ours is None:
        return "refused"
    np.testing.assert_allclose(script, ours, rtol=1e-9, equal_nan=True, err_msg=repr(content[:200]))
    return "correct"


def by_script(folder):
    """Returns what `predict.py` prints, or None if it ends with exit code 2 and one line."""
    out, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr):
        code = standalone.main([str(folder / "new.csv")], folder)
    assert code in (0, 2)
    if code:
        *lines, last = stderr.getvalue().split("\n")
        assert (len(lines), last, out.getvalue()) == (1, "", ""), stderr.getvalue()
        check_line(lines[0], "predict.py")
        return None
    _, *lines = csv.reader(io.StringIO(out.getvalue()))
    return np.array([[float(value or "nan") for value in line[1:]] for line in lines])


def by_dpreg(folder, missing):
    """Returns what dpreg predicts in float64, or None if it refuses."""
    schema = schema_of(missing)
    try:
        table, columns = open_table(str(folder / "new.csv")), columns_of(schema, config_of(missing).columns(), False)
        table.require(columns.used_columns)
        reader = RawReader(columns, schema, np.float64)
        raws = list(reader.read(table))
        if not raws:
            return None
        raw = np.concatenate(raws)
        valid = reader.valid(raw)
        reader.refuse_missing(table.name)
        raw[~valid, :-1] = 0
        x = schema.rows(raw, np.float64)["x"]
    except InputError as error:
        check_line(str(error), str(folder / "new.csv"))
        return None
    return np.where(valid[:, None], schema.prediction(x @ W.astype(float) + B), np.nan)


def parsed(text):
    head, *lines = csv.reader(io.StringIO(text))
    return {name: [line[at] for line in lines] for at, name in enumerate(head)}


def load_or_refused(folder):
    try:
        return load_model(folder)
    except InputError as error:
        check_line(str(error), str(folder))
        return None


def predict(folder):
    return standalone.predict(parsed(ROWS), folder)


def predict_or_refused(folder):
    try:
        return predict(folder)
    except KeyError:
        return None  # A column has another name.
    except ValueError as error:
        check_line("".join(c if c.isprintable() else "?" for c in str(error)))
        return None
