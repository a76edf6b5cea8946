"""Helpers that run dpreg in several processes on this machine, for tests and tests/benchmarks/faults.py."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import time

import forked
import psutil

from dpreg.outputs.metrics import read_records

ROOT = pathlib.Path(__file__).parent.parent
# A short run of 600 steps: 20 epochs of 30 steps.
WORK = ("--platform=cpu", "--reduction=ordered", "--num_train=960", "--batch_size=32", "--max_epochs=20", "--lr=0.01")


def start(processes, workdir, *flags, devices=None, restarts=0, work=WORK):
    """Starts launch/local.py in the background, with stdout and stderr in one pipe."""
    command = [sys.executable, "launch/local.py", f"--processes={processes}", f"--max_restarts={restarts}"]
    return subprocess.Popen(
        [*command, "--", *work, f"--num_devices={devices or 8 // processes}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(launcher, timeout=240):
    """Waits for the launcher to end, kills what is left of it and returns (exit code, output)."""
    try:
        output = launcher.communicate(timeout=timeout)[0]
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # A zombie raises this as well.
                if "dpreg.main" in " ".join(process.cmdline()):
                    process.kill()
    return launcher.returncode, output


def alone(workdir, *flags, devices=8, work=WORK):
    """Runs the same work in one process."""
    done = forked.run("-m", "dpreg.main", *work, f"--num_devices={devices}", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    return done


def several(processes, workdir, *flags, work=WORK):
    """Runs the same work in several processes without a launcher, with 8 devices in total."""
    where = (f"--num_devices={8 // processes}", f"--workdir={workdir}", free_address(), f"--num_processes={processes}")
    own = ([*work, *flags, *where, f"--process_id={number}"] for number in range(processes))
    done = run_processes(*((("-m", "dpreg.main"), flags, ROOT) for flags in own), timeout=240)
    for code, lines, *_ in done:
        assert code == 0, lines
    return done


def outcome(workdir):
    """Returns all results of a run that must not depend on devices and processes."""
    curve = [
        {k: v for k, v in r.items() if k != "rows_per_second"} for r in read_records(workdir / "metrics.jsonl").whole
    ]
    summary = json.loads((workdir / "summary.json").read_text())
    return summary["params_sha256"], curve, summary["train_loss"], summary["val_loss"]


def workers(launcher):
    """Returns the processes of the run, sorted by process id."""
    try:
        children = psutil.Process(launcher.pid).children()
        return sorted(children, key=lambda p: int(p.cmdline()[-1].removeprefix("--process_id=")))
    except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError, ValueError):
        return []


def wait_until(condition, launcher, seconds=120):
    """Waits until the condition holds or the run has ended, and returns the last value of the condition."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def complete(workdir):
    """Returns the steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


def free_address():
    """Returns a --coordinator_address flag with a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"--coordinator_address=127.0.0.1:{listener.getsockname()[1]}"


def has_logged_steps(workdir):
    """Returns whether metrics.jsonl has the record of at least one step."""
    return bool(read_records(workdir / "metrics.jsonl").whole)


def run_processes(*starts, timeout=100, prefix=()):
    """Runs processes without a launcher, each given as (command after python, flags, folder).

    Returns:
      (exit code, lines of stderr, stdout, seconds) of each process.
    """
    running, began, pipes = [], time.monotonic(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for command, flags, folder in starts:
        if prefix:
            running.append(subprocess.Popen([*prefix, sys.executable, *command, *flags], cwd=folder, **pipes))
        else:
            running.append(forked.start(*command, *flags, cwd=folder))
    try:
        results = []
        for process in running:
            out, err = process.communicate(timeout=timeout)
            lines = [line for line in err.splitlines() if "Gloo" not in line]
            results.append((process.returncode, lines, out, time.monotonic() - began))
        return results
    finally:
        end(running)


def end(running):
    """Kills the processes that still run and closes their pipes."""
    for process in running:
        process.kill()
        process.communicate()
