"""Shows the progress of a run: a bar in a terminal, and a line every 10 seconds elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dpreg.terminal import printable
from dpreg.train.callback import Callback, Progress

_LINE_SECONDS = 10.0


class ProgressDisplay(Callback):
    """A context manager that shows the epoch, loss, rows/s and time left on stderr."""

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
        """Shows a status before the first step, in the place of the bar; without a terminal, every 10 seconds."""
        self._bar.update(self._task, loss=printable(what))
        if not self._console.is_terminal and time.monotonic() - self._printed > _LINE_SECONDS:
            self._printed = time.monotonic()
            self.say(what)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def on_steps(self, progress: Progress) -> None:
        """Shows the progress; without a terminal, every 10 seconds and at the end of an epoch."""
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
            step = f"step {progress.step:,}/{progress.num_steps:,}"
            at = f"epoch {progress.epoch:.2f}/{progress.max_epochs}  {step}  {self._loss}  {speed}"
            self.say(at if progress.step else f"solved  {self._loss}")  # an exact solution takes no step

    on_log = on_epoch = on_steps
