"""No run hangs without a message: a deadline between the results of a run's steps."""

import faulthandler
import os
import sys
import threading

import jax

from dpreg.errors import ProcessLost

_TICK_SECONDS = 1.0
_SHORTEST_SECONDS = 120.0
_TIMES_THE_SLOWEST = 20.0


class Deadline:
    """Ends the process when no results have come for too long: with the stacks of all threads, and exit code 76.

    Heartbeats between processes come from threads of the runtime, and go on when Python or a file system hangs.
    A context manager; the time counts from the first `progress` on, so ingest and compilation have no limit.

    Args:
      seconds: how long to wait; 0 for ever; None for 120 s, or 20 times the longest wait so far where that is more.
    """

    def __init__(self, seconds: float | None = None):
        self._seconds, self._slowest = seconds, 0.0
        self._waited: float | None = None  # counted, not read from a clock: who is stopped and goes on, is not late
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    def __enter__(self) -> "Deadline":
        if self._seconds != 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def progress(self) -> None:
        """Results have come."""
        self._slowest, self._waited = max(self._slowest, self._waited or 0.0), 0.0

    @property
    def limit(self) -> float:
        """Seconds that a wait may take."""
        return self._seconds or max(_SHORTEST_SECONDS, _TIMES_THE_SLOWEST * self._slowest)

    def _watch(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            if self._waited is None:
                continue
            if jax.process_count() > 1:
                # A hung call may hold the lock that this thread needs: then this timer ends the process.
                faulthandler.dump_traceback_later(self.limit + 2 * _TICK_SECONDS, exit=True)
            self._waited += _TICK_SECONDS
            if self._waited > self.limit:
                self._end()

    def _end(self) -> None:
        print(
            f"dpreg: process {jax.process_index()} had no result for {self.limit:.0f} s (--step_timeout): it, a file "
            "system or another process hangs; its threads are at",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        os._exit(ProcessLost.exit_code)
