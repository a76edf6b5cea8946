"""What a person sees while a run goes on: a bar in a terminal, a line now and then elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dpreg.terminal import printable
from dpreg.train.callback import Callback, Progress

_LINE_SECONDS = 10.0


class ProgressDisplay(Callback):
    """Shows epoch, loss, rows/s and time left on stderr. A context manager, so that the bar is closed."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._loss, self._printed = "", time.monotonic()
        self._bar = Bar(
            TextColumn("{task.fields[epoch]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[speed]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal or self._console.quiet,
        )
        self._task = self._bar.add_task("", total=None, epoch="", loss="", speed="")

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def doing(self, what: str) -> None:
        """What goes on before the first step, in the bar's place. Without a terminal: a line each 10 seconds."""
        self._bar.update(self._task, loss=printable(what))
        if not self._console.is_terminal and time.monotonic() - self._printed > _LINE_SECONDS:
            self._printed = time.monotonic()
            self.say(what)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def on_steps(self, progress: Progress) -> None:
        """Shows where the run is. Without a terminal: a line each 10 seconds, and at the end of an epoch."""
        if progress.train_loss is not None:
            self._loss = f"loss {progress.train_loss:.4g}"
            if progress.val_loss is not None:
                self._loss += f"  val {progress.val_loss:.4g}"
        speed = f"{progress.rows_per_second:,.0f} rows/s"
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                completed=progress.step,
                total=progress.num_steps,
                epoch=f"epoch {progress.epoch:.1f}/{progress.max_epochs}",
                loss=self._loss,
                speed=speed,
            )
        elif progress.epoch_ended or (self._loss and time.monotonic() - self._printed > _LINE_SECONDS):
            self._printed = time.monotonic()
            done = f"step {progress.step:,}/{progress.num_steps:,}"
            self.say(f"epoch {progress.epoch:.2f}/{progress.max_epochs}  {done}  {self._loss}  {speed}")

    on_log = on_epoch = on_steps
