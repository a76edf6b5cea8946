"""The roll call: the processes of a run find each other, before JAX's runtime starts.

Process 0 calls it at the address where it will serve. The runtime would abort a process that waits in vain for
another, and one whose id another has, too. Each other process sends a line of JSON, gets empty lines while it
waits, and one of JSON at the end.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any, NoReturn

from dpreg.errors import InputError, ProcessLost
from dpreg.terminal import printable

HEARTBEAT_SECONDS = 10  # a process silent for as long is lost, and all others end
JOIN_SECONDS = 120  # for processes to find each other


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT -> (host, port), an IPv6 host without its brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    return host in ("localhost", "::1") or host.startswith("127.")


class Wait:
    """A wait that ends, and that tells every 10 seconds what for."""

    def __init__(self, seconds: float):
        self._began = self._told = time.monotonic()
        self._seconds = seconds

    def goes_on(self, what: str) -> bool:
        """False when it has been long enough."""
        now = time.monotonic()
        if now - self._told > 10:
            self._told = now
            tell(f"{what} ({now - self._began:.0f} s of {self._seconds})")
        return now - self._began < self._seconds


def tell(line: str) -> None:
    """A line on stderr, also from where Python's own stream may be in use."""
    os.write(2, f"dpreg: {printable(line)}\n".encode())


def call_roll(host: str, port: int, num_processes: int) -> None:
    """Process 0 waits until all others are there, and tells them to go on, or what is wrong."""
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as connections:
        listener = connections.enter_context(_listen(host, port))

        def end(error: InputError | ProcessLost) -> NoReturn:
            for connection in present.values():
                _send(connection, {type(error).__name__: str(error)})
            raise error

        wait = Wait(JOIN_SECONDS)
        while missing := [i for i in range(1, num_processes) if i not in present or _is_closed(present[i])]:
            who = f"process {', '.join(map(str, missing))}"
            if not wait.goes_on(f"process 0 waits at {host}:{port} for {who}"):
                end(
                    ProcessLost(
                        f"{who} did not come to process 0 at {host}:{port} in {JOIN_SECONDS} s; check that it runs, "
                        "and that a firewall does not keep it from that address"
                    )
                )
            for connection in present.values():
                _send(connection)
            try:
                connection = connections.enter_context(listener.accept()[0])
                hello = _receive(connection, timeout=1)
                process, processes = int(hello["process_id"]), int(hello["num_processes"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody yet, or not one of ours
            before, present[process] = present.get(process), connection
            if processes != num_processes:
                end(
                    InputError(
                        f"--num_processes is {num_processes} in process 0 and {processes} in process {process}; "
                        "start all processes with the same flags"
                    )
                )
            if before is not None and not _is_closed(before):
                present[-1] = before  # to be told as well
                end(InputError(f"--process_id={process}: two processes have it; give each its own"))
        listener.close()  # JAX's service takes its place
        for connection in present.values():
            _send(connection, {})


def answer_roll(host: str, port: int, num_processes: int, process_id: int) -> None:
    """Another process tells process 0 that it is there, and waits until all are."""
    wait, reason, connected = Wait(JOIN_SECONDS), "no answer", False
    while wait.goes_on(f"process {process_id} waits for process 0 at {host}:{port}: {reason}"):
        try:
            with socket.create_connection((host, port), timeout=2) as connection:
                connected = True
                _send(connection, {"process_id": process_id, "num_processes": num_processes})
                answer = _receive(connection, timeout=HEARTBEAT_SECONDS)
        except (OSError, ValueError) as error:
            if connected and isinstance(error, TimeoutError):
                raise ProcessLost(
                    f"process 0 at {host}:{port} says nothing for {HEARTBEAT_SECONDS} s: it is stuck; start all again"
                ) from error
            connected = False
            reason = getattr(error, "strerror", None) or "what answers there is no process 0 that waits"
            time.sleep(0.1)
            continue
        for kind in (InputError, ProcessLost):
            if kind.__name__ in answer:
                raise kind(answer[kind.__name__])
        return
    raise ProcessLost(
        f"process {process_id} found no process 0 at {host}:{port} in {JOIN_SECONDS} s ({reason}); check that it "
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
            f"--coordinator_address={host}:{port}: process 0 cannot serve there ({error.strerror}); use a port that "
            "no other run has, and a --process_id of its own for each process"
        ) from error
    listener.settimeout(0.1)
    return listener


def _send(connection: socket.socket, message: dict[str, Any] | None = None) -> None:
    with contextlib.suppress(OSError):  # who has gone will be missed by the runtime
        connection.sendall((json.dumps(message).encode() if message is not None else b"") + b"\n")


def _receive(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """The next message that is not empty. The time is for each line."""
    connection.settimeout(timeout)
    with connection.makefile("rb") as lines:
        while (line := lines.readline(4096)) == b"\n":
            pass
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
