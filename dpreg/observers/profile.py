"""A trace of some steps, for TensorBoard and Perfetto."""

import pathlib
from types import TracebackType

import jax

from dpreg.observer import Progress


class Profiler:
    """An observer that traces the steps from `start` to `stop`, of a trainer that pauses before either.

    A context manager: a trace that is still open is ended. It lies in `folder`: `tensorboard --logdir=FOLDER`, or the
    file `perfetto_trace.json.gz` at ui.perfetto.dev.
    """

    def __init__(self, folder: pathlib.Path, start: int, stop: int):
        self._folder, self._start, self._stop = folder, start, stop
        self._tracing = self._done = False

    def __enter__(self) -> "Profiler":
        if self._start == 0:
            self._begin()
        return self

    def __call__(self, progress: Progress) -> None:
        """Begins or ends the trace, when it is time."""
        if not self._tracing and not self._done and progress.step >= self._start:
            self._begin()
        elif self._tracing and progress.step >= self._stop:
            self._end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracing:
            self._end()

    def _begin(self) -> None:
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self._tracing = True

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._tracing, self._done = False, True
