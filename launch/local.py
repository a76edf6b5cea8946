"""Several processes of one run on this machine.

    python launch/local.py --processes=2 -- --flagfile=configs/cpu.cfg --num_devices=4 --workdir=runs/two

What follows `--` goes to each `python -m dpreg.main`; this only says who each of them is. When one dies the
others are ended at once; with --max_restarts all are then started again, on a new port, and go on from the
newest checkpoint. The exit code is the run's: 0, 2 or 3 as of one process, 75 preempted, 76 for a process lost.
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

FINAL = (0, 2, 3)  # done, wrong input, diverged: starting again would change nothing
PREEMPTED, LOST = 75, 76
GRACE_SECONDS = 15.0  # for the others to end by themselves once one has


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the processes to the end, restarting them as asked; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="how many to start")
    parser.add_argument("--max_restarts", type=int, default=0, help="how often to start all again")
    parser.add_argument("flags", nargs="*", help="after --: flags of dpreg.main, with --workdir")
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1:
        parser.error("--processes: use 1 or more")

    for attempt in range(parsed.max_restarts + 1):
        if attempt:
            delay = min(2.0 ** (attempt - 1), 60.0)
            print(f"local: starting again in {delay:.0f} s ({attempt} of {parsed.max_restarts})", flush=True)
            time.sleep(delay)
        run = Run(parsed.processes, parsed.flags)
        code = run.wait()
        if code in FINAL or run.told_to_stop:
            break
    return code


class Run:
    """One attempt: the processes, their output, and the signals passed on to them."""

    def __init__(self, processes: int, flags: Sequence[str]):
        self.told_to_stop = False
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
            )
            for i in range(processes)
        ]
        self._readers = [threading.Thread(target=self._show, args=(i,)) for i in range(processes)]
        for reader in self._readers:
            reader.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def wait(self) -> int:
        """Waits for the end of all, ending the others soon after the first that fails; the run's exit code."""
        deadline = float("inf")
        first_failed: int | None = None
        while any(process.poll() is None for process in self._processes):
            codes = [process.returncode for process in self._processes if process.returncode is not None]
            if codes and deadline == float("inf"):
                failed = [code for code in codes if code]
                first_failed = failed[0] if failed else None
                by_themselves = first_failed in (None, PREEMPTED, *FINAL)
                deadline = time.monotonic() + (GRACE_SECONDS if by_themselves else 0)
            if time.monotonic() >= deadline:
                for process in self._processes:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            time.sleep(0.02)
        for reader in self._readers:
            reader.join()
        failed = [process.returncode for process in self._processes if process.returncode]
        code = first_failed or (failed[0] if failed else 0)
        return code if code in (*FINAL, PREEMPTED) else LOST

    def _show(self, number: int) -> None:
        output = self._processes[number].stdout
        assert output is not None
        for line in output:
            print(f"[{number}] {line}", end="", flush=True)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.told_to_stop = True
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
