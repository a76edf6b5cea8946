"""Predicts with the linear model in the folder of this file. It needs only NumPy, not dpreg, which wrote it.

    python predict.py new.csv > predictions.csv

or in Python, with columns by name: `predict({"carat": [0.3], "cut": ["Ideal"]})`, and for labels also
`predict_proba`. It reads `model.json` and `parameters.npz`, and for a formula imports `terms.py`. (A quoted "NA" is a
missing value as well, as the csv module of Python does not report quotes.) With --mean, or `predict(..., mean=True)`,
models of logarithms predict means.
"""

import csv
import datetime
import decimal
import hashlib
import importlib
import io
import json
import math
import pathlib
import re
import runpy
import sys
import types
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Columns = Mapping[str, Sequence[Any]]  # of a table, by name
FORMAT = 6  # of model.json
ROOTS = "fit/roots"  # an array of parameters.npz that is no parameter
DESCRIPTION, PARAMETERS, TERMS = "model.json", "parameters.npz", "terms.py"

# The texts for a missing value in CSV files, the same as those of Arrow; and also str() of missing Python values.
_UPPER_CASE = ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "N/A", "NA", "NULL")
MISSING = frozenset([*_UPPER_CASE, "", "-NaN", "-nan", "NaN", "n/a", "nan", "null"])
_MISSING_OBJECTS = MISSING | {"None", "<NA>", "NaT"}

_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
# A number with a point, or with an exponent in the form that programs write; 12e5 may be a name.
_DECIMAL = re.compile(
    r"-?(?:(?:0|[1-9]\d*)\.\d*|\.\d+)(?:[eE][+-]?\d+)?|-?(?:0|[1-9]\d*)[eE](?:[+-]\d+|[1-9]\d+)", re.ASCII
)
_PADDED = re.compile(r"-?\d*\.\d*[1-9]0+")
_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[ T](\d\d)(:\d\d)?(:\d\d)?(?:\.(\d*[1-9])?0*)?(Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII
)
_TIME = re.compile(r"(\d\d:\d\d:\d\d)(?:\.(\d*[1-9])?0*)?", re.ASCII)
_UTC = datetime.timezone(datetime.timedelta(0))
_DIGITS = 17  # enough to identify any float64
_MAX_DIGITS = 100  # Arrow's decimals have at most 76
_EXACT = decimal.Context(prec=_MAX_DIGITS)
_MAX_INTEGER = 1e22  # larger ones are written with an exponent


def normalize_category(category: str) -> str:
    """The canonical text of a value, independent of the type of its column and the program that wrote it.

    Numbers with a point or an exponent are rounded to float64: 1e+15, 1.0E15 and 1000000000000000 become the same text,
    as do 7.00 and 7. Numbers in a form that no program writes are names, and stay as they are: 01234 and 3.10. True
    becomes true. Times with a time zone are converted to UTC, and the time 00:00:00 is dropped from a date.
    """
    if category.lower() in ("true", "false"):
        return category.lower()
    if _INTEGER.fullmatch(category):
        return "0" if category == "-0" else category
    if _DECIMAL.fullmatch(category) and not _PADDED.fullmatch(category):
        return _normalize_number(category)
    if date := _DATE.fullmatch(category):
        return _normalize_date(*date.groups())
    if time := _TIME.fullmatch(category):
        return f"{time[1]}.{time[2]}" if time[2] else time[1]
    return category


def _normalize_number(text: str) -> str:
    value, mantissa = float(text), re.split("[eE]", text)[0]
    if not math.isfinite(value):
        return text
    digits = re.sub(r"\D", "", mantissa).strip("0")
    if len(digits) > _DIGITS:  # not exact in float64
        if len(mantissa) < len(text):
            return text
        whole, _, fraction = mantissa.partition(".")
        fraction = fraction.rstrip("0")
        return f"{whole or 0}.{fraction}" if fraction else whole
    if value.is_integer() and abs(value) < _MAX_INTEGER:
        return str(int(value))
    return repr(value)


def _normalize_date(
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


def to_text(value: Any) -> str:
    """The text of a value of any type: the shortest text of a float32, and all digits of an integer."""
    if isinstance(value, decimal.Decimal) and value.is_finite() and abs(value.adjusted()) < _MAX_DIGITS:
        return f"{value.normalize(_EXACT):f}"
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (float, np.floating)) and (number := float(value)).is_integer():
        return str(int(number)) if abs(number) < _MAX_INTEGER else repr(number)
    return str(value)


def predict(columns: Columns, folder: pathlib.Path | None = None, mean: bool = False) -> np.ndarray:
    """Predicts the targets of rows of a table.

    Args:
      columns: the values of each feature by its name: numbers, categories, or dates such as 2026-01-31. Missing values
        are None, NaN, or their texts in CSV files.
      folder: the folder of the model; by default that of this file.
      mean: whether a model of logarithms predicts the mean instead of the median, by Duan's smearing factor.

    Returns:
      the predictions [n, t] float64 in the units of the table; NaN for a row with a missing value that is not filled.
      For labels that are not numbers [n, 1] object: the most probable label, and None for such a row.

    Raises:
      KeyError: for a missing feature.
      ValueError: for a value that is not a finite number or a date, and for a model that differs from what was written.
    """
    return _predict(*read_model(folder or pathlib.Path(__file__).parent), columns, mean)[0]


def predict_proba(columns: Columns, folder: pathlib.Path | None = None) -> np.ndarray:
    """The probabilities of the labels of a target, [n, C] float64; see `predict` for its arguments and errors.

    The labels are in the order of "labels" in `model.json`: numbers by value, false before true, text by code point.
    """
    model, arrays = read_model(folder or pathlib.Path(__file__).parent)
    if not model["schema"]["labels"]:
        raise ValueError("the target has no labels; use predict")
    return _predict(model, arrays, columns)[1]


def label_text(label: str | int | bool) -> str:
    """The text of a label, as `normalize_category` has it."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def are_codes(labels: Sequence[Any]) -> bool:
    """Whether labels are the numbers 0 to C - 1 themselves, so that they need no other code.

    >>> are_codes((0, 1)), are_codes((1, 2)), are_codes((False, True)), are_codes(("no", "yes")), are_codes(())
    (True, False, False, False, True)
    """
    return all(type(label) is int and label == code for code, label in enumerate(labels))


def predicted_labels(labels: Sequence[Any], loss: str) -> tuple[Any, ...]:
    """The labels whose probabilities are predicted; none for the numbers 0 and 1, whose prediction is that of 1."""
    return () if loss == "logistic" and are_codes(labels) else tuple(labels)


def to_probabilities(z: np.ndarray, loss: str) -> np.ndarray:
    """The probabilities of labels [n, C] float64 for the linear predictor z [n, p] of the loss logistic or softmax.

    >>> to_probabilities(np.zeros((1, 1)), "logistic"), to_probabilities(np.zeros((1, 4)), "softmax")
    (array([[0.5, 0.5]]), array([[0.25, 0.25, 0.25, 0.25]]))
    """
    z = z.astype(np.float64)
    logits = np.concatenate([np.zeros_like(z), z], axis=1) if loss == "logistic" else z
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True))


def choose_labels(probability: np.ndarray, labels: Sequence[Any]) -> np.ndarray:
    """The label of the largest probability [n, C], the first one of equal ones: [n, 1].

    Labels that are numbers are float64, and NaN for a row of NaN; others are objects, and None for such a row.
    """
    numeric = type(labels[0]) is int
    chosen: np.ndarray = np.array(labels, np.float64 if numeric else object)[probability.argmax(axis=1)]
    chosen[np.isnan(probability).any(axis=1)] = np.nan if numeric else None
    return chosen[:, None]


def add_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the checksum of a JSON object to it. `content` is undamaged if it equals `add_checksum(content)`."""
    values = {name: value for name, value in content.items() if name != "checksum"}
    return values | {"checksum": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def read_model(folder: pathlib.Path, of_table: bool = True) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the description of the model in a folder, and its arrays by name; with `of_table` it must have a schema.

    Raises:
      ValueError: when there is none, or it differs from what was written; the message names the folder and the reason.
    """
    try:
        if absent := [name for name in (DESCRIPTION, PARAMETERS) if not (folder / name).is_file()]:
            raise ValueError(f"there is no file {absent[0]}")
        model = json.loads((folder / DESCRIPTION).read_bytes())
        content = (folder / PARAMETERS).read_bytes()
        if model["format"] != FORMAT:
            raise ValueError("another version of dpreg wrote it")
        if model != add_checksum(model):
            raise ValueError(f"{DESCRIPTION} is not what was written")
        if model[PARAMETERS] != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{PARAMETERS} is not what was written")
        if not all(isinstance(model["flags"][name], str) for name in ("loss", "missing")):
            raise ValueError("dpreg does not write such flags")
        if of_table or model["schema"] is not None:
            _check_schema(model)
        with np.load(io.BytesIO(content), allow_pickle=False) as opened:
            arrays = dict(opened)
        for name, array in arrays.items():
            if array.dtype.kind not in "fiuV" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
                raise ValueError(f"parameter {name} is not finite")
    except (OSError, ValueError, RecursionError, MemoryError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{folder}: the model cannot be used ({error}); run the training command again") from error
    except (KeyError, TypeError, AttributeError, OverflowError, NotImplementedError, SyntaxError) as error:
        reason = f"dpreg does not write such a file: {error!r}"
        raise ValueError(f"{folder}: the model cannot be used ({reason}); run the training command again") from error
    return model, arrays


def _check_schema(model: Mapping[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError unless the schema is one that `dpreg.data.schema` writes."""
    schema = model["schema"]
    for column in (*schema["inputs"], *schema["targets"]):
        if column.get("kind", "number") == "number":
            numbers = [column["mean"], column["scale"], *([] if column["fill"] is None else [column["fill"]])]
            valid = column["scale"] > 0 and all(isinstance(column[name], bool) for name in ("days", "constant", "log"))
        else:
            numbers, values = [*column["counts"], column["others"]], column["values"]
            valid = all(isinstance(value, str) for value in values) and len({*values}) == len(values)
            valid = valid and len(column["counts"]) == len(values) and min(numbers) >= 0 and sum(numbers) > 0
        valid = valid and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        if not (valid and isinstance(column["name"], str)):
            raise ValueError(f"dpreg does not write such a column as {column['name']!r}")
    features = sum(1 if column["kind"] == "number" else len(column["values"]) + 1 for column in schema["inputs"])
    num_targets = len(schema["targets"])
    if schema["terms"]:
        features = sum(len(term.mean) for term in _import_terms().read_terms(schema))
    if (model["num_inputs"], model["num_targets"]) != (features, num_targets):
        raise ValueError("the number of its columns differs from that of training")
    if not isinstance(schema["log_targets"], bool) or not schema["inputs"] or not schema["targets"]:
        raise ValueError("dpreg does not write such columns")
    labels, flags, kinds = schema["labels"], model["flags"], {type(label) for label in schema["labels"]}
    if not isinstance(labels, list) or len(kinds) > 1 or not kinds <= {str, int, bool} or len({*labels}) < len(labels):
        raise ValueError("dpreg does not write such labels")
    if labels and (num_targets, len(labels)) != (1, {"logistic": 2, "softmax": flags["num_classes"]}[flags["loss"]]):
        raise ValueError("the number of its labels differs from that of training")
    if [0 < factor < math.inf for factor in model["smearing"] or [1.0] * num_targets] != [True] * num_targets:
        raise ValueError("dpreg does not write such factors of means")


def _import_terms() -> Any:
    """The code of formulas: a module of dpreg, and in the folder of a model the file beside this one."""
    if __package__:
        return importlib.import_module("dpreg.data.terms")
    return types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(__file__).with_name(TERMS))))


def _get_parameters(model: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The weights [d, t] and the bias [t] of a linear model, float64."""
    by_ndim = {a.ndim: a.astype(np.float64) for name, a in arrays.items() if a.dtype.kind == "f" and name != ROOTS}
    w = by_ndim.get(2, np.zeros((0, 0)))
    b = by_ndim.get(1, np.zeros(w.shape[1]))
    outputs = w.shape[1] if model["flags"]["loss"] == "softmax" else model["num_targets"]
    if len(arrays) - (ROOTS in arrays) != len(by_ndim) or w.shape + b.shape != (model["num_inputs"], outputs, outputs):
        raise ValueError(f"{PARAMETERS} does not fit {DESCRIPTION}; run the training command again")
    return w, b


def _predict(
    model: Mapping[str, Any], arrays: Mapping[str, np.ndarray], columns: Columns, as_means: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(the predictions [n, t], the probabilities of the labels [n, C]; C is 0 for a target without labels)."""
    schema, loss = model["schema"], model["flags"]["loss"]
    if as_means and model["smearing"] is None:
        raise ValueError("the model has no factor by which predicted medians become means; predict without it")
    w, b = _get_parameters(model, arrays)
    filled = model["flags"]["missing"] == "mean"
    encoded = {column["name"]: _encode_column(column, columns[column["name"]], filled) for column in schema["inputs"]}
    x = _import_terms().encode_rows(schema, encoded) if schema["terms"] else np.concatenate([*encoded.values()], axis=1)
    z, missing = x @ w + b, np.isnan(x).any(axis=1, keepdims=True)
    probability = np.zeros((len(z), 0))
    if schema["labels"]:
        probability = np.where(missing, np.nan, to_probabilities(z, loss))
        if labels := predicted_labels(schema["labels"], loss):
            return choose_labels(probability, labels), probability
    mean, scale = ([target[name] for target in schema["targets"]] for name in ("mean", "scale"))
    with np.errstate(over="ignore"):  # the prediction overflows to infinity
        prediction = apply_inverse_link(z, loss) * scale + mean
        prediction = np.exp(prediction) if schema["log_targets"] else prediction
        prediction = prediction * model["smearing"] if as_means else prediction
    return np.where(missing, np.nan, prediction), probability


def apply_inverse_link(z: np.ndarray, loss: str) -> np.ndarray:
    """The mean of the target for the linear predictor z; for "softmax" the label."""
    if loss == "softmax":
        return np.asarray(z.argmax(axis=1, keepdims=True), np.float64)
    if loss == "logistic":
        return np.asarray(1 / (1 + np.exp(-z)))
    return np.exp(z) if loss in ("poisson", "gamma", "tweedie", "negative_binomial") else z


def _encode_column(column: Mapping[str, Any], values: Any, filled: bool) -> np.ndarray:
    """Encodes a column as features [n, features]; NaN for a missing value that is not filled."""
    if hasattr(values, "iloc"):
        values = values.to_numpy()  # iterating over pandas would convert float32 to float64
    missing = np.array([v in MISSING if isinstance(v, str) else str(v) in _MISSING_OBJECTS for v in values], bool)
    if column["kind"] == "number":
        fill = np.nan if column["fill"] is None else column["fill"]
        numbers = [fill if gone else _to_number(v, column["days"]) for v, gone in zip(values, missing, strict=True)]
        number = np.array(numbers, np.float64).reshape(-1, 1)
        encoded: np.ndarray = ((np.log(number) if column["log"] else number) - column["mean"]) / column["scale"]
        # A column that was constant in training has no effect: any value becomes 0.
        return np.where(np.isnan(encoded), encoded, 0.0) if column["constant"] else encoded
    codes = {name: code for code, name in enumerate(column["values"])}
    code = np.array([codes.get(normalize_category(to_text(value)), len(codes)) for value in values], int)
    code[missing] = len(codes)
    encoded = np.eye(len(codes) + 1)[code]
    if not column["others"]:  # training had no other values: use the mean of the known ones
        encoded[code == len(codes)] = np.array([*column["counts"], 0]) / sum(column["counts"])
    if not filled:
        encoded[missing] = np.nan
    return encoded


def _to_number(value: Any, days: bool) -> float:
    text = str(value).strip()
    if days:
        if not re.match(r"\d{4}-\d\d-\d\d", text):
            raise ValueError(f"{text!r} is not a date such as 2026-01-31")
        return float(np.datetime64(text.removesuffix("Z"), "us").astype(np.int64) / 86_400e6)
    number = float({"true": 1, "false": 0}.get(text.lower(), "" if "_" in text else text))
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is not finite")
    return number


def _to_cell(value: Any) -> str:
    if isinstance(value, float):  # NumPy's float64 as well
        return "" if math.isnan(value) else repr(float(value))
    return "" if value is None else label_text(value)


def main(arguments: Sequence[str], folder: pathlib.Path | None = None) -> int:
    """Prints the predictions for a CSV file, and returns the exit code: 0, or 2 after one line about an error."""
    mean, files = "--mean" in arguments, [argument for argument in arguments if argument != "--mean"]
    if len(files) != 1:
        print("usage: python predict.py [--mean] FILE.csv > predictions.csv", file=sys.stderr)
        return 2
    try:
        _predict_file(files[0], folder or pathlib.Path(__file__).parent, mean)
    except (OSError, KeyError, ValueError, csv.Error) as error:
        message = f"there is no column {error}" if isinstance(error, KeyError) else str(error)
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)  # no escape sequences from a file
        print(f"predict.py: {line[:700]}", file=sys.stderr)
        return 2
    return 0


def _predict_file(file: str, folder: pathlib.Path, mean: bool) -> None:
    model, arrays = read_model(folder)
    csv.field_size_limit(2**31 - 1)
    with open(file, newline="", encoding="utf-8-sig") as lines:
        head, *rows = [row for row in csv.reader(lines) if row] or [[]]
    head = [name.strip() for name in head]
    if twice := [name for name in head if head.count(name) > 1]:
        raise ValueError(f"there are two columns {twice[0]!r}")
    for number, row in ((number, row) for number, row in enumerate(rows, 1) if len(row) != len(head)):
        raise ValueError(f"row {number} has {len(row)} values, and there are {len(head)} columns")
    if not rows:
        raise ValueError("there are no rows")
    columns = {name: [row[at] for row in rows] for at, name in enumerate(head)}
    predictions, probability = _predict(model, arrays, columns, mean)
    labels = predicted_labels(model["schema"]["labels"], model["flags"]["loss"])
    names = [f"predicted_{target['name']}" for target in model["schema"]["targets"]]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["row", *names, *(f"probability_{label_text(label)}" for label in labels)])
    for number, values in enumerate(zip(predictions, probability[:, : len(labels)], strict=True), 1):
        writer.writerow([number, *(_to_cell(value) for row in values for value in row)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
