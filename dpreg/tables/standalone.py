"""Predicts with the linear model beside this file, with NumPy alone.

    python predict.py new.csv > predictions.csv

or from Python, for columns by their names: `predict({"carat": [0.3], "cut": ["Ideal"]})`. It reads `model.json` and
`parameters.npz`, and needs nothing of dpreg, which writes it there. (The csv module of Python does not tell a quoted
"NA" from one that is not: both are missing.)
"""

import csv
import datetime
import decimal
import hashlib
import io
import json
import math
import pathlib
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FORMAT = 3  # of model.json
DESCRIPTION, PARAMETERS = "model.json", "parameters.npz"

# What CSV files write for a missing value, as Arrow has it, and how Python shows one that is no text.
_IN_FILES = ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL")
MISSING = frozenset([*_IN_FILES, "", "NaN", "n/a", "nan", "null"])
_SHOWN = MISSING | {"None", "<NA>", "NaT"}


_WHOLE = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
# A number with a point, or with an exponent as programs write it: 12e5 may be the name of something.
_DECIMAL = re.compile(
    r"-?(?:(?:0|[1-9]\d*)\.\d*|\.\d+)(?:[eE][+-]?\d+)?|-?(?:0|[1-9]\d*)[eE](?:[+-]\d+|[1-9]\d+)", re.ASCII
)
_PADDED = re.compile(r"-?\d*\.\d*[1-9]0+")
_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[ T](\d\d)(:\d\d)?(:\d\d)?(?:\.(\d*[1-9])?0*)?(Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)
_TIME = re.compile(r"(\d\d:\d\d:\d\d)(?:\.(\d*[1-9])?0*)?", re.ASCII)
_UTC = datetime.timezone(datetime.timedelta(0))
_DIGITS = 17  # that tell every two float64 from each other
_MOST_DIGITS = 100  # of decimals in columns there are 76 at most
_EXACT = decimal.Context(prec=_MOST_DIGITS)
_MOST_WHOLE = 1e22  # written without an exponent


def spelled(category: str) -> str:
    """One spelling of a value, whatever the type of its column and the program that wrote it.

    Numbers are those of float64 where they have a point or an exponent: 1e+15, 1.0E15 and 1000000000000000 are one, as
    are 7.00 and 7. What no program writes for a number is a name: 01234, and 3.10 besides 3.1. True is true. Times are
    in UTC where they have a zone; of 00:00:00 nothing is left but the day.
    """
    if category.lower() in ("true", "false"):
        return category.lower()
    if _WHOLE.fullmatch(category):
        return "0" if category == "-0" else category
    if _DECIMAL.fullmatch(category) and not _PADDED.fullmatch(category):
        return _number_spelled(category)
    if date := _DATE.fullmatch(category):
        return _date_spelled(*date.groups())
    if time := _TIME.fullmatch(category):
        return f"{time[1]}.{time[2]}" if time[2] else time[1]
    return category


def _number_spelled(text: str) -> str:
    value, mantissa = float(text), re.split("[eE]", text)[0]
    if not math.isfinite(value):
        return text
    digits = re.sub(r"\D", "", mantissa).strip("0")
    if len(digits) > _DIGITS:  # more than float64 holds
        if len(mantissa) < len(text):
            return text
        whole, _, fraction = mantissa.partition(".")
        fraction = fraction.rstrip("0")
        return f"{whole or 0}.{fraction}" if fraction else whole
    if value.is_integer() and abs(value) < _MOST_WHOLE:
        return str(int(value))
    return repr(value)


def _date_spelled(
    day: str, hour: str | None, minute: str | None, second: str | None, fraction: str | None, zone: str | None
) -> str:
    if hour is None:
        return day
    time = f"{hour}{minute or ':00'}{second or ':00'}"
    if zone:
        offset = "+00:00" if zone == "Z" else f"{zone[:3]}:{zone[3:].lstrip(':') or '00'}"
        try:
            moment = datetime.datetime.fromisoformat(f"{day}T{time}{offset}").astimezone(_UTC)
        except (ValueError, OverflowError):
            pass
        else:
            day, time, zone = f"{moment:%Y-%m-%d}", f"{moment:%H:%M:%S}", "Z"
    if fraction:
        time = f"{time}.{fraction}"
    return f"{day} {time}{zone or ''}" if zone or time != "00:00:00" else day


def text_of(value: Any) -> str:
    """A value of any type as text; of float32 as few digits as tell it from its neighbours, all of a whole number."""
    if isinstance(value, decimal.Decimal) and value.is_finite() and abs(value.adjusted()) < _MOST_DIGITS:
        return f"{value.normalize(_EXACT):f}"
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (float, np.floating)) and (number := float(value)).is_integer():
        return str(int(number)) if abs(number) < _MOST_WHOLE else repr(number)
    return str(value)


def predict(columns: Mapping[str, Sequence[Any]], folder: pathlib.Path | None = None) -> np.ndarray:
    """What the model predicts for rows of a table: [n, t] float64, in the units of the table; NaN where values miss.

    Args:
      columns: the values of each feature, by its name: numbers, categories, or dates such as 2026-01-31; missing ones
        are None, NaN, or what CSV files write for them.
      folder: of the model; that of this file by default.

    Raises:
      KeyError: for a feature that is not there; ValueError: for what is no finite number, or no date, and for a model
        that is not as it was written.
    """
    model, arrays = read_model(folder or pathlib.Path(__file__).parent)
    w, b = _weights(model, arrays)
    return _predict(model, w, b, columns)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values of JSON with the checksum of all of them: content is whole if it equals `sealed(content)`."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return rest | {"checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_model(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description of the model in a folder, and its arrays by their names.

    Raises:
      ValueError: when there is none, or it is not as it was written; names the folder, and what is wrong.
    """
    try:
        for name in (DESCRIPTION, PARAMETERS):
            if not (folder / name).is_file():
                raise ValueError(f"there is no file {name}")
        model = json.loads((folder / DESCRIPTION).read_bytes())
        content = (folder / PARAMETERS).read_bytes()
        if model["format"] != FORMAT:
            raise ValueError("another version of dpreg wrote it")
        if model != sealed(model):
            raise ValueError(f"{DESCRIPTION} is not what was written")
        if model[PARAMETERS] != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{PARAMETERS} is not what was written")
        if not all(isinstance(model["flags"][name], str) for name in ("loss", "missing")):
            raise ValueError("its flags are not of a kind that dpreg writes")
        if model["schema"] is not None:
            _check_schema(model)
        with np.load(io.BytesIO(content), allow_pickle=False) as opened:
            arrays = dict(opened)
        for name, array in arrays.items():
            if array.dtype.kind not in "fiuV" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
                raise ValueError(f"parameter {name} is not finite")
    except (OSError, ValueError, RecursionError, MemoryError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{folder}: the model cannot be used ({error}); run the training command again") from error
    except (KeyError, TypeError, AttributeError, OverflowError, NotImplementedError, SyntaxError) as error:
        raise ValueError(
            f"{folder}: the model cannot be used (it is not of a kind that dpreg writes: {error!r}); "
            "run the training command again"
        ) from error
    return model, arrays


def _check_schema(model: Mapping[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError where the columns are not as `dpreg.data.schema` writes them."""
    schema = model["schema"]
    features = 0
    for column in (*schema["inputs"], *schema["targets"]):
        if column.get("kind", "number") == "number":
            numbers = [column["mean"], column["scale"], *([] if column["fill"] is None else [column["fill"]])]
            well = column["scale"] > 0 and all(isinstance(column[name], bool) for name in ("days", "constant"))
            features += 1
        else:
            numbers, values = [*column["counts"], column["others"]], column["values"]
            well = all(isinstance(value, str) for value in values) and len({*values}) == len(values)
            well = well and len(column["counts"]) == len(values) and min(numbers) >= 0 and sum(numbers) > 0
            features += len(values) + 1
        well = well and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        if not (well and isinstance(column["name"], str)):
            raise ValueError(f"column {column['name']!r} is not of a kind that dpreg writes")
    num_targets = len(schema["targets"])
    if (model["num_inputs"], model["num_targets"]) != (features - num_targets, num_targets):
        raise ValueError("its columns are not as many as it was trained on")
    if not isinstance(schema["log_targets"], bool) or not schema["inputs"] or not schema["targets"]:
        raise ValueError("its columns are not of a kind that dpreg writes")


def _weights(model: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Weights [d, t] and bias [t] of a linear model, float64."""
    by_size = {array.ndim: array.astype(np.float64) for array in arrays.values() if array.dtype.kind == "f"}
    w = by_size.get(2, np.zeros((0, 0)))
    b = by_size.get(1, np.zeros(w.shape[1]))
    outputs = w.shape[1] if model["flags"]["loss"] == "softmax" else model["num_targets"]
    if len(arrays) != len(by_size) or w.shape != (model["num_inputs"], outputs) or b.shape != (outputs,):
        raise ValueError(f"{PARAMETERS} does not fit {DESCRIPTION}; run the training command again")
    return w, b


def _predict(
    model: Mapping[str, Any], w: np.ndarray, b: np.ndarray, columns: Mapping[str, Sequence[Any]]
) -> np.ndarray:
    schema = model["schema"]
    filled = model["flags"]["missing"] == "mean"
    x = np.concatenate([_seen(column, columns[column["name"]], filled) for column in schema["inputs"]], axis=1)
    z = x @ w + b
    mean, scale = ([target[name] for target in schema["targets"]] for name in ("mean", "scale"))
    with np.errstate(over="ignore"):  # it is infinite then
        found = _of_link(z, model["flags"]["loss"]) * scale + mean
        found = np.exp(found) if schema["log_targets"] else found
    return np.where(np.isnan(x).any(axis=1, keepdims=True), np.nan, found)


def _of_link(z: np.ndarray, loss: str) -> np.ndarray:
    found = z
    if loss == "softmax":
        found = z.argmax(axis=1, keepdims=True).astype(np.float64)
    elif loss == "logistic":
        found = 1 / (1 + np.exp(-z))
    elif loss in ("poisson", "gamma"):
        found = np.exp(z)
    return found


def _seen(column: Mapping[str, Any], values: Any, filled: bool) -> np.ndarray:
    """What the model sees of a column: [n, features]; NaN where a value is missing that is not filled in."""
    if hasattr(values, "iloc"):
        values = values.to_numpy()  # not item by item: pandas gives a float32 as the nearest float64
    missing = np.array([value in MISSING if isinstance(value, str) else str(value) in _SHOWN for value in values], bool)
    if column["kind"] == "number":
        fill = np.nan if column["fill"] is None else column["fill"]
        numbers = [fill if gone else _number(v, column["days"]) for v, gone in zip(values, missing, strict=True)]
        seen: np.ndarray = (np.array(numbers, np.float64).reshape(-1, 1) - column["mean"]) / column["scale"]
        # Of a column that had one value in all training rows the model knows nothing: it sees 0 for any value.
        return np.where(np.isnan(seen), seen, 0.0) if column["constant"] else seen
    place = {name: at for at, name in enumerate(column["values"])}
    at = np.array([place.get(spelled(text_of(value)), len(place)) for value in values], int)
    at[missing] = len(place)
    seen = np.eye(len(place) + 1)[at]
    if not column["others"]:  # of which the model knows nothing: the mean of the known ones
        seen[at == len(place)] = np.array([*column["counts"], 0]) / sum(column["counts"])
    if not filled:
        seen[missing] = np.nan
    return seen


def _number(value: Any, days: bool) -> float:
    text = str(value).strip()
    if days:
        if not re.match(r"\d{4}-\d\d-\d\d", text):
            raise ValueError(f"{text!r} is no date such as 2026-01-31")
        return float(np.datetime64(text.removesuffix("Z"), "us").astype(np.int64) / 86_400e6)
    number = float({"true": 1, "false": 0}.get(text.lower(), "" if "_" in text else text))
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not finite")
    return number


def main(arguments: Sequence[str], folder: pathlib.Path | None = None) -> int:
    """Prints the predictions for a CSV file: 0; 2 and one line on stderr for what is wrong."""
    if len(arguments) != 1:
        print("usage: python predict.py FILE.csv > predictions.csv", file=sys.stderr)
        return 2
    try:
        _predict_file(arguments[0], folder or pathlib.Path(__file__).parent)
    except (OSError, KeyError, ValueError, csv.Error) as error:
        what = f"there is no column {error}" if isinstance(error, KeyError) else str(error)
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in what)  # no escape sequence from a file
        print(f"predict.py: {line[:700]}", file=sys.stderr)
        return 2
    return 0


def _predict_file(file: str, folder: pathlib.Path) -> None:
    model, arrays = read_model(folder)
    w, b = _weights(model, arrays)
    csv.field_size_limit(2**31 - 1)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        head, *rows = [row for row in csv.reader(lines) if row] or [[]]
    head = [name.strip() for name in head]
    for name in head:
        if head.count(name) > 1:
            raise ValueError(f"there are two columns {name!r}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} values, and there are {len(head)} columns")
    if not rows:
        raise ValueError("there are no rows")
    found = _predict(model, w, b, {name: [row[at] for row in rows] for at, name in enumerate(head)})
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["row", *(f"predicted_{target['name']}" for target in model["schema"]["targets"])])
    writer.writerows([i, *("" if np.isnan(v) else repr(float(v)) for v in row)] for i, row in enumerate(found, 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
