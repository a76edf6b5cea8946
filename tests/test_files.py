"""Files of a table: each is read correctly, or refused in one line that names it."""

import bz2
import itertools
import os
import pathlib
import socket
import time
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

import dpreg
from dpreg.config import Config
from dpreg.tables.ingest import ingest
from dpreg.tables.table import open_table
from dpreg.tables.values import NUMBERS

HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': %s}"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Returns a function that reads a table: (feature names, {row: unscaled features and target})."""
    monkeypatch.chdir(tmp_path)

    def read_table(name, target="y", **columns):
        asked = dpreg.Columns(target=(target,), validation_fraction=0.0, standardize=False, **columns)
        data = dpreg.read_table(name, asked, cache_dir="cache")
        rows = data.train[np.argsort(data.train.row)]
        return data.schema.features, rows["x"].tolist(), rows["y"][:, 0].tolist()

    return read_table


def refused(read, name, **columns):
    """Returns the one-line error of a table that must be refused within seconds of CPU time."""
    started = time.process_time()
    with pytest.raises(dpreg.InputError) as caught:
        read(name, **columns)
    assert time.process_time() - started < 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_parquet(path, **columns):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


def test_a_folder_is_read_with_its_subfolders_and_every_compression(read):
    for row, name in enumerate(("a.csv", "b.csv.gz", "b/c.csv.bz2", "b/d/e.csv.zst", "f.CSV")):
        content = f"a,y\n{row},{10 * row}\n".encode()
        pathlib.Path("t", name).parent.mkdir(parents=True, exist_ok=True)
        codec = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}.get(name.rpartition(".")[2])
        with pa.output_stream(f"t/{name}", compression=codec) as file:
            file.write(content)
    write("t/_SUCCESS", "")
    write("t/.part.crc", "x")
    write("t/_temporary/0.csv", "a,y\n99,99\n")
    # Files are read in the order of their names: the folder b before the file b.csv.gz.
    expected = [[0.0], [2.0], [3.0], [1.0], [4.0]]
    for name in ("t", "t/**", "t/*", "t/../t"):
        assert read(name)[1] == expected, name
    assert read("t/**/*.csv*")[1] == expected[:-1]
    many = bz2.compress(b"a,y\n0,0\n") + bz2.compress(b"1,1\n")  # concatenated streams
    write("s.csv.bz2", many)
    assert read("s.csv.bz2")[2] == [0, 1]
    for suffix in (".pq", ".parq", ".parquet"):
        write_parquet(f"p/0{suffix}", a=[1.0], y=[2.0])
    assert read("p")[2] == [2, 2, 2]


def test_files_of_a_folder_that_cannot_be_read_are_named(read):
    write("t/a.csv", "a,y\n1,2\n")
    write("t/b/notes.txt", "")
    write("t/c.csv.xz", "")
    message = refused(read, "t")
    assert "'t/b/notes.txt', 't/c.csv.xz' cannot be read" in message
    assert "such as 't/**/*.csv'" in message
    assert read("t/**/*.csv")[2] == [2]
    assert "'t/c.csv.xz' cannot be read" in refused(read, "t/*")
    write("t/c.parquet", "")
    os.remove("t/b/notes.txt")
    os.remove("t/c.csv.xz")
    assert "of different kinds, .csv and .parquet" in refused(read, "t")


def test_hive_partitions_are_columns_with_one_type_over_all_partitions(read):
    for year, month, y in (("2024", "01", 3.0), ("2023", "12", 2.0), ("__HIVE_DEFAULT_PARTITION__", "02", 1.0)):
        write_parquet(f"h/year={year}/month%20x={month}/0.parquet", a=[y, y], y=[y, y])
    assert read("h", missing="drop") == (
        ("a", "year", "month x"),
        [[2, 2023, 12], [2, 2023, 12], [3, 2024, 1], [3, 2024, 1]],
        [2, 2, 3, 3],
    )
    assert read("h/**/*.parquet", missing="drop")[1] == read("h", missing="drop")[1]
    assert read("h/year=2024")[0] == ("a", "month x")  # A folder named in the path is not a value of a column.
    features = read("h", categorical=("year", "month x"), missing="mean")[0]
    assert features[1:] == (
        "year=2023",
        "year=2024",
        "year=other",
        "month x=1",
        "month x=12",
        "month x=2",
        "month x=other",
    )
    # If the files contain the column as well, as those of polars do, the values must agree.
    for k in (1, 2):
        write_parquet(f"own/k={k}/0.parquet", k=[k, k], y=[1.0, 2.0])
    assert read("own")[:2] == (("k",), [[1], [1], [2], [2]])
    write_parquet("own/k=2/0.parquet", k=[2, 3], y=[1.0, 2.0])
    assert "own/k=2/0.parquet, row 1: column 'k' differs from the name of its folder, 2" in refused(read, "own")
    write_parquet("half/k=1/0.parquet", y=[1.0])
    write_parquet("half/0.parquet", y=[1.0])
    assert "half/0.parquet: there is no column 'k'" in refused(read, "half")
    write_parquet("text/k=1/0.parquet", y=[1.0])
    write_parquet("text/k=u/0.parquet", y=[1.0])
    assert "text/k=u/0.parquet, row 1: column 'k' has 'u', which is no number" in refused(read, "text")


def test_files_of_a_table_must_have_the_same_columns_whichever_is_first(read):
    for first, second in itertools.permutations(("a,y\n1,1\n", "a,b,y\n1,2,3\n")):
        write("t/0.csv", first)
        write("t/1.csv", second)
        without = "t/0.csv" if "b" not in first else "t/1.csv"
        assert f"{without}: there is no column 'b'" in refused(read, "t")
        assert read("t", features=("a",))[2] in ([1, 3], [3, 1])


PARTS = {
    "header": "a,y\n",
    "missing": "a,y\n,5\n",
    "ones": "a,y\n0,1\n1,2\n",
    "booleans": "a,y\nTrue,3\nFALSE,4\n",
    "nothing": "",
    "numbers": "a,y\n2.5,6\n",
}


def test_the_type_of_a_column_comes_from_all_files_in_any_order(read):
    values = {1: 0, 2: 1, 3: 1, 4: 0}  # y -> a
    names = ("header", "missing", "ones", "booleans", "nothing")
    for number, order in enumerate(itertools.permutations(names)):
        if number % 7 == 0:  # Each file comes in each place.
            for place, part in enumerate(order):
                write(f"t/{place}.csv", PARTS[part])
            _, x, y = read("t", missing="drop")
            assert {b: a for (a,), b in zip(x, y, strict=True)} == values, order
    whole = "a,y\n" + "0,0\n" * 1000
    for content in (whole + "True,1\n", "a,y\nTrue,1\n" + whole[4:]):
        write("t.csv", content)
        assert read("t.csv")[1].count([1]) == 1
    for order in itertools.permutations(("numbers", "booleans")):
        for place, part in enumerate(order):
            write(f"m/{place}.csv", PARTS[part])
        assert "column 'a' has a number besides 0 and 1, and true or false in m/" in refused(read, "m")
        assert read("m", categorical=("a",))[0] == ("a=2.5", "a=false", "a=true", "a=other")
    write("w.csv", PARTS["numbers"] + "true,6\n")
    assert "column 'a' has a number besides 0 and 1" in refused(read, "w.csv")


def test_the_type_of_a_column_does_not_depend_on_which_block_reveals_it(read, monkeypatch):
    monkeypatch.setattr("dpreg.tables.csv_files._BLOCK_BYTES", 1 << 10)
    rows = [f"{i % 2},2020-01-01,{i}" for i in range(500)]
    for at in (0, 250, 499):
        lines = list(rows)
        lines[at] = f"{bool(at % 2)},2020-01-01 12:00:00.5,{at}"
        write("t.csv", "\n".join(["a,d,y", *lines]) + "\n")
        _, x, y = read("t.csv", dates=("d",))
        assert y == list(range(500))
        np.testing.assert_array_equal(np.array(x)[:, 0], np.arange(500) % 2)
        np.testing.assert_allclose(np.array(x)[:, 1], 18262 + 0.5 * (np.arange(500) == at), atol=1e-2)


def test_dates_of_any_precision_and_time_zone_become_days_in_any_file_order(read):
    values = {
        "2020-01-01": 18262,
        " 2020-01-01 12:00": 18262.5,
        "2020-01-01T06:00:00.123456789": 18262.25,
        "2020-01-01T00:00:00Z": 18262,
        "2020-01-01 00:00:00+12:00": 18261.5,
        "1500-01-01": -171664,
    }
    for texts in (list(values), list(values)[::-1]):
        for place, text in enumerate(texts):
            write(f"d/{place}.csv", f"d,y\n{text},{place}\n")
        np.testing.assert_allclose(np.ravel(read("d", dates=("d",))[1]), [values[text] for text in texts], rtol=1e-6)
    write("d/9.csv", "d,y\n5,1\n")
    assert "d/9.csv, row 1: column 'd' has '5', which is no date" in refused(read, "d", dates=("d",))


def test_a_pandas_index_is_a_feature_only_if_it_is_named(read, caplog):
    frame = pd.DataFrame({"a": [1.0, 2.0], "y": [3.0, 4.0]}, index=[5, 7])
    for name, index in (("__index_level_0__", frame), ("k", frame.rename_axis("k"))):
        index.to_parquet("t.parquet")
        assert name in pyarrow.parquet.read_schema("t.parquet").names
        assert read("t.parquet")[0] == ("a",)
        assert f"t.parquet: '{name}': the index of a pandas DataFrame, and not a feature" in caplog.messages[-1]
        assert read("t.parquet", features=(name, "a"))[1] == [[5, 1], [7, 2]]
    assert read("t.parquet", categorical=("k",))[0] == ("a", "k=5", "k=7", "k=other")
    frame.to_csv("t.csv")
    caplog.clear()
    assert read("t.csv")[0] == ("", "a")
    assert "t.csv: column '' has no name" in caplog.messages[-1]
    assert read("t.csv", exclude=("",))[0] == ("a",)
    assert len(caplog.messages) == 1
    frame.to_csv("u.csv")
    pd.read_csv("u.csv").to_csv("u.csv", index=False)
    assert read("u.csv")[0] == ("Unnamed: 0", "a")
    assert "'Unnamed: 0' has no name" in caplog.messages[-1]


@pytest.mark.parametrize("change", ["replaced", "touched", "removed", "added"])
def test_a_table_that_changes_while_it_is_read_is_not_cached(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    for part in (0, 1):
        write_parquet(f"t/{part}.parquet", a=np.arange(4.0), y=np.arange(4.0))
    table = open_table("t")
    rows = table.read({"a": NUMBERS})
    assert next(rows).file == "t/0.parquet"
    write_parquet("new.parquet", a=np.ones(9), y=np.ones(9))
    if change == "removed":
        os.remove("t/1.parquet")
    elif change == "touched":
        os.utime("t/0.parquet")
    else:
        os.replace("new.parquet", "t/2.parquet" if change == "added" else "t/1.parquet")
    message = r"^t: '.*/[012].parquet' changed while the table was read; start again$"
    with pytest.raises(dpreg.InputError, match=message):
        list(rows)
    with pytest.raises(dpreg.InputError, match=message):
        ingest(table, dpreg.Columns(target=("y",)), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(list(open_table("t").read({"a": NUMBERS}))) == {"removed": 1, "added": 3}.get(change, 2)


def test_a_path_that_is_not_a_regular_file_is_refused_before_it_is_opened(read):
    os.mkfifo("f.csv")
    os.symlink("/dev/zero", "zero.csv")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.csv")
    os.symlink("nowhere", "broken.csv")
    os.symlink("self.csv", "self.csv")
    write("loop/a.csv", "a,y\n1,2\n")
    os.symlink("../loop", "loop/again")
    write("twice/a.csv", "a,y\n1,2\n")
    os.symlink("a.csv", "twice/b.csv")
    for name, message in {
        "f.csv": "is a pipe or a device",
        "zero.csv": "is a pipe or a device",
        "s.csv": "is a pipe or a device",
        "/dev/zero": "unknown kind",
        "broken.csv": "No such file",
        "self.csv": "Too many levels of symbolic links",
        "loop": "loop/again: is the folder loop again",
        "twice": "twice/b.csv: is the file twice/a.csv again",
        "a\nb.csv": "cannot be printed",
        "a\0b.csv": "cannot be printed",
    }.items():
        assert message in refused(read, name), name
    write("u\u2028.csv", "a,y\n1,2\n")
    write(os.fsdecode(b"v\xff.csv"), "a,y\n1,2\n")
    for name in ("u*.csv", "v*.csv"):
        assert "cannot be printed; rename it" in refused(read, name)


@pytest.mark.parametrize("flag", ["workdir", "output", "cache_dir", "data_dir"])
@pytest.mark.parametrize("name", ["w\udcff", "w\n", "w\u2028x", "w\x1b[2J"])
def test_unprintable_paths_are_refused_before_anything_starts(flag, name):
    with pytest.raises(dpreg.InputError, match=f"{flag}=.* cannot be printed; rename it|no flagfile holds"):
        Config(**{flag: name})


def header_of_npy(text, data=b""):
    text = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def test_numpy_files_whose_size_contradicts_their_header_are_refused(read):
    for shape, message in {
        "(1000000000000, 2)": "takes 16,000,000,000,000 bytes, and it has 32",
        "(1000000000000,)": "takes 8,000,000,000,000 bytes, and it has 32",
        "(1, 2)": "takes 16 bytes, and it has 32",
        "(0, 1000000000000)": "more than 1,048,576 columns",
    }.items():
        write("n.npy", header_of_npy(HEADER % shape, bytes(32)))
        assert message in refused(read, "n.npy", target="c1")
    write("n.npy", header_of_npy("{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000,)}"))
    assert "values of 0 bytes" in refused(read, "n.npy", target="c")
    zipfile.ZipFile("none.npz", "w").close()
    with zipfile.ZipFile("twice.npz", "w") as archive:
        archive.writestr("a.npy", header_of_npy(HEADER % "(4,)", bytes(32)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", header_of_npy(HEADER % "(4,)", bytes(32)))
    assert "there are two arrays 'a.npy'" in refused(read, "twice.npz")
    assert "there are no arrays" in refused(read, "none.npz")


def test_a_damaged_npz_is_read_correctly_or_refused(read):
    columns = {"a": np.arange(8.0), "y": np.arange(8.0) ** 2}
    np.savez("s.npz", **columns)
    np.savez_compressed("c.npz", **columns)
    for name in ("s.npz", "c.npz"):
        whole = pathlib.Path(name).read_bytes()
        expected, refusals = read(name), 0
        for at in range(0, len(whole), 5):
            write("t.npz", whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                assert read("t.npz") == expected
            except dpreg.InputError:
                refusals += 1
        assert refusals > len(whole) / 10


def test_text_that_is_not_csv_is_refused_in_one_line(read, monkeypatch):
    monkeypatch.setattr("dpreg.tables.csv_files._BLOCK_BYTES", 1 << 16)
    for content, message in {
        "a,y\n1,2\n".encode("utf-16"): "it is written in UTF-16; save it in UTF-8",
        b"a\x1bb,y\n1,2\n": "has characters that cannot be printed; rename it",
        "a\u2028b,y\n1,2\n".encode(): "has characters that cannot be printed; rename it",
        b"a\xe9,y\n1,2\n": "not a readable csv file: ",
        b"a,y\n1,2\0\n": "row 1: column 'y' has '2\\x00', which is no number",
        b"a,y\n" + b"1" * (1 << 18) + b",2\n": "a row has more than 65,536 bytes, or a quote is not closed",
        b'a,y\n"' + b"1" * (1 << 18) + b",2\n": "a row has more than 65,536 bytes, or a quote is not closed",
        b"": "Empty CSV file",
    }.items():
        write("t.csv", content)
        assert message in refused(read, "t.csv"), message
    write("t.csv", "\ufeffa,y\r\n1,2\r\n3,4\r\n")
    assert read("t.csv") == (("a",), [[1], [3]], [2, 4])


def test_reading_time_is_linear_in_the_number_of_columns(read, monkeypatch):
    columns, rows = 20_000, 3
    names = [f"column{i}" for i in range(columns)]
    values = np.arange(rows * columns).reshape(rows, columns)
    write(
        "w.csv", "\n".join(",".join(map(str, line)) for line in [[*names, "y"], *np.column_stack([values, [1, 2, 3]])])
    )
    started = time.process_time()
    features, x, _ = read("w.csv")
    assert time.process_time() - started < 20  # Quadratic time would take minutes.
    assert list(features) == names
    np.testing.assert_array_equal(x, values.astype(np.float32))
    assert len(refused(read, "w.csv", target="z")) < 500
