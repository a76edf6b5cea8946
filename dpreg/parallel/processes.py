"""Several processes of one run: how they find each other, agree, and end when one of them is lost."""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the coordination service's key-value store has no public name

from dpreg.errors import InputError, ProcessLost

Result = TypeVar("Result")

_HEARTBEAT_SECONDS = 10  # a process silent for as long is lost, and all others end
_JOIN_SECONDS = 120  # for processes to find each other
_MEET_SECONDS = 1800  # for all to have read their rows and compiled
# More than 1 where a launcher has started several processes; JAX finds out the rest by itself.
_CLUSTER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the run, if there are any, by JAX's coordination service.

    Args:
      address: HOST:PORT at which process 0 serves; "auto" asks the cluster; None does so where Slurm or
        Open MPI have started several processes.
      num_processes: how many there are; process_id: which this is, from 0.

    Raises:
      InputError: when two processes have the same id, or the port is taken, or there is no cluster to ask.
      ProcessLost: when the others cannot be reached.
    """
    # SIGTERM is ours: Orbax asks JAX's own preemption service with numbers of its own, and it then misses the moment.
    jax.config.update("jax_enable_preemption_service", False)
    timeouts: dict[str, Any] = {
        "initialization_timeout": _JOIN_SECONDS,
        "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": _HEARTBEAT_SECONDS,
    }
    if address is not None and num_processes is not None and process_id is not None:
        host, port = split_address(address)
        if process_id == 0:
            _call_roll(host, port, num_processes)
        else:
            _answer_roll(host, port, num_processes, process_id)
        _end_as_lost_when_aborted()
        # The service has no authentication: what runs on this machine alone stays on its loopback.
        bind = address if is_loopback(host) else None
        jax.distributed.initialize(address, num_processes, process_id, coordinator_bind_address=bind, **timeouts)
    elif address == "auto" or _in_cluster():
        _end_as_lost_when_aborted()
        try:
            jax.distributed.initialize(**timeouts)
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(
                f"--coordinator_address=auto: JAX finds no cluster to ask here ({error}); give HOST:PORT, "
                "--num_processes and --process_id"
            ) from error


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT -> (host, port), an IPv6 host without its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    return host in ("localhost", "::1") or host.startswith("127.")


def coordinator() -> str | None:
    """HOST:PORT of the coordination service; None for a single process."""
    return distributed.global_state.coordinator_address if jax.process_count() > 1 else None


def _in_cluster() -> bool:
    sizes = (os.environ.get(name, "") for name in _CLUSTER_SIZES)
    return any(size.isdigit() and int(size) > 1 for size in sizes)


class _Wait:
    """A wait that ends, and that tells every 10 seconds what for."""

    def __init__(self, seconds: float):
        self._began = self._told = time.monotonic()
        self._seconds = seconds

    def goes_on(self, what: str) -> bool:
        """False when it has been long enough."""
        now = time.monotonic()
        if now - self._told > 10:
            self._told = now
            _tell(f"{what} ({now - self._began:.0f} s of {self._seconds})")
        return now - self._began < self._seconds


def _tell(line: str) -> None:
    """A line on stderr, also from where Python's own stream may be in use."""
    os.write(2, f"dpreg: {line}\n".encode())


# Before JAX's runtime starts, process 0 calls the roll at the same address: the runtime would abort a process that
# waits in vain, and one whose id another has, too. Each sends a line of JSON and gets one back.


def _call_roll(host: str, port: int, num_processes: int) -> None:
    """Process 0 waits until all others are there, and tells them to go on, or what is wrong."""
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as connections:
        listener = connections.enter_context(_listen(host, port))

        def end(error: InputError | ProcessLost) -> NoReturn:
            for connection in present.values():
                _send(connection, {type(error).__name__: str(error)})
            raise error

        wait = _Wait(_JOIN_SECONDS)
        while missing := [i for i in range(1, num_processes) if i not in present or _is_closed(present[i])]:
            who = f"process {', '.join(map(str, missing))}"
            if not wait.goes_on(f"process 0 waits at {host}:{port} for {who}"):
                end(
                    ProcessLost(
                        f"{who} did not come to process 0 at {host}:{port} in {_JOIN_SECONDS} s: check that it runs, "
                        "and that a firewall does not keep it from that address"
                    )
                )
            try:
                connection = connections.enter_context(listener.accept()[0])
                hello = _receive(connection, timeout=5)
                process, processes = int(hello["process_id"]), int(hello["num_processes"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody yet, or not one of ours
            before, present[process] = present.get(process), connection
            if processes != num_processes:
                end(
                    InputError(
                        f"--num_processes is {num_processes} in process 0 and {processes} in process {process}: "
                        "start all processes with the same flags"
                    )
                )
            if before is not None and not _is_closed(before):
                present[-1] = before  # to be told as well
                end(InputError(f"--process_id={process}: two processes have it; give each its own"))
        listener.close()  # JAX's service takes its place
        for connection in present.values():
            _send(connection, {})


def _answer_roll(host: str, port: int, num_processes: int, process_id: int) -> None:
    """Another process tells process 0 that it is there, and waits until all are."""
    wait, reason = _Wait(_JOIN_SECONDS), "no answer"
    while wait.goes_on(f"process {process_id} waits for process 0 at {host}:{port}: {reason}"):
        try:
            with socket.create_connection((host, port), timeout=2) as connection:
                _send(connection, {"process_id": process_id, "num_processes": num_processes})
                answer = _receive(connection, timeout=_JOIN_SECONDS + 10)  # process 0 gives up before
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "what answers there is no process 0 that waits"
            time.sleep(0.1)
            continue
        for kind in (InputError, ProcessLost):
            if kind.__name__ in answer:
                raise kind(answer[kind.__name__])
        return
    raise ProcessLost(
        f"process {process_id} found no process 0 at {host}:{port} in {_JOIN_SECONDS} s ({reason}): check that it "
        "runs, that this is an address of its host"
        + (" (this one is of each machine alone)" if is_loopback(host) else "")
        + ", and that no firewall keeps the port"
    )


def _listen(host: str, port: int) -> socket.socket:
    try:
        if is_loopback(host):
            listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        elif socket.has_dualstack_ipv6():
            listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            listener = socket.create_server(("", port))
    except OSError as error:
        raise InputError(
            f"--coordinator_address={host}:{port}: process 0 cannot serve there ({error.strerror}): use a port that "
            "no other run has, and a --process_id of its own for each process"
        ) from error
    listener.settimeout(0.1)
    return listener


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who has gone will be missed by the runtime
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout: float) -> dict[str, Any]:
    connection.settimeout(timeout)
    with connection.makefile("rb") as lines:
        line = lines.readline(4096)
    message = json.loads(line)
    if not line.endswith(b"\n") or not isinstance(message, dict):
        raise ValueError("not a message of ours")
    return message


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


_ABORT_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_ABORT_HANDLER
def _aborted(_: int) -> None:
    _tell(
        f"process {distributed.global_state.process_id} ends: JAX's runtime lost another process, as it says above; "
        "start all again to go on from the newest checkpoint"
    )
    os._exit(ProcessLost.exit_code)


def _end_as_lost_when_aborted() -> None:
    """Makes exit code 76 of SIGABRT, by which JAX's runtime ends a process when another one is lost.

    A handler in Python would come too late, as abort() ends the process once the C handler has returned; and the
    runtime's own callback for the case cannot be used from Python (std::bad_cast, jaxlib 0.10 and 0.12).
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _ABORT_HANDLER), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), _aborted)


def end_as_lost(error: BaseException) -> NoReturn:
    """Ends this process at once, with exit code 76 and the reason why the run is lost: a normal exit would wait.

    The reason is that of the process which ended first, where it could still tell it.
    """
    reason = f"process {jax.process_index()}: {' '.join(str(error).split()) or type(error).__name__}"[:500]
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        service = _service()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one told it before
            service.key_value_set("dpreg/lost", reason)
        reason = service.key_value_try_get("dpreg/lost")
    _tell(f"the run lost a process ({reason}): start all again to go on from the newest checkpoint")
    sys.stdout.flush()
    os._exit(ProcessLost.exit_code)


_ERROR = "!"
_exchanges = itertools.count()


def _service() -> Any:
    """The client of the coordination service."""
    return distributed.global_state.client


def exchange(text: str = "", error: str | None = None) -> list[str]:
    """Tells all processes a text and returns those of all, in the order of their ids; a meeting of all, too.

    Over the coordination service, not the devices: it works before the first collective, and waits as long as
    a process may take to read its rows. All processes have to call it equally often.

    Args:
      error: says instead that this process cannot go on; then it ends for all, at whichever meeting they are.

    Raises:
      AgreedError: with the error of the first process that told one.
      ProcessLost: when a process does not come for half an hour.
    """
    mine = f":{text}" if error is None else _ERROR + error
    told = [mine]
    if jax.process_count() > 1:
        meeting, wait = f"dpreg/exchange/{next(_exchanges)}", _Wait(_MEET_SECONDS)
        _service().key_value_set(f"{meeting}/{jax.process_index()}", mine)
        told = [_awaited(f"{meeting}/{process}", process, wait) for process in range(jax.process_count())]
    for process, answer in enumerate(told):
        if answer.startswith(_ERROR):
            where = f"process {process}: " if jax.process_count() > 1 else ""
            raise AgreedError(where + answer.removeprefix(_ERROR))
    return [answer.removeprefix(":") for answer in told]


def _awaited(key: str, process: int, wait: _Wait) -> str:
    """What the process puts under a key."""
    while wait.goes_on(f"process {jax.process_index()} waits for process {process}"):
        try:
            return _service().blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise ProcessLost(f"process {process} did not come in {_MEET_SECONDS} s")


class AgreedError(InputError):
    """An InputError that all processes know of and raise."""


def agreed(function: Callable[[], Result]) -> Result:
    """Runs it in all processes; an InputError of one becomes that of all, at their next meeting.

    Raises:
      AgreedError: where a process had an InputError.
    """
    try:
        result = function()
        exchange()
        return result
    except AgreedError:
        raise
    except InputError as error:
        exchange(error=str(error))
        raise


class Announcements:
    """What any process asks for and all processes hear at the same call of `heard`: process 0 says when."""

    # Processes are held together by their collectives to within the calls in flight (8); this is well beyond.
    _LEAD = 16

    def __init__(self) -> None:
        self._calls, self._number = 0, 0
        self._wanted: list[str] = []
        self._announced = ""

    def ask(self, what: str) -> None:
        """Lets all processes hear a word, some calls from now. Repeated before that, it does nothing."""
        if what not in (*self._wanted, self._announced):  # a signal handler may call this
            self._wanted.append(what)

    def heard(self) -> str:
        """What to do now, or "". All processes have to call it equally often, between the same steps."""
        self._calls += 1
        if jax.process_count() == 1:
            return self._wanted.pop(0) if self._wanted else ""
        if jax.process_index():
            while self._wanted:
                _service().key_value_set(f"dpreg/wanted/{self._wanted.pop(0)}", "", allow_overwrite=True)
        elif not self._announced:
            for key, _ in _service().key_value_dir_get("dpreg/wanted/"):
                _service().key_value_delete(key)
                self.ask(key.rpartition("/")[2])
            if self._wanted:
                self._announced = self._wanted.pop(0)
                at = self._calls + self._LEAD
                _service().key_value_set(f"dpreg/announced/{self._number}", f"{at} {self._announced}")
        try:
            at, what = _service().key_value_try_get(f"dpreg/announced/{self._number}").split()
        except jax.errors.JaxRuntimeError:  # nothing is announced
            return ""
        if self._calls < int(at):
            return ""
        self._number, self._announced = self._number + 1, ""
        return what
