"""The history of a run in JSON lines: metrics.jsonl has a line for each log point, starts.jsonl for each start."""

import datetime
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

from dpreg.errors import InputError
from dpreg.outputs.workdir import write_whole
from dpreg.terminal import printable
from dpreg.train.callback import Callback, Progress

Record = dict[str, Any]


def to_json(value: Any, indent: int | None = None) -> str:
    """Writes a value as JSON. Numbers that are not finite become null, as JSON has no NaN."""

    def replace_nonfinite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: replace_nonfinite(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [replace_nonfinite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(replace_nonfinite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """Reads a value that `to_json` wrote.

    Raises:
      ValueError: for text that it cannot have written, such as NaN, or lists nested a thousand deep.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number in the range of float64."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


Schedule = Callable[[int], float]  # the learning rate of each global step, from 0


def make_record(progress: Progress, schedule: Schedule | None = None) -> Record:
    """The record of a log point.

    It has step, epoch, train_loss, gradient_norm, rows_per_second, and with a schedule learning_rate; at the end of an
    epoch also val_loss, the metrics, and audit.
    """
    record: Record = {
        "step": progress.step,
        "epoch": progress.epoch,
        "train_loss": progress.train_loss,
        "rows_per_second": progress.rows_per_second,
    }
    if progress.gradient_norm is not None:
        record["gradient_norm"] = progress.gradient_norm
        if schedule is not None:
            record["learning_rate"] = schedule(progress.step - 1)
    if progress.val_loss is not None:
        record |= {"val_loss": progress.val_loss, **(progress.metrics or {})}
    if progress.audit is not None:
        record["audit"] = {"rows": int(progress.audit[0]), "tags": f"{progress.audit[1]:08x}"}
    return record


class MetricsWriter(Callback):
    """A context manager that appends a line for each log point, see `make_record`.

    Each line is flushed at once, so an interrupted run keeps its history.

    Args:
      path: the file. If it has damaged lines, it is renamed, see `recover_records`.
      step: the step from which the run starts or resumes; records of later steps are deleted.
      schedule: the learning rates, if they are known.
    """

    def __init__(self, path: pathlib.Path, step: int = 0, schedule: Schedule | None = None):
        _rewrite(path, [record for record in recover_records(path, is_log_point) if record["step"] <= step])
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._schedule = schedule

    def on_log(self, progress: Progress) -> None:
        """Writes a log point."""
        self._file.write(to_json(make_record(progress, self._schedule)) + "\n")
        self._file.flush()

    on_epoch = on_log

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def note_start(path: pathlib.Path, step: int, device_count: int, process_count: int) -> None:
    """Appends the time of a start, its step, and the number of devices and processes to a file of starts."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {"time": now, "step": step, "device_count": device_count, "process_count": process_count}
    _rewrite(path, [*recover_records(path, is_start), start])


def is_log_point(record: Any) -> bool:
    """Whether a JSON value is a record of `make_record`: numbers or null by name, and an audit."""
    if not isinstance(record, dict) or not {"step", "epoch", "train_loss"} <= {*record}:
        return False
    numbers = dict(record)
    audit = numbers.pop("audit", {"rows": 0, "tags": ""})
    return (
        _is_count(record["step"])
        and is_number(record["epoch"])
        and all(value is None or is_number(value) for value in numbers.values())
        and isinstance(audit, dict)
        and _is_count(audit.get("rows"))
        and isinstance(audit.get("tags"), str)
    )


def is_start(record: Any) -> bool:
    """Whether a JSON value is a record of `note_start`."""
    counts = ("step", "device_count", "process_count")
    return (
        isinstance(record, dict)
        and {*record} == {"time", *counts}
        and isinstance(record["time"], str)
        and all(_is_count(record[name]) for name in counts)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


class Records(NamedTuple):
    """The content of a file of JSON lines.

    Attributes:
      whole: the records, in order.
      damaged: the number of lines that are no records: cut off, overwritten, or with other content.
    """

    whole: list[Record]
    damaged: int


def read_records(path: pathlib.Path, is_whole: Callable[[Any], bool] = is_log_point) -> Records:
    """Reads the records of a file of JSON lines; none if there is no file.

    Args:
      path: the file.
      is_whole: tells whether a JSON value is a record: `is_log_point` or `is_start`.

    Raises:
      InputError: if the path is a folder, a pipe or a device.
      OSError: if the file cannot be read.
    """
    if not path.exists():
        return Records([], 0)
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path}: is not a file; move it away")
    *lines, cut = path.read_bytes().split(b"\n")
    whole, damaged = list[Record](), int(bool(cut))
    for line in lines:
        try:
            record = from_json(line)
        except ValueError:  # includes invalid UTF-8
            record = None
        if is_whole(record):
            whole.append(record)
        else:
            damaged += 1
    return Records(whole, damaged)


def recover_records(path: pathlib.Path, is_whole: Callable[[Any], bool]) -> list[Record]:
    """Reads the undamaged records of a file. If there are damaged lines, it renames the file and logs a warning."""
    try:
        whole, damaged = read_records(path, is_whole)
    except InputError:
        whole, damaged = [], 1
    if damaged:
        renamed = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(renamed)
        lines = "1 line is" if damaged == 1 else f"{damaged:,} lines are"
        logging.warning(
            "%s: %s damaged; the run continues with the %d others, and the damaged file is renamed to %s",
            *(printable(str(path)), lines, len(whole), printable(renamed.name)),
        )
    return whole


def _rewrite(path: pathlib.Path, records: list[Record]) -> None:
    """Rewrites the file: the next record would be appended to a line that a crash cut off."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
