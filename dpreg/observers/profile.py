"""A trace of some steps, for TensorBoard and Perfetto."""

import pathlib
from types import TracebackType

import jax

from dpreg.observer import Progress


class Profiler:
    """An observer that traces the steps from `start` to `stop`, of a trainer at `step` that pauses before either.

    A context manager: a trace that is still open is ended. It lies in `folder`: `tensorboard --logdir=FOLDER`, or the
    file `perfetto_trace.json.gz` at ui.perfetto.dev.
    """

    def __init__(self, folder: pathlib.Path, start: int, stop: int, step: int):
        self._folder, self._start, self._stop, self._step = folder, start, stop, step
        self._tracing = False

    def __enter__(self) -> "Profiler":
        self._at(self._step)
        return self

    def __call__(self, progress: Progress) -> None:
        """Begins or ends the trace, when it is time."""
        self._at(progress.step)

    def _at(self, step: int) -> None:
        due = self._start <= step < self._stop
        if due and not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        elif self._tracing and not due:
            jax.profiler.stop_trace()
        self._tracing = due

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._at(self._stop)
