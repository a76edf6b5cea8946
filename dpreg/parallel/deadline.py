"""No run hangs without a message: a deadline between the results of a run's steps."""

import faulthandler
import math
import os
import sys
import threading
import time

import jax

from dpreg.errors import ProcessLost

_TICK_SECONDS = 1.0
_FIRST_SECONDS = 600.0  # before anything is measured
_SHORTEST_SECONDS = 120.0
_TIMES_THE_SLOWEST = 20.0
_LAST_SECONDS = 4.0
_FORGOTTEN = 0.1  # of the slowest wait, with each result


class Deadline:
    """Ends the process when no results have come for too long: with the stacks of all threads, and exit code 76.

    (1 where a hung call holds the interpreter's lock, and so keeps this from saying it.) Heartbeats between processes
    come from threads of the runtime, and go on when Python or a file system hangs.
    A context manager; the time counts from `begin` on, so ingest and compilation have no limit.

    Args:
      seconds: how long to wait; 0 for ever; None for 120 s, or 20 times the slowest of the latest results where
        that is more (600 s for the first).
    """

    def __init__(self, seconds: float | None = None):
        self._seconds, self._tick = seconds, min(_TICK_SECONDS, (seconds or math.inf) / 4)
        self._slowest: float | None = None
        self._waited: float | None = None  # counted, not read from a clock: who is stopped and goes on, is not late
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)

    def __enter__(self) -> "Deadline":
        if self._seconds != 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._seconds != 0:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def begin(self) -> None:
        """Results are to come from now on."""
        self._waited = 0.0

    def progress(self) -> None:
        """Results have come."""
        self._slowest = max(self._waited or 0.0, (self._slowest or 0.0) * (1 - _FORGOTTEN))
        self._waited = 0.0

    @property
    def limit(self) -> float:
        """Seconds that a wait may take."""
        if self._seconds or self._slowest is None:
            return self._seconds or _FIRST_SECONDS
        return max(_SHORTEST_SECONDS, _TIMES_THE_SLOWEST * self._slowest)

    def _watch(self) -> None:
        while not self._over.wait(self._tick):
            if self._waited is None:
                continue
            if jax.process_count() > 1:
                # A hung call may hold the lock that this thread needs: then this timer ends the process.
                faulthandler.dump_traceback_later(self.limit + 2 * _TICK_SECONDS, exit=True)
            self._waited += self._tick
            if self._waited > self.limit:
                self._end()

    def _end(self) -> None:
        print(
            f"dpreg: process {jax.process_index()} had no result for {self.limit:g} s (--step_timeout): it, a file "
            "system or another process hangs; its threads are at",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        if jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(_LAST_SECONDS)  # with process 0 all others end: let them say where they are
        os._exit(ProcessLost.exit_code)
