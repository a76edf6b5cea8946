"""Shared code of the benchmarks: programs run in turns, each in its own process, and are timed in steady state."""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time

SECONDS = 3.0  # The shortest time to measure.
RANK = "DPREG_BENCHMARK_OF_TWO"  # Environment variable with the rank of one of two processes.


def steady_rate(epoch, num_rows, epochs=None):
    """Returns rows per second of `epoch(number)` after the first two epochs, over SECONDS or over `epochs`.

    Processes that communicate must run the same number of epochs.
    """
    epoch(0)
    epoch(1)
    started, done = time.perf_counter(), 0
    while done < epochs if epochs else time.perf_counter() - started < SECONDS:
        done += 1
        epoch(done + 1)
    return done * num_rows / (time.perf_counter() - started)


def in_two_processes(program):
    """Returns the program run in two processes on this machine, one core each; its result is that of the first.

    Each process calls `program(*sizes, rank)` with its rank.
    """

    def both(*sizes):
        if RANK in os.environ:
            return program(*sizes, rank=int(os.environ[RANK]))
        processes = [
            subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {RANK: rank}, stdout=subprocess.PIPE)
            for rank in "01"
        ]
        for process, core in zip(processes, sorted(os.sched_getaffinity(0)), strict=False):
            os.sched_setaffinity(process.pid, {core})
        found = [process.communicate(timeout=300)[0] for process in processes]
        if any(process.returncode for process in processes):
            sys.exit("one of two processes failed")
        return json.loads(found[0].splitlines()[-1])

    return both


def on_one_core(program):
    """Returns the program run on one core."""

    def alone(*sizes):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        return program(*sizes)

    return alone


def rows(num_rows, num_inputs):
    """Returns X [n, d] and y [n, 1], float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), np.float32)
    return x, x @ rng.standard_normal((num_inputs, 1), np.float32) + np.float32(4.2)


def tf_data(x, y, batch):
    """Returns a function of the epoch that yields its batches, as in tf.data's guide."""
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x)).batch(batch, drop_remainder=True)
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    return lambda number: dataset.as_numpy_iterator()


def grain(x, y, batch):
    """Returns a function of the epoch that yields its batches, as in Grain's documentation."""
    import grain as package

    class Source:
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            return x[index], y[index]

    def batches(number):
        shuffled = package.MapDataset.source(Source()).shuffle(seed=number)
        return package.MapDataset.to_iter_dataset(shuffled.batch(batch, drop_remainder=True))

    return batches


@contextlib.contextmanager
def awake():
    """Keeps all cores from halting, by a process of lowest priority on each.

    In a virtual machine an idle core halts, and takes some 100 us to wake up for a thread.
    """
    yielding = "import os\nos.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: os.sched_yield()"
    processes = [subprocess.Popen([sys.executable, "-c", yielding]) for _ in os.sched_getaffinity(0)]
    try:
        for process, core in zip(processes, sorted(os.sched_getaffinity(0)), strict=True):
            os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_turns(description, programs, workloads, needs, some=False):
    """Yields (workload, {program: rows/s of each round}); in the process of a single program it runs that program.

    Args:
      programs: name -> function of a workload's sizes that returns rows/s.
      workloads: name -> sizes.
      needs: program -> the package it needs; without that package the program is left out.
      some: whether `--only` may leave out others.
    """
    absent = {program: package for program, package in needs.items() if not importlib.util.find_spec(package)}
    programs = {name: program for name, program in programs.items() if name not in absent}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=programs)
    parser.add_argument("--workload", choices=workloads)
    parser.add_argument("--rounds", type=int, default=3)
    if some:
        parser.add_argument(
            "--only", action="append", choices=programs, help="run only this program; repeat the flag for others"
        )
    parser.add_argument("--awake", action="store_true", help="keep idle cores from halting, for all programs alike")
    arguments = parser.parse_args()
    if arguments.program:
        print(json.dumps(programs[arguments.program](*workloads[arguments.workload])), flush=True)
        return
    programs = {name: programs[name] for name in (some and arguments.only) or programs}
    machine = f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    kept = ", cores kept awake" if arguments.awake else ""
    print(f"{machine}{kept}, {arguments.rounds} rounds, {time.strftime('%Y-%m-%d')}", flush=True)
    for program, package in absent.items():
        print(f"without {program}: {package} is not installed")
    for workload in [arguments.workload] if arguments.workload else workloads:
        rates = {program: [] for program in programs}
        for _ in range(arguments.rounds):
            for program in programs:
                command = [sys.executable, sys.argv[0], f"--program={program}", f"--workload={workload}"]
                with awake() if arguments.awake else contextlib.nullcontext():
                    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
                if done.returncode:
                    sys.exit(f"{program}: {done.stderr[-2000:]}")
                rates[program].append(json.loads(done.stdout.splitlines()[-1]))
        yield workload, rates


def median_ratio(above, below):
    """Returns the median over the rounds of the ratio of two programs in the same round, close in time."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as text:
            return next(line.partition(":")[2].strip() for line in text if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
