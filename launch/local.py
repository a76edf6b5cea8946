"""Several processes of one run on this machine.

    python launch/local.py --processes=2 -- --flagfile=configs/cpu.cfg --num_devices=4 --workdir=runs/two

What follows `--` goes to each `python -m dpreg.main`; this only says who each of them is. When one dies the
others are ended at once; with --max_restarts all are then started again, on a new port, and go on from the
newest checkpoint. The exit code is the run's: 0 to 3 as of one process, 75 preempted, 76 for a process lost, 130 for
Ctrl-C: the run saves, and the same command goes on. A second Ctrl-C ends all at once.

On CPU each process simulates --num_devices of its own; of GPUs each gets one, by its number.
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
FINAL = (0, 1, 2, 3, INTERRUPTED)  # done, a fault, wrong input, diverged: starting again would change nothing
GRACE_SECONDS = 15.0  # for the others to end by themselves once one has


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the processes to the end, restarting them as asked; gives the exit code."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many to start, 1 or more")
    parser.add_argument("--max_restarts", type=int, default=0, help="how often to start all again; default: 0")
    parser.add_argument("flags", nargs="*", help="after --: flags of dpreg.main, with --workdir")
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1:
        parser.error(f"--processes={parsed.processes}: use 1 or more")
    if parsed.max_restarts < 0:
        parser.error(f"--max_restarts={parsed.max_restarts}: use 0 or more")

    told_to_stop = threading.Event()
    interrupts = 0
    run: Run | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        del frame
        told_to_stop.set()
        interrupts += number == signal.SIGINT
        if run is not None:
            # Not SIGINT: a terminal has sent that to the processes as well, and a second one ends them at once.
            run.signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    code = PREEMPTED  # of a run that was stopped before its first process
    for attempt in range(parsed.max_restarts + 1):
        if attempt:
            delay = min(2.0 ** (attempt - 1), 60.0)
            say(f"starting again in {delay:.0f} s ({attempt} of {parsed.max_restarts})")
            told_to_stop.wait(delay)
        if told_to_stop.is_set():
            break
        again = ["--resume=auto"] if attempt else []  # whatever the first attempt was told
        run = Run(parsed.processes, [*parsed.flags, *again])
        if told_to_stop.is_set():
            run.signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)
        code = run.wait()
        if code in FINAL or told_to_stop.is_set():
            break
    return INTERRUPTED if interrupts and code in (PREEMPTED, LOST) else code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as dpreg has it, where argparse adds its usage."""
        self.exit(2, f"local: {message}; see --help\n")


class Run:
    """One attempt: the processes and their output."""

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
        """Waits for the end of all, ending the others soon after the first that fails; the run's exit code."""
        ended: dict[int, int] = {}  # process -> exit code, in the order in which they ended
        deadline = float("inf")
        while len(ended) < len(self._processes):
            for number, process in enumerate(self._processes):
                if number not in ended and process.poll() is not None:
                    ended[number] = process.returncode
                    agreed = process.returncode in (PREEMPTED, *FINAL)  # then the others end alike by themselves
                    if not agreed and time.monotonic() < deadline:
                        say(f"process {number} {how_it_ended(process.returncode)}; ending the others")
                    deadline = min(deadline, time.monotonic() + (GRACE_SECONDS if agreed else 0))
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
        """Sends a signal to all that still run."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)


def say(line: str) -> None:
    """A line of the launcher's own, between those of the processes."""
    print(f"local: {line}", flush=True)


def how_it_ended(code: int) -> str:
    """Such as "was ended by SIGKILL"."""
    return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
