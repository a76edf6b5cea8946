"""Traces some steps of a run, for TensorBoard and Perfetto."""

import pathlib
from types import TracebackType

import jax

from dpreg.train.callback import Callback, Progress


class Profiler(Callback):
    """A context manager that traces the steps from `start` to `stop`, and requests a sync point at both.

    To view the trace, use `tensorboard --logdir=FOLDER`, or open `perfetto_trace.json.gz` at ui.perfetto.dev.

    Args:
      folder: the folder of the trace. None traces nothing, for the other processes of a run: they need the same sync
        points.
      start, stop: the first step of the trace, and the first step after it.
      step: the current step of the trainer.
    """

    def __init__(self, folder: pathlib.Path | None, start: int, stop: int, step: int):
        self._folder, self._start, self._stop, self._step = folder, start, stop, step
        self._tracing = False

    def next_sync(self, step: int) -> int | None:
        """The next of `start` and `stop` after a step."""
        return next((bound for bound in (self._start, self._stop) if bound > step), None)

    def __enter__(self) -> "Profiler":
        self._start_or_stop(self._step)
        return self

    def on_steps(self, progress: Progress) -> None:
        """Starts the trace at `start`, and stops it at `stop`."""
        self._start_or_stop(progress.step)

    def _start_or_stop(self, step: int) -> None:
        if self._folder is None:
            return
        due = self._start <= step < self._stop
        if due and not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        elif self._tracing and not due:
            jax.profiler.stop_trace()
        self._tracing = due

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._start_or_stop(self._stop)
