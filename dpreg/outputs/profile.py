"""A trace of some steps, for TensorBoard and Perfetto."""

import pathlib
from types import TracebackType

import jax

from dpreg.train.callback import Callback, Progress


class Profiler(Callback):
    """Traces the steps from `start` to `stop`, of a trainer at `step`, with a sync point before either.

    A context manager: a trace that is still open is ended. It lies in `folder`: `tensorboard --logdir=FOLDER`, or the
    file `perfetto_trace.json.gz` at ui.perfetto.dev. Without a folder nothing is traced: so in all processes but one,
    which need the same sync points.
    """

    def __init__(self, folder: pathlib.Path | None, start: int, stop: int, step: int):
        self._folder, self._start, self._stop, self._step = folder, start, stop, step
        self._tracing = False

    def next_sync(self, step: int) -> int | None:
        """`start`, then `stop`."""
        return next((bound for bound in (self._start, self._stop) if bound > step), None)

    def __enter__(self) -> "Profiler":
        self._at(self._step)
        return self

    def on_steps(self, progress: Progress) -> None:
        """Begins or ends the trace, when it is time."""
        self._at(progress.step)

    def _at(self, step: int) -> None:
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
        self._at(self._stop)
