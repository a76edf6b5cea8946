"""Checkpoints: a run stopped at any step resumes to the same bits and the same curve, on any devices."""

import contextlib
import functools
import gc
import json
import os
import pathlib
import resource
import shutil
import signal
import time

import forked
import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from models import Net, Rows

import dpreg
from dpreg.distributed.sync_signal import SyncSignal
from dpreg.errors import Preempted
from dpreg.outputs.checkpoint import Checkpoints
from dpreg.outputs.metrics import MetricsWriter, is_start, note_start, read_records
from dpreg.train.callback import FunctionCallback

IDENTITY = {"lr": 0.05}
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # `optax.add_noise` needs it.
        yield


def net(**arguments):
    """Returns a network whose optimizer state holds a random key, which must be saved and restored too."""
    # Only one leaf gets noise: the random numbers of each take a second to compile.
    is_last = functools.partial(jax.tree.map, lambda leaf: leaf.shape == (1,))
    noise = optax.masked(optax.add_noise(1e-4, 0.5, key=0), is_last)
    return Net(optax.chain(noise, optax.sgd(0.05, momentum=0.9)), **arguments)


LINEAR = dpreg.LinearRegressionScratch(3, 0.05)  # It compiles faster, for tests of files and of callbacks.


def prepared(num_val=20, model=None, **arguments):
    trainer = dpreg.Trainer(3, reduction="ordered", log_every_steps=3, steps_per_block=2, **arguments)
    trainer.prepare_data(Rows(153, weighted=True).data(16, num_val))
    trainer.prepare_model(model or net())
    return trainer


def train(folder, stop_at=None, identity=IDENTITY, **arguments):
    """Trains for 3 epochs of 10 steps, or until a signal at step `stop_at`; resumes from a checkpoint in the folder."""
    folder.mkdir(exist_ok=True)
    trainer = prepared(**arguments)
    sync_signal = SyncSignal()
    with Checkpoints(
        folder / "checkpoints", identity, every_steps=stop_at or 0, sync_signal=sync_signal
    ) as checkpoints:
        checkpoints.restore(trainer)
        began_at = trainer.step
        with MetricsWriter(folder / "metrics.jsonl", trainer.step) as metrics:
            signal_comes = lambda p: sync_signal.request("stop") if stop_at and p.step >= stop_at else None  # noqa: E731
            for callback in (metrics, FunctionCallback(signal_comes), checkpoints):
                trainer.add_callback(callback)
            with contextlib.suppress(Preempted):
                trainer.fit_epochs()
                checkpoints.save(trainer)
    return trainer, began_at


def leaves_of(trainer):
    state = trainer.state
    leaves = jax.tree.leaves((state.step, state.params, state.opt_state, state.batch_stats))
    return b"".join(np.asarray(leaf).tobytes() for leaf in leaves)


def outcome(folder, trainer):
    curve = [
        {k: v for k, v in r.items() if k != "rows_per_second"} for r in read_records(folder / "metrics.jsonl").whole
    ]
    return leaves_of(trainer), curve, trainer.train_loss, trainer.val_loss


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer, _ = train(folder)
    return outcome(folder, trainer)


@pytest.mark.parametrize("stops", [(4, 7), (10, 29), (30,)])
def test_a_stopped_run_goes_on_to_the_same_bits_on_other_devices(tmp_path, whole, stops):
    for stop, devices in zip(stops, (3, 1), strict=False):
        trainer, _ = train(tmp_path, stop, num_devices=devices)
        assert trainer.step == stop
    trainer, began_at = train(tmp_path, num_devices=8, backend="pmap", placement="host")
    assert began_at == stops[-1]
    assert outcome(tmp_path, trainer) == whole


def test_a_run_stopped_with_two_epochs_in_flight_resumes_to_the_same_bits(tmp_path):
    trainer, _ = train(tmp_path / "whole", num_val=0)
    whole = outcome(tmp_path / "whole", trainer)
    trainer, sync_signal = prepared(num_val=0), SyncSignal()
    folder = tmp_path / "w"
    with (
        Checkpoints(folder / "checkpoints", IDENTITY, sync_signal=sync_signal) as checkpoints,
        MetricsWriter(folder / "metrics.jsonl") as metrics,
    ):
        signal_comes = FunctionCallback(lambda p: sync_signal.request("stop") if p.step == 8 else None)
        for callback in (metrics, signal_comes, checkpoints):
            trainer.add_callback(callback)
        with pytest.raises(Preempted):
            trainer.fit_epochs()
    assert trainer.step == 12  # 8 steps were reported; 4 more were in flight, 2 of them in the next epoch.
    trainer, began_at = train(folder, num_val=0, num_devices=3)
    assert began_at == 12
    assert outcome(folder, trainer) == whole


@pytest.mark.parametrize(("num_val", "step", "after"), [(0, 2, 6), (0, 10, 14), (20, 9, 10)])
def test_a_trainer_does_not_go_on_if_a_callback_raised_before_all_steps_were_reported(tmp_path, num_val, step, after):
    def enough(progress):
        if progress.step == step:
            raise StopIteration

    trainer = prepared(num_val, LINEAR, callbacks=[FunctionCallback(enough)])
    with pytest.raises(StopIteration):
        trainer.fit_epochs()
    for goes_on in (trainer.fit_epochs, functools.partial(Checkpoints.save, None, trainer)):
        with pytest.raises(dpreg.InputError, match=f"the state is after step {after}, and callbacks do not know"):
            goes_on()


@pytest.mark.parametrize("num_val", [0, 20])
def test_a_callback_may_save_and_raise_at_the_end_of_a_validated_epoch(tmp_path, num_val):
    def save_and_raise(progress):
        if progress.epoch_ended and progress.step == 20 and not saved:
            saved.append(1)
            checkpoints.save(trainer)
            raise StopIteration

    saved = []
    trainer = prepared(num_val, LINEAR, callbacks=[FunctionCallback(save_and_raise)])
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        with pytest.raises(StopIteration if num_val else dpreg.InputError):
            trainer.fit_epochs()
        assert checkpoints.restore(trainer) == bool(num_val)
        if num_val:
            assert trainer.step == 20
            trainer.fit_epochs()
            whole = prepared(num_val, LINEAR)
            whole.fit_epochs()
            assert leaves_of(trainer) == leaves_of(whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tasks that Orbax abandons
def test_a_flipped_byte_in_any_file_is_detected_and_the_previous_checkpoint_is_used(tmp_path, caplog):
    saved = {stop: leaves_of(train(tmp_path / "w", stop)[0]) for stop in (4, 7)}
    trainer, noticed = prepared(), []
    newest = tmp_path / "w" / "checkpoints" / "7"
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "w" / "checkpoints", folder)
        damaged = folder / "7" / file
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 0x10
        damaged.write_bytes(content)
        caplog.clear()
        with Checkpoints(folder, IDENTITY) as checkpoints:
            assert checkpoints.restore(trainer)
        assert leaves_of(trainer) == saved[trainer.step]
        assert (
            ("checkpoint 7 is damaged" in caplog.text)
            == (trainer.step == 4)
            == (not (folder / "7").exists())
            == any(folder.glob("damaged-7-*"))
        )
        if trainer.step == 4:
            noticed.append(file.name)
    gc.collect()  # Raises the warnings of tasks that Orbax abandoned here and not in a later test.
    assert {"metadata", "manifest.ocdbt"} <= set(noticed)
    assert any(len(name) == 32 for name in noticed)  # Orbax's data files


def test_a_flipped_byte_in_the_identity_file_is_reported_as_damage_not_as_another_run(tmp_path, caplog):
    train(tmp_path, 4, model=LINEAR)
    train(tmp_path, 7, model=LINEAR)
    file = tmp_path / "checkpoints" / "7" / "meta" / "metadata"
    content = file.read_bytes()
    assert b'"lr": 0.05' in content
    file.write_bytes(content.replace(b'"lr": 0.05', b'"lr": 0.15'))
    trainer = prepared(model=LINEAR)
    with Checkpoints(tmp_path / "checkpoints", IDENTITY) as checkpoints:
        assert checkpoints.restore(trainer)
    assert trainer.step == 4
    assert "checkpoint 7 is damaged, and renamed to damaged-7-" in caplog.text


def test_resuming_with_another_model_under_the_same_flags_is_refused_and_loses_nothing(tmp_path):
    train(tmp_path, 4)
    trainer = prepared(model=net(width=8))
    with (
        Checkpoints(tmp_path / "checkpoints", IDENTITY) as checkpoints,
        pytest.raises(dpreg.InputError, match=r"another model: .*'kernel'.* was float32\[16, 1\] and is float32\[8"),
    ):
        checkpoints.restore(trainer)
    assert (tmp_path / "checkpoints" / "4").exists()


def test_resuming_with_model_code_that_changed_its_computation_is_refused(tmp_path, monkeypatch):
    trainer, _ = train(tmp_path, 4)
    was, changed = trainer.loop.computation, prepared(model=net(activation=lambda x: nn.relu(x) * 1.0625))
    with Checkpoints(tmp_path / "checkpoints", IDENTITY) as checkpoints:
        with pytest.raises(
            dpreg.InputError, match="the code of the model computes something else than in the saved run"
        ):
            checkpoints.restore(changed)
        for arguments in ({"num_devices": 1}, {"backend": "pmap", "placement": "host"}):
            rewritten = prepared(model=net(activation=lambda x: nn.relu(x)), **arguments)
            assert rewritten.loop.computation == was
            assert checkpoints.restore(rewritten)
        # Other versions of the libraries may trace the same computation differently.
        monkeypatch.setattr(
            type(changed.loop), "computation", was.replace(jax.__version__, "99.0").replace(was[:32], "0")
        )
        assert checkpoints.restore(changed)


def test_the_curve_survives_a_crash_right_after_a_resume(tmp_path):
    train(tmp_path, 7, model=LINEAR)
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()
    writer = MetricsWriter(path, 7)  # It is not closed, so nothing is written.
    assert path.read_text() == before
    writer.__exit__()


LINES = [f'{{"step": {step}, "epoch": {step / 10}, "train_loss": 0.5}}'.encode() for step in (1, 2, 3)]
DAMAGES = {
    "NULs after a power cut": b"\n".join([*LINES, b"\0" * 4096]),
    "a cut line": b"\n".join([*LINES, LINES[0][:9]]) + b"\n",
    "a cut line at the end": b"\n".join([*LINES, LINES[0][:9]]),
    "an empty object": b"{}\n" + b"\n".join(LINES) + b"\n",
    "another kind of value": b"\n".join([LINES[0], b"[7]", *LINES[1:], b"7"]) + b"\n",
    "other types": b'{"step": "1", "epoch": 0.1, "train_loss": 0.5}\n' + b"\n".join(LINES) + b"\n",
    "no UTF-8": b"\n".join([*LINES, b'{"step": 4, "\xff": 0}']) + b"\n",
    "no number of float64": b"\n".join([*LINES, b'{"step": 4, "epoch": 1e999, "train_loss": NaN}']) + b"\n",
    "lists in lists": b"[" * 10**5 + b"\n" + b"\n".join(LINES) + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_curve_is_set_aside_and_the_run_resumes_with_its_complete_lines(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(DAMAGES[damage])
    MetricsWriter(path, 2).__exit__()
    assert path.read_bytes() == b"\n".join(LINES[:2]) + b"\n"
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == DAMAGES[damage]
    (line,) = caplog.messages
    assert f"damaged; the run continues with the 3 others, and the damaged file is renamed to {aside.name}" in line
    MetricsWriter(path, 2).__exit__()
    assert len(caplog.messages) == 1


def test_a_file_where_the_checkpoint_folder_belongs_is_refused(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(dpreg.InputError, match="checkpoints: is not a folder; move it away, or name another workdir"):
        Checkpoints(tmp_path / "checkpoints", IDENTITY)


def test_a_curve_path_that_is_not_a_regular_file_is_set_aside(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    os.mkfifo(tmp_path / "starts.jsonl")
    MetricsWriter(tmp_path / "metrics.jsonl").__exit__()
    note_start(tmp_path / "starts.jsonl", 7, 8, 1)
    (start,) = read_records(tmp_path / "starts.jsonl", is_start).whole
    assert (start["step"], (tmp_path / "metrics.jsonl").read_text(), len(caplog.messages)) == (7, "", 2)


def test_a_run_without_its_curve_resumes_to_the_same_bits(tmp_path, whole):
    train(tmp_path, 7)
    curve = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(curve[:-20] + bytes(20))
    trainer, began_at = train(tmp_path)
    bits, lines, *losses = outcome(tmp_path, trainer)
    assert (began_at, bits, *losses) == (7, whole[0], *whole[2:])
    assert lines == [line for line in whole[1] if line["step"] != 6]  # Step 6 is the last one before the signal.


def test_an_error_of_the_file_system_is_not_taken_for_a_damaged_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, 4, model=LINEAR)
    trainer = prepared(model=LINEAR)
    with Checkpoints(tmp_path / "checkpoints", IDENTITY) as checkpoints:
        for error in (OSError(5, "Input/output error"), ValueError("PERMISSION_DENIED: no"), MemoryError()):
            with monkeypatch.context() as patch:

                def fail(*args, error=error, **kwargs):
                    raise error

                patch.setattr(checkpoints._manager, "restore", fail)
                with pytest.raises(type(error)):
                    checkpoints.restore(trainer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_an_epoch_resumed_without_its_audit_is_not_audited(tmp_path):
    train(tmp_path, 4, audit=False, model=LINEAR)
    train(tmp_path, model=LINEAR)
    audits = [
        record.get("audit") for record in read_records(tmp_path / "metrics.jsonl").whole if record["step"] % 10 == 0
    ]
    assert audits[0] is None
    assert audits[1] == audits[2]
    assert audits[1]["rows"] == 153


def test_resuming_another_run_is_refused_with_the_settings_that_differ(tmp_path):
    train(tmp_path, 4, model=LINEAR)
    with pytest.raises(dpreg.InputError, match=r"another run: lr was 0\.05 and is 0\.1"):
        train(tmp_path, identity={"lr": 0.1}, model=LINEAR)


def command(workdir, *rest):
    flags = ("--platform=cpu", "--num_train=20000", "--batch_size=32", "--reduction=ordered", f"--workdir={workdir}")
    return ["-m", "dpreg.main", *flags, *rest]


def run(workdir, *rest):
    return forked.run(*command(workdir, *rest))


def wait_for(condition, process):
    for _ in range(1200):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.05)


EPOCHS = "--max_epochs=200"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns the workdir of a run that was not killed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    assert run(workdir, EPOCHS, "--num_devices=1").returncode == 0
    return workdir


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_resumes_to_the_result_of_an_uninterrupted_run(tmp_path, how, uninterrupted):
    process = forked.start(*command(tmp_path / "w", EPOCHS, "--num_devices=2", "--checkpoint_every_seconds=0.3"))
    folder = tmp_path / "w" / "checkpoints"
    wait_for(lambda: folder.exists() and any(path.name.isdigit() for path in folder.iterdir()), process)
    os.kill(process.pid, how)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGINT: 130}.get(how, -how), stderr
    if how != signal.SIGKILL:
        verb = "interrupted" if how == signal.SIGINT else "stopped"
        assert f"{verb} at step " in stderr.splitlines()[-1]
        assert "the same command resumes from there" in stderr.splitlines()[-1]
    done = run(tmp_path / "w", EPOCHS, "--num_devices=1")
    assert "going on from step" in done.stderr
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (tmp_path / "w", uninterrupted)]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    curves = [read_records(workdir / "metrics.jsonl").whole for workdir in (tmp_path / "w", uninterrupted)]
    assert len(curves[0]) == len(curves[1])
    for resumed, expected in zip(*curves, strict=True):
        assert resumed | {"rows_per_second": 0} == expected | {"rows_per_second": 0}


def test_resume_never_starts_over_and_resume_must_needs_a_checkpoint(tmp_path):
    assert run(tmp_path / "w", "--max_epochs=1").returncode == 0
    again = run(tmp_path / "w", "--max_epochs=1", "--resume=never")
    assert (again.returncode, "going on" in again.stderr) == (0, False)
    again = run(tmp_path / "w", "--max_epochs=2", "--resume=must")
    assert (again.returncode, "going on from step 625" in again.stderr) == (0, True)
    other = run(tmp_path / "w", "--seed=1")
    assert (other.returncode, len(other.stderr.splitlines())) == (2, 1)
    assert "seed was 0 and is 1" in other.stderr
    empty = run(tmp_path / "new", "--resume=must")
    assert (empty.returncode, len(empty.stderr.splitlines()), (tmp_path / "new").exists()) == (2, 1, False)


def test_a_resumed_run_remembers_the_best_epoch(tmp_path):
    def train_with_patience(folder, stop_at=None, num_devices=8):
        trainer, _ = train(folder, stop_at, patience=5, num_devices=num_devices)
        variables = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.loop.best.variables)]
        return trainer.step, trainer.loop.best.val_loss, trainer.loop.best.step, variables

    whole = train_with_patience(tmp_path / "whole")
    assert 0 < whole[2] <= 30
    for stop_at in (7, 10, 20):
        assert train_with_patience(tmp_path / f"{stop_at}", stop_at)[0] == stop_at
        assert train_with_patience(tmp_path / f"{stop_at}", num_devices=3) == whole


def _save_more_than_fits(folder, trainer, again):
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, allowed[1]))
    try:
        with Checkpoints(folder, {}) as checkpoints:
            checkpoints.save(trainer)
            if again:
                trainer.fit_epochs(1)
                checkpoints.save(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


@pytest.mark.parametrize("again", [True, False])
def test_a_failed_save_is_reported_in_one_line_and_keeps_the_last_complete_checkpoint(tmp_path, again, capfd):
    """Orbax writes in the background: the error is raised by the next save or when the checkpoints are closed."""
    trainer = dpreg.Trainer(4, 1)
    trainer.prepare_data(dpreg.RegressionData(dpreg.ArraySource(np.ones((16, 1 << 14)), np.ones(16)), batch_size=8))
    trainer.prepare_model(dpreg.LinearRegressionScratch(1 << 14, 1e-6))  # random parameters of 64 kB
    trainer.fit_epochs(1)
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(trainer)
    trainer.fit_epochs(1)
    with pytest.raises(dpreg.InputError, match=r"of step 4 cannot be written \(File too large\)") as caught:
        _save_more_than_fits(tmp_path, trainer, again)
    assert "the newest complete one is of step 2:" in str(caught.value)
    gc.collect()
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path) == ["2"]
    with Checkpoints(tmp_path, {}) as checkpoints:
        assert checkpoints.restore(trainer)
        assert trainer.step == 2
        trainer.fit_epochs()
        checkpoints.save(trainer)
    assert sorted(os.listdir(tmp_path)) == ["2", "8"]
