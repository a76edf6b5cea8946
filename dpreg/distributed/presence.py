"""What each process of a run is doing, written to JAX's key-value store for the processes that wait for it."""

import atexit
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

SILENT_SECONDS = 120.0  # others stop waiting for a process that has shown no sign of life for so long
_POST_SECONDS = 2.0
_KEY = "dpreg/presence"


def is_one_of_several() -> bool:
    """Whether this process has joined others. Unlike `jax.process_count`, it does not start JAX's backends."""
    state = distributed.global_state
    return state.client is not None and (state.num_processes or 1) > 1


def _client() -> Any:
    return distributed.global_state.client


class _Own:
    """The activity of this process, which a thread posts regularly, even during a long call."""

    def __init__(self) -> None:
        self.work: list[str] = []  # nested activities, the innermost last
        self.calls = 0  # compiled calls that this process has dispatched
        self._beats, self._posted = 0, ""
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
            self._thread.start()
            atexit.register(self._stop)  # runs before the client of the store is destroyed

    def _stop(self) -> None:
        self.work.clear()
        self._over.set()
        if self._thread is not None:
            self._thread.join(_POST_SECONDS)

    def _run(self) -> None:
        while not self._over.wait(_POST_SECONDS):
            self._post()
        self._post()  # the end of the activity

    def _post(self) -> None:
        work = self.work[-1] if self.work else ""
        self._beats += bool(work)
        text, number = f"{self.calls} {self._beats} {work}", distributed.global_state.process_id
        if text != self._posted:
            with contextlib.suppress(jax.errors.JaxRuntimeError, AttributeError):  # the service is shut down or lost
                _client().key_value_set(f"{_KEY}/{number}", text, allow_overwrite=True)
                self._posted = text


_own = _Own()


@contextlib.contextmanager
def at_work(what: str) -> Iterator[None]:
    """Keeps the other processes waiting for this one while the body runs, however long it takes.

    A process that waits for another one ends after 120 s without a sign of life from it. Reading tables, compiling
    and solving give such signs. Use this function around code of your own that takes longer in one process than in the
    others.

    Args:
      what: the activity, for the messages of processes that wait, such as "reading rows".
    """
    if not is_one_of_several():
        yield
        return
    _own.start()
    _own.work.append(what)
    try:
        yield
    finally:
        _own.work.pop()


def begin_call() -> None:
    """Counts a compiled call that all processes dispatch, so that others see which processes have not reached it."""
    if is_one_of_several():
        _own.start()
        _own.calls += 1


class Signs:
    """The signs of life of the other processes since this object was made, for a process that waits for them."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}  # process -> its last post, and when that was new
        self._began = time.monotonic()

    def look(self, process: int | None = None) -> None:
        """Reads what a process, or each of the others, has posted."""
        try:
            if process is None:
                found = _client().key_value_dir_get(f"{_KEY}/")
            else:
                found = [(f"{_KEY}/{process}", _client().key_value_try_get(f"{_KEY}/{process}"))]
        except jax.errors.JaxRuntimeError:
            return  # nothing was posted yet, or the coordinator is lost and the runtime will end this process
        for key, text in found:
            of = int(key.rpartition("/")[2])
            # The first value that is read may be old: only a change is a sign of life.
            when = time.monotonic() if of in self._seen else self._began
            if of not in self._seen or self._seen[of][0] != text:
                self._seen[of] = text, when

    def silence(self, process: int) -> float:
        """The seconds since the last sign of life of a process."""
        return time.monotonic() - self._seen.get(process, ("", self._began))[1]

    def describe(self, process: int) -> str:
        """Such as "process 1, which is compiling"."""
        *_, work = self._seen.get(process, ("  ", 0.0))[0].split(" ", 2)
        silence = self.silence(process)
        if work and silence < min(10 * _POST_SECONDS, SILENT_SECONDS):
            return f"process {process}, which is {work}"
        return f"process {process}, without a sign of life for {silence:.0f} s of {SILENT_SECONDS:g} s"

    def behind(self) -> list[int]:
        """The processes that have dispatched fewer compiled calls than this one."""
        state = distributed.global_state
        calls = {process: int(text.split(" ", 1)[0]) for process, (text, _) in self._seen.items()}
        return [p for p in range(state.num_processes) if p != state.process_id and calls.get(p, 0) < _own.calls]
