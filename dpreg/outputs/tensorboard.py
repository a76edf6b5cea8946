"""Writes event files for TensorBoard: the scalars of metrics.jsonl, and the hyperparameters."""

import numbers
import os
import pathlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from dpreg.errors import InputError
from dpreg.outputs.metrics import Schedule, make_record
from dpreg.spelling import spell
from dpreg.train.callback import Callback, Progress


def require_tensorboard() -> None:
    """Raises InputError if the package that writes event files is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{spell('tensorboard', True)}: its package is not installed; run pip install tensorboard"
        ) from error


class TensorBoardWriter(Callback):
    """A context manager that writes each log point as scalars, with the names of `make_record`.

    Args:
      workdir: the folder of the run; the event files are written into its folder `tensorboard`.
      step: the step from which the run starts or resumes; TensorBoard drops the points of later steps in older files.
      hyperparameters: the hyperparameters by name, for the HParams tab; those that are None are left out.
      schedule: the learning rates, if they are known.
    """

    def __init__(
        self, workdir: pathlib.Path, step: int, hyperparameters: Mapping[str, Any], schedule: Schedule | None = None
    ):
        # Optional dependency. EventFileWriter would import TensorFlow, if that is installed, so write records directly.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._schedule = Event, Summary, schedule
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._writer = RecordWriter((folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("wb"))
        self._add(0, file_version="brain.Event:2")
        plain = {
            name: value if isinstance(value, (bool, numbers.Real)) else str(value)
            for name, value in hyperparameters.items()
            if value is not None and value != ()
        }
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        self._add(0, summary=hparams_pb(plain, trial_id=workdir.absolute().name))

    def on_log(self, progress: Progress) -> None:
        """Writes a log point."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in make_record(progress, self._schedule).items()
            if name != "step" and isinstance(value, numbers.Real)
        ]
        self._add(progress.step, summary=self._summary(value=values))
        self._writer.flush()

    on_epoch = on_log

    def _add(self, step: int, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), step=step, **fields).SerializeToString())

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
