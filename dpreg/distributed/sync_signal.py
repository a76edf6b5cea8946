"""A signal that all processes of a run receive between the same steps."""

import itertools

import jax

from dpreg.distributed import processes

_numbers = itertools.count()


class SyncSignal:
    """A word that any process may request, and that all processes receive at the same call of `poll`.

    Process 0 decides which call that is. All processes have to create equally many signals, in the same order.
    """

    # Processes are held together by their collectives to within the calls in flight and the one to come.
    _LEAD = processes.CALLS_IN_FLIGHT + 4

    def __init__(self) -> None:
        self._key, self._calls, self._number = f"dpreg/sync_signal/{next(_numbers)}", 0, 0
        self._wanted: list[str] = []
        self._announced: tuple[int, str] | None = None  # at which call, and what

    def request(self, what: str) -> None:
        """Sends a word to all processes, which receive it some calls later. To repeat it before that has no effect."""
        if what not in self._wanted and (self._announced is None or self._announced[1] != what):
            self._wanted.append(what)  # a signal handler may call this

    def pending(self, what: str) -> bool:
        """Whether this process itself has requested the word, and not all have received it."""
        return what in self._wanted

    def poll(self) -> str:
        """The word to act on now, or "". All processes have to call it equally often, between the same steps."""
        self._calls += 1
        if jax.process_count() == 1:
            return self._wanted.pop(0) if self._wanted else ""
        if jax.process_index():
            while self._wanted:
                processes.service().key_value_set(f"{self._key}/wanted/{self._wanted.pop(0)}", "", allow_overwrite=True)
        elif self._announced is None:
            self._announce()
        if self._announced is None:
            self._announced = self._listen()
        if self._announced is None or self._calls < self._announced[0]:
            return ""
        (_, what), self._announced = self._announced, None
        self._number += 1
        return what

    def _announce(self) -> None:
        """Process 0 announces what any process has requested, and at which call it is received."""
        for key, _ in processes.service().key_value_dir_get(f"{self._key}/wanted/"):
            processes.service().key_value_delete(key)
            self.request(key.rpartition("/")[2])
        if self._wanted:
            text = f"{self._calls + self._LEAD} {self._wanted.pop(0)}"
            processes.service().key_value_set(f"{self._key}/announced/{self._number}", text)

    def _listen(self) -> tuple[int, str] | None:
        try:
            at, what = processes.service().key_value_try_get(f"{self._key}/announced/{self._number}").split()
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return int(at), what
