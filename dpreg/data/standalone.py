"""Predicts with the linear model beside this file, with NumPy alone.

    python predict.py new.csv > predictions.csv

or from Python, for columns by their names: `predict({"carat": [0.3], "cut": ["Ideal"]})`. It reads `model.json` and
`parameters.npz`, and needs nothing of dpreg, which writes it there. (The csv module of Python does not tell a quoted
"NA" from one that is not: both are missing.)
"""

import csv
import json
import math
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What CSV files write for a missing value, as Arrow has it, and how Python shows one that is no text.
_IN_FILES = ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL")
MISSING = frozenset([*_IN_FILES, "", "NaN", "n/a", "nan", "null"])
_SHOWN = MISSING | {"None", "<NA>", "NaT"}


def spelled(category: str) -> str:
    """One spelling for what files write differently: 1.0 is 1, True is true, a time of 00:00:00 is none."""
    if category.lower() in ("true", "false"):
        return category.lower()
    if re.fullmatch(r"-?\d+\.0+", category):
        return category.partition(".")[0]
    date = re.fullmatch(r"(\d{4}-\d\d-\d\d)(?:[ T](\d\d:\d\d:\d\d)(?:\.(\d*[1-9])?0*)?)?", category)
    if date is None:
        return category
    day, time, fraction = date.groups()
    if fraction:
        return f"{day} {time}.{fraction}"
    return f"{day} {time}" if time and time != "00:00:00" else day


def predict(columns: Mapping[str, Sequence[Any]], folder: pathlib.Path | None = None) -> np.ndarray:
    """What the model predicts for rows of a table: [n, t] float64, in the units of the table; NaN where values miss.

    Args:
      columns: the values of each feature, by its name: numbers, categories, or dates such as 2026-01-31; missing ones
        are None, NaN, or what CSV files write for them.
      folder: of the model; that of this file by default.

    Raises:
      KeyError: for a feature that is not there; ValueError: for what is no finite number, or no date.
    """
    folder = folder or pathlib.Path(__file__).parent
    model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    with np.load(folder / "parameters.npz") as arrays:
        by_size = {array.ndim: array.astype(np.float64) for array in arrays.values()}
    schema, w = model["schema"], by_size[2]
    filled = model["flags"]["missing"] == "mean"
    x = np.concatenate([_seen(column, columns[column["name"]], filled) for column in schema["inputs"]], axis=1)
    z = x @ w + by_size.get(1, 0.0)
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


def _seen(column: Mapping[str, Any], values: Sequence[Any], filled: bool) -> np.ndarray:
    """What the model sees of a column: [n, features]; NaN where a value is missing that is not filled in."""
    missing = np.array([value in MISSING if isinstance(value, str) else str(value) in _SHOWN for value in values], bool)
    if column["kind"] == "number":
        fill = np.nan if column["fill"] is None else column["fill"]
        numbers = [fill if gone else _number(v, column["days"]) for v, gone in zip(values, missing, strict=True)]
        seen: np.ndarray = (np.array(numbers, np.float64).reshape(-1, 1) - column["mean"]) / column["scale"]
        return seen
    place = {name: at for at, name in enumerate(column["values"])}
    texts = [repr(float(value) + 0.0) if isinstance(value, (float, np.floating)) else str(value) for value in values]
    at = np.array([place.get(spelled(text), len(place)) for text in texts], int)
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


def _main(file: str) -> None:
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
    found = predict({name: [row[at] for row in rows] for at, name in enumerate(head)})
    model = json.loads((pathlib.Path(__file__).parent / "model.json").read_text(encoding="utf-8"))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["row", *(f"predicted_{target['name']}" for target in model["schema"]["targets"])])
    writer.writerows([i, *("" if np.isnan(v) else repr(float(v)) for v in row)] for i, row in enumerate(found, 1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python predict.py FILE.csv > predictions.csv", file=sys.stderr)
        sys.exit(2)
    try:
        _main(sys.argv[1])
    except (OSError, KeyError, ValueError, csv.Error) as error:
        what = f"there is no column {error}" if isinstance(error, KeyError) else error
        print(f"predict.py: {what}", file=sys.stderr)
        sys.exit(2)
