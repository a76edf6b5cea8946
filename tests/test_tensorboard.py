"""--tensorboard writes event files that a real TensorBoard serves."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import forked
import numpy as np
import pytest
from cluster import ROOT

from dpreg.outputs.tensorboard import TensorBoardWriter
from dpreg.train.callback import Progress

RUN = ("--platform=cpu", "--num_devices=2", "--nooptimality")


def run(workdir, *flags):
    return forked.run("-m", "dpreg.main", *RUN, f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Yields the workdir of a run that was resumed once, and a function that queries TensorBoard."""
    folder = tmp_path_factory.mktemp("board")
    for flags in ("--max_epochs=1",), ("--max_epochs=3",):
        done = run(folder / "run", "--tensorboard", *flags)
        assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", f"--port={port}", "--load_fast=false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def answer(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        url, headers = f"http://127.0.0.1:{port}/data/{path}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    try:
        for _ in range(240):
            try:
                if answer("plugin/scalars/tags"):
                    break
            except OSError:
                assert server.poll() is None, server.stderr.read()
            time.sleep(0.5)  # TensorBoard's server gives no signal when it is ready.
        yield folder / "run", answer
    finally:
        server.kill()
        server.communicate()


def test_the_scalars_agree_with_the_metrics(served):
    workdir, answer = served
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 24
    (name,) = answer("plugin/scalars/tags")
    for tag in ("train_loss", "val_loss", "gradient_norm", "learning_rate", "rmse", "epoch"):
        points = answer(f"plugin/scalars/scalars?run={name}&tag={tag}")
        expected = [(record["step"], record[tag]) for record in records if tag in record]
        assert [step for _, step, _ in points] == [step for step, _ in expected]
        np.testing.assert_allclose([value for *_, value in points], [value for _, value in expected], rtol=1e-6)


def test_the_hyperparameters_are_the_flags(served):
    _, answer = served
    states = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"]
    asked = {"colParams": [], "sliceSize": 9, "experimentName": "", "allowedStatuses": states}
    (group,) = answer("plugin/hparams/session_groups", asked)["sessionGroups"]
    found = group["hparams"]
    assert (group["name"], found["lr"], found["batch_size"]) == ("run", 0.03, 32)
    assert (found["model"], found["intercept"]) == ("linear", True)
    assert "checkpoint_every_seconds" not in found  # It does not affect the result.


def test_a_resumed_run_discards_events_written_after_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, end in ((0, 6), (3, 5)):
        with TensorBoardWriter(tmp_path, begin, {"lr": 0.1}) as writer:
            for step in range(begin + 1, end + 1):
                writer.on_log(Progress(step, 6, step / 6, 1, train_loss=float(10 * begin + step)))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train_loss")] == [
        *((step, float(step)) for step in (1, 2, 3)),
        *((step, 30.0 + step) for step in (4, 5)),
    ]


def test_without_tensorboard_installed_the_flag_is_refused_at_once(tmp_path):
    program = "import sys; sys.modules['tensorboard'] = None; from dpreg.main import main; main()"
    command = [sys.executable, "-c", program, *RUN, "--tensorboard", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "pip install tensorboard" in done.stderr
    assert not (tmp_path / "w").exists()
