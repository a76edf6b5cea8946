"""The loss curve on disk: metrics.jsonl, one object a log point."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, TextIO

from dpreg.trainer import Progress


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: what is not finite is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


class MetricsWriter:
    """Appends a line for each log point: step, epoch, train_loss, rows_per_second.

    At the end of an epoch also val_loss, metrics and audit.

    Each line is on disk before the next step is told, so an interrupted run keeps its curve.

    Args:
      path: the file.
      step: the step that the run goes on from: lines up to it are kept, later ones are written again.
    """

    def __init__(self, path: pathlib.Path, step: int = 0):
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        rewritten = path.with_suffix(".tmp")  # whole or not at all
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        rewritten.replace(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __call__(self, progress: Progress) -> None:
        """Writes the log point, if it is one."""
        if progress.train_loss is None:
            return
        record: dict[str, Any] = {
            "step": progress.step,
            "epoch": progress.epoch,
            "train_loss": progress.train_loss,
            "rows_per_second": progress.rows_per_second,
        }
        if progress.val_loss is not None:
            record |= {"val_loss": progress.val_loss, **(progress.metrics or {})}
        if progress.audit is not None:
            record["audit"] = {"rows": int(progress.audit[0]), "tags": f"{progress.audit[1]:08x}"}
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The log points of a run, in order; none where there is no file. A line cut off by a crash is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
