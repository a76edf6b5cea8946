"""The watchdog ends a run that has no results for too long, with a message."""

import contextlib
import faulthandler
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax

from dpreg.distributed import presence
from dpreg.distributed.rendezvous import log_line
from dpreg.errors import ProcessLost
from dpreg.spelling import spell

_TICK_SECONDS = 1.0
_FIRST_SECONDS = 600.0  # before anything is measured
_SHORTEST_SECONDS = 120.0
_TIMES_THE_SLOWEST = 20.0
_LAST_SECONDS = 4.0
_FORGOTTEN = 0.1  # of the slowest wait, with each result
_REPORT_SECONDS = 10.0  # between the lines of a process that waits for others
_MOST_NAMED = 4  # of those that it waits for


class Watchdog:
    """Ends the process when no results have come for too long: with the stacks of all threads, and exit code 76.

    (1 where a hung call holds the interpreter's lock, and so keeps this from saying it.) Heartbeats between processes
    come from threads of the runtime, and go on when Python or a file system hangs.
    A context manager; the time counts from `begin` on, so ingest and compilation have no limit.

    One of several processes reports every 10 s without a result, and names the processes that it waits for.

    Args:
      seconds: how long to wait; 0 for ever; None for 120 s, or 20 times the slowest of the latest results where
        that is more (600 s for the first), and 120 s for another process that shows no sign of life.
    """

    def __init__(self, seconds: float | None = None):
        self._seconds, self._tick = seconds, min(_TICK_SECONDS, (seconds or math.inf) / 4)
        self._slowest: float | None = None
        self._waited: float | None = None  # counted, not read from a clock: who is stopped and goes on, is not late
        self._signs, self._reported = presence.Signs(), 0.0
        self._lock = threading.RLock()  # of what counts a wait
        self._timer = False  # whether a timer of C ends a process whose Python hangs
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._timer = True
        if self._seconds != 0:
            self._thread.start()
        _entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _entered.remove(self)
        self._over.set()
        if self._seconds != 0:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def begin(self) -> None:
        """Results are to come from now on."""
        with self._lock:
            self._waited, self._reported, self._signs = 0.0, 0.0, presence.Signs()

    def progress(self) -> None:
        """Results have come."""
        self._slowest = max(self._waited or 0.0, (self._slowest or 0.0) * (1 - _FORGOTTEN))
        self.begin()

    @property
    def limit(self) -> float:
        """Seconds that a wait may take."""
        if self._seconds or self._slowest is None:
            return self._seconds or _FIRST_SECONDS
        return max(_SHORTEST_SECONDS, _TIMES_THE_SLOWEST * self._slowest)

    def _watch(self) -> None:
        while not self._over.wait(self._tick):
            with self._lock:
                if self._waited is None:
                    continue
                self._waited = waited = self._waited + self._tick
            if self._timer and jax.process_count() > 1:
                # A hung call may hold the lock that this thread needs: then this timer ends the process.
                faulthandler.dump_traceback_later(self.limit + 2 * _TICK_SECONDS, exit=True)
            if waited > self.limit:
                self._end(f"{self.limit:g} s ({spell('step_timeout')}): it, a file system or another process hangs")
            elif presence.is_one_of_several() and waited - self._reported >= _REPORT_SECONDS:
                self._report(waited)

    def _report(self, waited: float) -> None:
        """Says for whom this process waits, and ends it where that one shows no sign of life for too long."""
        self._reported, signs = waited, self._signs
        signs.look()
        behind = signs.behind()
        whom = "; ".join(map(signs.describe, behind[:_MOST_NAMED]))
        log_line(
            f"process {jax.process_index()} has no new result for {waited:.0f} s (of {self.limit:g} s)"
            + (f": it waits for {whom}" if behind else "")
        )
        if self._seconds is None and max(map(signs.silence, behind), default=0.0) >= presence.SILENT_SECONDS:
            self._end(f"{waited:.0f} s: it waits for {whom}")

    def _end(self, how: str) -> None:
        print(
            f"dpreg: process {jax.process_index()} had no result for {how}; its threads are at",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        if jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(_LAST_SECONDS)  # with process 0 all others end: let them say where they are
        os._exit(ProcessLost.exit_code)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Callable[[], None]]:
        """Counts the time of the body alone; yields `progress`."""
        if not self._thread.is_alive():
            self._thread.start()
        self.begin()
        try:
            yield self.progress
        finally:
            with self._lock:
                self._waited = None


_entered: list[Watchdog] = []
_of_python = functools.cache(Watchdog)  # made where it is used: a thread of before a fork cannot be started


def watched() -> contextlib.AbstractContextManager[Callable[[], None]]:
    """Ends a wait for results of several processes, where no `Watchdog` of the caller's does.

    Gives what to call when a result has come. A program of the user's own has no `Watchdog` around it, and may pause
    between two results for as long as it likes.
    """
    if _entered or not presence.is_one_of_several():
        return contextlib.nullcontext(lambda: None)
    return _of_python().waiting()
