"""What is told of a run while it trains, and to whom."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Progress:
    """What an observer is told after some steps.

    Attributes:
      step, num_steps: steps done, steps of the run.
      epoch, max_epochs: epochs done, in parts; epochs of the run.
      train_loss: mean loss per weight over the steps since the last log point; None between log points.
      gradient_norm: of the mean loss in the last of these steps, before it is clipped; None between log points.
      val_loss, metrics: the mean loss and the metrics on the validation rows; only at the end of an epoch.
      rows_per_second: training speed since training went on: from a validation, a checkpoint or a pause.
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


Observer = Callable[[Progress], None]
