"""Tests on a real GPU, if one is available; all other tests run on simulated CPU devices."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from cluster import ROOT, complete, wait_until

from dpreg.plan import CUDA_PLUGINS

pytestmark = pytest.mark.skipif(
    shutil.which("nvidia-smi") is None or not any(map(find_spec, CUDA_PLUGINS)), reason="no GPU, or no JAX for it"
)
MLP = ("--model=mlp", "--hidden=128,64", "--optimizer=adam", "--lr=0.001", f"--w={','.join(['1', '-2'] * 16)}")


def environment(cache=None):
    """Returns the environment of a command on the GPU, which several commands may share."""
    of_tests = ("NPROC", "JAX_COMPILATION_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in of_tests}
    return kept | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | ({"XDG_CACHE_HOME": str(cache)} if cache else {})


def finished(module, *arguments, cache=None):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained(workdir, *flags, cache=None):
    finished("dpreg.main", "--config_preset=gpu", f"--workdir={workdir}", *flags, cache=cache)
    return json.loads((workdir / "summary.json").read_text())


RUNS = {
    "the preset": (),
    "host": ("--placement=host", "--num_train=5003"),
    "accumulated": ("--accumulate_steps=4", "--optimizer=adam"),
    "float64": ("--precision=float64", "--reduction=ordered"),
    "mlp": (*MLP, "--num_train=5003"),
    "batch norm": (*MLP, "--batch_norm", "--sync_batch_norm", "--batch_size=256"),
    "quantile": ("--loss=quantile", "--gradient_clip_val=0.5", "--l2=0.01"),
    "exact": ("--solver=exact", "--num_train=5003"),
    "lbfgs": ("--optimizer=lbfgs", "--batch_size=1000", "--lr=1"),
    "patience": ("--patience=2", "--noise=1", "--max_epochs=9"),
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_gpu_run_has_the_result_of_the_cpu_run(tmp_path, flags):
    found = trained(tmp_path / "gpu", *flags)
    finished("dpreg.main", "--config_preset=cpu", f"--workdir={tmp_path}/cpu", *flags)
    wanted = json.loads((tmp_path / "cpu" / "summary.json").read_text())
    assert found["device_kind"] != wanted["device_kind"] == "cpu"
    for name, value in wanted.get("parameters", {}).items():
        np.testing.assert_allclose(found["parameters"][name], value, rtol=1e-5)
    assert found["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-4)


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
@pytest.mark.parametrize("model", [(), MLP, (*MLP, "--precision=bfloat16")], ids=["linear", "mlp", "bfloat16"])
def test_each_process_computes_the_same_bits(tmp_path, reduction, model):
    """This holds also for a process that recompiles, and so selects the algorithms of its products again."""
    flags = (*model, f"--reduction={reduction}", "--num_train=20003", "--batch_size=256")
    found = [trained(tmp_path / run, *flags, cache=tmp_path / f"cache-{run}") for run in ("a", "b")]
    assert found[0]["params_sha256"] == found[1]["params_sha256"]


@pytest.mark.parametrize("model", [(), MLP], ids=["linear", "mlp"])
def test_ordered_bits_do_not_depend_on_how_rows_are_fed(tmp_path, model):
    flags = (*model, "--reduction=ordered", "--num_train=20003", "--batch_size=256")
    ways = {
        "device": (),
        "host": ("--placement=host",),
        "blocks": ("--checkpoint_every_steps=25",),
        "pmap": ("--backend=pmap",),
    }
    assert len({trained(tmp_path / way, *flags, *more)["params_sha256"] for way, more in ways.items()}) == 1


@pytest.mark.parametrize("model", [(), MLP], ids=["linear", "mlp"])
def test_ordered_bits_do_not_depend_on_the_number_of_gpus(tmp_path, model):
    flags = (*model, "--reduction=ordered", "--num_train=20003", "--batch_size=256")
    found = trained(tmp_path / "all", *flags)
    if found["device_count"] == 1:
        pytest.skip("one GPU")
    one = trained(tmp_path / "one", *flags, "--num_devices=1")
    assert one["params_sha256"] == found["params_sha256"]


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, reduction):
    flags = (*MLP, f"--reduction={reduction}", "--num_train=200000", "--max_epochs=10", "--checkpoint_every_steps=2000")
    whole = trained(tmp_path / "whole", *flags)
    command = [sys.executable, "-m", "dpreg.main", "--config_preset=gpu", f"--workdir={tmp_path}/killed", *flags]
    process = subprocess.Popen(command, cwd=ROOT, env=environment())
    try:
        assert wait_until(lambda: len(complete(tmp_path / "killed")) > 1, process)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert trained(tmp_path / "killed", *flags)["params_sha256"] == whole["params_sha256"]


IN_FLOAT64 = """
import sys
import numpy as np
import dpreg
x, y = np.load(sys.argv[1]), np.load(sys.argv[2])
for precision in ("float32", "bfloat16"):
    trainer = dpreg.Trainer(20, platform="gpu", precision=precision, seed=3)
    model = dpreg.LinearRegressionScratch(x.shape[1], lr=0.05, sigma=0.0, num_targets=y.shape[1])
    trainer.fit(model, dpreg.RegressionData(dpreg.ArraySource(x, y), None, len(x)))
    np.save(sys.argv[3] + precision, np.asarray(trainer.state.params["w"]))
"""


@pytest.mark.parametrize(("num_targets", "rounded"), [(1, (0, 1e-6)), (3, (1e-6, 4e-3))])
def test_full_batch_steps_agree_with_float64(tmp_path, num_targets, rounded):
    """Float32 products use no TF32; bfloat16 products with a vector are not rounded, others only in their factors."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, 256), np.float32)
    y = x @ rng.standard_normal((256, num_targets), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    command = [sys.executable, "-c", IN_FLOAT64, *(str(tmp_path / name) for name in ("x.npy", "y.npy", "w-"))]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    bits = x.view(np.uint32)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)  # Rounds to bfloat16, ties to even.
    for precision, features, (least, most) in (("float32", x, (0, 1e-6)), ("bfloat16", nearest, rounded)):
        features, target = features.astype(np.float64), y.astype(np.float64)
        w, b = np.zeros((256, num_targets)), np.zeros(num_targets)
        for _ in range(20):
            error = features @ w + b - target
            w, b = w - 0.05 * features.T @ error / len(x), b - 0.05 * error.mean(axis=0)
        found = np.load(tmp_path / f"w-{precision}.npy")
        assert least <= np.linalg.norm(found - w) / np.linalg.norm(w) < most


def test_the_doctor_and_the_plan_recognize_the_gpu(tmp_path):
    output = finished("dpreg.main", "--config_preset=gpu", "--mode=doctor")
    assert "WRONG" not in output
    assert "gpu" in output
    output = finished("dpreg.plan", "--flagfile=configs/gpu.cfg", f"--workdir={tmp_path}")
    results = json.loads((tmp_path / "plan.json").read_text())
    assert results["fits"]
    assert results["state_donated"]
    assert results["kind"].startswith("NVIDIA")
    assert results["capacity"] > 1e9


def test_a_profile_contains_the_kernels_of_the_steps(tmp_path):
    trained(tmp_path, "--profile=10:20")
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["10"]
    assert any("GPU" in event.get("args", {}).get("name", "") for event in events if event.get("ph") == "M")
