"""Several processes: the same bits as one, and a run that outlives any of them."""

import json
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from dpreg.observers.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
# 600 steps of real work: 20 epochs of 30 steps
WORK = ("--platform=cpu", "--reduction=ordered", "--num_train=960", "--batch_size=32", "--max_epochs=20", "--lr=0.01")


def start(processes, workdir, *flags, restarts=0):
    command = [sys.executable, "launch/local.py", f"--processes={processes}", f"--max_restarts={restarts}"]
    return subprocess.Popen(
        [*command, "--", *WORK, f"--num_devices={8 // processes}", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(launcher, timeout=240):
    try:
        said = launcher.communicate(timeout=timeout)[0]
    finally:
        for process in psutil.Process().children(recursive=True):
            if "dpreg.main" in " ".join(process.cmdline()):
                process.kill()
    return launcher.returncode, said


def outcome(workdir):
    curve = [{k: v for k, v in r.items() if k != "rows_per_second"} for r in read_metrics(workdir / "metrics.jsonl")]
    summary = json.loads((workdir / "summary.json").read_text())
    return summary["params_sha256"], curve, summary["train_loss"], summary["val_loss"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "dpreg.main", *WORK, "--num_devices=8", f"--workdir={workdir}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    return outcome(workdir)


@pytest.mark.parametrize(
    ("processes", "flags"), [(2, ()), (4, ()), (2, ("--backend=pmap",)), (2, ("--placement=host",))]
)
def test_processes_give_the_bits_of_one(tmp_path, alone, processes, flags):
    code, said = ended(start(processes, tmp_path, *flags))
    assert code == 0, said
    assert f"8 cpu devices of {processes} processes" in said
    assert outcome(tmp_path) == alone
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["process_count"], summary["device_count"]) == (processes, 8)


def workers(launcher):
    return sorted(psutil.Process(launcher.pid).children(), key=lambda p: p.cmdline()[-1])


def wait_until(condition, launcher):
    deadline = time.monotonic() + 120
    while not condition() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def complete(workdir):
    folder = workdir / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


@pytest.mark.parametrize(("victim", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_process_costs_nothing_but_time(tmp_path, alone, victim, how):
    launcher = start(2, tmp_path, "--checkpoint_every_steps=50", restarts=1)
    wait_until(lambda: complete(tmp_path), launcher)
    time.sleep(random.Random(victim).random())
    workers(launcher)[victim].send_signal(how)
    code, said = ended(launcher)
    assert code == 0, said
    assert "starting again" in said
    assert "going on from step" in said
    assert outcome(tmp_path) == alone


def test_sigterm_to_one_process_saves_in_all_and_exits_75(tmp_path):
    longer = "--max_epochs=400"  # all hear of the signal within seconds
    launcher = start(2, tmp_path / "w", longer, "--checkpoint_every_steps=50")
    wait_until(lambda: complete(tmp_path / "w"), launcher)
    workers(launcher)[1].send_signal(signal.SIGTERM)
    code, said = ended(launcher)
    assert code == 75, said
    assert said.count("the same command goes on from there") == 2
    for name in ("w", "whole"):
        command = [sys.executable, "-m", "dpreg.main", *WORK, longer, "--num_devices=1", f"--workdir={tmp_path / name}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert ("going on from step" in done.stderr) == (name == "w"), done.stderr
    assert outcome(tmp_path / "w") == outcome(tmp_path / "whole")


def pair(first, second):
    """Two processes of one run, started by hand: the exit code and stderr of each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"--coordinator_address=127.0.0.1:{listener.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dpreg.main", "--platform=cpu", "--num_devices=1", address, *flags],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags in (("--process_id=0", *first), ("--process_id=1", *second))
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in running]
        return [(process.returncode, text) for process, text in zip(running, said, strict=True)]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (["--lr=0.1"], [], "--lr is 0.1 in process 0 and 0.03 in process 1"),
        (["--num_shards=1", "--batch_size=4"], ["--num_shards=1", "--batch_size=4"], "in each of 2 processes"),
        (["--batch_size=30"], ["--batch_size=30"], "use --batch_size=24 or 32"),
        ([], ["--workdir={}/other"], "see different folders"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line_in_each(tmp_path, first, second, said):
    (tmp_path / "other").mkdir()
    common = ("--num_processes=2", f"--workdir={tmp_path / 'w'}")
    for code, stderr in pair((*common, *first), (*common, *(flag.format(tmp_path) for flag in second))):
        lines = [line for line in stderr.splitlines() if "Gloo" not in line]
        assert (code, len(lines)) == (2, 1), stderr
        assert said in lines[0]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator_address=node:1234"], "go together: give all three"),
        (["--coordinator_address=node:1234", "--num_processes=2", "--process_id=2"], "use 0 to 1"),
        (["--coordinator_address=node", "--num_processes=2", "--process_id=0"], "give the host and the port"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=0", "--workdir="], "give --workdir"),
    ],
)
def test_bad_process_flags_are_one_line(flags, said):
    done = subprocess.run([sys.executable, "-m", "dpreg.main", *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert said in done.stderr


def test_a_port_that_is_taken_is_noticed():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"--coordinator_address=127.0.0.1:{listener.getsockname()[1]}"
        flags = [address, "--num_processes=2", "--process_id=0", "--workdir=/nowhere"]
        done = subprocess.run([sys.executable, "-m", "dpreg.main", *flags], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "serves there" in done.stderr
