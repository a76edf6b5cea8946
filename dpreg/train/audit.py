"""Checks that an epoch used every row exactly once, over all devices and processes."""

import numpy as np

from dpreg.errors import AuditFailed

_NOTHING = np.zeros(2, np.uint32)


class Audit:
    """Counts the rows that the steps of an epoch used and sums their tags: [2] uint32, as `Dataset.audit_total`.

    Args:
      on: whether to audit; if not, nothing is counted and no epoch fails.

    Attributes:
      used: the count and the sum for this epoch so far; None if unknown.
    """

    used: np.ndarray | None

    def __init__(self, on: bool):
        self.on = on
        self.begin()

    def begin(self, used: np.ndarray | None = _NOTHING) -> None:
        """Starts an epoch, part of which is already used; if that part is unknown (None), the epoch is not audited."""
        self.used = used if self.on else None

    def add(self, used: np.ndarray) -> None:
        """Adds what steps of the epoch used: [..., 2] uint32, over any devices."""
        if self.used is not None:
            self.used = self.used + used.reshape(-1, 2).sum(axis=0, dtype=np.uint32)

    def check(self, step: int, due: np.ndarray) -> np.ndarray | None:
        """Checks what the epoch that ends at `step` used against what was due, and returns it.

        Raises:
          AuditFailed: when they differ.
        """
        if self.used is not None and (self.used != due).any():
            what, right = (f"{rows:,} rows with tags {tags:08x}" for rows, tags in (self.used, due))
            raise AuditFailed(
                f"the epoch that ends at step {step:,} did not use every row once: {what} where it has {right}; "
                "report this fault, of dpreg or of the machine, with flags.cfg"
            )
        return self.used
