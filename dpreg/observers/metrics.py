"""The loss curve on disk: metrics.jsonl, one object a log point."""

import datetime
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from dpreg.observer import Progress
from dpreg.observers.workdir import write_whole


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: what is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


Schedule = Callable[[int], float]  # the learning rate of each global step, from 0


def record_of(progress: Progress, schedule: Schedule | None = None) -> dict[str, Any] | None:
    """What is kept of a log point; None for what is none.

    step, epoch, train_loss, gradient_norm, rows_per_second, learning_rate where there is a schedule; at the end of an
    epoch also val_loss, metrics and audit.
    """
    if progress.train_loss is None:
        return None
    record: dict[str, Any] = {
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


class MetricsWriter:
    """Appends a line for each log point, see `record_of`.

    Each line is on disk before the next step is told, so an interrupted run keeps its curve.

    Args:
      path: the file.
      step: the step that the run goes on from: lines up to it are kept, later ones are written again.
      schedule: the learning rates, where they are known.
    """

    def __init__(self, path: pathlib.Path, step: int = 0, schedule: Schedule | None = None):
        _rewrite(path, [record for record in read_records(path) if record["step"] <= step])
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._schedule = schedule

    def __call__(self, progress: Progress) -> None:
        """Writes the log point, if it is one."""
        if record := record_of(progress, self._schedule):
            self._file.write(to_json(record) + "\n")
            self._file.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; none where there is no file. One cut off by a crash is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def note_start(path: pathlib.Path, step: int, device_count: int, process_count: int) -> None:
    """Adds to the history of a run when it was started, from which step and on what."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {"time": now, "step": step, "device_count": device_count, "process_count": process_count}
    _rewrite(path, [*read_records(path), start])


def _rewrite(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes the lines anew: one that a crash cut off would swallow the next."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
