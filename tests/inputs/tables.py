"""Tables in files: read as pandas or NumPy read them, or refused in one line with the position."""

import csv
import dataclasses
import gzip
import io
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

import dpreg

from .mutate import damage_bytes
from .refusal import check_line

# The texts that Arrow takes for missing; pandas is configured to do the same.
MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA")
MISSING += ("NULL", "NaN", "n/a", "nan", "null")
NAMES = (
    "a",
    "b",
    "y",
    "x0",
    " y",
    "a ",
    "Größe",
    "row,1",
    'say "x"',
    "x=1",
    "two\nlines",
    "",
    "λ",
    "\x1b[2J",
    "\u2028",
)
WORDS = (
    "u",
    "v",
    "other",
    "",
    " ",
    "NA",
    "null",
    "1",
    "1.0",
    "True",
    "é",
    "a,b",
    'q"q',
    "l1\nl2",
    "∞",
    "\x1b[1m",
    "x" * 300,
)
ODD = (0.0, -0.0, 1e-320, 1e39, -1e300, 16777217.0, math.nan, math.inf, 5e-324, 1e150, -7.25)
SUFFIXES = (".csv", ".csv", ".csv.gz", ".csv.zst", ".csv.bz2", ".parquet", ".npy", ".npz")


def draw_table(rng):
    """Draws (names, kinds, values): columns of Python values, with None for missing ones."""
    if rng.random() < 0.4:  # a plain table
        rows = int(rng.integers(10, 13))
        return ["a", "b", "y"], ["float"] * 3, [rng.uniform(1, 1e6, rows).tolist() for _ in range(3)]
    tame = rng.random() < 0.8  # Most other tables are refused.
    count, rows = int(rng.integers(2 if tame else 1, 5)), int(rng.integers(5 if tame else 0, 13))
    kinds = rng.choice(["float", "float", "float", "int", "huge", "bool", "text", "text", "null"], count).tolist()
    names = [draw_name(rng, tame) for _ in range(count)]
    if tame:
        kinds[-1] = "float"
        names = [f"{name.strip()}{i}" for i, name in enumerate(names)]
    gaps = 0.2 if rng.random() < 0.4 else 0.0
    values = [[None if rng.random() < gaps else draw_value(kind, rng, tame) for _ in range(rows)] for kind in kinds]
    return names, kinds, values


def draw_name(rng, tame):
    return ("a", "b", "Größe", "λ", "x=1", "row,1")[rng.integers(6)] if tame else NAMES[rng.integers(len(NAMES))]


def draw_value(kind, rng, tame):
    match kind:
        case "float" if tame:
            return float(rng.choice([rng.normal(scale=1e3), float(rng.integers(1, 9)), rng.uniform(1, 1e6)]))
        case "float":
            return float(rng.choice([rng.normal(), rng.choice(ODD), np.float32(rng.normal(scale=1e30))]))
        case "int":
            return int(rng.integers(-5, 6) if rng.random() < 0.7 else rng.integers(-(2**63), 2**63 - 1))
        case "huge":
            return int(rng.integers(-(10**15), 10**15)) * 10 ** int(rng.integers(0, 16))
        case "bool":
            return bool(rng.integers(2))
        case "text":
            return WORDS[rng.integers(len(WORDS))]
    return None


def draw_columns(rng, names, kinds):
    """Draws the settings of the columns; the last column is the target."""
    stripped = [name.strip() for name in names]
    texts = tuple(n for n, kind in zip(stripped[:-1], kinds, strict=False) if kind == "text")
    return dpreg.Columns(
        target=(stripped[-1],),
        categorical=texts if rng.random() < 0.7 else (),
        missing=str(rng.choice(["error", "drop", "mean"])),
        validation_fraction=float(rng.choice([0.0, 0.3])),
        standardize=bool(rng.integers(2)),
        target_transform=str(rng.choice(["none", "none", "log", "standardize"])),
    )


def run(rng, folder):
    names, kinds, values = draw_table(rng)
    weighted = rng.random() < 0.2 and len(values[0]) > 4
    if weighted:
        names, kinds = [*names[:-1], "wt", names[-1]], [*kinds[:-1], "int", kinds[-1]]
        values = [*values[:-1], rng.integers(0, 4, len(values[0])).tolist(), values[-1]]
    suffix = SUFFIXES[rng.integers(len(SUFFIXES))]
    columns = draw_columns(rng, names, kinds)
    if weighted:
        columns = dataclasses.replace(columns, weight_column="wt")
    file = folder / f"t{suffix}"
    if suffix in (".npy", ".npz"):
        content = write_arrays(suffix, names, kinds, values)
    elif suffix == ".parquet":
        content = write_parquet(names, kinds, values)
    else:
        content = write_csv(names, values)
    whole = rng.random() < 0.4
    plain = whole and is_plain(names, kinds, values) and columns.target[0] in names
    if not whole and (suffix.startswith(".csv") and rng.random() < 0.7):
        content = damage_bytes(content, rng)  # The damage comes before compression.
        written, whole = compress(content, suffix), True
    else:
        written = compress(content, suffix)
    if not whole:
        written = damage_bytes(written, rng)
    file.write_bytes(written)
    read = read_independently(suffix, written, content, (names, values))
    data = read_or_refused(folder, file, columns)
    if isinstance(data, str):
        assert not plain or suffix in (".npy", ".npz"), f"a plain table is refused: {data}"
        return "refused"
    if read is None:
        return "read, not compared"
    header, frame = read
    compare(data, frame, [name.strip() for name in header], columns)
    return "correct"


def write_csv(names, values):
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    rows.writerow(names)
    rows.writerows(zip(*[["" if v is None else v for v in column] for column in values], strict=True))
    return text.getvalue().encode()


def write_parquet(names, kinds, values):
    types = {"float": pa.float64(), "int": pa.int64(), "huge": pa.decimal128(38)}
    types |= {"bool": pa.bool_(), "text": pa.string(), "null": pa.null()}
    arrays = [pa.array(column, types[kind]) for kind, column in zip(kinds, values, strict=True)]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, [name.strip() for name in names]), stream)
    return stream.getvalue()


def write_arrays(suffix, names, kinds, values):
    arrays = {}
    for name, kind, column in zip(names, kinds, values, strict=True):
        if kind in ("text", "null"):
            arrays[name.strip() or "e"] = np.array(["" if v is None else v for v in column], str)
        else:
            arrays[name.strip() or "e"] = np.array([math.nan if v is None else float(v) for v in column])
    stream = io.BytesIO()
    if suffix == ".npy":
        np.save(stream, np.column_stack(list(arrays.values())) if len(values[0]) else np.zeros((0, len(arrays))))
    else:
        np.savez(stream, **{name.replace("/", "_"): array for name, array in arrays.items()})
    return stream.getvalue()


def compress(content, suffix):
    if suffix.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    codec = {".zst": "zstd", ".bz2": "bz2"}.get(suffix[-4:])
    if codec is None:
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def read_independently(suffix, written, content, table):
    """Reads (names, columns) by pandas, NumPy or this module; None if no independent reader can."""
    if suffix == ".parquet":
        names, values = table
        return (
            (names, pd.DataFrame({i: pd.Series(v, dtype=object) for i, v in enumerate(values)}))
            if (written == content)
            else None
        )
    if suffix in (".npy", ".npz"):
        return read_arrays(suffix, written)
    try:
        if suffix == ".csv":
            content = written
        elif suffix == ".csv.gz":
            content = gzip.decompress(written)
        elif written != compress(content, suffix):
            return None
        # Blank lines are not rows.
        header = next(
            row for row in csv.reader(io.StringIO(content.removeprefix(b"\xef\xbb\xbf").decode(), newline="")) if row
        )
        frame = pd.read_csv(
            io.BytesIO(content),
            header=0,
            names=range(len(header)),
            dtype=str,
            na_values=MISSING,
            keep_default_na=False,
            index_col=False,
        )
    except (ValueError, StopIteration, EOFError, OSError, csv.Error, pd.errors.ParserError, gzip.zlib.error):
        return None
    return header, frame


def read_arrays(suffix, written):
    try:
        loaded = np.load(io.BytesIO(written), allow_pickle=False)
        arrays = {"c": loaded} if suffix == ".npy" else dict(loaded)
        columns = {}
        for name, array in arrays.items():
            if array.ndim == 2:
                columns |= {f"{name}{j}": array[:, j].tolist() for j in range(array.shape[1])}
            else:
                columns[name] = array.tolist()
        return list(columns), pd.DataFrame({i: pd.Series(v, dtype=object) for i, v in enumerate(columns.values())})
    except Exception:  # NumPy raises many types of exceptions.
        return None


def read_or_refused(folder, file, columns):
    """Returns the rows, or the error message; after an error no files are left."""
    try:
        return dpreg.read_table(str(file), columns, cache_dir=str(folder / "cache"))
    except dpreg.InputError as error:
        message = str(error)
    check_line(message, str(file), str(folder / "cache"))
    left = list((folder / "cache").iterdir()) if (folder / "cache").exists() else []
    assert not left, f"the cache holds {left} after: {message}"
    return message


def is_plain(names, kinds, values):
    """Returns whether a table has nothing unusual."""
    return (
        len(set(names)) == len(names) > 1
        and all(name.isascii() and name.isalnum() for name in names)
        and all(kind in ("float", "int") for kind in kinds)
        and len(values[0]) > 9
        and "wt" not in names
        and all(v is not None and 0.01 < v < 1e9 for column in values for v in column)
        and all(len(set(column)) > 1 for column in values)
    )


def compare(data, frame, names, columns):
    """Checks that the rows read are those of the frame with nonzero weight, each once."""
    sources = [source for source in (data.train, data.val) if source]
    number = np.concatenate([source.row for source in sources])
    x, y, weight = (
        np.concatenate([source[np.arange(len(source))][name] for source in sources]) for name in ("x", "y", "weight")
    )
    raw = {name: frame[i].tolist() for i, name in enumerate(names)}
    categorical = columns.categorical
    values = {n: np.array([as_number(v) for v in c], float) for n, c in raw.items() if n not in categorical}
    gone = {n: np.array([is_missing(v) for v in c]) for n, c in raw.items()}
    weights = values[columns.weight_column] if columns.weight_column else np.ones(len(frame))
    kept = ~np.any(list(gone.values()), axis=0) if columns.missing == "drop" else np.ones(len(frame), bool)
    assert sorted(number) == list(np.flatnonzero(kept & (weights != 0))), "the rows differ"
    np.testing.assert_array_equal(weight, weights[number].astype(np.float32))
    found = {feature: x[:, i] for i, feature in enumerate(data.schema.features)}
    target, fitted = values[columns.target[0]], (data.train.row, weights[data.train.row])
    if columns.target_transform == "log":
        target = np.log(np.where(weights, target, 1.0))
    close(y[:, 0], (standardized(target, *fitted) if columns.target_transform == "standardize" else target)[number])
    for name in (name for name in names if name not in (columns.target[0], columns.weight_column)):
        if name in categorical:
            words = [None if is_gone else spelled(word) for word, is_gone in zip(raw[name], gone[name], strict=True)]
            compare_category(name, words, found, number, *fitted)
        else:
            close(found[name], seen_by_model(values[name], columns, *fitted)[number])


def seen_by_model(column, columns, fitted, weights):
    """Returns a numeric column scaled, with means for missing values, or 0 if it is constant."""
    present = ~np.isnan(column[fitted])
    mean = np.average(column[fitted][present], weights=weights[present]) if present.any() else math.nan
    column = np.where(np.isnan(column), mean, column)
    if len({*column[fitted].tolist()}) == 1:
        return np.zeros(len(column))
    return standardized(column, fitted, weights) if columns.standardize else column


def compare_category(name, words, found, number, fitted, weights):
    """Checks that each row has a 1 for its category, or the substitute of a category that was not in training."""
    kinds = [c for c in found if c.startswith(f"{name}=")]
    seen = dict.fromkeys((words[row] for row in fitted), 0.0)
    for row, weight in zip(fitted, weights, strict=True):
        seen[words[row]] += weight
    for position, row in enumerate(number):
        values = {kind: found[kind][position] for kind in kinds}
        ones = [kind for kind, value in values.items() if value]
        if words[row] in seen and words[row] is not None:
            assert ones == [f"{name}={words[row]}"], (ones, words[row])
        elif None in seen:  # Some training rows had no category, either.
            assert ones == kinds[-1:], (ones, words[row])
        else:
            shares = {f"{name}={word}": np.float32(count / sum(seen.values())) for word, count in seen.items()}
            assert values == shares | {kinds[-1]: 0}, (values, shares)


def as_number(value):
    """Returns NaN for a missing value and None for a text that is not a number."""
    if is_missing(value):
        return math.nan
    try:
        return float({"true": 1, "false": 0}.get(value.lower(), value) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None


def spelled(word):
    word = str(word)
    if word.lower() in ("true", "false"):
        return word.lower()
    return word.removesuffix(".0") if word.removesuffix(".0").removeprefix("-").isdigit() else word


def is_missing(value):
    return value is None or value == "" or (isinstance(value, (float, np.floating)) and math.isnan(value))


def standardized(values, fitted, weights):
    values, weights = values.astype(np.longdouble), weights.astype(np.longdouble)
    mean = np.average(values[fitted], weights=weights)
    several = len(set(values[fitted].tolist())) > 1
    deviation = np.sqrt(np.average(np.square(values[fitted] - mean), weights=weights)) if several else 1
    return (values - mean) / (deviation if deviation > 1e-150 else 1)


def close(found, wanted):
    scale = max(1e-30, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=2e-6, atol=1e-6 * scale)
