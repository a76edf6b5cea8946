"""Handles Ctrl-C during a loop: KeyboardInterrupt is raised between its calls, where the state is consistent."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dpreg.distributed import processes
from dpreg.distributed.sync_signal import SyncSignal

_WORD = "interrupt"


class Interrupts:
    """Records whether any process has received a SIGINT since the loop began.

    Attributes:
      pending: whether the loop should stop; the same in all processes between the same calls of `poll`.
    """

    def __init__(self) -> None:
        self.pending, self._received = False, False
        self._sync_signal = SyncSignal()

    def poll(self) -> bool:
        """Updates and returns `pending`. All processes must call it equally often, between the same steps."""
        self.pending = bool(self._sync_signal.poll()) or self.pending
        return self.pending

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: notes the first SIGINT; a second one raises KeyboardInterrupt at once."""
        if self._received:
            signal.default_int_handler(number, frame)
        self._received = True
        self._sync_signal.request(_WORD)

    def raise_received(self) -> None:
        """Raises KeyboardInterrupt in all processes if any of them has received a SIGINT. It is a barrier."""
        if _WORD in processes.allgather_text(_WORD if self._received else ""):
            raise KeyboardInterrupt


@contextlib.contextmanager
def deferred() -> Iterator[Interrupts]:
    """Defers KeyboardInterrupt until the body raises it for `Interrupts.pending`, or to the end of the body.

    It does so only in the main thread, and only if Python's own handler of SIGINT is installed.
    """
    interrupts, installed = Interrupts(), False
    if threading.current_thread() is threading.main_thread():
        installed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if installed:
            signal.signal(signal.SIGINT, interrupts.receive)
        yield interrupts
    finally:
        if installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.raise_received()
