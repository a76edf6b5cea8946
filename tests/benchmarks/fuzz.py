"""Tries thousands of malformed inputs: each must be read correctly, or refused in one line, in time.

    python tests/benchmarks/fuzz.py [--inputs=10000] [--seed=0] [--minutes=0] [--only=tables] [--first=0]

The inputs are tables, other files, command lines and flagfiles, model folders, files of a run, connections to the
rendezvous port, and generalised linear models, some without an optimum; the modules are in tests/inputs. An input
depends only on the seed and its number. An independent reader (pandas, NumPy, json or csv) decides what is "correct".
Any other outcome, and an input that takes more than 10 s or 6 GiB, is printed with the command that reproduces it, and
the exit code is 1. At the end a few whole commands run on damaged inputs, for at most a minute each.
"""

import argparse
import collections
import importlib
import json
import logging
import pathlib
import random
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

TESTS = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

# The share of each kind of input.
KINDS = {"tables": 36, "files": 4, "flags": 20, "models": 20, "histories": 15, "port": 5, "glms": 15}
LIMIT_SECONDS = 10.0
MOST_BYTES = 6 << 30


def kind_of(seed, number):
    """Returns the kind of an input, which is the module that makes it."""
    return random.Random(f"{seed} {number}").choices([*KINDS], [*KINDS.values()])[0]


def run(seed, number, kind=None):
    """Makes an input, passes it to dpreg and checks the outcome; returns (kind, "correct" or "refused")."""
    import numpy as np

    kind = kind or kind_of(seed, number)
    module = importlib.import_module(f"inputs.{kind}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pandas and NumPy warn about unusual values.
        return kind, module.run(np.random.default_rng([seed, number]), pathlib.Path(folder))


def work(seed, first, end, only):
    """Runs inputs in this process and prints a line of JSON for each."""
    from dpreg.distributed import devices

    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    logging.getLogger().addHandler(logging.NullHandler())  # Warnings are counted and not shown.
    devices.start("cpu", 3)
    for kind in KINDS:
        importlib.import_module(f"inputs.{kind}")  # The import takes seconds, which must not count for the first input.
    for number in range(first, end):
        if only and kind_of(seed, number) != only:
            continue
        print(json.dumps({"starts": number}), flush=True)
        began, trace = time.monotonic(), ""
        try:
            _, ended = run(seed, number)
        except Exception as error:
            ended, trace = f"{type(error).__name__}: {error}"[:400], traceback.format_exc()
        print(json.dumps({"ended": ended, "seconds": time.monotonic() - began, "trace": trace}), flush=True)


class Worker:
    """A process that runs inputs; it is killed if an input takes too long."""

    def __init__(self, seed, first, end, only):
        command = [sys.executable, __file__, f"--seed={seed}", f"--work={first}:{end}"]
        command += [f"--only={only}"] if only else []
        # Processes at the rendezvous port write to stderr while they wait.
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def read(self, seconds):
        """Returns the next line, or None after the timeout or the end of the process."""
        line = self._process.stdout.readline() if self._selector.select(seconds) else b""
        return json.loads(line) if line else None

    def end(self):
        self._process.kill()
        return self._process.wait()


def results(seed, first, end, only):
    """Yields (number, outcome, seconds, traceback) of each input, even if the process that runs it dies."""
    while first < end:
        worker, number = Worker(seed, first, end, only), None
        while (line := worker.read(60 if number is None else 2 * LIMIT_SECONDS)) is not None:
            if "starts" in line:
                number = line["starts"]
            else:
                yield number, line["ended"], line["seconds"], line["trace"]
                first, number = number + 1, -1
        code = worker.end()
        if number in (None, -1):  # No input of that kind is left.
            return
        yield number, f"no answer: the process was killed, or ended with {code}", 2 * LIMIT_SECONDS, ""
        first = number + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="stop after so many minutes; 0 for no limit")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--only", choices=[*KINDS])
    parser.add_argument("--commands", type=int, default=10, help="how many commands are started at the end")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.work:
        first, end = map(int, parsed.work.split(":"))
        return work(parsed.seed, first, end, parsed.only)
    counts, failed, began, slowest = collections.Counter(), 0, time.monotonic(), (0.0, 0, "")
    for number, ended, seconds, trace in results(parsed.seed, parsed.first, parsed.first + parsed.inputs, parsed.only):
        kind = kind_of(parsed.seed, number)
        slowest = max(slowest, (seconds, number, kind))
        well = ended in ("correct", "refused", "read, not compared") and seconds < LIMIT_SECONDS
        counts[kind, ended if well else "WRONG"] += 1
        if not well:
            failed += 1
            print(f"WRONG {kind}: {ended} ({seconds:.1f} s)\n{trace}", flush=True)
            print(f"  python tests/benchmarks/fuzz.py --seed={parsed.seed} --first={number} --inputs=1", flush=True)
        if parsed.minutes and time.monotonic() - began > 60 * parsed.minutes:
            break
    for number in range(0 if parsed.only else parsed.commands):
        try:
            counts["commands", run(parsed.seed, number, "commands")[1]] += 1
        except Exception as error:
            failed += 1
            print(f"WRONG command {number} of --seed={parsed.seed}: {type(error).__name__}: {error}"[:2000], flush=True)
    for (kind, ended), count in sorted(counts.items()):
        print(f"{kind:<10} {ended:<20} {count:>6,}")
    print(f"{counts.total():,} inputs in {time.monotonic() - began:.0f} s, {failed} wrong; slowest: {slowest}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
