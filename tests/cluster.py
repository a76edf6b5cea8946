"""Runs of several processes on this machine, as a user starts them: for tests and tests/benchmarks/faults.py."""

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
# 600 steps of real work: 20 epochs of 30 steps
WORK = ("--platform=cpu", "--reduction=ordered", "--num_train=960", "--batch_size=32", "--max_epochs=20", "--lr=0.01")


def start(processes, workdir, *flags, devices=None, restarts=0, work=WORK):
    """launch/local.py in the background; its output is in one pipe."""
    command = [sys.executable, "launch/local.py", f"--processes={processes}", f"--max_restarts={restarts}"]
    return subprocess.Popen(
        [*command, "--", *work, f"--num_devices={devices or 8 // processes}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(launcher, timeout=240):
    """Its exit code and what it said. No process of it outlives this."""
    try:
        said = launcher.communicate(timeout=timeout)[0]
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie is none
                if "dpreg.main" in " ".join(process.cmdline()):
                    process.kill()
    return launcher.returncode, said


def alone(workdir, *flags, devices=8, work=WORK):
    """The same work in one process."""
    done = forked.run("-m", "dpreg.main", *work, f"--num_devices={devices}", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    return done


def several(processes, workdir, *flags, work=WORK):
    """The same work in some processes started by hand, with 8 devices in all."""
    where = (f"--num_devices={8 // processes}", f"--workdir={workdir}", free_address(), f"--num_processes={processes}")
    own = ([*work, *flags, *where, f"--process_id={number}"] for number in range(processes))
    done = together(*((("-m", "dpreg.main"), flags, ROOT) for flags in own), timeout=240)
    for code, lines, *_ in done:
        assert code == 0, lines
    return done


def outcome(workdir):
    """All of a run that may not depend on who ran it."""
    curve = [
        {k: v for k, v in r.items() if k != "rows_per_second"} for r in read_records(workdir / "metrics.jsonl").whole
    ]
    summary = json.loads((workdir / "summary.json").read_text())
    return summary["params_sha256"], curve, summary["train_loss"], summary["val_loss"]


def workers(launcher):
    """The processes of the run, by their ids."""
    try:
        children = psutil.Process(launcher.pid).children()
        return sorted(children, key=lambda p: int(p.cmdline()[-1].removeprefix("--process_id=")))
    except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError, ValueError):
        return []


def wait_until(condition, launcher, seconds=120):
    """Waits until the condition holds, or the run has ended; whether it holds."""
    deadline = time.monotonic() + seconds
    while not (held := condition()) and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def complete(workdir):
    """The steps of the checkpoints that are whole."""
    folder = workdir / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


def free_address():
    """A flag with an address that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"--coordinator_address=127.0.0.1:{listener.getsockname()[1]}"


def stepping(workdir):
    """Whether steps have been told of."""
    return bool(read_records(workdir / "metrics.jsonl").whole)


def together(*starts, timeout=100, prefix=()):
    """Processes started by hand, each by its (command after python, flags, folder).

    Returns:
      Of each its exit code, lines of stderr, stdout and seconds.
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
    """Kills what still runs, and closes its pipes."""
    for process in running:
        process.kill()
        process.communicate()
