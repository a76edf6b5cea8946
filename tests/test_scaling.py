"""Scaling with the number of devices: exact tests of the arithmetic, and of the output of runs."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from cluster import ROOT, end, wait_until

from dpreg.config import Config
from dpreg.distributed import devices
from dpreg.errors import InputError
from dpreg.planning.exchange import Exchange
from dpreg.scaling import Measurement, Runner, extrapolate

SHOWN = pathlib.Path(ROOT) / "docs" / "6-scale.md"  # Its command is run here.


def test_latency_and_bandwidth_are_recovered_from_times():
    seconds = {size: 2e-5 + size / 3e9 for size in (24, 4096, 65_536, 1 << 20, 4 << 20)}
    found = Exchange.fit(4, seconds)
    assert (found.latency, found.bandwidth) == (pytest.approx(2e-5), pytest.approx(3e9))
    assert found.error < 1e-9
    assert found.predict(3e6, 4) == pytest.approx(2e-5 + 1e-3)
    assert found.predict(3e6, 16) == pytest.approx(4e-5 + 1e-3 * (15 / 16) / (3 / 4))
    assert found.predict(3e6, 1) == 0
    off = Exchange.fit(4, seconds | {24: 4e-5})
    assert 0.1 < off.error < 1
    assert math.isinf(Exchange.fit(2, dict.fromkeys(seconds, 1e-5)).bandwidth)
    # Times measured on a busy machine: the fitted line has a negative latency, so the best line passes through 0.
    noisy = {24: 1e-3, 65_536: 1e-5, 1 << 20: 5e-4}
    through_0 = Exchange.fit(2, noisy)
    size, measured = np.array(list(noisy)), np.array(list(noisy.values()))
    slope = (size / measured).sum() / ((size / measured) ** 2).sum()
    assert (through_0.latency, through_0.bandwidth) == (0.0, pytest.approx(1 / slope))


def test_the_recommended_number_of_devices_keeps_an_efficiency_of_one_half():
    # A step of 1 ms, of which 0.1 ms do not scale; a reduction takes 10 us on two devices and 20 us on four.
    exchange = Exchange(2, 1e-5, 1e12, 0.0, {})
    runs = [
        Measurement(count, "strong", 0.0, 1 / (0.9e-3 / count + 0.1e-3 + latency), 0.0, 0.0, 1.0)
        for count, latency in ((1, 0), (2, 1e-5), (4, 2e-5))
    ]
    found = extrapolate(runs, [exchange], 0, batch_size=1024)
    assert (found["shared"], found["fixed"]) == (pytest.approx(0.9e-3), pytest.approx(0.1e-3))
    assert found["efficiency"][1] == 1
    assert found["efficiency"][16] == pytest.approx(1e-3 / (0.9e-3 + 16 * (0.1e-3 + 4e-5)), rel=1e-6)
    pays = found["pays_up_to"]
    assert found["efficiency"][pays] >= 0.5 > found["efficiency"][2 * pays]
    assert max(found["efficiency"]) == 1024
    assert extrapolate(runs, [], 24, 32) == {}


@pytest.mark.faults
@pytest.mark.skipif(devices.cores() < 2, reason="one core")
def test_scaling_measures_a_run_on_one_and_two_cores(tmp_path):
    (command,) = re.findall(r"^python (-m dpreg.scaling .*)$", SHOWN.read_text(), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, *command.split(), f"--workdir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "simulated devices (--num_devices) share cores" in done.stdout
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [(run["devices"], run["kind"]) for run in found["runs"]] == [(1, "strong"), (2, "strong"), (2, "weak")]
    one, strong, weak = found["runs"]
    assert one["efficiency"] == 1
    assert 0 < strong["efficiency"] == pytest.approx(strong["rows_per_second"] / 2 / one["rows_per_second"])
    assert weak["rows_per_second"] / weak["steps_per_second"] == pytest.approx(
        2 * one["rows_per_second"] / one["steps_per_second"], rel=0.05
    )
    (exchange,) = found["exchanges"]
    assert min(exchange["seconds"].values()) > 0
    fitted = Exchange.fit(2, {int(size): seconds for size, seconds in exchange["seconds"].items()})
    assert (exchange["latency"], exchange["error"]) == (fitted.latency, fitted.error)
    shown = (tmp_path / "scaling.html").read_text()
    assert shown.count("<polyline") == 3
    assert shown.count("http") == 0


def test_a_run_that_diverges_is_reported_in_one_line():
    command = [sys.executable, "-m", "dpreg.scaling", "--platform=cpu", "--lr=1e9", "--num_val=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3
    assert "a run on 1 device: the loss is not finite at step" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("lost", [1, 2])
def test_processes_that_lost_another_are_started_again_once_and_what_they_say_is_shown(tmp_path, capfd, lost):
    program = f"""
import pathlib, sys
starts = len(list(pathlib.Path({str(tmp_path)!r}).glob("start*"))) // 2
(pathlib.Path({str(tmp_path)!r}) / ("start" + sys.argv[3] + str(starts))).touch()
print("result", sys.argv[3])
if starts < {lost} and sys.argv[3] == "1":
    print("the cause\\nthe last line", file=sys.stderr)
    sys.exit(76)
"""
    runner = Runner(Config(platform="cpu"))
    if lost == 1:
        assert runner._run_python(["-c", program], 2) == ["result 0\n", "result 1\n"]
    else:
        with pytest.raises(InputError, match="a run on 2 devices: the last line") as error:
            runner._run_python(["-c", program], 2)
        assert error.value.exit_code == 76
    shown = capfd.readouterr().err
    assert (
        shown == "the cause\nthe last line\na run on 2 devices lost a process, as it says above; it is started again\n"
    )


def test_a_stopped_scaling_measurement_leaves_no_process():
    command = [sys.executable, "-m", "dpreg.scaling", "--platform=cpu", "--num_train=100000", "--max_epochs=10000"]
    scaling = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        process = psutil.Process(scaling.pid)
        wait_until(lambda: process.children(recursive=True), scaling)
        time.sleep(1)
        runs = process.children(recursive=True)
        assert runs
        scaling.terminate()
        assert scaling.wait(120) == 143
        assert not psutil.wait_procs(runs, 60)[1]
    finally:
        end([scaling])
