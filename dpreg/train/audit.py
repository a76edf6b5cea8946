"""Proof that an epoch used every row exactly once, on whatever devices of whatever processes."""

import numpy as np

from dpreg.errors import AuditFailed

_NOTHING = np.zeros(2, np.uint32)


class Audit:
    """Counts the rows that the steps of an epoch used, and adds up their tags: [2] uint32, as `Dataset.tags`.

    Args:
      on: whether to; else nothing is counted, and all is well.

    Attributes:
      used: by this epoch so far; None where nobody knows.
    """

    used: np.ndarray | None

    def __init__(self, on: bool):
        self.on = on
        self.begin()

    def begin(self, used: np.ndarray | None = _NOTHING) -> None:
        """Starts an epoch, of which so much is used already; None where nobody knows: it is not audited then."""
        self.used = used if self.on else None

    def add(self, used: np.ndarray) -> None:
        """Takes in what steps of the epoch used, on whatever devices: [..., 2] uint32."""
        if self.used is not None:
            self.used = self.used + used.reshape(-1, 2).sum(axis=0, dtype=np.uint32)

    def check(self, step: int, due: np.ndarray) -> np.ndarray | None:
        """What the epoch that ends at a step used, once it is known to be what was due.

        Raises:
          AuditFailed: when it is not.
        """
        if self.used is not None and (self.used != due).any():
            what, right = (f"{rows:,} rows with tags {tags:08x}" for rows, tags in (self.used, due))
            raise AuditFailed(
                f"the epoch that ends at step {step:,} did not use every row once: {what} where it has {right}; "
                "report this fault, of dpreg or of the machine, with flags.cfg"
            )
        return self.used
