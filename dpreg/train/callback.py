"""The events of a run while it trains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dpreg.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
      step, num_steps: steps done, steps of the run.
      epoch, max_epochs: epochs done, with a fraction; epochs of the run.
      train_loss: mean loss per weight over the steps since the last log point; None between log points.
      gradient_norm: of the mean loss in the last of these steps, before it is clipped; None between log points.
      val_loss, metrics: the mean loss and the metrics on the validation rows; only at the end of an epoch.
      rows_per_second: training speed since the last validation, checkpoint or other sync point.
      audit: [2] uint32, how many rows this epoch used and the sum of their tags; only at the end of an audited one.

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
        """Whether this closes an epoch: validation is done."""
        return self.metrics is not None


class Callback:
    """Receives the events of `Loop`: a subclass overrides the methods of those that it needs.

    Up to a sync point some steps are in flight, so `trainer.state` may be ahead of the progress that is reported. A
    method that raises ends `fit_epochs` there.

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
        """The next sync point after `step`, before which all steps are done; None for none.

        It has to be the same in all processes.
        """
        return None

    def requests_sync(self) -> bool:
        """Whether the next compiled call is to be the last before a sync point.

        All processes ask it equally often, between the same calls, and have to get the same answer.
        """
        return False

    def on_steps(self, progress: Progress) -> None:
        """The sums of some steps have come from the devices."""

    def on_log(self, progress: Progress) -> None:
        """A log point within an epoch, every `log_every_steps`: `progress` has the loss and the gradient's norm."""

    def on_epoch(self, progress: Progress) -> None:
        """The end of an epoch, after its validation: `progress` has all of its values."""

    def on_sync(self, trainer: "Trainer") -> None:
        """A sync point: no step is in flight, and the trainer's state is that of `trainer.step`."""

    def on_result(self) -> None:
        """Results have come from the devices, of training, validation or prediction, or a sync point is over."""


class FunctionCallback(Callback):
    """Calls a function with the progress after each block of steps, log point and epoch."""

    def __init__(self, function: Callable[[Progress], None]):
        self._function = function

    def on_steps(self, progress: Progress) -> None:
        """Calls the function."""
        self._function(progress)

    on_log = on_epoch = on_steps
