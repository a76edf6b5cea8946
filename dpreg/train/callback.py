"""The events of a run while it trains."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from dpreg.errors import InputError
from dpreg.step.foreign_methods import is_read, user_methods

if TYPE_CHECKING:
    from dpreg.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
      step, num_steps: the number of steps done, and of the run.
      epoch, max_epochs: the number of epochs done, with a fraction, and of the run.
      train_loss: the mean loss per weight over the steps since the last log point; only at log points and at the end of
        an epoch. After `Trainer.set_linear_params`, the loss that was given to it.
      gradient_norm: the norm of the gradient in the last of these steps, before clipping; None after
        `Trainer.set_linear_params`.
      val_loss, metrics: the mean loss and the metrics on the validation rows; only at the end of an epoch. Without
        validation rows, None and {}.
      rows_per_second: the training speed since the last validation, checkpoint or other sync point.
      audit: [2] uint32, the number of rows that this epoch used and the sum of their tags; only at the end of an
        audited epoch.

    >>> Progress(step=32, num_steps=96, epoch=1.0, max_epochs=3, val_loss=0.5, metrics={"r2": 0.9}).epoch_ended
    True
    """

    step: int
    num_steps: int
    epoch: float
    max_epochs: int
    train_loss: float | None = None
    gradient_norm: float | None = None
    val_loss: float | None = None
    metrics: Mapping[str, float] | None = None
    rows_per_second: float = 0.0
    audit: np.ndarray | None = None

    @property
    def epoch_ended(self) -> bool:
        """Whether this is the end of an epoch, after its validation."""
        return self.metrics is not None


class Callback:
    """Receives the events of `Loop`: a subclass overrides the methods of the events that it needs.

    Between sync points some steps are in flight, so `trainer.state` may be ahead of the progress that is reported. An
    exception in a method ends `fit_epochs`.

    >>> import dpreg
    >>> class PrintLoss(dpreg.Callback):
    ...     def on_epoch(self, progress):
    ...         print(f"epoch {progress.epoch:.0f}: validation loss {progress.val_loss:.1f}")
    >>> trainer = dpreg.Trainer(max_epochs=2, callbacks=[PrintLoss()])
    >>> trainer.fit(dpreg.LinearRegressionScratch(2, lr=0.3), dpreg.SyntheticRegressionData([2, -3.4], 4.2))
    epoch 1: validation loss 0.0
    epoch 2: validation loss 0.0
    """

    def next_sync(self, step: int) -> int | None:
        """The next step after `step` at which a sync point is needed; None for none.

        It must be the same in all processes.
        """
        return None

    def requests_sync(self) -> bool:
        """Whether to insert a sync point after the next compiled call.

        It is called equally often in all processes, between the same compiled calls, and must return the same value.
        """
        return False

    def on_steps(self, progress: Progress) -> None:
        """Called when the sums of some steps have arrived from the devices."""

    def on_log(self, progress: Progress) -> None:
        """Called at log points within an epoch, every `log_every_steps`, with the loss and the norm of the gradient."""

    def on_epoch(self, progress: Progress) -> None:
        """Called at the end of an epoch, after its validation, and after `Trainer.set_linear_params`.

        `progress.val_loss` is None without validation rows, `progress.audit` without an audit or where it is unknown
        which rows a resumed epoch had used, and `progress.gradient_norm` after `set_linear_params`.
        """

    def on_sync(self, trainer: "Trainer") -> None:
        """Called at a sync point: no step is in flight, and the trainer's state is that of `trainer.step`."""

    def on_result(self) -> None:
        """Called when results of training, validation or prediction have arrived, and after a sync point."""


def require_known_events(callback: Callback) -> None:
    """Raises InputError for a method `on_...` that is no event, unless another method of the callback reads it."""
    events = [name for name in vars(Callback) if name.startswith("on_")]
    for owner, name in user_methods(callback):
        if name.startswith("on_") and name not in events and not is_read(name, callback):
            nearest = difflib.get_close_matches(name, events, n=1, cutoff=0)[0]
            raise InputError(
                f"{owner}.{name}: dpreg.Callback has no such event; define {nearest}, or another of {', '.join(events)}"
            )


class FunctionCallback(Callback):
    """Calls a function with the progress after each block of steps, log point and epoch."""

    def __init__(self, function: Callable[[Progress], None]):
        self._function = function

    def on_steps(self, progress: Progress) -> None:
        """Calls the function."""
        self._function(progress)

    on_log = on_epoch = on_steps
