"""What benchmarks share: programs take turns, each in a process of its own, and are measured in their steady state."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

SECONDS = 3.0  # at least this long is measured


def steady_rate(epoch, num_rows):
    """Rows per second of `epoch(number)` after the first."""
    epoch(0)
    started, epochs = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        epochs += 1
        epoch(epochs)
    return epochs * num_rows / (time.perf_counter() - started)


def in_turns(description, programs, workloads):
    """Yields (workload, {program: median rows/s}); where this is the process of one program, runs that instead.

    Args:
      programs: name -> function of a workload's sizes that gives rows/s.
      workloads: name -> sizes.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=programs)
    parser.add_argument("--workload", choices=workloads)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.program:
        print(json.dumps(programs[arguments.program](*workloads[arguments.workload])))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}, {arguments.rounds} rounds, {time.strftime('%Y-%m-%d')}", flush=True)
    for workload in [arguments.workload] if arguments.workload else workloads:
        rates = {program: [] for program in programs}
        for _ in range(arguments.rounds):
            for program in programs:
                command = [sys.executable, sys.argv[0], f"--program={program}", f"--workload={workload}"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
                if done.returncode:
                    sys.exit(f"{program}: {done.stderr[-2000:]}")
                rates[program].append(json.loads(done.stdout.splitlines()[-1]))
        yield workload, {program: statistics.median(values) for program, values in rates.items()}
