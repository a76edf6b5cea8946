"""Tables and TFDS datasets: each row once, scaled by the right moments, from files of any format."""

import datetime
import decimal
import gzip
import os
import pathlib
import sys
import threading

import hypothesis
import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

import dpreg
from dpreg.config import Columns
from dpreg.data.schema import Category, Number, Schema
from dpreg.data.synthetic_regression import SyntheticRegression
from dpreg.distributed.devices import data_mesh
from dpreg.models.linear import linear_parameters
from dpreg.models.mlp import LinearRegression
from dpreg.solvers.glm import FAMILIES
from dpreg.solvers.solver import Solver
from dpreg.tables import cache, codes, csv_files, ingest, shuffle, standalone
from dpreg.tables import columns as data_columns
from dpreg.tables.statistics import Moments


def all_rows(source):
    return source[np.arange(len(source))]


@pytest.fixture
def read(tmp_path):
    """Returns a function that reads a table in the test's folder, with its own cache."""

    def read_table(name, *, batch_size=32, validation_dataset=None, data_dir=None, **columns):
        columns = {
            k: (v,) if isinstance(v, str) and k in ("target", "features", "exclude", "categorical", "dates") else v
            for k, v in columns.items()
        }
        return dpreg.read_table(
            name if name.startswith("tfds:") else str(tmp_path / name),
            Columns(**columns),
            batch_size=batch_size,
            validation_dataset=validation_dataset and str(tmp_path / validation_dataset),
            data_dir=data_dir,
            cache_dir=str(tmp_path / "cache"),
        )

    return read_table


@pytest.fixture
def columns(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "a": rng.normal(1e4, 1, 1000),
        "flag": rng.random(1000) > 0.5,
        "k": np.arange(1000),
        "kind": rng.choice(["red", "green", "blue", "Grün"], 1000, p=[0.5, 0.3, 0.15, 0.05]),
        "y": rng.normal(size=1000),
    }
    table = pa.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "t.csv")
    with gzip.open(tmp_path / "t.csv.gz", "wb") as file:
        file.write((tmp_path / "t.csv").read_bytes())
    np.savez(tmp_path / "t.npz", **columns)
    np.savez_compressed(tmp_path / "t2.npz", **columns)
    for folder, suffix in (("parts", "parquet"), ("csvs", "csv")):
        (tmp_path / folder).mkdir()
        for number, (first, last) in enumerate(((0, 1), (1, 500), (500, 500), (500, 1000))):
            part = table.slice(first, last - first)
            path = tmp_path / folder / f"part-{number}.{suffix}"
            (pyarrow.parquet.write_table if suffix == "parquet" else pyarrow.csv.write_csv)(part, path)
    return columns


KINDS = ["t.parquet", "t.csv", "t.csv.gz", "t.npz", "t2.npz", "parts", "parts/part-*.parquet", "csvs"]


@pytest.mark.parametrize("name", KINDS)
def test_each_row_is_in_one_split_and_keeps_its_columns_together(read, columns, name):
    data = read(name, target="y", features=("k", "a", "flag"), validation_fraction=0.2, standardize=False)
    assert data.schema.features == ("k", "a", "flag")
    parts = [all_rows(data.train), all_rows(data.val)]
    assert 150 < len(data.val) < 250
    index = np.concatenate([data.train.row, data.val.row])
    assert sorted(index) == list(range(1000))
    x, y = (np.concatenate([part[name] for part in parts]) for name in "xy")
    np.testing.assert_array_equal(x[:, 0], index)
    np.testing.assert_array_equal(x[:, 1], columns["a"][index].astype(np.float32))
    np.testing.assert_array_equal(x[:, 2], columns["flag"][index])
    np.testing.assert_array_equal(y[:, 0], columns["y"][index].astype(np.float32))
    assert not np.array_equal(data.train.row, np.sort(data.train.row))
    again = read(name, target="y", features="k", validation_fraction=0.2)
    np.testing.assert_array_equal(again.val.row, data.val.row)


def test_the_fingerprint_depends_only_on_the_rows_and_not_on_format_or_files(read, columns, tmp_path, monkeypatch):
    wanted = {"target": "y", "features": ("a", "kind"), "categorical": "kind"}
    prints = {name: read(name, **wanted).fingerprint() for name in KINDS}
    assert len(set(prints.values())) == 1, prints
    for size, most in ((20_000, 63), (300, 61)):  # Rows are shuffled on disk: in buckets, or in buckets of buckets.
        monkeypatch.setattr(shuffle, "_IN_MEMORY_BYTES", size)
        assert read("t.parquet", **wanted, max_categories=most).fingerprint() == prints["t.parquet"]
    # Some files store a column as float32 and some as float64, so the rows on disk differ in width.
    whole = pa.table(columns)
    in_float32 = whole.set_column(0, "a", whole["a"].cast(pa.float32(), safe=False))
    (tmp_path / "mixed").mkdir()
    pyarrow.parquet.write_table(in_float32[:400], tmp_path / "mixed" / "0.parquet")
    pyarrow.parquet.write_table(whole[400:], tmp_path / "mixed" / "1.parquet")
    monkeypatch.setattr(shuffle, "_IN_MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(data_columns, "_BATCH_BYTES", 4000)
    kept = read("mixed", **wanted).fingerprint()
    monkeypatch.setattr(shuffle, "_IN_MEMORY_BYTES", 300)
    assert read("mixed", **wanted, max_categories=60).fingerprint() == kept
    assert (
        read("t.parquet", **wanted, max_categories=62).train.row.tolist() == read("t.csv", **wanted).train.row.tolist()
    )


def test_numeric_features_are_standardised_with_the_moments_of_the_training_rows(read, columns):
    data = read("t.parquet", target="y", features=("k", "a"), target_transform="standardize")
    x = all_rows(data.train)["x"].astype(np.float64)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-4)
    kept, (k, a), (y,) = data.train.row, data.schema.inputs, data.schema.targets
    assert k.mean == pytest.approx(kept.mean(), rel=1e-12)
    assert (a.scale, a.fill) == (pytest.approx(columns["a"][kept].std(), rel=1e-9), None)
    assert (y.mean, y.scale) == pytest.approx((columns["y"][kept].mean(), columns["y"][kept].std()), rel=1e-9)


@pytest.mark.parametrize("cuts", [(), (1,), (3, 3, 999), range(0, 5000, 7)])
def test_moments_of_ill_scaled_columns_agree_with_float64(cuts):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(5000, 4)) * [1, 1e-3, 1e8, 1] + [1e6, 5e3, 0, -1e9]
    values[rng.random(values.shape) < 0.1] = np.nan
    values[:, 3] = 7.0
    moments = Moments.none(4)
    for part in np.split(values, list(cuts)):
        if len(part):
            moments.add(part, np.ones(len(part)))
    exact = values.astype(np.longdouble)
    count = (~np.isnan(values)).sum(0)
    mean = np.nansum(exact, 0) / count
    np.testing.assert_allclose(moments.mean, mean.astype(float), rtol=1e-12, atol=1e-6)
    np.testing.assert_allclose(moments.squares[:3], np.nansum((exact - mean) ** 2, 0)[:3].astype(float), rtol=1e-9)
    assert moments.scale(5000, True)[3] == (7.0, 1.0)


def test_categories_are_one_hot_and_rare_ones_count_as_other(read, columns):
    data = read(
        "t.parquet", target="y", features=("kind", "k"), categorical="kind", max_categories=2, standardize=False
    )
    kinds = columns["kind"][data.train.row]
    assert data.schema.inputs[0] == Category(
        "kind",
        ("red", "green"),
        ((kinds == "red").sum(), (kinds == "green").sum()),
        (~np.isin(kinds, ["red", "green"])).sum(),
    )
    assert data.schema.features == ("kind=red", "kind=green", "kind=other", "k")
    for source in (data.train, data.val):
        kinds, x = columns["kind"][source.row], all_rows(source)["x"]
        np.testing.assert_array_equal(x[:, 0], kinds == "red")
        np.testing.assert_array_equal(x[:, 1], kinds == "green")
        np.testing.assert_array_equal(x[:, 2], ~np.isin(kinds, ["red", "green"]))
        np.testing.assert_array_equal(x[:, 3], source.row)


@pytest.fixture
def table_with_gaps(tmp_path):
    (tmp_path / "holed.csv").write_text("a,c,y\n1,u,1\n,v,2\n3,,3\n4,u,\n5,u,5\nnan,v,6\n")


def test_missing_values_are_an_error_with_their_counts(read, table_with_gaps, tmp_path):
    with pytest.raises(dpreg.InputError) as caught:
        read("holed.csv", target="y", categorical="c", validation_fraction=0.0)
    file = tmp_path / "holed.csv"
    assert (
        f"column 'a' has 2, the first in {file}, row 2; column 'c' has 1, the first in {file}, row 3; "
        f"column 'y' has 1, the first in {file}, row 4"
    ) in str(caught.value)
    with pytest.raises(dpreg.InputError, match="column 'y' has 1"):
        read("holed.csv", target="y", categorical="c", missing="mean")
    assert not list((tmp_path / "cache").iterdir())


def test_missing_rows_are_dropped_or_filled_with_the_mean(read, table_with_gaps):
    wanted = {"target": "y", "categorical": "c", "validation_fraction": 0.0}
    assert sorted(read("holed.csv", **wanted, missing="drop").train.row) == [0, 4]
    data = read("holed.csv", target="a", features=("y", "c"), categorical="c", missing="drop", validation_fraction=0.0)
    assert sorted(data.train.row) == [0, 4]


def test_a_missing_number_becomes_the_mean_and_a_missing_category_becomes_other(read, tmp_path):
    (tmp_path / "h.csv").write_text("a,c,y\n1,u,1\n,v,2\n3,,3\n8,u,4\n")
    data = read("h.csv", target="y", categorical="c", missing="mean", validation_fraction=0.0)
    order = np.argsort(data.train.row)
    a, scale = np.array([1, 4, 3, 8.0]), np.std([1, 4, 3, 8.0])
    assert data.schema.inputs[0] == Number("a", 4.0, pytest.approx(scale, rel=1e-12), 4.0)
    x = all_rows(data.train)["x"][order]
    np.testing.assert_allclose(x[:, 0], (a - 4) / scale, rtol=1e-6)
    np.testing.assert_array_equal(x[:, 1:], [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])


def test_weights_excluded_columns_and_a_validation_table_are_applied(read, columns, tmp_path):
    weighted = pa.table({**columns, "w": np.arange(1000) % 3 + 1})
    pyarrow.parquet.write_table(weighted, tmp_path / "w.parquet")
    pyarrow.parquet.write_table(weighted.slice(0, 10), tmp_path / "v.parquet")
    data = read("w.parquet", target="y", weight_column="w", exclude=("kind", "flag"), validation_dataset="v.parquet")
    assert data.schema.features == ("a", "k")
    assert (len(data.train), sorted(data.val.row)) == (1000, list(range(10)))
    weight = np.arange(1000) % 3 + 1
    np.testing.assert_array_equal(all_rows(data.train)["weight"], weight[data.train.row])
    mean = np.average(np.arange(1000), weights=weight)
    scale = np.sqrt(np.average((np.arange(1000) - mean) ** 2, weights=weight))
    np.testing.assert_allclose(all_rows(data.val)["x"][:, 1], (data.val.row - mean) / scale, rtol=1e-6)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("asked", [{"target_transform": "log"}, {"missing": "mean", "max_categories": 2}])
def test_a_row_of_weight_0_changes_nothing(read, tmp_path, suffix, asked):
    rng = np.random.default_rng(0)
    rows = pa.table(
        {
            "a": rng.normal(5, 2, 300),
            "c": rng.choice(["u", "v", "w"], 300),
            "w": rng.integers(1, 5, 300) / 2,
            "y": rng.gamma(2.0, 1.0, 300),
        }
    )
    nothing = pa.table(
        {"a": [1e200, None, -1e20], "c": ["u", "z", None], "w": [0.0, -0.0, 0.0], "y": [-1.0, 1e12, None]}
    )
    parts, kept = [], []
    for at in range(0, 300, 20):
        parts += [nothing, rows.slice(at, 20)]
        kept += [*range(at // 20 * 23 + 3, at // 20 * 23 + 23)]
    write = pyarrow.csv.write_csv if suffix == "csv" else pyarrow.parquet.write_table
    write(rows, tmp_path / f"without.{suffix}")
    write(pa.concat_tables(parts), tmp_path / f"with.{suffix}")
    wanted = {"target": "y", "categorical": "c", "weight_column": "w", "validation_fraction": 0.2, **asked}
    one, other = (read(f"{name}.{suffix}", **wanted) for name in ("without", "with"))
    assert other.schema == one.schema
    assert other.fingerprint() == one.fingerprint()
    for part in ("train", "val"):
        np.testing.assert_array_equal(getattr(other, part).row, np.array(kept)[getattr(one, part).row])
    held_out = read(f"without.{suffix}", **wanted, validation_dataset=f"with.{suffix}").val
    np.testing.assert_array_equal(np.sort(held_out.row), kept)


def test_integer_weights_are_equivalent_to_repeated_rows_in_moments_and_categories(read, tmp_path):
    rng = np.random.default_rng(1)
    columns = {"a": rng.normal(1e6, 1, 200), "c": rng.choice([*"uvwx"], 200), "y": rng.normal(size=200)}
    columns["a"][::7] = np.nan
    columns["c"][::11] = ""
    weight = rng.integers(1, 4, 200)
    pyarrow.parquet.write_table(pa.table(columns | {"w": weight}), tmp_path / "w.parquet")
    repeated = {name: np.repeat(values, weight) for name, values in columns.items()}
    pyarrow.parquet.write_table(pa.table(repeated), tmp_path / "r.parquet")
    wanted = {"target": "y", "categorical": "c", "missing": "mean", "max_categories": 2, "validation_fraction": 0.0}
    weighted = read("w.parquet", weight_column="w", target_transform="standardize", **wanted).schema
    expected = read("r.parquet", target_transform="standardize", **wanted).schema
    assert weighted.inputs[1] == expected.inputs[1]
    assert weighted.inputs[0].fill == weighted.inputs[0].mean
    for found, like in zip(
        (weighted.inputs[0], *weighted.targets), (expected.inputs[0], *expected.targets), strict=True
    ):
        assert (found.mean, found.scale) == pytest.approx((like.mean, like.scale), rel=1e-12)


@pytest.mark.parametrize("asked", [{}, {"standardize": False}, {"missing": "mean"}])
def test_a_model_receives_0_for_a_constant_column_whatever_its_value_at_prediction(read, tmp_path, asked):
    day = np.full(50, np.datetime64("2026-01-01", "D"))
    store = pa.array([17.0] * 49 + [None if "missing" in asked else 17.0])
    table = pa.table({"store": store, "day": day, "a": np.arange(50.0), "y": np.arange(50.0)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    data = read("t.parquet", target="y", dates="day", validation_fraction=0.0, **asked)
    np.testing.assert_array_equal(all_rows(data.train)["x"][:, :2], 0)
    other = np.array([[900.0, -3.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(data.schema.rows(other)["x"][:, :2], 0)
    w, _ = data.schema.parameters(np.ones((3, 1)), np.ones(1))
    np.testing.assert_array_equal(w[:2], 0)
    # Without an intercept a constant column of ones is kept.
    kept = read("t.parquet", target="y", dates="day", validation_fraction=0.0, intercept=False, missing="drop")
    np.testing.assert_array_equal(all_rows(kept.train)["x"][:, 0], 17)


def test_integer_weights_are_equivalent_to_repeated_rows_under_a_penalty(tmp_path):
    rng = np.random.default_rng(2)
    columns = {"a": rng.normal(3, 2, 60), "c": rng.choice([*"uvw"], 60), "y": rng.poisson(2.0, 60).astype(float)}
    weight = rng.integers(1, 5, 60)
    pyarrow.parquet.write_table(pa.table(columns | {"w": weight}), tmp_path / "w.parquet")
    pyarrow.parquet.write_table(
        pa.table({name: np.repeat(values, weight) for name, values in columns.items()}), tmp_path / "r.parquet"
    )
    found = []
    for name, weighed in (("w", "w"), ("r", None)):
        wanted = Columns(("y",), categorical=("c",), weight_column=weighed, validation_fraction=0.0)
        data = dpreg.read_table(
            str(tmp_path / f"{name}.parquet"), wanted, cache_dir=str(tmp_path / "c"), dtype=np.float64
        )
        solver = Solver(data.train, data_mesh(8), 8)
        fits = solver.least_squares(0.3), solver.newton(FAMILIES["poisson"], 0.3)[0]
        found.append([np.append(*data.schema.parameters(fit.w, fit.b)) for fit in fits])
    np.testing.assert_allclose(*found, rtol=1e-9)


@pytest.mark.parametrize("kind", [dpreg.LinearRegressionScratch, LinearRegression])
def test_features_that_are_constant_in_training_have_no_initial_weight(read, tmp_path, kind):
    a = np.random.default_rng(0).normal(size=80)
    table = pa.table({"store": np.full(80, 17), "a": a, "again": a, "y": 5 * a + 3})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    data = read("t.parquet", target="y", validation_fraction=0.0, batch_size=80)

    def parameters(**fields):
        trainer = dpreg.Trainer(40, 1)
        inputs = {"num_inputs": 3} if kind is dpreg.LinearRegressionScratch else {}
        trainer.fit(kind(lr=0.3, **inputs, **fields), data)
        return data.schema.parameters(*linear_parameters(trainer.state.params))

    w, b = parameters()
    np.testing.assert_allclose(np.append(w, b), [0, 2.5, 2.5, 3], atol=1e-5)
    w, b = parameters(sigma=1.0)  # The weights are random as requested, but that of a constant column is 0.
    assert w[0] == 0
    assert abs(w[1] - w[2]) > 0.01
    np.testing.assert_allclose([w[1] + w[2], b], [[5], [3]], atol=1e-5)
    with pytest.raises(dpreg.InputError, match=r"'store' has one value, 17, .*Columns\(intercept=False\)"):
        parameters(intercept=False)


def test_a_second_read_uses_the_cache_and_a_changed_file_is_detected(read, columns, tmp_path, monkeypatch):
    first = read("t.parquet", target="y", exclude="kind")
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "_write", None)
        assert read("t.parquet", target="y", exclude="kind").fingerprint() == first.fingerprint()
    changed = pa.table({**columns, "y": columns["y"] + 1})
    pyarrow.parquet.write_table(changed, tmp_path / "t.parquet")
    assert read("t.parquet", target="y", exclude="kind").fingerprint() != first.fingerprint()


def test_an_interrupted_ingest_leaves_no_files_and_two_at_once_do_no_harm(read, columns, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            ingest, "_encode", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(dpreg.InputError, match="the disk is full"):
            read("t.parquet", target="y", exclude="kind")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache" / "left.new-by-a-killed-process").mkdir()
    (tmp_path / "cache" / "left.new-by-a-killed-process" / "train.x").write_bytes(b"half")
    os.utime(tmp_path / "cache" / "left.new-by-a-killed-process", (0, 0))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(read("t.parquet", target="y", exclude="kind").fingerprint()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(os.listdir(folder)) == sorted(
        [
            "manifest.json",
            "checksums",
            *(f"{part}.{name}" for part in ("train", "val") for name in ("row", "weight", "x", "y")),
        ]
    )


def test_a_numpy_matrix_is_read_as_numbered_columns(read, tmp_path):
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20.0)
    np.savez(tmp_path / "m.npz", x=x, y=y)
    data = read("m.npz", target="y", features="x", standardize=False, validation_fraction=0.0)
    assert data.schema.features == ("x0", "x1")
    np.testing.assert_array_equal(all_rows(data.train)["x"], x[data.train.row])
    np.save(tmp_path / "m.npy", np.column_stack([x, y]))
    data = read("m.npy", target="c2", standardize=False, validation_fraction=0.0)
    np.testing.assert_array_equal(all_rows(data.train)["y"][:, 0], data.train.row)
    np.savez(tmp_path / "bad.npz", x=x, y=np.arange(3))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], object), allow_pickle=True)
    for name, message in (("bad.npz", "3 and 20 rows"), ("objects.npy", "not unpickled")):
        with pytest.raises(dpreg.InputError, match=message):
            read(name, target="y" if "npz" in name else "c")


def test_a_column_with_a_large_mean_keeps_its_digits(read, tmp_path):
    pyarrow.parquet.write_table(
        pa.table({"t": 1.7e9 + np.arange(100.0), "y": 0.5 * np.arange(100.0)}), tmp_path / "t.parquet"
    )
    data = read("t.parquet", target="y")
    x, y = (all_rows(data.train)[name][:, 0].astype(np.float64) for name in "xy")
    np.testing.assert_allclose(np.polyfit(x, y, 1)[0], 0.5 * data.schema.inputs[0].scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"features": ("k", "k")}, "'k' is asked for twice"),
        ({"target": ("y", "y")}, "'y' is asked for twice"),
        ({"features": ("k", "y")}, "'y' is asked for twice"),
        ({"features": "z"}, "column 'z' is not there; use one of 'a'"),
        ({"exclude": "z"}, "column 'z' is not there"),
        ({"categorical": "y"}, r"categorical=\('y',\) is not a feature"),
        ({"exclude": ("a", "flag", "k", "kind")}, "no column to fit on"),
        ({}, "row 1: column 'kind' has '.*', which is no number; choose columns .* or use categorical="),
        ({"features": "k", "weight_column": "y"}, "'y' is asked for twice"),
        ({"features": "k", "target": "k2", "weight_column": "a"}, "'k2' is not there"),
        ({"features": "k", "target": "a", "weight_column": "y"}, "the weight is negative"),
        ({"features": "k", "target_transform": "log"}, "'y' is not above 0"),
        ({"features": "k", "validation_fraction": 0.99999999}, "no rows to fit besides those held out"),
    ],
)
def test_a_column_that_cannot_be_read_from_a_table_is_refused_in_one_line(read, columns, tmp_path, asked, message):
    with pytest.raises(dpreg.InputError, match=message) as caught:
        read("t.parquet", **{"target": "y", **asked})
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("content", "asked", "message"),
    [
        ("a,y\n0,1\n1e-30,2\n", {"validation_dataset": "v.csv"}, "row 1: 'a' is not finite once it is scaled"),
        ("a,y,w\n1,1,0\n2,2,0\n", {"weight_column": "w"}, "all weights in column 'w' are 0"),
        ("a,y,w\n1,1,1e-37\n2,2,2e-37\n", {"weight_column": "w"}, "column 'w' are 2e-37 at most, .* multiply all"),
        (
            "a,y,w\n1,1,1\n2,2,2\n",
            {"weight_column": "w", "validation_dataset": "light.csv"},
            "light.csv: no row held out has a weight in column 'w'",
        ),
        ("a,y\n1,1e-45\n2,3e-45\n", {}, "column 'y' varies by .* target_transform='standardize'"),
        ("a,y\n1, \n2,3\n", {}, "row 1: column 'y' has ' ', .*leave no blanks"),
        ("a,b,y\n1,,1\n2,,2\n", {"missing": "mean"}, "column 'b' has no value"),
        ("a,a=u,y\nu,1,1\nv,2,2\n", {"categorical": "a"}, "two features would be called 'a=u'"),
        ("b,y\n0,1\n1,2\n", {"validation_dataset": "v.csv"}, "v.csv: column 'b' is not there"),
        ("a,y\n0,1\n1,2\n", {"validation_dataset": "none.csv"}, "there are no rows to hold out"),
    ],
)
def test_tables_that_would_be_misread_silently_are_refused(read, tmp_path, content, asked, message):
    (tmp_path / "t.csv").write_text(content)
    (tmp_path / "v.csv").write_text("a,y\n1e30,1\n")
    (tmp_path / "none.csv").write_text("a,y\n")
    (tmp_path / "light.csv").write_text("a,y,w\n1,1,0\n")
    with pytest.raises(dpreg.InputError, match=message):
        read("t.csv", target="y", validation_fraction=0.0, **asked)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_value_too_small_to_square_is_not_scaled_to_infinity(read, tmp_path):
    pyarrow.parquet.write_table(pa.table({"a": [0.0, 1e-200, 0.0], "y": [1.0, 2.0, 3.0]}), tmp_path / "t.parquet")
    assert np.isfinite(all_rows(read("t.parquet", target="y", validation_fraction=0.0).train)["x"]).all()


def test_categories_may_be_numbers_or_be_called_other(read, tmp_path):
    kinds = ["other", "b", "other", "", None, "b"]
    numbers = [1.0, np.nan, -0.0, 0.0, 1.0, 2.0]
    table = pa.table({"c": kinds, "n": numbers, "y": np.arange(6.0)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    data = read("t.parquet", target="y", categorical=("c", "n"), missing="mean", validation_fraction=0.0)
    assert data.schema.features == ("c=b", "c=other", "c=other_", "n=0", "n=1", "n=2", "n=other")
    x = all_rows(data.train)["x"][np.argsort(data.train.row)]
    np.testing.assert_array_equal(x.argmax(axis=1), [1, 0, 1, 2, 2, 0])
    np.testing.assert_array_equal(x[:, 3:].argmax(axis=1), [1, 3, 0, 0, 1, 2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"missing": "Drop"},
        {"target_transform": "Log"},
        {"max_categories": 0},
        {"validation_fraction": 1.5},
        {"target": "y"},
    ],
)
def test_invalid_columns_are_refused_in_python(wrong):
    with pytest.raises(dpreg.InputError, match=f"^{next(iter(wrong))}="):
        Columns(**wrong)


def test_a_category_has_one_spelling_in_any_file_format(read, tmp_path):
    columns = {
        "number": np.array([1, 2, 1, 30]),
        "flag": np.array([True, False, True, True]),
        "day": np.array(["2026-01-01", "2026-01-02", "2026-01-01", "2000-02-29"], "datetime64[s]"),
        "time": np.array(["2026-01-01T10", "2026-01-01T11:00:00.5", "2026-01-01T10", "2026-01-01"], "datetime64[ms]"),
        "y": np.arange(4.0),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    pyarrow.csv.write_csv(pa.table(columns), tmp_path / "t.csv")
    floats = columns | {"number": columns["number"].astype(float)}
    pyarrow.parquet.write_table(pa.table(floats), tmp_path / "f.parquet")
    lines = ["number,flag,day,time,y", "1.0,True,2026-01-01,2026-01-01 10:00:00,0"]
    lines += [
        "2.0,False,2026-01-02 00:00:00,2026-01-01 11:00:00.500000,1",
        "1.0,True,2026-01-01,2026-01-01T10:00:00.000,2",
    ]
    (tmp_path / "p.csv").write_text("\n".join([*lines, "30.0,TRUE,2000-02-29,2026-01-01,3"]) + "\n")
    wanted = {"target": "y", "categorical": ("number", "flag", "day", "time"), "validation_fraction": 0.0}
    schemas = {name: read(name, **wanted).schema for name in ("t.parquet", "t.csv", "f.parquet", "p.csv")}
    for name, schema in schemas.items():
        assert schema == schemas["t.parquet"], name
    assert schemas["t.csv"].inputs[0].values == ("1", "2", "30")


WHOLE = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-99, 99), st.integers(0, 18).map(lambda e: 10**e))
SHORT = st.one_of(st.floats(-1e6, 1e6).map(lambda v: round(v, 3)), st.floats(allow_nan=False, allow_infinity=False))


def in_types_of_numbers(value):
    """Returns the number as columns of each type that can hold it, and as texts that different programs write."""
    number = float(value)
    yield pa.array([number])
    yield from (pa.array([text]) for text in (repr(number), f"{number:.16e}", repr(number).replace("e", "E")))
    yield pa.array([number]).cast(pa.string())
    for narrow in (np.float32, np.float16):
        with np.errstate(over="ignore"):
            as_narrow = narrow(value)
        # The same integer, or the same number with few decimals.
        if float(as_narrow) == value if number.is_integer() else str(as_narrow) == str(number):
            yield pa.array(np.array([as_narrow]))
    if number.is_integer() and abs(value) < 10**22:
        whole = int(value)
        yield pa.array([f"{whole}.00"])
        for kind, least, most in ((pa.int64(), -(2**63), 2**63), (pa.uint64(), 0, 2**64), (pa.int8(), -128, 128)):
            if least <= whole < most:
                yield pa.array([whole], kind)
    exact = decimal.Decimal(int(value) if number.is_integer() else repr(value))
    if abs(exact) < 10**20 and exact.as_tuple().exponent >= -12:
        yield pa.array([exact], pa.decimal128(38, 12))


def spellings(arrays):
    """Returns the spellings of the single values of arrays, by the table reader and by `model/predict.py`."""
    for array in arrays:
        for column in (array, array.dictionary_encode()):
            decoded = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            (text,), _ = codes._distinct(decoded)
            yield standalone.normalize_category(text)
        (value,) = array.to_numpy(zero_copy_only=False)
        yield standalone.normalize_category(standalone.to_text(value))
        if pa.types.is_string(array.type):
            for kind in (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()):
                (text,), _ = codes._distinct(array.cast(kind))
                yield standalone.normalize_category(text)


@hypothesis.given(st.one_of(WHOLE.filter(lambda v: int(float(v)) == v), SHORT))
def test_a_number_has_one_spelling_in_any_column_type(value):
    found = set(spellings(in_types_of_numbers(value)))
    assert len(found) == 1, found
    (text,) = found
    assert float(text) == value
    assert standalone.normalize_category(text) == text
    if isinstance(value, int):
        assert found == {standalone.normalize_category(str(value))}


def test_different_values_have_different_spellings():
    numbers = [0, 1, -1, 0.1, 1e15, 1e15 + 1, 2**53, 2**60, 2**60 + 1, 2**63 - 1, 1e22, 1e23, 1e-5, 0.30000000000000004]
    texts = ["01", "1a", "1e3", "12E5", "0x1", "+1", "1,000", "v1.0", "inf", "1.0.0", "٣", "1_0", "true", "2026-01-01"]
    found = [standalone.normalize_category(standalone.to_text(value)) for value in [*numbers, *texts]]
    assert len(set(found)) == len(found)
    assert found[len(numbers) :] == texts
    assert standalone.normalize_category("0.12345678901234567890123") == "0.12345678901234567890123"


def test_booleans_dates_and_times_have_one_spelling_in_any_column_type():
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 120_000)
    utc = moment.replace(tzinfo=datetime.UTC)
    cases = {
        "true": [pa.array([True]), *(pa.array([text]) for text in ("true", "True", "TRUE"))],
        "2026-01-02": [
            *(pa.array([moment.date()], kind) for kind in (pa.date32(), pa.date64())),
            *(pa.array([datetime.datetime(2026, 1, 2)], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")),
            *(pa.array([text]) for text in ("2026-01-02", "2026-01-02 00:00:00", "2026-01-02T00:00:00.000")),
        ],
        "2026-01-02 03:04:05.12": [
            *(pa.array([moment], pa.timestamp(unit)) for unit in ("ms", "us", "ns")),
            *(pa.array([text]) for text in (str(moment), moment.isoformat(), "2026-01-02T03:04:05.12")),
        ],
        "2026-01-02 03:04:05.12Z": [
            *(pa.array([utc], pa.timestamp(unit, zone)) for unit in ("ms", "us") for zone in ("UTC", "Asia/Tokyo")),
            *(pa.array([text]) for text in (str(utc), "2026-01-02T03:04:05.120Z", "2026-01-02 05:04:05.12+0200")),
        ],
        "03:04:05.12": [
            *(pa.array([moment.time()], kind) for kind in (pa.time32("ms"), pa.time64("us"), pa.time64("ns"))),
            pa.array(["03:04:05.120000"]),
        ],
    }
    for text, arrays in cases.items():
        for array in arrays:
            (distinct,), _ = codes._distinct(array)
            assert standalone.normalize_category(distinct) == text, array.type
            assert standalone.normalize_category(standalone.to_text(array[0].as_py())) == text, array.type


def test_a_category_is_recognized_if_its_column_has_another_type_at_prediction(read, tmp_path):
    values = {
        "int": [10**15, 3, -7, 2**60],
        "float": [1e15, 3.0, -7.0, 2.0**60],
        "text": ["1e+15", "3.0", "-7", str(2**60)],
    }
    for name, column in values.items():
        pyarrow.parquet.write_table(pa.table({"k": column, "y": np.arange(4.0)}), tmp_path / f"{name}.parquet")
        schema = read(f"{name}.parquet", target="y", categorical="k", validation_fraction=0.0).schema
        assert set(schema.inputs[0].values) == {"1000000000000000", "3", "-7", "1152921504606846976"}
    (tmp_path / "v.csv").write_text("k,y\n3.1,1\n3.10,2\n7.00,3\n7,4\n")  # Versions are text, not numbers.
    schema = read("v.csv", target="y", categorical="k", validation_fraction=0.0).schema
    assert schema.inputs[0].values == ("7", "3.1", "3.10")
    duration = pa.table({"k": pa.array([1, 2], pa.duration("s")), "y": [1.0, 2.0]})
    pyarrow.parquet.write_table(duration, tmp_path / "d.parquet")
    with pytest.raises(dpreg.InputError, match=r"column 'k' holds no categories but duration\[s\]"):
        read("d.parquet", target="y", categorical="k")


def test_unscaled_values_that_float32_cannot_distinguish_are_refused(read, tmp_path):
    noise = np.random.default_rng(0).normal(size=200)
    pyarrow.parquet.write_table(pa.table({"a": noise + 1e9, "y": noise + 1e9}), tmp_path / "t.parquet")
    with pytest.raises(dpreg.InputError, match=r"'y' varies by .* around 1e\+09, .*target_transform='standardize'"):
        read("t.parquet", target="y")
    with pytest.raises(dpreg.InputError, match=r"'a' varies by .*standardize=True"):
        read("t.parquet", target="y", target_transform="standardize", standardize=False)
    data = read("t.parquet", target="y", target_transform="standardize")
    np.testing.assert_allclose(*(all_rows(data.train)[name] for name in "xy"), atol=1e-6)


def test_a_cache_without_its_manifest_is_rebuilt(read, columns, tmp_path):
    first = read("t.parquet", target="y", exclude="kind").fingerprint()
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    manifest.unlink()
    assert read("t.parquet", target="y", exclude="kind").fingerprint() == first


def _damaged(content, how):
    middle = len(content) // 2
    if how == "cut":
        return content[:middle]
    return content[:middle] + (b"\0" if how == "zero" else bytes([content[middle] ^ 64])) + content[middle + 1 :]


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_cache_is_detected_and_rebuilt(read, tmp_path, how, caplog, monkeypatch):
    """The damage of a small table is detected when it is opened; that of others when the damaged block is read."""
    rng = np.random.default_rng(0)
    pa.parquet.write_table(pa.table({name: rng.normal(size=5000) for name in "abcdyw"}), tmp_path / "many.parquet")
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 1 << 12)

    def content():
        data = read("many.parquet", target="y", exclude="w", validation_fraction=0.2)
        return {part: all_rows(getattr(data, part)) | {"row": getattr(data, part).row} for part in ("train", "val")}

    whole = content()
    (folder,) = (tmp_path / "cache").iterdir()
    for file in sorted(folder.iterdir()):
        written = file.read_bytes()
        file.write_bytes(_damaged(written, how))
        caplog.clear()
        jax.tree.map(np.testing.assert_array_equal, content(), whole)
        (line,) = (record.getMessage() for record in caplog.records)
        assert "is damaged" in line
        assert "the table is read anew" in line
        assert file.read_bytes() == written
    monkeypatch.setattr(cache, "_READ_AT_ONCE_BYTES", 0)
    for name in ("train.x", "train.y", "val.weight", "train.row") if how == "flip" else ():
        file = folder / name
        file.write_bytes(_damaged(file.read_bytes(), how))
        data = read("many.parquet", target="y", exclude="w", validation_fraction=0.2)
        part = getattr(data, name.partition(".")[0])
        with pytest.raises(dpreg.InputError, match=f"{name} has other bytes .* start again to read the table anew"):
            _ = part[np.arange(len(part))], part.row
        assert not folder.exists()
        jax.tree.map(np.testing.assert_array_equal, content(), whole)


def test_dates_become_days_if_requested(read, tmp_path):
    days = np.array(["1970-01-01", "2026-11-23", "1969-12-31", "2000-02-29"], "datetime64[D]")
    columns = {
        "date": days,
        "time": days.astype("datetime64[s]") + np.timedelta64(6, "h"),
        "zoned": pa.array(days.astype("datetime64[us]")).cast(pa.timestamp("us", "Europe/Paris")),
        "text": [f"{day} 12:00:00" for day in days],
        "long": pa.array([36 * 3600 * 10**9 + 7, 0, -3600 * 10**9, None], pa.duration("ns")),
        "y": np.arange(4.0),
    }
    names = ("date", "time", "zoned", "text", "long")
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    pyarrow.csv.write_csv(pa.table({k: v for k, v in columns.items() if k != "long"}), tmp_path / "t.csv")
    wanted = {"target": "y", "validation_fraction": 0.0, "standardize": False}
    data = read("t.parquet", dates=names, missing="mean", **wanted)
    x, number = all_rows(data.train)["x"][np.argsort(data.train.row)], days.astype(float)
    expected = [number, number + 0.25, number, number + 0.5, [1.5, 0, -1 / 24, (1.5 - 1 / 24) / 3]]
    np.testing.assert_allclose(x, np.transpose(expected), rtol=1e-6)
    same = read("t.csv", dates=names[:4], **wanted)
    np.testing.assert_array_equal(all_rows(same.train)["x"], all_rows(data.train)["x"][:, :4])
    with pytest.raises(dpreg.InputError, match=r"'date' is not numeric but date32.*; use dates=\('date',\)"):
        read("t.parquet", features="date", **wanted)
    with pytest.raises(dpreg.InputError, match=r"dates=\('y',\) is not a feature"):
        read("t.parquet", dates="y", **wanted)
    (tmp_path / "bad.csv").write_text("d,y\n2026-01-01,1\n2026-02-30,2\n")
    with pytest.raises(dpreg.InputError, match=r"bad.csv, row 2: column 'd' has '2026-02-30', which is no date"):
        read("bad.csv", dates="d", **wanted)


def test_files_of_a_table_may_order_their_columns_differently(read, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "1.csv").write_text("a, b,y\n1,2,3\n")
    (tmp_path / "p" / "2.csv").write_text("y,b ,a\n6,5,4\n")
    wanted = {"target": "y", "validation_fraction": 0.0, "standardize": False}
    data = read("p", **wanted)
    np.testing.assert_array_equal(all_rows(data.train)["x"][np.argsort(data.train.row)], [[1, 2], [4, 5]])
    for wrong, message in (("y,b\n6,5\n", "2.csv: there is no column 'a'"), ("a,b,a,y\n1,2,3,4\n", "two columns 'a'")):
        (tmp_path / "p" / "2.csv").write_text(wrong)
        with pytest.raises(dpreg.InputError, match=message):
            read("p", **wanted)


def test_dictionary_columns_and_foreign_byte_orders_are_decoded(read, tmp_path):
    kinds, values = ["u", "v", "u"], np.arange(3.0)
    table = pa.table({"k": pa.array(kinds).dictionary_encode(), "n": pa.array(values).dictionary_encode(), "y": values})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    wanted = {"target": "y", "validation_fraction": 0.0, "standardize": False}
    data = read("t.parquet", categorical="k", **wanted)
    x = all_rows(data.train)["x"][np.argsort(data.train.row)]
    np.testing.assert_array_equal(x, [[1, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 2]])
    with pytest.raises(dpreg.InputError, match=r"row 1: column 'k' has 'u', which is no number; .*categorical="):
        read("t.parquet", features="k", **wanted)
    np.savez(tmp_path / "t.npz", n=values.astype(">f8"), y=values.astype(">i4"))
    np.testing.assert_array_equal(all_rows(read("t.npz", **wanted).train)["x"][:, 0], data.train.row)


def test_a_quoted_na_is_missing_in_a_number_and_text_in_a_category(read, tmp_path, monkeypatch):
    """This holds also after the first block, from which Arrow infers types; and then no row is read twice."""
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1 << 10)
    full = [f'"{i}","{"NA" if i % 7 == 0 else "u"}","{i}"' for i in range(1000)]
    wanted = {"target": "y", "missing": "mean", "validation_fraction": 0.0, "standardize": False}
    for holes in ([], [0], [990]):
        lines = [line.replace(f'"{i}",', '"",', 1) if i in holes else line for i, line in enumerate(full)]
        (tmp_path / "t.csv").write_text("\n".join(['"a","c","y"', *lines]) + "\n")
        data = read("t.csv", categorical="c", **wanted)
        x, y = (all_rows(data.train)[name][np.argsort(data.train.row)] for name in "xy")
        numbers = np.arange(1000.0)
        numbers[holes] = np.delete(numbers, holes).mean()
        np.testing.assert_allclose(x[:, 0], numbers, rtol=1e-6)
        np.testing.assert_array_equal(x[:, 2], np.arange(1000) % 7 == 0)  # "NA"
        np.testing.assert_array_equal(y[:, 0], np.arange(1000))
        np.testing.assert_array_equal(all_rows(read("t.csv", exclude="c", **wanted).train)["x"].sum(), x[:, 0].sum())


def test_a_column_name_takes_precedence_over_a_group_of_columns(read, tmp_path):
    rows = np.zeros(9, [("y", "f8"), ("c", "f8")])
    rows["c"] = np.arange(9)
    np.save(tmp_path / "s.npy", rows)
    assert read("s.npy", target="y", features="c", validation_fraction=0.0).schema.features == ("c",)


def test_a_value_of_another_type_in_a_later_block_is_named(read, tmp_path):
    lines = [f"{i},{i % 2 == 0}" for i in range(1_500_000)]
    lines[1_400_000] = "x,True"
    (tmp_path / "t.csv").write_text("\n".join(["a,y", *lines]) + "\n")
    with pytest.raises(dpreg.InputError, match=r"t.csv, row 1,400,001: column 'a' has 'x', which is no number"):
        read("t.csv", target="y")
    (tmp_path / "l.csv").write_bytes(b"a,k,y\n1,u,2\n2,\xe9,3\n")
    with pytest.raises(dpreg.InputError, match=r"l.csv: .* row 2: CSV conversion error to string: invalid UTF8"):
        read("l.csv", target="y", categorical="k")
    (tmp_path / "s.csv").write_text("a,y\n1,2\n3\n")
    with pytest.raises(dpreg.InputError, match=r"row 2: Expected 2 columns, got 1"):
        read("s.csv", target="y")


def test_parameters_in_original_units_predict_the_same():
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(50, 3)) * [1, 100, 0.01] + [5, -1e3, 0]
    raw[:, 1] = rng.integers(0, 3, 50)
    schema = Schema(
        (Number("a", 5.0, 2.0), Category("c", ("u", "v"), (3, 2), 1), Number("b", 0.0, 0.01)),
        (Number("y", 7.0, 3.0), Number("z")),
    )
    w, b = rng.normal(size=(5, 2)), rng.normal(size=2)
    one_hot = np.eye(3)[raw[:, 1].astype(int)]
    original = np.column_stack([raw[:, 0], one_hot, raw[:, 2]])
    scaled = np.column_stack([(raw[:, 0] - 5) / 2, one_hot, raw[:, 2] / 0.01])
    np.testing.assert_allclose(schema.rows(np.pad(raw, ((0, 0), (0, 3))))["x"], scaled, rtol=1e-6)
    original_w, original_b = schema.parameters(w, b)
    np.testing.assert_allclose(original @ original_w + original_b, (scaled @ w + b) * [3, 1] + [7, 0], rtol=1e-9)
    assert Schema.from_json(schema.to_json()) == schema


def test_the_tfds_builder_contains_the_synthetic_rows(read, tmp_path):
    source = dpreg.SyntheticRegressionData((1.0, 2.0, 3.0), -1.0, num_train=130, num_val=20, seed=5)
    builder = SyntheticRegression(source, data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    data = read("tfds:synthetic_regression", data_dir=str(tmp_path), standardize=False)
    for ours, theirs in ((data.train, source.train), (data.val, source.val)):
        for name, column in theirs[ours.row].items():
            np.testing.assert_array_equal(all_rows(ours)[name], column)
    assert "tensorflow" not in sys.modules


def test_tfds_features_are_selected_by_name(read, tmp_path):
    SyntheticRegression(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    data = read("tfds:synthetic_regression", features="x1", target="y", data_dir=str(tmp_path))
    assert (data.num_inputs, data.num_targets, data.schema.features) == (1, 1, ("x1",))
    data = read("tfds:synthetic_regression", features="y", target="x", data_dir=str(tmp_path))
    assert (data.num_inputs, data.num_targets) == (1, 2)
    with pytest.raises(dpreg.InputError, match="column 'z' is not there; use one of 'x0', 'x1', 'y0'"):
        read("tfds:synthetic_regression", target="z", data_dir=str(tmp_path))
    with pytest.raises(dpreg.InputError, match="Could not find dataset files for: mnist"):
        read("tfds:mnist", data_dir=str(tmp_path))


def test_imports_go_downward():
    """Lists the layers, lowest first: a module may import only from its own layer and from lower ones."""
    layers = [
        ("files", "spelling", "terminal", "tracing"),
        ("errors",),
        ("config",),
        ("completion", "distributed", "models"),
        ("cli", "data"),
        ("step", "tables"),
        ("solvers",),
        ("train",),
        ("estimators", "outputs", "planning"),
        ("d2l", "doctor", "plan", "report", "scaling", "sklearn"),
        ("predict",),
        ("run",),
        ("main",),
    ]
    level = {name: height for height, names in enumerate(layers) for name in names}

    def layer_of(*parts):
        return next(part for part in parts if part in level)

    folder = pathlib.Path(dpreg.__file__).parent
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__init__":
            continue
        own = layer_of(*parts)
        for line in path.read_text().splitlines():
            words = line.replace(",", " ").split()
            if len(words) > 1 and words[0] in ("from", "import") and words[1].split(".")[0] == "dpreg":
                _, *module = words[1].split(".")
                for name in words[3:] or [""]:
                    other = layer_of(*module, name)
                    assert other == own or level[other] < level[own], f"{path.name}: {line}"


@pytest.mark.parametrize("flag", [(), ("kind",)])
@pytest.mark.parametrize("encoded", [False, True])
def test_text_that_is_not_utf8_is_refused_in_one_line(tmp_path, flag, encoded):
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 1, 3, 4], np.int32)), pa.py_buffer(b"a\xe2(b"))
    kind = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), texts) if encoded else texts
    pyarrow.parquet.write_table(pa.table({"kind": kind, "y": [1.0, 2.0, 3.0]}), tmp_path / "t.parquet")
    columns = dpreg.Columns(target=("y",), categorical=flag)
    with pytest.raises(dpreg.InputError, match=r"t\.parquet.*UTF-?8"):
        dpreg.read_table(str(tmp_path / "t.parquet"), columns, cache_dir=str(tmp_path))


def test_a_file_whose_rows_all_have_weight_0_is_read_as_if_it_were_empty(tmp_path):
    """Also if it has another type in a column, which then says nothing about the values."""
    (folder := tmp_path / "table").mkdir()
    for name, flag, weight in (("a", [True, False], 0.0), ("b", [0.5, 2.5], 1.0)):
        table = pa.table({"flag": flag, "w": [weight] * 2, "y": [1.0, 2.0]})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    columns = dpreg.Columns(target=("y",), weight_column="w", validation_fraction=0)
    data = dpreg.read_table(str(folder), columns, cache_dir=str(tmp_path / "cache"))
    assert len(data.train) == 2
