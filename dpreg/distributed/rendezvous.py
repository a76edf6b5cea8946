"""The rendezvous of the processes of a run, before JAX's runtime starts.

JAX's runtime would abort a process if another one is missing or has the same id. So process 0 first listens at the
address of the coordination service. Each other process sends it a line of JSON and receives lines of JSON: which
processes are missing, repeatedly, and finally that all are connected, or an error. Anything else that reaches the port,
on either side, is limited in bytes and in time, and is logged in one line.
"""

import contextlib
import json
import os
import selectors
import socket
import time
from typing import Any

from dpreg.errors import InputError, ProcessLost
from dpreg.spelling import spell
from dpreg.terminal import printable

HEARTBEAT_SECONDS = 10  # a process without heartbeats for so long is lost, and all others end
JOIN_SECONDS = 120  # the limit for all processes to connect

# Limits on connections to process 0, and on its answers. A process sends one short line as soon as it is connected.
_HELLO_BYTES, _HELLO_SECONDS, _MOST_UNKNOWN, _MOST_PROCESSES = 128, 5.0, 128, 1 << 24
_ANSWER_BYTES, _MOST_NAMED, _MOST_ERROR = 4096, 8, 1000
_REPORT_SECONDS = 10.0  # between the log lines of a process that waits
_STATUS_SECONDS = 1.0  # between the messages of process 0 to the processes that wait
_MISSING, _ALL_ARE_THERE = "missing", "all_are_there"


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reachable from this machine only."""
    return host in ("localhost", "::1") or host.startswith("127.")


class Wait:
    """A wait with a limit, which logs every 10 seconds what it waits for."""

    def __init__(self, seconds: float):
        self._began = self._told = time.monotonic()
        self._seconds = seconds

    def goes_on(self, what: str) -> bool:
        """Whether the limit is not yet reached; logs `what` when a report is due."""
        now = time.monotonic()
        if now - self._told > _REPORT_SECONDS:
            self._told = now
            log_line(f"{what} (for {now - self._began:.0f} s)")
        return now - self._began < self._seconds


def log_line(line: str) -> None:
    """Writes a line to stderr, even while Python's own stream is in use, as in a signal handler."""
    os.write(2, f"dpreg: {printable(line)}\n".encode())


class _Caller:
    """A connection to process 0, which is a stranger until it has sent the message of a process of the run."""

    def __init__(self, connection: socket.socket, address: str):
        self.connection, self.address, self._since, self._received = connection, address, time.monotonic(), b""
        self.process: int | None = None
        self.num_processes = 0
        connection.setblocking(False)

    def read(self) -> None:
        """Reads the data that have arrived, without waiting.

        Raises:
          _StrangerError: when the connection is closed, or its data are not the message of a process of a run.
        """
        try:
            received = self.connection.recv(_HELLO_BYTES + 1)
        except BlockingIOError:
            return
        except OSError as error:
            raise _StrangerError(error.strerror or "the connection failed") from error
        if not received:
            raise _StrangerError("it closed the connection")
        self._received += received
        if self.process is not None or len(self._received) > _HELLO_BYTES:
            raise _StrangerError("it sends more than a process of a run does")
        if self._received.endswith(b"\n"):
            self.process, self.num_processes = _parse_hello(self._received)

    def is_late(self) -> bool:
        """Whether the message of a process of the run is overdue."""
        return self.process is None and time.monotonic() - self._since > _HELLO_SECONDS


class _StrangerError(Exception):
    """A connection does not belong to a process of this run; the text gives the reason."""


class _Registry:
    """The connections to process 0 while it waits for the others, all read by one thread.

    Anyone who can reach the port may connect. A connection that sends anything but the message of a process, or
    nothing, is closed, and does not delay the others.
    """

    def __init__(self, listener: socket.socket, num_processes: int):
        self.present: dict[int, _Caller] = {}
        self._listener, self._num_processes = listener, num_processes
        self._unknown: list[_Caller] = []
        self._reported = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Closes all connections."""
        for caller in (*self._unknown, *self.present.values()):
            caller.connection.close()
        self._selector.close()

    def missing(self) -> list[int]:
        """The processes that have not connected yet."""
        return [process for process in range(1, self._num_processes) if process not in self.present]

    def serve(self, seconds: float) -> None:
        """Accepts and reads connections for some seconds.

        Raises:
          InputError: when a process was started with another number of processes, or with the id of another one.
        """
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
                continue
            if not self._knows(key.data):
                continue  # was closed in this loop
            if self._read(key.data):
                self._enter(key.data)
        for caller in [caller for caller in self._unknown if caller.is_late()]:
            self._drop(caller, f"it sends no whole message within {_HELLO_SECONDS:g} s")

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:
            return  # the connection was closed, or there are too many open files
        if len(self._unknown) >= _MOST_UNKNOWN:
            self._drop(self._unknown[0], "too many others wait")
        caller = _Caller(connection, str(address[0]))
        self._unknown.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)

    def _knows(self, caller: _Caller) -> bool:
        return caller in self._unknown or caller in self.present.values()

    def _read(self, caller: _Caller) -> bool:
        """Reads a connection, and returns whether it has sent the message of a process."""
        known = caller.process
        try:
            caller.read()
        except _StrangerError as error:
            self._drop(caller, str(error), known)
            return False
        return known is None and caller.process is not None

    def _enter(self, caller: _Caller) -> None:
        process, num_processes = caller.process, caller.num_processes
        if num_processes != self._num_processes:
            raise InputError(
                f"{spell('num_processes')} is {self._num_processes} in process 0 and {num_processes} in process "
                f"{process}; start all processes with the same settings"
            )
        assert process is not None
        if process in self.present:
            self._read(self.present[process])  # drops that connection if its process has ended
        if process in self.present:
            raise InputError(f"{spell('process_id', process)}: two processes have it; give each a different one")
        self._unknown.remove(caller)
        self.present[process] = caller

    def _drop(self, caller: _Caller, why: str, process: int | None = None) -> None:
        """Closes a connection; the first stranger is logged."""
        self._selector.unregister(caller.connection)
        caller.connection.close()
        if process is not None:
            del self.present[process]  # the process has ended, and may be started again
            return
        self._unknown.remove(caller)
        if not self._reported:
            self._reported = True
            log_line(f"process 0 ignores a connection from {caller.address}, which is no process of this run: {why}")

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message to all connected processes."""
        line = json.dumps(message).encode() + b"\n"
        for caller in (*self._unknown, *self.present.values()):
            if caller.process is not None:
                with contextlib.suppress(OSError):  # the runtime will notice a process that has ended
                    caller.connection.send(line)


def serve_rendezvous(host: str, port: int, num_processes: int) -> None:
    """Waits in process 0 until all other processes are connected, and notifies them, or sends them an error.

    Raises:
      InputError: when a process was started with other settings, or the port is in use.
      ProcessLost: when a process does not connect in time.
    """
    with _listen(host, port) as listener, contextlib.closing(_Registry(listener, num_processes)) as registry:
        wait, status_due = Wait(JOIN_SECONDS), 0.0
        try:
            while missing := registry.missing():
                who = _name_processes(missing)
                if not wait.goes_on(f"process 0 waits at {host}:{port} for {who}"):
                    raise ProcessLost(
                        f"{who} did not come to process 0 at {host}:{port} in {JOIN_SECONDS} s; check that it runs, "
                        "and that a firewall does not keep it from that address"
                    )
                if time.monotonic() >= status_due:
                    registry.send({_MISSING: missing[:_MOST_NAMED]})
                    status_due = time.monotonic() + _STATUS_SECONDS
                registry.serve(_STATUS_SECONDS / 10)
        except (InputError, ProcessLost) as error:
            registry.send({type(error).__name__: str(error)[:_MOST_ERROR]})
            raise
        listener.close()  # JAX's service will listen at this port
        registry.send({_ALL_ARE_THERE: True})


def join_rendezvous(host: str, port: int, num_processes: int, process_id: int) -> None:
    """Connects to process 0 from another process, and waits until all are connected.

    Raises:
      InputError: when process 0 sends one.
      ProcessLost: when process 0 is not reachable or stops sending, or another process does not connect.
    """
    hello = json.dumps({"process_id": process_id, "num_processes": num_processes}).encode() + b"\n"
    wait, reason = Wait(JOIN_SECONDS), "no answer"
    while wait.goes_on(f"process {process_id} waits for process 0 at {host}:{port}: {reason}"):
        try:
            with socket.create_connection((host, port), timeout=2) as connection:
                connection.sendall(hello)
                _await_all(connection, f"process {process_id}", f"process 0 at {host}:{port}")
                return
        except _StrangerError as error:
            reason = f"what answers there is no process 0 that waits ({error})"
        except OSError as error:
            reason = error.strerror or "no answer"
        time.sleep(0.1)
    raise ProcessLost(
        f"process {process_id} found no process 0 at {host}:{port} in {JOIN_SECONDS} s ({reason}); check that it "
        "runs, that this is an address of its host"
        + (" (this one is of each machine alone)" if is_loopback(host) else "")
        + ", and that no firewall keeps the port"
    )


def _await_all(connection: socket.socket, own: str, zero: str) -> None:
    """Reads the messages of process 0 until all processes are connected.

    Raises:
      InputError: as process 0 sends it.
      ProcessLost: likewise; and when it falls silent.
      _StrangerError: when what answers is no process 0.
    """
    wait, missing, received, spoke = Wait(2 * JOIN_SECONDS), "the others", b"", False
    last = time.monotonic()
    while wait.goes_on(f"{own} is connected to {zero}, which waits for {missing}"):
        silent = time.monotonic() - last  # since a whole message: single bytes do not count
        if silent > HEARTBEAT_SECONDS and spoke:
            raise ProcessLost(f"{zero} says nothing for {HEARTBEAT_SECONDS} s: it is stuck; start all again")
        if silent > HEARTBEAT_SECONDS:
            raise _StrangerError(f"it says nothing for {HEARTBEAT_SECONDS} s")
        connection.settimeout(max(0.01, min(1.0, HEARTBEAT_SECONDS - silent)))
        try:
            part = connection.recv(_ANSWER_BYTES)
        except TimeoutError:
            continue
        *lines, received = (received + part).split(b"\n")
        if not part or len(received) > _ANSWER_BYTES:
            raise _StrangerError("it closed the connection" if not part else "it sends too long a line")
        for line in lines:
            message = _parse(line)
            last, spoke = time.monotonic(), True
            if _ALL_ARE_THERE in message:
                return
            for kind in (InputError, ProcessLost):
                if kind.__name__ in message:
                    raise kind(_printable(message[kind.__name__]))
            waited_for = message.get(_MISSING)
            if not isinstance(waited_for, list) or not all(type(process) is int for process in waited_for):
                raise _StrangerError("it sends no message of dpreg")
            missing = _name_processes(waited_for)
    raise ProcessLost(f"{zero} waits for {missing} for {2 * JOIN_SECONDS} s; start all again")


def _parse(line: bytes) -> dict[str, Any]:
    """The message in a line, which is bounded in length, and with it its depth and its numbers.

    Raises:
      _StrangerError: when it is none.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _StrangerError("it sends no message of dpreg") from error
    if not isinstance(message, dict) or len(message) > 2:
        raise _StrangerError("it sends no message of dpreg")
    return message


def _parse_hello(line: bytes) -> tuple[int, int]:
    """(process id, number of processes) as a process other than 0 sends them."""
    message = _parse(line)
    process, num_processes = message.get("process_id"), message.get("num_processes")
    if type(process) is not int or type(num_processes) is not int:  # not isinstance: a bool is none
        raise _StrangerError("it sends no message of dpreg")
    if not 0 < process < num_processes <= _MOST_PROCESSES:
        raise _StrangerError(f"it sends a process id that does not exist, of {num_processes} processes")
    return process, num_processes


def _name_processes(processes: list[int]) -> str:
    """Such as "process 1, 2"; the first few of many."""
    more = ", ..." if len(processes) > _MOST_NAMED else ""
    return f"process {', '.join(map(str, processes[:_MOST_NAMED]))}{more}"


def _printable(text: object) -> str:
    """A text that another process sent, without what would control a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))[:_MOST_ERROR]


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
            f"{spell('coordinator_address', f'{host}:{port}')}: process 0 cannot serve there ({error.strerror}); use a "
            f"port that no other run has, and a different {spell('process_id')} for each process"
        ) from error
    listener.setblocking(False)
    return listener
