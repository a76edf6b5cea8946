"""The main entry point, started as users do: outputs and exit codes."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import forked
import jax
import numpy as np
import pyarrow.parquet
import pytest

import dpreg as package
from dpreg.config import Config
from dpreg.data.sampler import keyed_hash
from dpreg.distributed.sync_signal import SyncSignal
from dpreg.errors import InputError, Preempted
from dpreg.outputs.profile import Profiler
from dpreg.outputs.workdir import open_workdir
from dpreg.run import _to_go_on_in, run

ROOT = pathlib.Path(__file__).parent.parent
CPU = "--flagfile=configs/cpu.cfg"
CACHE = pathlib.Path(tempfile.gettempdir()) / "dpreg-tests"


def dpreg(*arguments):
    return forked.run("-m", "dpreg.main", f"--cache_dir={CACHE}", *arguments)


def finished(*arguments):
    done = dpreg(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_default_run_and_its_outputs(tmp_path):
    command = [sys.executable, "-m", "dpreg.main", CPU, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert re.search(r"error in estimating w: \[.*\]\nerror in estimating b: ", done.stdout)
    assert str(tmp_path) in done.stdout
    assert "epoch 3.00/3  step 96/96  loss" in done.stderr

    summary = summary_of(tmp_path)
    np.testing.assert_allclose(summary["parameter_error"]["w"], [0.107, -0.183], atol=0.06)
    assert summary["parameter_error"]["b"] == pytest.approx(0.226, abs=0.06)
    assert (summary["step"], summary["epoch"], summary["device_count"], summary["num_shards"]) == (96, 3, 8, 8)
    assert (summary["placement"], summary["reduction"], summary["backend"]) == ("device", "pmean", "jit")
    assert set(summary["seconds"]) == {"ingest", "compile", "train", "eval"}
    assert set(summary["metrics"]) == {"rmse", "mae", "r2"}
    w, b = (np.float32(summary["parameters"][name]) for name in "wb")
    # The documented order of the bytes is b before w.
    assert summary["params_sha256"] == hashlib.sha256(b.tobytes() + w.tobytes()).hexdigest()

    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(4, 97, 4))
    assert [r["step"] for r in records if "val_loss" in r] == [32, 64, 96]
    assert records[-1]["val_loss"] == summary["val_loss"]

    assert {r["learning_rate"] for r in records} == {0.03}
    assert all(r["gradient_norm"] > 0 for r in records)
    report = (tmp_path / "report.html").read_text()
    # The charts are losses, gap, learning rate, gradient norm, rows per second and calibration.
    assert report.count("<polyline") == 7
    for heading in (
        "Optimality gap",
        "Residuals",
        "Shape of the residuals",
        "Calibration",
        "Devices",
        "Starts",
        "Audit",
    ):
        assert f">{heading}</h" in report
    assert "<tr><td>7<td>0<td>7<td>125" in report  # device, process, shard, rows
    assert not re.search(r"(src|href)=|https?:|@import|url\(", report)
    assert list((tmp_path / "checkpoints").iterdir()) == [tmp_path / "checkpoints" / "96"]


def test_the_written_flags_repeat_the_run(tmp_path):
    first = ("--platform=cpu", "--num_devices=3", "--reduction=ordered", "--w=1,2,3", "--num_train=77", "--b=-1")
    finished(*first, "--l2=0.5", "--resume=never", f"--workdir={tmp_path / 'a'}")
    finished(f"--flagfile={tmp_path / 'a' / 'flags.cfg'}", f"--workdir={tmp_path / 'b'}")
    assert summary_of(tmp_path / "a")["params_sha256"] == summary_of(tmp_path / "b")["params_sha256"]
    assert (tmp_path / "a" / "flags.cfg").read_text() == (tmp_path / "b" / "flags.cfg").read_text()
    assert "resume" not in (tmp_path / "a" / "flags.cfg").read_text()
    report = (tmp_path / "a" / "report.html").read_text()
    assert "The best possible is" in report
    assert "Optimality gap" not in report  # The gap includes the penalty, and the curves do not.


def test_ordered_runs_give_the_same_bits_in_different_processes(tmp_path):
    common = ("--platform=cpu", "--reduction=ordered", "--num_train=1003", "--batch_size=64")
    hashes = set()
    for name, rest in {
        "one": ("--num_devices=1",),
        "eight": ("--num_devices=8", "--backend=pmap"),
        "three": ("--num_devices=3", "--placement=host"),
    }.items():
        finished(*common, *rest, f"--workdir={tmp_path / name}")
        hashes.add(summary_of(tmp_path / name)["params_sha256"])
    assert len(hashes) == 1


def test_a_run_reads_a_tfds_dataset_prepared_on_disk(tmp_path):
    arguments = (CPU, "--dataset=tfds:synthetic_regression", f"--data_dir={tmp_path / 'data'}")
    finished(*arguments, f"--workdir={tmp_path / 'a'}", "--max_epochs=10")
    w = summary_of(tmp_path / "a")["parameters"]["w"]
    np.testing.assert_allclose([w["x0"], w["x1"]], [2, -3.4], atol=0.003)
    assert summary_of(tmp_path / "a")["parameters"]["b"] == pytest.approx(4.2, abs=0.003)
    finished(*arguments, f"--workdir={tmp_path / 'b'}", "--max_epochs=10")
    assert summary_of(tmp_path / "a")["params_sha256"] == summary_of(tmp_path / "b")["params_sha256"]


def test_a_run_on_a_table_reports_its_columns_and_parameters(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2)) * [3, 0.01] + [1000, 5]
    y = x @ [2.0, -30.0] + 7 + rng.normal(size=500)
    lines = ["height,width,cost", *(f"{a:.9g},{b:.9g},{c:.9g}" for (a, b), c in zip(x, y, strict=True))]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    workdir = tmp_path / "w"
    finished(CPU, f"--dataset={tmp_path / 'table.csv'}", "--target=cost", "--max_epochs=40", f"--workdir={workdir}")
    summary = summary_of(workdir)
    assert summary["metrics"]["r2"] > 0.9
    assert summary["parameters"]["w"]["height"] == pytest.approx(2, abs=0.1)
    assert set(summary["parameters"]["w"]) == {"height", "width"}


DIAMONDS = ROOT.parent / "shared" / "data" / "diamonds.parquet"


@pytest.mark.skipif(not DIAMONDS.exists(), reason="the table of diamonds is not here")
def test_real_diamonds_are_fitted_to_within_a_thousandth_of_least_squares(tmp_path):
    """The README's example, on 1 and on 8 devices."""
    table = pyarrow.parquet.read_table(DIAMONDS).to_pydict()
    numbers, kinds = ("carat", "depth", "table", "x", "y", "z"), ("cut", "color", "clarity")
    columns = [np.array(table[name], np.float64) for name in numbers]
    for name in kinds:
        columns += [np.array(table[name]) == kind for kind in sorted(set(table[name]))[1:]]
    x, y = np.column_stack([*columns, np.ones(len(columns[0]))]), np.array(table["price"], np.float64)
    summaries = []
    for devices in (1, 8):
        finished(
            "--platform=cpu",
            f"--num_devices={devices}",
            f"--dataset={DIAMONDS}",
            "--target=price",
            f"--features={','.join(numbers + kinds)}",
            f"--categorical={','.join(kinds)}",
            "--target_transform=standardize",
            *("--reduction=ordered", "--lr=0.1", "--batch_size=256", "--max_epochs=30"),
            f"--workdir={tmp_path / str(devices)}",
        )
        summaries.append(summary_of(tmp_path / str(devices)))
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]

    held_out = keyed_hash(np.arange(len(y)), 1, 0) < np.uint32(0.1 * 0xFFFFFFFF)

    def r2(prediction):
        rest = y[held_out] - prediction[held_out]
        return 1 - (rest @ rest) / np.square(y[held_out] - y[held_out].mean()).sum()

    best = x @ np.linalg.lstsq(x[~held_out], y[~held_out], rcond=None)[0]
    w, b = (summaries[0]["parameters"][name] for name in "wb")
    ours = b + sum(w[name] * np.array(table[name], np.float64) for name in numbers)
    ours += sum(np.array([w[f"{name}={kind}"] for kind in table[name]]) for name in kinds)
    assert r2(ours) == pytest.approx(summaries[0]["metrics"]["r2"], abs=1e-5)
    assert r2(ours) == pytest.approx(r2(best), abs=1e-3)


def test_a_missing_platform_is_named(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "dpreg.main", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "JAX_PLATFORMS=cuda" in done.stderr


def test_written_flags_repeat_column_names_with_commas(tmp_path):
    (tmp_path / "t.csv").write_text('a,"b,c", y\n' + "".join(f"{i},{i * i % 7},{i % 5}\n" for i in range(50)))
    quoted = '--features="b,c",a'
    finished("--platform=cpu", f"--dataset={tmp_path / 't.csv'}", "--target=y", quoted, f"--workdir={tmp_path / 'a'}")
    finished(f"--flagfile={tmp_path / 'a' / 'flags.cfg'}", f"--workdir={tmp_path / 'b'}")
    assert set(summary_of(tmp_path / "b")["parameters"]["w"]) == {"a", "b,c"}
    assert summary_of(tmp_path / "a")["params_sha256"] == summary_of(tmp_path / "b")["params_sha256"]


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = dpreg(f"--workdir={tmp_path / 'file' / 'w'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr


def test_bad_input_does_not_change_the_files_of_an_earlier_run(tmp_path):
    finished("--platform=cpu", "--max_epochs=1", f"--workdir={tmp_path}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert dpreg("--batch_size=30", f"--workdir={tmp_path}").returncode == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_divergence_ends_with_exit_code_3_and_keeps_the_last_finite_state(tmp_path):
    import orbax.checkpoint as ocp

    done = dpreg(CPU, "--lr=30", f"--workdir={tmp_path}")
    assert done.returncode == 3
    step = int(re.search(r"not finite at step (\d+)", done.stderr.splitlines()[-1]).group(1))
    assert not (tmp_path / "summary.json").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(4, step, 4))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "checkpoints" / str(step - 1) / "state")["train_state"]
    assert state["step"] == step - 1
    assert np.isfinite(state["params"]["w"]).all()


def test_help_is_short_and_grouped_and_helpfull_is_complete():
    """The help of each flag gives its default or describes it in words."""
    short, full = dpreg("--help"), dpreg("--helpfull")
    assert short.returncode == full.returncode == 0
    assert dpreg("--version").stdout == f"dpreg {package.__version__}\n"
    assert len(short.stdout.splitlines()) < 80
    assert "\nDevices\n  --platform" in short.stdout
    assert "--num_shards               Logical shards" in short.stdout
    assert "[8]" in short.stdout
    for field in dataclasses.fields(Config):
        if field.metadata:
            assert f"--{field.name}:" in full.stdout or f"--[no]{field.name}:" in full.stdout
            assert field.default is not None or field.metadata["per_process"] or "Default: " in field.metadata["help"]
    plan = forked.run("-m", "dpreg.plan", "--help")
    assert "\nThis command\n  --topology" in plan.stdout


def test_a_terminal_shows_a_progress_bar(tmp_path):
    script = pathlib.Path(__file__).with_name("terminal.py")
    done = subprocess.run(
        [sys.executable, script, sys.executable, "-m", "dpreg.main", CPU, f"--workdir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "epoch 3.0/3" in done.stdout
    assert "rows/s" in done.stdout


def test_a_run_that_cannot_start_does_not_harm_another_run(tmp_path):
    def cannot_start(workdir, beside=None):
        with open_workdir(str(workdir)):
            if beside:
                beside.mkdir()
            raise InputError("too late")

    with pytest.raises(InputError, match="too late"):
        cannot_start(tmp_path / "sweep" / "a", tmp_path / "sweep" / "b")
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["b"]
    with pytest.raises(InputError, match="too late"):
        cannot_start(tmp_path / "new" / "a")
    assert not (tmp_path / "new").exists()


def test_two_runs_cannot_share_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_workdir(None) as one, open_workdir(None) as other:
        assert one != other
        for folder in (one, other):
            with pytest.raises(InputError, match="another run uses it"), open_workdir(str(folder)):
                pass
    with open_workdir(str(one)):  # The workdir is free again and still exists.
        assert not list(one.iterdir())


def test_a_run_holds_its_workdir_until_its_last_output(tmp_path, monkeypatch):
    tried = []

    def another(path, *others, **named):
        with pytest.raises(InputError, match="another run uses it"), open_workdir(str(path.parent)):
            tried.append(path)
        tried.append(path)

    monkeypatch.setattr("dpreg.run.write_report", another)
    monkeypatch.setattr("dpreg.run._stop_signals", SyncSignal)  # The signal handlers of pytest must stay.
    run(Config(workdir=str(tmp_path / "w"), max_epochs=1, num_train=64, num_val=0))
    assert tried == [tmp_path / "w" / "report.html"]


def test_a_stopped_run_prints_its_folder_if_the_command_does_not_name_it():
    for folder, message in (
        (pathlib.Path("runs/now"), "the same command with workdir='runs/now' resumes"),
        (None, "d resumes"),
    ):
        with pytest.raises(Preempted, match=message), _to_go_on_in(folder):
            raise Preempted(3)


def test_several_processes_need_a_workdir(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="workdir: several processes need a folder"), open_workdir(None):
        pass


def test_a_profile_traces_the_requested_steps(tmp_path):
    finished(CPU, "--num_devices=2", "--profile=10:20", f"--workdir={tmp_path}")
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["10"]
    assert any("while" in event.get("name", "") for event in events)  # The loop is a part of the step.
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    profiler = Profiler(tmp_path / "later", 0, 10, step=25)  # The profiler of a resumed run.
    with profiler:
        pass
    assert not (tmp_path / "later").exists()
    wrong = dpreg(CPU, "--profile=7", f"--workdir={tmp_path}/w")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "dpreg: --profile=7: give two steps, the earlier first, such as --profile=100:200\n",
    )


def test_a_flagfile_can_hold_an_empty_list_instead_of_a_default():
    text = Config(hidden=()).to_flagfile()
    assert "--hidden=\n" in text
    assert "--features" not in text  # It is empty by default.
