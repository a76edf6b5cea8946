"""Tables as the world has them: read as pandas reads them, or refused in one line that says where."""

import csv
import gzip
import io
import math
import pathlib
import tempfile

import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from hypothesis import strategies as st

import dpreg

_FLOAT32 = float(np.finfo(np.float32).max)
# What Arrow takes for missing, and pandas is told to.
_MISSING = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA"]
_MISSING += ["NULL", "NaN", "n/a", "nan", "null"]

names = st.one_of(
    st.sampled_from(["a", "b", "y", "x0", " y", "a ", "Größe", "row,1", 'say "x"', "x=1", "two\nlines", "", "λ"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
)
numbers = st.one_of(
    st.integers(-9, 9).map(float),
    st.floats(width=32),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e39, -1e300, 16777217.0, math.nan, math.inf]),
)
words = st.one_of(
    st.sampled_from(["u", "v", "other", "", " ", "NA", "null", "1", "1.0", "True", "é", "a,b", 'q"q', "l1\nl2", "∞"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=4),
)
tame_floats = st.floats(-1e9, 1e9, width=32) | st.floats(1, 1e6) | st.integers(1, 9).map(float)
columns_of_a_kind = {
    "float": numbers,
    "int": st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5),
    "huge": st.integers(-(10**30), 10**30),
    "bool": st.booleans(),
    "text": words,
    "null": st.none(),
}


@st.composite
def tables(draw):
    """(names, values) of a small table, with nulls in any place."""
    how = draw(st.sampled_from(["wild", "tame", "plain"]))  # most wild ones are refused
    tame = how != "wild"
    if how == "plain":
        rows = draw(st.integers(10, 12))
        values = [draw(st.lists(st.floats(1, 1e6), min_size=rows, max_size=rows, unique=True)) for _ in range(3)]
        return ["a", "b", "y"], ["float"] * 3, values
    count, rows = draw(st.integers(2 if tame else 1, 4)), draw(st.integers(5 if tame else 0, 12))
    kinds = [draw(st.sampled_from(["float", "float", "text", *columns_of_a_kind])) for _ in range(count)]
    nulls = draw(st.sampled_from([False, False, True]))
    if tame:
        kinds[-1] = "float"
    values = []
    for kind in kinds:
        value = tame_floats if tame and kind == "float" else columns_of_a_kind[kind]
        values.append(draw(st.lists(value | st.none() if nulls else value, min_size=rows, max_size=rows)))
    header = draw(st.lists(names, min_size=count, max_size=count, unique_by=str.strip if tame else None))
    return header, kinds, values


asked = st.fixed_dictionaries(
    {
        "missing": st.sampled_from(["error", "drop", "mean"]),
        "validation_fraction": st.sampled_from([0.0, 0.3]),
        "standardize": st.sampled_from([True, False]),
        "target_transform": st.sampled_from(["none", "none", "log", "standardize"]),
    }
)


def written(folder, suffix, table):
    """The file, and its columns as pandas reads them; None where pandas cannot either."""
    header, kinds, values = table
    file = folder / f"t{suffix}"
    if suffix == ".parquet":
        types = {"float": pa.float64(), "int": pa.int64(), "huge": pa.decimal128(38)}
        types |= {"bool": pa.bool_(), "text": pa.string(), "null": pa.null()}
        arrays = [pa.array(v, types[kind]) for kind, v in zip(kinds, map(list, values), strict=True)]
        pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, [n.strip() for n in header]), file)
        return file, pd.DataFrame({i: pd.Series(v, dtype=object) for i, v in enumerate(values)})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    rows.writerow(header)
    rows.writerows(zip(*[["" if v is None else v for v in column] for column in values], strict=True))
    content = text.getvalue().encode()
    with (gzip.open if suffix.endswith(".gz") else open)(file, "wb") as opened:
        opened.write(content)
    try:
        return file, pd.read_csv(
            io.BytesIO(content),
            header=0,
            names=range(len(header)),
            dtype=str,
            na_values=_MISSING,
            keep_default_na=False,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError):
        return file, None


def as_number(value):
    """NaN for what is missing; None for no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    try:
        return float({"true": 1, "false": 0}.get(value.lower(), value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None


@hypothesis.settings(max_examples=400, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    table=tables(),
    suffix=st.sampled_from([".csv", ".csv", ".csv.gz", ".parquet"]),
    wanted=asked,
    categories=st.booleans(),
)
def test_a_table_is_read_as_pandas_reads_it_or_refused_in_one_line(table, suffix, wanted, categories):
    header, kinds, values = table
    stripped = [name.strip() for name in header]
    categorical = tuple(n for n, kind in zip(stripped[:-1], kinds, strict=False) if kind == "text" and categories)
    asked_for = dpreg.Columns(target=(stripped[-1],), categorical=categorical, **wanted)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        file, frame = written(folder, suffix, table)
        data = read_or_refused(folder, file, asked_for)
        if isinstance(data, str):
            assert not is_plain(header, kinds, values), data
            return
        hypothesis.assume(frame is not None)
        compare(data, frame, stripped, categorical, wanted)


def read_or_refused(folder, file, columns):
    """The rows; or the line that says why not, and nothing is left of them then."""
    try:
        return dpreg.read_table(str(file), columns, cache_dir=str(folder / "cache"))
    except dpreg.InputError as error:
        message = str(error)
    assert str(file) in message, message
    assert "\n" not in message, message
    assert not (folder / "cache").exists() or not list((folder / "cache").iterdir())
    return message


def is_plain(header, kinds, values):
    """Whether nothing at all is odd about a table."""
    return (
        len(set(header)) == len(header) > 1
        and all(name.isascii() and name.isalnum() for name in header)
        and all(kind in ("float", "int") for kind in kinds)
        and len(values[0]) > 9
        and all(v is not None and 0.01 < v < 1e9 for column in values for v in column)
        and all(len(set(column)) > 1 for column in values)
    )


def compare(data, frame, names, categorical, wanted):
    """The rows read are those of the frame, once."""
    sources = [source for source in (data.train, data.val) if source]
    number = np.concatenate([source.row for source in sources])
    x, y = (np.concatenate([source[np.arange(len(source))][name] for source in sources]) for name in "xy")
    raw = {name: frame[i].tolist() for i, name in enumerate(names)}
    values = {n: np.array([as_number(v) for v in c], float) for n, c in raw.items() if n not in categorical}
    gone = {n: np.array([is_missing(v) for v in c]) for n, c in raw.items()}
    there = ~np.any(list(gone.values()), axis=0) if wanted["missing"] == "drop" else np.ones(len(frame), bool)
    assert sorted(number) == list(np.flatnonzero(there))
    columns = {feature: x[:, i] for i, feature in enumerate(data.schema.features)}
    target, fitted = values[names[-1]], data.train.row
    if wanted["target_transform"] == "log":
        target = np.log(target)
    scaled = standardized(target, fitted) if wanted["target_transform"] == "standardize" else target
    close(y[:, 0], scaled[number])
    for name in names[:-1]:
        if name in categorical:
            kinds = [c for c in columns if c.startswith(f"{name}=")]
            words = [None if gone[name][row] else spelled(word) for row, word in enumerate(raw[name])]
            seen = [words[row] for row in fitted]
            for position, row in enumerate(number):
                found = {kind: columns[kind][position] for kind in kinds}
                if words[row] in seen and words[row] is not None:
                    assert [kind for kind, value in found.items() if value] == [f"{name}={words[row]}"]
                elif None in seen:  # in training, too, there were some without
                    (kind,) = (kind for kind, value in found.items() if value)
                    assert kind == kinds[-1]
                else:
                    shares = {f"{name}={word}": np.float32(seen.count(word) / len(seen)) for word in seen}
                    assert found == shares | {kinds[-1]: 0}
        else:
            column = values[name]
            column = np.where(np.isnan(column), np.nanmean(column[fitted]), column)
            close(columns[name], (standardized(column, fitted) if wanted["standardize"] else column)[number])


def spelled(word):
    return word.lower() if word.lower() == "true" else word.removesuffix(".0")


def is_missing(value):
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def standardized(values, fitted):
    values = values.astype(np.longdouble)
    deviation = values[fitted].std() if len(set(values[fitted].tolist())) > 1 else 1
    return (values - values[fitted].mean()) / (deviation if deviation > 1e-150 else 1)


def close(found, wanted):
    scale = max(1e-30, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=2e-6, atol=1e-6 * scale)


@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    suffix=st.sampled_from([".csv", ".csv.gz", ".parquet", ".npy", ".npz"]),
    real=st.sampled_from([".csv", ".csv.gz", ".parquet", ".npy", ".npz"]),
    cut=st.integers(0, 3000),
    at=st.integers(0, 3000),
    noise=st.binary(max_size=8),
)
def test_a_broken_file_or_one_of_another_kind_is_refused_in_one_line(suffix, real, cut, at, noise):
    rng = np.random.default_rng(0)
    columns = {"c0": rng.normal(size=50), "c1": rng.normal(size=50)}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        whole = folder / f"whole{real}"
        if real == ".npy":
            np.save(whole, np.column_stack(list(columns.values())))
        elif real == ".npz":
            np.savez(whole, **columns)
        elif real == ".parquet":
            pyarrow.parquet.write_table(pa.table(columns), whole)
        else:
            pd.DataFrame(columns).to_csv(whole, index=False)
        content = bytearray(whole.read_bytes())
        content[at : at + len(noise)] = noise
        file = folder / f"t{suffix}"
        file.write_bytes(content[: max(0, len(content) - cut)])
        data = read_or_refused(folder, file, dpreg.Columns(target=("c1",)))
        if not isinstance(data, str):
            for source in (data.train, data.val):
                assert source is None or all(np.isfinite(v).all() for v in source[np.arange(len(source))].values())
