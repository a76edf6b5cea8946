"""Starts a run in several processes on this machine.

    python launch/local.py --processes=2 -- --flagfile=configs/cpu.cfg --num_devices=4 --workdir=runs/two

The arguments after `--` are passed to each `python -m dpreg.main`, together with the number of the process. If a
process dies, the others are killed. With --max_restarts, all are then started again on a new port, and resume from the
newest checkpoint. Exit codes: 0 to 3 are those of a single process; 75 after a preemption; 76 if a process was lost;
130 after Ctrl-C, which saves a checkpoint, so that the same command resumes. A second Ctrl-C kills all processes.

On CPU each process simulates --num_devices devices of its own. Of several GPUs, each process gets the one with its
number.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

PREEMPTED, LOST, INTERRUPTED = 75, 76, 130
FINAL = (0, 1, 2, 3, INTERRUPTED)  # done, bug, wrong input, diverged, interrupted: a restart would not help
GRACE_SECONDS = 15.0  # for the other processes to end by themselves after the first


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the processes, with restarts, and returns the exit code of the run."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="number of processes, 1 or more")
    parser.add_argument("--max_restarts", type=int, default=0, help="largest number of restarts; default: 0")
    parser.add_argument("flags", nargs="*", help="after --: flags of dpreg.main, with --workdir")
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1:
        parser.error(f"--processes={parsed.processes}: use 1 or more")
    if parsed.max_restarts < 0:
        parser.error(f"--max_restarts={parsed.max_restarts}: use 0 or more")

    stop_requested = threading.Event()
    interrupts = 0
    run: Run | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        del frame
        stop_requested.set()
        interrupts += number == signal.SIGINT
        if run is not None:
            # Do not forward SIGINT: a terminal sends it to the processes as well, and a second one would kill them.
            run.signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = PREEMPTED  # if the run is stopped before its first process starts
    for attempt in range(parsed.max_restarts + 1):
        if attempt:
            delay = min(2.0 ** (attempt - 1), 60.0)
            log(f"starting again in {delay:.0f} s ({attempt} of {parsed.max_restarts})")
            stop_requested.wait(delay)
        if stop_requested.is_set():
            break
        resume = ["--resume=auto"] if attempt else []  # overrides the user's flag after a restart
        run = Run(parsed.processes, [*parsed.flags, *resume])
        if stop_requested.is_set():
            run.signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)
        code = run.wait()
        if code in FINAL or stop_requested.is_set():
            break
    return INTERRUPTED if interrupts and code in (PREEMPTED, LOST) else code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line, like dpreg, instead of the usage that argparse prints."""
        self.exit(2, f"local: {message}; see --help\n")


class Run:
    """The processes of a run, and their output."""

    def __init__(self, processes: int, flags: Sequence[str]):
        address = f"127.0.0.1:{free_port()}"
        self._processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "dpreg.main", *flags),
                    *(f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={i}"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={"JAX_LOCAL_DEVICE_IDS": str(i), **os.environ},
            )
            for i in range(processes)
        ]
        self._readers = [threading.Thread(target=self._show, args=(i,)) for i in range(processes)]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """Waits for all processes, kills the others soon after one has failed, and returns the run's exit code."""
        ended: dict[int, int] = {}  # process -> exit code, in the order of their ends
        deadline = float("inf")
        while len(ended) < len(self._processes):
            for number, process in enumerate(self._processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = process.returncode
                    orderly = process.returncode in (PREEMPTED, *FINAL)  # the others end by themselves as well
                    if not orderly and time.monotonic() < deadline:
                        log(f"process {number} {describe_exit(process.returncode)}; ending the others")
                    deadline = min(deadline, time.monotonic() + (GRACE_SECONDS if orderly else 0))
            if time.monotonic() >= deadline:
                self.signal(signal.SIGKILL)
            time.sleep(0.02)
        for reader in self._readers:
            reader.join()
        code = next((code for code in ended.values() if code), 0)
        return code if code > 0 else LOST if code else 0

    def _show(self, number: int) -> None:
        output = self._processes[number].stdout
        assert output is not None
        for line in output:
            print(f"[{number}] {line}", end="", flush=True)

    def signal(self, number: int) -> None:
        """Sends a signal to all running processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def log(line: str) -> None:
    """Prints a line of the launcher, between those of the processes."""
    print(f"local: {line}", flush=True)


def describe_exit(code: int) -> str:
    """Describes a return code, for example "was ended by SIGKILL"."""
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def free_port() -> int:
    """Finds a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
