"""Runs Python in new processes forked from one that has imported dpreg, which saves seconds of import at each start.

Each process has its own JAX, signals, folder, output and exit code. `run` and `Process` work like `run` and
`Popen` of subprocess, but without the interpreter as an argument. Tests of the import itself, or of variables
that it reads, need a fresh process.
"""

import contextlib
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import weakref

ROOT = pathlib.Path(__file__).parent.parent
# None of them starts JAX or its threads. A run imports jinja2 for its report, and pyarrow imports pandas.
IMPORTED = ("dpreg.main", "dpreg.report", "jinja2", "pandas", "scipy.linalg", "scipy.special")


def run(*arguments, timeout=240, **where):
    """Runs `python ARGUMENTS` to its end; the arguments are those of `start`."""
    with start(*arguments, **where) as process:
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(*arguments, cwd=ROOT, env=None):
    """Starts `python ARGUMENTS`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.

    Args:
      env: changes to the environment of this process; None removes a variable.
    """
    return _parent().start([*map(str, arguments)], str(cwd), env or {})


class Process:
    """A started process; leaving its context kills it."""

    def __init__(self, parent, pid, arguments, files):
        self.pid, self.args, self.returncode = pid, arguments, None
        self._parent, self._files = parent, files

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.wait(60)

    def send_signal(self, number):
        """Sends a signal if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)  # No other process can have this pid yet.

    def terminate(self):
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Sends SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)

    def poll(self):
        """Returns the exit code, or None while the process runs."""
        if self.returncode is None:
            self._parent.listen(0)
            self.returncode = self._parent.ended.get(self.pid)
        return self.returncode

    def wait(self, timeout=240):
        """Waits for the process to end and returns its exit code."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if (rest := until - time.monotonic()) < 0:
                raise subprocess.TimeoutExpired(self.args, timeout, *(file.read_bytes() for file in self._files))
            self._parent.listen(rest)
        return self.returncode

    def communicate(self, timeout=240):
        """Waits for the process to end and returns (stdout, stderr)."""
        self.wait(timeout)
        return tuple(file.read_text(errors="replace") for file in self._files)


class _Parent:
    """The process that has imported dpreg and forks all others."""

    def __init__(self):
        self._folder, self._count, self._text = tempfile.TemporaryDirectory(), 0, b""
        self.started, self.ended = [], {}
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        weakref.finalize(self, self._process.communicate)

    def start(self, arguments, cwd, env):
        self._count += 1
        files = [pathlib.Path(self._folder.name) / f"{self._count}.{stream}" for stream in (1, 2)]
        request = {"arguments": arguments, "files": [*map(str, files)], "cwd": cwd, "env": env}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        while not self.started:
            self.listen(60)
        return Process(self, self.started.pop(), arguments, files)

    def listen(self, seconds):
        """Reads which processes have started and which have ended."""
        if select.select([self._process.stdout], [], [], seconds)[0]:
            text = os.read(self._process.stdout.fileno(), 1 << 16)
            assert text, "the process that forks the others has ended"
            *lines, self._text = (self._text + text).split(b"\n")
            for pid, *code in map(json.loads, lines):
                if code:
                    self.ended[pid] = code[0]
                else:
                    self.started.append(pid)


def _parent(kept=[]):  # noqa: B006
    if not kept:
        kept.append(_Parent())
    return kept[0]


def _serve():
    """Forks a process for each request and reports its pid and its exit code."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # Garbage collection would otherwise copy the shared memory pages in each process.
    wakes, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches this process too; pytest ends it.
    waiting = b""
    while True:
        ready = select.select([0, wakes], [], [])[0]
        if wakes in ready:
            os.read(wakes, 1 << 10)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    _say(ended[0], os.waitstatus_to_exitcode(ended[1]))
        if 0 in ready:
            text = os.read(0, 1 << 16)
            if not text:
                return
            *lines, waiting = (waiting + text).split(b"\n")
            for request in map(json.loads, lines):
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    os.close(wakes)
                    os.close(waker)
                    return _run(**request)
                _say(pid)


def _say(*message):
    os.write(1, json.dumps(message).encode() + b"\n")


def _run(arguments, files, cwd, env):
    """Turns the forked process into one that runs `python ARGUMENTS`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in enumerate((os.devnull, *files)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(cwd)
    for name, value in env.items():
        assert not name.startswith(("JAX", "PYTHON")), f"{name} is read by imports"
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
    first, *rest = arguments
    if first in ("-m", "-c"):
        what, *rest = rest
    sys.path[0], sys.argv = cwd, [first, *rest]
    if first == "-m":
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        sys.path[0] = str(pathlib.Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _serve()
