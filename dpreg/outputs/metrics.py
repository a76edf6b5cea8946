"""The history of a run on disk, as lines of JSON: metrics.jsonl, one a log point, and starts.jsonl, one a start."""

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
    """JSON that every reader takes: what is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """The value that `to_json` wrote.

    Raises:
      ValueError: for what it cannot have written, such as NaN, or lists in lists a thousand deep.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that float64 holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


Schedule = Callable[[int], float]  # the learning rate of each global step, from 0


def record_of(progress: Progress, schedule: Schedule | None = None) -> Record:
    """What is kept of a log point.

    step, epoch, train_loss, gradient_norm, rows_per_second, learning_rate where there is a schedule; at the end of an
    epoch also val_loss, metrics and audit.
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
    """Appends a line for each log point, see `record_of`.

    Each line is on disk before the next step is reported, so an interrupted run keeps its curve.

    Args:
      path: the file. Damaged lines of it are set aside, see `recover_records`.
      step: the step that the run goes on from: lines up to it are kept, later ones are written again.
      schedule: the learning rates, where they are known.
    """

    def __init__(self, path: pathlib.Path, step: int = 0, schedule: Schedule | None = None):
        _rewrite(path, [record for record in recover_records(path, is_log_point) if record["step"] <= step])
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._schedule = schedule

    def on_log(self, progress: Progress) -> None:
        """Writes the log point."""
        self._file.write(to_json(record_of(progress, self._schedule)) + "\n")
        self._file.flush()

    on_epoch = on_log

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def note_start(path: pathlib.Path, step: int, device_count: int, process_count: int) -> None:
    """Adds to the history of a run when it was started, from which step and on what."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {"time": now, "step": step, "device_count": device_count, "process_count": process_count}
    _rewrite(path, [*recover_records(path, is_start), start])


def is_log_point(record: Any) -> bool:
    """Whether it is a record as `record_of` makes them: numbers by their names, or null, and an audit."""
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
    """Whether it is a record as `note_start` makes them."""
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
    """What a file of JSON lines holds.

    Attributes:
      whole: the records, in order.
      damaged: how many other lines there are: cut off, overwritten, or of something else.
    """

    whole: list[Record]
    damaged: int


def read_records(path: pathlib.Path, is_whole: Callable[[Any], bool] = is_log_point) -> Records:
    """The records of a file of JSON lines; none where there is no file.

    Args:
      path: the file.
      is_whole: whether a value is such a record: `is_log_point` or `is_start`.

    Raises:
      InputError: where the path is a folder, or something else that is no file.
      OSError: where the file cannot be read.
    """
    if not path.exists():
        return Records([], 0)
    if not path.is_file():  # to read a pipe would wait for its writer
        raise InputError(f"{path}: is not a file; move it away")
    *lines, cut = path.read_bytes().split(b"\n")
    whole, damaged = list[Record](), int(bool(cut))
    for line in lines:
        try:
            record = from_json(line)
        except ValueError:  # also of bytes that are no UTF-8
            record = None
        if is_whole(record):
            whole.append(record)
        else:
            damaged += 1
    return Records(whole, damaged)


def recover_records(path: pathlib.Path, is_whole: Callable[[Any], bool]) -> list[Record]:
    """The whole records of a file, to go on with. A damaged file is set aside first, and a line says so."""
    try:
        whole, damaged = read_records(path, is_whole)
    except InputError:
        whole, damaged = [], 1
    if damaged:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        path.rename(aside)
        lines = "1 line is" if damaged == 1 else f"{damaged:,} lines are"
        logging.warning(
            "%s: %s damaged, and %d are whole; the run goes on with those, and the file is set aside as %s",
            *(printable(str(path)), lines, len(whole), printable(aside.name)),
        )
    return whole


def _rewrite(path: pathlib.Path, records: list[Record]) -> None:
    """Writes the lines anew: one that a crash cut off would swallow the next."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
