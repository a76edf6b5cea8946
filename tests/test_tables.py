"""Tables and TFDS datasets: the right rows, scaled by the right moments, reported in original units."""

import pathlib
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import dpreg
from dpreg.data.sources import Scaling
from dpreg.data.synthetic_regression import SyntheticRegression
from dpreg.data.tfds import read_tfds


def all_rows(source):
    return source[np.arange(len(source))]


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    columns = {
        "a": rng.normal(1e4, 1, 1000),
        "flag": rng.random(1000) > 0.5,
        "k": np.arange(1000),
        "y": rng.normal(size=1000),
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    pyarrow.csv.write_csv(pa.table({**columns, "flag": columns["flag"].astype(int)}), tmp_path / "t.csv")
    return tmp_path, columns


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_every_row_of_a_table_is_in_one_part_and_keeps_its_columns_together(table, kind):
    folder, columns = table
    data = dpreg.read_table(
        str(folder / f"t.{kind}"), "y", ("k", "a", "flag"), validation_fraction=0.2, standardize=False
    )
    assert data.features == ("k", "a", "flag")
    parts = [all_rows(data.train), all_rows(data.val)]
    assert 150 < len(data.val) < 250
    index = np.concatenate([part["x"][:, 0] for part in parts]).astype(int)
    assert sorted(index) == list(range(1000))
    x, y = (np.concatenate([part[name] for part in parts]) for name in "xy")
    np.testing.assert_array_equal(x[:, 1], columns["a"][index].astype(np.float32))
    np.testing.assert_array_equal(x[:, 2], columns["flag"][index])
    np.testing.assert_array_equal(y[:, 0], columns["y"][index].astype(np.float32))
    assert not np.array_equal(index[: len(data.train)], np.sort(index[: len(data.train)]))
    again = dpreg.read_table(str(folder / f"t.{kind}"), "y", ("k",), validation_fraction=0.2, standardize=False)
    np.testing.assert_array_equal(all_rows(again.val)["x"][:, 0], index[len(data.train) :])


def test_features_are_standardised_by_the_training_rows(table):
    folder, columns = table
    data = dpreg.read_table(str(folder / "t.parquet"), "y", ("k", "a"))
    x = all_rows(data.train)["x"].astype(np.float64)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(0), 1, atol=1e-4)
    held_out = np.round(all_rows(data.val)["x"][:, 0] * data.scaling.scale[0] + data.scaling.mean[0]).astype(int)
    kept = np.setdiff1d(np.arange(1000), held_out)
    assert data.scaling.mean[0] == pytest.approx(kept.mean(), rel=1e-9)
    assert data.scaling.scale[1] == pytest.approx(columns["a"][kept].astype(np.float64).std(), rel=1e-9)


def test_a_column_far_from_zero_keeps_its_digits(tmp_path):
    t = 1.7e9 + np.arange(100.0)
    pyarrow.parquet.write_table(pa.table({"t": t, "y": 0.5 * np.arange(100.0)}), tmp_path / "t.parquet")
    data = dpreg.read_table(str(tmp_path / "t.parquet"), "y")
    x, y = (all_rows(data.train)[name][:, 0].astype(np.float64) for name in "xy")
    np.testing.assert_allclose(np.polyfit(x, y, 1)[0], 0.5 * data.scaling.scale[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "features", "said"),
    [("y", ("k", "k"), "'k' is asked for twice"), (("y", "y"), (), "'y' is asked for twice"), ("y", ("k", "y"), "'y'")],
)
def test_a_column_named_twice_is_refused(table, target, features, said):
    with pytest.raises(dpreg.InputError, match=said):
        dpreg.read_table(str(table[0] / "t.parquet"), target, features)


def test_one_row_is_always_fitted(table):
    assert len(dpreg.read_table(str(table[0] / "t.parquet"), "y", validation_fraction=0.9999).train) == 1


def test_parameters_in_original_units_predict_the_same():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 3)) * [1, 100, 0.01] + [5, -1e3, 0]
    w, b = rng.normal(size=(3, 2)), rng.normal(size=2)
    scaling = Scaling.of(x)
    original_w, original_b = scaling.to_original_units(w, b)
    np.testing.assert_allclose(x @ original_w + original_b, (x - x.mean(0)) / x.std(0) @ w + b, rtol=1e-9)


def test_a_constant_column_is_only_centred():
    scaling = Scaling.of(np.full((7, 1), 0.1))  # the mean of which is not quite 0.1
    np.testing.assert_allclose(scaling(np.full((2, 1), 1.1)), [[1.0], [1.0]])


def test_the_tfds_builder_holds_the_synthetic_rows(tmp_path):
    source = dpreg.SyntheticRegressionData((1.0, 2.0, 3.0), -1.0, num_train=130, num_val=20, seed=5)
    builder = SyntheticRegression(source, data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    data = read_tfds("synthetic_regression", data_dir=str(tmp_path))
    for ours, theirs in ((data.train.source, source.train), (data.val, source.val)):
        for name, column in all_rows(theirs).items():
            np.testing.assert_array_equal(all_rows(ours)[name], column)
    assert "tensorflow" not in sys.modules


def test_tfds_features_are_chosen_by_name(tmp_path):
    SyntheticRegression(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    data = read_tfds("synthetic_regression", ("x",), ("y",), data_dir=str(tmp_path))
    assert (data.num_inputs, data.num_targets) == (1, 2)
    for target, features, said in ((("z",), (), "no feature 'z'; it has x, y"), ((), ("q",), "no feature 'q'")):
        with pytest.raises(dpreg.InputError, match=said):
            read_tfds("synthetic_regression", target, features, data_dir=str(tmp_path))
    with pytest.raises(dpreg.InputError, match="Could not find dataset files for: mnist"):
        read_tfds("mnist", data_dir=str(tmp_path))


def test_imports_go_downward():
    """The rooms of the house, lower ones first: a module imports from rooms below its own, or from its own."""
    rooms = [
        ("errors",),
        ("config",),
        ("data", "models"),
        ("parallel",),
        ("trainer",),
        ("observers", "build"),
        ("doctor",),
        ("main",),
    ]
    level = {name: height for height, names in enumerate(rooms) for name in names}
    folder = pathlib.Path(dpreg.__file__).parent
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("from", "import") and words[1].split(".")[0] == "dpreg":
                other = words[1].split(".")[1]
                assert level[other] < level[own] or other == own, f"{path.name}: {line}"
