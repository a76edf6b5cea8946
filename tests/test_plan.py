"""Plans: collectives, memory and cost of a compiled train step, on this machine and for TPU slices that it lacks."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from cluster import ROOT

import dpreg
from dpreg.config import Config
from dpreg.plan import plan
from dpreg.planning import chips, programs
from dpreg.step import tuning
from dpreg.step.reduce import REDUCTION_BY_NAME
from dpreg.train.program import lay_out

LINEAR = Config(num_train=5000, batch_size=64, platform="cpu", num_devices=8)


def config_with(**changes):
    return dataclasses.replace(LINEAR, **changes)


@pytest.mark.parametrize(
    "config",
    [
        config_with(),
        config_with(placement="host"),
        config_with(accumulate_steps=4),
        config_with(optimizer="sgd", gradient_clip_val=1.0, l2=0.1),
        config_with(precision="bfloat16"),
    ],
    ids=["linear", "host", "accumulated", "clipped", "bfloat16"],
)
def test_a_linear_step_has_one_all_reduce_and_donates_the_state(config):
    found = plan(config)
    (one,) = found.collectives
    # The all-reduce holds w (2), b, the loss and the weights, in float32.
    assert (one.kind, one.size, one.devices, one.each_step) == ("all-reduce", 5 * 4, 8, True)
    assert found.state_donated
    rows = 5000 if found.placement == "device" else 64 * found.steps_per_call
    assert found.memory.arguments > rows * (2 * 2 + 4 + 4) / 8  # The features take at least 2 bytes each.


def test_an_ordered_step_has_one_all_gather_and_on_one_device_none():
    (one,) = plan(config_with(reduction="ordered")).collectives
    assert (one.kind, one.size, one.devices, one.each_step) == ("all-gather", 8 * 5 * 4, 8, True)
    assert [c for c in plan(config_with(num_devices=1)).collectives if c.devices > 1] == []


def test_a_perceptron_reduces_its_whole_gradient_in_one_collective():
    found = plan(config_with(model="mlp", hidden=(16, 8), optimizer="momentum"))
    size = (2 * 16 + 16) + (16 * 8 + 8) + (8 + 1) + 2
    assert [(c.kind, c.size, c.each_step) for c in found.collectives] == [("all-reduce", 4 * size, True)]
    assert found.state_donated


def test_the_gpu_compiler_options_exist_and_xla_flags_override_them(monkeypatch):
    """The CPU compiler parses the GPU options as well, so it can check them."""
    monkeypatch.setenv("XLA_FLAGS", "")
    options = tuning.compiler_options(REDUCTION_BY_NAME["ordered"], "gpu")
    assert {"xla_gpu_autotune_level", "xla_gpu_enable_command_buffer"} < {*options}
    assert jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError):
        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options | {"xla_gpu_no_such_option": "1"})
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    assert "xla_gpu_autotune_level" not in tuning.compiler_options(REDUCTION_BY_NAME["ordered"], "gpu")


def test_a_collective_inside_a_loop_counts_once_for_each_iteration():
    config = config_with(
        model="mlp", hidden=(4,), batch_norm=True, sync_batch_norm=True, accumulate_steps=3, num_devices=2
    )
    found = plan(config)
    # The gradient is reduced once, and the batch statistics in each accumulated batch.
    assert sorted({one.loops for one in found.collectives}) == [
        1,
        2,
    ]
    assert "3 times a step" in found.describe()


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (64, {"num_devices": 1}),
        (64, {"num_devices": 1, "reduction": "ordered"}),
        (8, {}),
        (4 * 8, {"accumulate_steps": 4}),
        (16384, {"num_devices": 1, "batch_size": 16384, "num_train": 20000}),
    ],
    ids=["one", "ordered", "eight", "accumulated", "in parts"],
)
def test_operations_and_bytes_of_a_step_match_the_formula(rows, changes):
    """With wide rows nearly all operations are in x w and x^T g, a multiplication and an addition each."""
    found = plan(config_with(w=tuple(np.linspace(-1, 1, 512)), **changes))
    assert found.operations == pytest.approx(2 * 2 * rows * 512, rel=0.35 if rows < 32 else 0.1)
    assert found.bytes_moved == pytest.approx(rows * (512 + 3) * 4 + 2 * 513 * 4, rel=0.01)


def test_the_compiled_step_computes_no_more_than_the_formula():
    """XLA counts one iteration of each loop, and the cost outside of the loops grows with the steps of a call."""
    data = dpreg.SyntheticRegressionData(np.ones(512), 1.0, num_train=640, num_val=0, batch_size=64)
    model = dpreg.LinearRegressionScratch(512, 0.1)

    def counted(steps):
        laid_out = lay_out(data, dpreg.Trainer(1, 1, steps_per_block=steps).settings)
        return laid_out.compile_train(model, laid_out.initial_state(model)).cost_analysis()["flops"]

    assert counted(2) - (counted(4) - counted(2)) == pytest.approx(2 * 2 * 64 * 512, rel=0.1)


def test_held_out_rows_count_in_the_memory_of_a_plan():
    few, many = (plan(config_with(num_val=rows, num_devices=1)) for rows in (0, 5000))
    assert few.validation_bytes == 0
    assert many.validation_bytes == pytest.approx(5000 * (2 + 1 + 1) * 4, rel=0.1)
    assert many.held_bytes - many.memory.total == many.validation_bytes


@pytest.mark.parametrize(("reduction", "part"), [("pmean", 5 << 20), ("ordered", 4 << 19)])
def test_the_rows_of_a_large_batch_are_copied_in_chunks_that_fit_in_cache(reduction, part):
    """A chunk has at most 5 MB, or the rows of a shard."""
    found = plan(config_with(w=(1.0,) * 512, num_devices=1, batch_size=8192, num_train=16384, reduction=reduction))
    rows = 16384 * (512 + 3) * 4
    assert rows < found.memory.arguments < 1.02 * rows
    assert found.memory.temporaries < 1.1 * part < 8192 * 512 * 4


def test_collectives_are_parsed_from_the_program_text():
    class Compiled:
        def as_text(self):
            return """
%region_1.5 (c: f32[6]) -> f32[6] {
  %psum.1 = f32[6]{0:T(128)} all-reduce(%c), replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/while/body/sum/psum"}
}

%region_2.7 (t: (f32[6])) -> (f32[6]) {
  %sum = f32[6] call(%gte), to_apply=%region_1.5
}

ENTRY %main.9 (s: f32[1,6]) -> f32[8,6] {
  %while.3 = (f32[6]) while(%t), condition=%region_4.1, body=%region_2.7
  ROOT all-gather.2 = (f32[2,6]{1,0}, f32[8,6]{1,0}) all-gather-start(%s), replica_groups=[2,4]<=[8], dimensions={0}
  %done = f32[8,1,6]{2,1,0} all-gather-done(%all-gather.2)
  %no = f32[6] add(%all-reduce, %psum.1)
}
"""

    found = programs.find_collectives(Compiled(), 8)
    assert found == [
        programs.Collective("all-reduce", 24, 4, 1, "sum/psum"),
        programs.Collective("all-gather", 8 * 6 * 4, 4, 0, ""),
    ]
    assert [one.wire_bytes for one in found] == [36, 144]


@pytest.mark.parametrize("name", ["v5e:2x2", "v5e:16x16", "v6e:4x8", "v4:2x2x1", "v5p:4x4x12", "v5p:16x16x24"])
def test_an_existing_slice_is_parsed(name):
    assert "x".join(map(str, chips.parse_topology(name).shape)) in name


def test_the_time_of_a_collective_follows_from_the_links_of_the_slice():
    # A v5e pod: each chip has 200 GB/s in one direction, half of the 51.2 TB/s documented for 256 chips.
    assert chips.parse_topology("v5e:16x16").seconds("all-reduce", 10**9) == pytest.approx(0.01, rel=0.01)
    # Without a torus, a chip of 2x2x1 uses two of its six links: 3/4 of the bytes at 200 GB/s and two hops, both twice.
    assert chips.parse_topology("v5p:2x2x1").seconds("all-reduce", 10**9) == pytest.approx(2 * (0.75 / 200 + 2e-6))
    assert chips.parse_topology("v5p:2x2x1").seconds("all-gather", 10**9) == pytest.approx(0.75 / 200 + 2e-6)
    assert (chips.parse_topology("v5p:8x8x8").hops, chips.parse_topology("v5e:8x8").hops) == (12, 14)
    # An axis of 16 is a ring even if the other axis is not: three of four links, 150 GB/s.
    half = chips.parse_topology("v5e:8x16")
    assert half.hops == 7 + 8
    assert half.seconds("all-reduce", 10**9) == pytest.approx(2e9 / 150e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:32x32", "there is no such slice of several chips; use one of v5e: 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5p:8x4x4", "there is no such slice"),
        ("v5p:16x20x28", "there is no such slice"),
        ("v5p:4x4x384", "there is no such slice"),
        ("v4:4x4x256", "there is no such slice"),
        ("v5p:0x4x4", "there is no such slice"),
        ("v5p:4x4", "there is no such slice"),
        ("v5e:4xx4", "there is no such slice"),
        ("h1:8", "use KIND:SHAPE, with a kind of v4, v5e, v5p, v6e, a100, h100, h200"),
        ("h100:3", "use h100:HOSTSxGPUS, up to 1,280 hosts of 1, 2, 4 or 8 GPUs each"),
        ("h100:0x8", "use h100:HOSTSxGPUS"),
        ("h100:", "use h100:HOSTSxGPUS"),
        ("h100:x8", "use h100:HOSTSxGPUS"),
        ("h100:²x8", "use h100:HOSTSxGPUS"),
        ("v5p:²x4x4", "no such slice"),
        ("v5p", "there is no such slice"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(name, message):
    with pytest.raises(dpreg.InputError, match=message):
        chips.parse_topology(name)


def run_plan(*flags):
    return subprocess.run(
        [sys.executable, "-m", "dpreg.plan", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_time_of_a_gpu_collective_follows_from_the_slowest_link():
    gigabyte, ring = 10**9, 2 * (1 - 1 / 8)
    alone, apart = (chips.parse_topology(name).seconds("all-reduce", gigabyte) for name in ("h100:8", "h100:2x4"))
    assert alone == pytest.approx(ring * gigabyte / 450e9, rel=0.01)
    assert apart == pytest.approx(ring * gigabyte / 50e9, rel=0.01)
    assert chips.parse_topology("h100:1").seconds("all-reduce", gigabyte) == 0


def test_the_plan_command_writes_its_results(tmp_path):
    done = run_plan("--flagfile=configs/cpu.cfg", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "all-reduce of 20 bytes over 8 devices, each step (exchange/psum); a device sends 35" in done.stdout
    (one,) = json.loads((tmp_path / "plan.json").read_text())["collectives"]
    assert (one["size"], one["wire_bytes"]) == (20, 35)
    wrong = run_plan("--flagfile=configs/cpu.cfg", "--num_devices=9")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize(("topology", "count"), [("v5e:2x4", 8), ("v6e:2x4", 8), ("v5p:8x8x8", 512)])
def test_the_tpu_configuration_compiles_for_slices(topology, count, tmp_path):
    pytest.importorskip("libtpu")
    done = run_plan(f"--topology={topology}", "--flagfile=configs/tpu.cfg", f"--workdir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    # With more devices than shards, the shards become as many as the devices, with the same number of rows each.
    assert (found["devices"], found["num_shards"], found["batch_size"]) == (count, count, count * 4)
    assert [(c["kind"], c["size"], c["each_step"]) for c in found["collectives"]] == [("all-reduce", 20, True)]
    assert found["state_donated"]
    assert found["fits"]
    assert found["seconds"]["step"] > 0


def test_no_step_on_a_slice_changes_the_layout_of_whole_columns():
    pytest.importorskip("libtpu")
    program_of_step = """
import os, re
from dpreg import plan
os.environ.update(plan._COMPILE_ONLY)
from dpreg.config import Config
from dpreg.planning import programs
from dpreg.train.program import lay_out

def large(compiled, devices):
    text = compiled.as_text()
    loops, computation, lines = programs._count_loops(text), "", 0
    for line in text.splitlines():
        if head := programs._COMPUTATION.match(line):
            computation = head[1]
        made = re.match(r"\\s*(?:ROOT )?%?[\\w.-]+ = \\(?\\w+\\[([\\d,]+)\\][^ ]* ([\\w-]+)\\(", line)
        if made and loops.get(computation, 0) and made[2] not in ("parameter", "get-tuple-element", "bitcast"):
            lines += 1
            if max(map(int, made[1].split(","))) >= 500_000:
                print("LARGE", line[:200])
    print("LINES", lines)
    return []

plan.find_collectives = large
plan.plan(Config(num_train=4_000_000, batch_size=4096, num_val=0), "v5e:2x4")
"""
    done = subprocess.run(
        [sys.executable, "-c", program_of_step], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("LINES ")[2]) > 50
    assert "LARGE" not in done.stdout


@pytest.mark.parametrize(("topology", "count"), [("a100:8", 8), ("h100:1x8", 8), ("h200:4x2", 8)])
def test_the_gpu_configuration_compiles_for_gpus(topology, count, tmp_path):
    pytest.importorskip("jax_cuda13_plugin")
    done = run_plan(f"--topology={topology}", "--flagfile=configs/gpu.cfg", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["devices"] == count
    assert [(c["kind"], c["size"], c["each_step"]) for c in found["collectives"]] == [("all-reduce", 20, True)]
    assert found["state_donated"]
    assert found["fits"]
    assert 0 < found["seconds"]["exchange"] < found["seconds"]["step"] < 1e-3


def test_a_plan_that_fits_no_slice_is_refused_in_one_line(tmp_path):
    pytest.importorskip("libtpu")
    uneven = run_plan("--topology=v5p:4x4x4", "--flagfile=configs/tpu.cfg", "--batch_size=30")
    assert (uneven.returncode, len(uneven.stderr.splitlines())) == (2, 1)
    assert "--batch_size=30: it is not a multiple of --num_shards=8" in uneven.stderr
    wide = ("--model=mlp", "--hidden=100000,100000", "--batch_size=64", "--num_train=64", "--num_val=8")
    large = run_plan("--topology=v5e:2x4", "--flagfile=configs/tpu.cfg", *wide)
    assert large.returncode == 2
    assert "DOES NOT FIT" in large.stdout or ("does not compile" in large.stderr and "memory" in large.stderr.lower())


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_a_trainer_reports_the_collectives_of_its_step(reduction):
    data = dpreg.SyntheticRegressionData([1.0, 2], 0.5, num_train=100, num_val=0)
    trainer = dpreg.Trainer(1, 8, reduction=reduction)
    trainer.fit(dpreg.LinearRegressionScratch(2, 0.1), data)
    (one,) = plan(config_with(reduction=reduction)).collectives
    assert trainer.exchange_bytes == one.size
