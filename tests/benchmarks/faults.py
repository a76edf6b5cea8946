"""Kills processes of a run: every victim, signal and moment, and measures how long the recovery takes.

    python tests/benchmarks/faults.py [--rounds 1] [--only saving]

Each case trains 600 steps in two processes of `launch/local.py`, sends a signal to one process, and compares the
restarted run with an undisturbed run of one process: the bits of the parameters, and every line of metrics.jsonl.
It prints the seconds from the signal to the end of all processes, and to the first step after it.
"""

import argparse
import itertools
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import psutil
from cluster import alone, complete, outcome, start, wait_until, workers

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
# Evaluation takes most of the time, so that a random moment is likely during it.
EVALUATING = ("--num_val=150000",)


def saving(workdir):
    folder = workdir / "checkpoints"
    return complete(workdir) and any("tmp" in path.name for path in folder.iterdir())


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# When to send the signal: a condition to wait for, the longest random delay after it in seconds, and flags.
MOMENTS = {
    "joining": (lambda workdir: True, 4.0, ()),
    "compiling": (lambda workdir: workdir.exists(), 2.5, ()),
    "stepping": (lambda workdir: len(complete(workdir)) > 0, 1.0, ()),
    "evaluating": (lambda workdir: len(complete(workdir)) > 0, 2.0, EVALUATING),
    "saving": (saving, 0.1, ()),
    "exiting": (lambda workdir: 600 in complete(workdir), 0.5, ()),
}


def case(victim, how, moment, expected, random_delay):
    """Runs one case; returns (seconds to the end of all, seconds to the next step, restarts), or the error."""
    condition, delay, flags = MOMENTS[moment]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "w"
        launcher = start(2, workdir, "--checkpoint_every_steps=20", *flags, restarts=3)
        lines = []

        def listen():
            lines.extend((time.monotonic(), line) for line in launcher.stdout)

        listener = threading.Thread(target=listen)
        listener.start()
        try:
            wait_until(lambda: len(workers(launcher)) == 2, launcher)
            if not wait_until(lambda: condition(workdir), launcher):
                return "the moment did not come"
            time.sleep(delay * random_delay)
            hit = workers(launcher)
            if len(hit) < 2:
                return "the run was over"
            sent = time.monotonic()
            hit[victim].send_signal(how)
            wait_until(lambda: not any(map(is_alive, hit)), launcher)
            gone = time.monotonic() - sent
            code = launcher.wait(240)
        finally:
            launcher.kill()
            listener.join()
        again = [at for at, line in lines if "] epoch" in line and at > sent + gone]
        restarts = sum("starting again" in line for _, line in lines)
        if code or outcome(workdir) != expected[flags]:
            return f"WRONG: exit code {code}\n" + "".join(line for _, line in lines)
        return gone, again[0] - sent if again and restarts else float("nan"), restarts


def kill_one(launcher, workdir, delays, while_it_saves):
    """Kills a random process some time after the next checkpoint, and waits until all have ended."""
    newest = max(complete(workdir), default=0)
    wait_until(lambda: max(complete(workdir), default=0) > newest, launcher)
    if while_it_saves:
        wait_until(lambda: saving(workdir), launcher)
    else:
        time.sleep(0.5 * delays.random())
    hit = workers(launcher)
    delays.choice(hit).send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, hit)), launcher)


def five_kills(delays, expected):
    """Runs one run whose processes are killed five times."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "w"
        launcher = start(2, workdir, "--checkpoint_every_steps=20", restarts=10)
        lines = []
        listener = threading.Thread(target=lambda: lines.extend(launcher.stdout))
        listener.start()
        try:
            for number in range(5):
                kill_one(launcher, workdir, delays, while_it_saves=number == 2)
            code = launcher.wait(240)
        finally:
            launcher.kill()
            listener.join()
        restarts = sum("starting again" in line for line in lines)
        if code or outcome(workdir) != expected[()] or restarts != 5:
            return f"WRONG: exit code {code}, {restarts} restarts\n" + "".join(lines)
        return "the same bits and the same curve"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(MOMENTS))
    parsed = parser.parse_args()
    delays, failures, expected = random.Random(parsed.seed), 0, {}
    for flags in ((), EVALUATING):
        with tempfile.TemporaryDirectory() as folder:
            alone(pathlib.Path(folder), *flags)
            expected[flags] = outcome(pathlib.Path(folder))
    print(f"{'moment':<12}{'process':<9}{'signal':<9}{'all ended':>10}{'resumed':>10}{'restarts':>10}", flush=True)
    moments = [parsed.only] if parsed.only else list(MOMENTS)
    for _, moment, victim, how in itertools.product(range(parsed.rounds), moments, (0, 1), SIGNALS):
        result = case(victim, how, moment, expected, delays.random())
        text = result if isinstance(result, str) else "{:>9.1f}s{:>9.1f}s{:>10}".format(*result)
        failures += isinstance(result, str) and result.startswith("WRONG")
        print(f"{moment:<12}{victim:<9}{how.name:<9}{text}", flush=True)
    if not parsed.only:
        result = five_kills(delays, expected)
        failures += result.startswith("WRONG")
        print(f"one run, a random process killed at five random moments, once while it saves: {result}")
    print(f"{failures} cases failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
