"""The rendezvous port: foreign connections and foreign servers do not harm a run."""

import contextlib
import json
import os
import socket
import threading
import time

from dpreg.distributed.rendezvous import join_rendezvous, serve_rendezvous
from dpreg.errors import InputError

from .mutate import TOKENS, damage_bytes
from .refusal import check_line

HELLO = b'{"process_id": 1, "num_processes": 3}\n'
ANSWERS = (b'{"missing": [1]}\n', b'{"all_are_there": true}\n', b'{"InputError": "\\u001b[2J"}\n', b"\n", b"{}\n")


def run(rng, folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return (serve_among_foreign_connections if rng.random() < 0.7 else join_after_a_foreign_server)(rng, port)


def serve_among_foreign_connections(rng, port):
    """Foreign clients connect to process 0; the other two processes must still join."""
    payloads = [payload(rng) for _ in range(rng.integers(1, 8))]
    claims = any(is_hello(text) for text, _ in payloads)
    outcome = {}
    with quiet():
        processes = [thread(outcome, 0, serve_rendezvous, "127.0.0.1", port, 3)]
        foreign = [thread(None, None, disturb, port, *each) for each in payloads]
        time.sleep(0.05 * rng.random())
        processes += [thread(outcome, i, join_rendezvous, "127.0.0.1", port, 3, i) for i in (1, 2)]
        for running in processes[:1] if claims else processes:
            running.join(10)
        for running in foreign:
            running.join(10)
    # If a foreign client claims to be a process of this run, process 0 ends, and processes that come later wait for it.
    waiting = {0} if claims else {0, 1, 2}
    assert waiting <= {*outcome}, f"process {waiting - {*outcome}} waits; foreign connections sent {payloads!r:.300}"
    errors = [error for error in outcome.values() if error is not None]
    for error in errors:
        assert isinstance(error, InputError), error
        check_line(str(error))
    assert not errors or claims, f"{errors[0]}: foreign connections sent {payloads!r:.300}"
    return "refused" if errors else "correct"


def join_after_a_foreign_server(rng, port):
    """A foreign server answers at the port first; then process 0 starts."""
    answer = damage_bytes(ANSWERS[rng.integers(len(ANSWERS))], rng) if rng.random() < 0.8 else payload(rng)[0]
    outcome = {}
    with quiet(), socket.create_server(("127.0.0.1", port)) as listener:
        other = thread(outcome, 1, join_rendezvous, "127.0.0.1", port, 2, 1)
        listener.settimeout(5)
        connection = listener.accept()[0]
        with contextlib.suppress(OSError):
            connection.sendall(answer)
        connection.close()
        listener.close()
        if still_running(other, 0.2):
            thread(outcome, 0, serve_rendezvous, "127.0.0.1", port, 2).join(10)
        other.join(10)
    assert 1 in outcome, f"process 1 still waits after {answer!r:.300}"
    error = outcome[1]
    assert error is None or isinstance(error, InputError), error
    if error is not None:
        check_line(str(error))
        assert b"InputError" in answer, f"{error} after {answer!r:.300}"
    return "refused" if error else "correct"


def payload(rng):
    """Draws (bytes, how they are sent)."""
    how = ("at once", "in drips", "kept open", "reset")[rng.integers(4)]
    text = (
        HELLO,
        damage_bytes(HELLO, rng),
        TOKENS[rng.integers(len(TOKENS))] + b"\n",
        rng.bytes(int(rng.integers(0, 200))),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    )[rng.integers(1, 5)]
    return text, how


def is_hello(text):
    """Returns whether a process of a run could have sent the text, so that an InputError is allowed."""
    try:
        message = json.loads(text)
        return isinstance(message["process_id"], int) and isinstance(message["num_processes"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def disturb(port, text, how):
    """Connects and sends a text."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        if how == "in drips":
            for at in range(min(len(text), 40)):
                connection.sendall(text[at : at + 1])
                time.sleep(0.01)
        else:
            connection.sendall(text)
        if how == "kept open":
            time.sleep(0.5)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def thread(outcome, name, work, *arguments):
    def go():
        error = None
        try:
            work(*arguments)
        except Exception as raised:
            error = raised
        if outcome is not None:
            outcome[name] = error

    running = threading.Thread(target=go, daemon=True)
    running.start()
    return running


def still_running(running, seconds):
    running.join(seconds)
    return running.is_alive()


@contextlib.contextmanager
def quiet():
    """Suppresses output to the file descriptor of stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
