"""The training loop: D2L's interface, separate traces, exact validation, divergence, patience and interrupts."""

import dataclasses
import functools
import hashlib
import math
import os
import signal
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet
import pytest
from flax import linen as nn
from jax._src import compilation_cache as jax_cache
from models import Foreign, Net, Rows

import dpreg
from dpreg.config import Config
from dpreg.distributed import compilation_cache
from dpreg.distributed.devices import data_mesh
from dpreg.planning.programs import find_collectives
from dpreg.step.layout import call_arguments
from dpreg.step.reduce import tree_sum
from dpreg.step.tuning import fewest_chunks, steps_of_call
from dpreg.train.build import build_model
from dpreg.train.callback import FunctionCallback
from dpreg.train.program import lay_out

CACHE_OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def test_the_snippet_of_the_book_runs_on_all_devices():
    model = dpreg.LinearRegressionScratch(2, lr=0.03)
    data = dpreg.SyntheticRegressionData(w=jnp.array([2, -3.4]), b=4.2)
    trainer = dpreg.Trainer(max_epochs=3)
    trainer.fit(model, data)
    params = trainer.state.params
    assert len(params["w"].devices()) == 8
    # 96 exact steps leave 0.97**96 of the initial error; the sample of 1,000 rows adds some noise.
    np.testing.assert_allclose(data.w - params["w"].reshape(data.w.shape), [0.107, -0.183], atol=0.06)
    np.testing.assert_allclose(data.b - params["b"], [0.226], atol=0.06)
    trainer = dpreg.Trainer(max_epochs=10)
    trainer.fit(model, data)
    np.testing.assert_allclose(trainer.state.params["w"].ravel(), [2, -3.4], atol=0.003)
    np.testing.assert_allclose(trainer.state.params["b"], [4.2], atol=0.003)


def test_the_same_seed_gives_the_same_result_twice_and_another_seed_another():
    def run(seed):
        trainer = dpreg.Trainer(1, seed=seed)
        trainer.fit(Net(optax.sgd(0.05)), Rows(100).data(16))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trainer.state.params)])

    first = run(3)
    np.testing.assert_array_equal(first, run(3))
    assert not np.array_equal(first, run(4))


def test_any_flax_module_with_a_loss_and_an_optimizer_trains():
    source = Rows(400).source()
    trainer = dpreg.Trainer(30)
    trainer.fit(Foreign(), dpreg.RegressionData(source, source, 16))
    best = np.abs(
        source.y - np.c_[source.x, np.ones(400)] @ np.linalg.lstsq(np.c_[source.x, np.ones(400)], source.y)[0]
    )
    assert trainer.val_loss < 1.05 * best.mean()


class Modes(dpreg.Module):
    """Predicts differently in training, which reveals a validation that runs the training trace."""

    @nn.compact
    def __call__(self, x, train=False):
        w = self.param("w", nn.initializers.zeros, (x.shape[1], 1))
        return jnp.matmul(x, w) + (1000.0 if train else 0.0)

    def configure_optimizers(self):
        return optax.sgd(0.0)


def test_validation_is_not_traced_as_training():
    data = dpreg.RegressionData(dpreg.ArraySource(np.ones(16), np.zeros(16)), Rows(9, num_inputs=1).source(), 8)
    trainer = dpreg.Trainer(1)
    trainer.fit(Modes(), data)
    assert trainer.train_loss == 1000.0**2 / 2
    assert trainer.val_loss == pytest.approx(float(np.square(data.val.y).mean() / 2), rel=1e-6)


@pytest.mark.parametrize(("num_devices", "placement"), [(1, "host"), (2, "device"), (3, "device"), (8, "host")])
def test_validation_is_the_exact_weighted_mean_over_all_rows(num_devices, placement):
    val = Rows(101, num_inputs=2, weighted=True, seed=4).source()
    val = dpreg.ArraySource(val.x, np.c_[val.y, 50 + val.y**2], val.weight)
    model = dpreg.LinearRegressionScratch(2, lr=0.01, num_targets=2)
    trainer = dpreg.Trainer(1, num_devices, placement=placement)
    trainer.fit(model, dpreg.RegressionData(val, val, 16))
    x, y, c = (column.astype(np.float64) for column in (val.x, val.y, val.weight))
    error = x @ np.float64(trainer.state.params["w"]) + np.float64(trainer.state.params["b"]) - y
    center = c @ y / c.sum()
    r2 = 1 - (c @ error**2) / (c @ (y - center) ** 2)
    assert trainer.val_loss == pytest.approx((c @ (error**2).sum(1) / 2) / c.sum(), rel=1e-6)
    assert trainer.metrics["rmse"] == pytest.approx(np.sqrt((c @ error**2).mean() / c.sum()), rel=1e-6)
    assert trainer.metrics["mae"] == pytest.approx((c @ abs(error)).mean() / c.sum(), rel=1e-6)
    assert trainer.metrics["r2"] == pytest.approx(r2.mean(), rel=1e-5)


def test_gradient_clip_val_scales_the_global_gradient_to_its_norm():
    source = Rows(8).source()
    model = dpreg.LinearRegressionScratch(3, lr=1.0)
    start = model.init(jax.random.key(0), source.x[:1])["params"]
    moved = {}
    for clip in (0.0, 0.1):
        trainer = dpreg.Trainer(1, gradient_clip_val=clip)
        trainer.fit(model, dpreg.RegressionData(source, None, 8))
        moved[clip] = np.concatenate([np.ravel(trainer.state.params[k] - start[k]) for k in ("w", "b")])
    assert np.linalg.norm(moved[0.0]) > 0.2
    np.testing.assert_allclose(moved[0.1], moved[0.0] * 0.1 / np.linalg.norm(moved[0.0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("reduction", "backend", "num_devices"),
    [("pmean", "jit", 1), ("pmean", "jit", 8), ("ordered", "jit", 1), ("ordered", "jit", 3), ("pmean", "pmap", 2)],
)
def test_the_reported_gradient_norm_is_measured_before_clipping(reduction, backend, num_devices):
    """Compares with gradient descent in float64, on weighted rows that no number of devices divides."""
    source, reported = Rows(21, weighted=True).source(), []
    trainer = dpreg.Trainer(
        6,
        num_devices,
        0.2,
        reduction=reduction,
        backend=backend,
        log_every_steps=1,
        callbacks=[FunctionCallback(reported.append)],
    )
    trainer.fit(dpreg.LinearRegressionScratch(3, lr=0.5), dpreg.RegressionData(source, None, 24))
    x, y, c = np.c_[source.x, np.ones(21)].astype(np.float64), source.y.astype(np.float64), np.float64(source.weight)
    start = dpreg.LinearRegressionScratch(3, lr=0.5).init(jax.random.key(0), source.x[:1])["params"]
    theta, expected = np.float64(np.concatenate([start["w"], start["b"][:, None]])), []
    for _ in range(6):
        gradient = x.T @ ((x @ theta - y) * c[:, None]) / c.sum()
        expected.append(np.linalg.norm(gradient))
        theta -= 0.5 * gradient * min(1, 0.2 / expected[-1])
    assert expected[0] > 0.2  # The gradient is clipped.
    norms = [progress.gradient_norm for progress in reported if progress.train_loss is not None]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_predictions_are_paired_with_observed_targets():
    val = Rows(101, weighted=True, seed=4).source()
    trainer = dpreg.Trainer(1, 3)
    trainer.fit(dpreg.LinearRegressionScratch(3, lr=0.1), dpreg.RegressionData(Rows(40).source(), val, 8))
    predicted, observed, weight = trainer.predictor().compared(val, most=40)
    rows = np.arange(0, 101, 3)
    rows = rows[val.weight[rows] > 0]
    assert 0 < len(rows) < 34
    w, b = (np.float64(trainer.state.params[name]) for name in "wb")
    np.testing.assert_allclose(predicted, val.x[rows] @ w + b, rtol=1e-5)
    np.testing.assert_array_equal(observed, val.y[rows])
    np.testing.assert_array_equal(weight, val.weight[rows])


def test_a_predictor_does_not_change_with_further_steps():
    trainer = dpreg.Trainer(2, 3)
    trainer.prepare_data(Rows(40).data(8))
    trainer.prepare_model(dpreg.LinearRegressionScratch(3, lr=0.1))
    trainer.fit_epochs(1)
    predictor, x = trainer.predictor(), np.eye(3)
    before = predictor.predict(x)
    trainer.fit_epochs(1)
    assert (trainer.predict(x) != before).any()
    np.testing.assert_array_equal(predictor.predict(x), before)


def test_a_model_that_is_prepared_without_steps_validates_and_predicts_but_does_not_train():
    trainer, data = dpreg.Trainer(1, 3), Rows(40).data(8, num_val=21)
    trainer.prepare_data(data)
    trainer.prepare_model(dpreg.LinearRegressionScratch(3, lr=0.1), trains=False)
    w, b = np.array([[1.0], [-2.0], [0.5]]), np.array([0.25])
    trainer.set_linear_params(w, b, 0.0)
    error = data.val.x @ w + b - data.val.y
    assert trainer.val_loss == pytest.approx(np.mean(error**2) / 2, rel=1e-6)
    np.testing.assert_allclose(trainer.predict(data.val.x), data.val.y + error, rtol=1e-5, atol=1e-6)
    with pytest.raises(dpreg.InputError, match="trains=False: the model is prepared without steps"):
        trainer.fit_epochs()


def test_a_predictor_uses_the_batch_size_of_training():
    rows = []
    for accumulate in (1, 16):
        trainer = dpreg.Trainer(1, 2, accumulate_steps=accumulate)
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(400).data(8))
        rows.append(trainer.predictor().chunk_rows)
    assert rows[0] == rows[1]


class Relative(dpreg.Module):
    """A model and a loss that are NaN for rows of zeros: padding must repeat real rows."""

    lr: float = 0.01

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False)(x)
        return nn.Dense(1)(x / jnp.linalg.norm(x, axis=1, keepdims=True))

    def loss(self, prediction, target):
        return (jnp.abs(prediction - target) / jnp.abs(target)).sum(axis=1)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_padding_does_no_harm_to_a_loss_that_is_nan_for_zeros(placement):
    trainer = dpreg.Trainer(2, placement=placement)
    trainer.fit(Relative(), Rows(100).data(32))
    assert math.isfinite(trainer.train_loss)


class MeanLoss(dpreg.LinearRegressionScratch):
    def loss(self, prediction, target):
        return jnp.square(prediction - target).mean() / 2


class ColumnLoss(dpreg.LinearRegressionScratch):
    def loss(self, prediction, target):
        return jnp.square(prediction - target) / 2


@pytest.mark.parametrize("model", [MeanLoss(3, 0.1), ColumnLoss(3, 0.1)])
def test_a_loss_that_is_not_per_row_is_refused(model):
    with pytest.raises(dpreg.InputError, match="one value for each row"):
        dpreg.Trainer(1).fit(model, Rows(64).data(32))


class Mean(dpreg.LinearRegressionScratch):
    def __call__(self, x):
        return super().__call__(x).mean(axis=0, keepdims=True)


def test_a_prediction_that_is_not_per_row_is_refused():
    with pytest.raises(dpreg.InputError, match=r"predicts \[1, 1\] for 4 rows; give a prediction for each row"):
        dpreg.Trainer(1).fit(Mean(3, 0.1), Rows(64).data(32))


class Flat(Foreign):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(x)[:, 0]

    def loss(self, prediction, target):
        return jnp.abs(prediction - target[:, 0])


def test_a_one_dimensional_prediction_is_refused_when_metrics_are_computed():
    with pytest.raises(dpreg.InputError, match="one column for each target"):
        dpreg.Trainer(1).fit(Flat(), Rows(64).data(32, num_val=8))


def test_a_validation_loss_that_is_not_finite_is_reported():
    val = dpreg.ArraySource(np.ones((4, 3)), np.array([0, 0, 1e30, 0]))
    trainer = dpreg.Trainer(2)
    with pytest.raises(dpreg.Diverged, match="validation loss is not finite after step 8"):
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), dpreg.RegressionData(Rows(64).source(), val, 8))
    assert int(trainer.state.step) == trainer.step == 8
    trainer.loop.require_idle()  # Otherwise the trainer could not be saved.


def test_resuming_where_validation_failed_fails_again():
    """A run whose validation failed must not succeed when it is started again."""
    val = dpreg.ArraySource(np.ones((4, 3)), np.array([0, 0, 1e30, 0]))
    model, data = dpreg.LinearRegressionScratch(3, 0.1), dpreg.RegressionData(Rows(64).source(), val, 8)
    trainer, again = dpreg.Trainer(1), dpreg.Trainer(1)
    with pytest.raises(dpreg.Diverged):
        trainer.fit(model, data)
    again.prepare_data(data)
    again.prepare_model(model)
    with pytest.raises(dpreg.Diverged, match="validation loss is not finite after step 8") as caught:
        again.loop.load_state(trainer.state, trainer.loop.epoch_sums)
    assert caught.value.exit_code == 3


def test_patience_does_not_mistake_overflow_for_rows_of_weight_zero():
    val = dpreg.ArraySource(np.full((4, 3), 1e4) * [[1], [-1], [1], [-1]], np.ones(4))
    data = dpreg.RegressionData(dpreg.ArraySource(Rows(64).source().x, np.ones(64)), val, 8)
    with pytest.raises(dpreg.Diverged, match="validation"):
        dpreg.Trainer(2, patience=1).fit(build_model(Config(loss="poisson"), 3, 1), data)


@pytest.mark.parametrize("batch_size", [4, 12])
@pytest.mark.parametrize("num_val", [0, 8])
def test_shards_must_divide_each_accumulated_batch(batch_size, num_val):
    """Otherwise some rows would be in no accumulated batch."""
    trainer = dpreg.Trainer(1, accumulate_steps=2, num_shards=8)
    with pytest.raises(dpreg.InputError, match=f"^batch_size={batch_size}: it is not a multiple of num_shards=8"):
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(64).data(batch_size, num_val))


def test_the_process_with_least_memory_decides_the_placement_of_rows(monkeypatch):
    data, settings = Rows(64).data(8), dpreg.Trainer(1, 2).settings
    assert lay_out(data, settings).train.resolved_placement == "device"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("dpreg.distributed.processes.allgather_text", lambda own: [own, "host"])
    assert lay_out(data, settings).train.resolved_placement == "host"


def test_rows_of_weight_zero_are_ignored_and_a_batch_of_them_has_loss_zero():
    source = Rows(100).source()
    ghost = dpreg.ArraySource(source.x, source.y, np.zeros(100))
    for model in (dpreg.LinearRegressionScratch(3, lr=0.1), Net(optax.sgd(0.1))):
        trainer = dpreg.Trainer(1)
        trainer.fit(model, dpreg.RegressionData(ghost, ghost, 16))
        start = jax.jit(model.init)(jax.random.key(0), source.x[:1])
        jax.tree.map(np.testing.assert_array_equal, trainer.state.params, start["params"])
        jax.tree.map(np.testing.assert_array_equal, trainer.state.batch_stats, start.get("batch_stats", {}))
        assert (trainer.train_loss, trainer.val_loss) == (0.0, 0.0)


class Twice(Net):
    """Draws two masks with the same key."""

    def __call__(self, x, train=False):
        if train:
            key = self.make_rng("dropout")
            x = x + jax.random.normal(key, x.shape) + jax.random.uniform(key, x.shape)
        return super().__call__(x, train)


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_no_random_key_is_used_twice(reduction):
    def train(model):
        data = dpreg.SyntheticRegressionData(np.ones(3), 1.0, num_train=100, num_val=20, batch_size=16)
        dpreg.Trainer(1, 2, reduction=reduction).fit(model, data)

    jax.clear_caches()  # Keys are checked while functions are traced.
    with jax.debug_key_reuse(True):
        train(Net(optax.sgd(0.1)))
        with pytest.raises(dpreg.InputError, match="KeyReuseError"):
            train(Twice(optax.sgd(0.1)))


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(reduction):
    x = np.ones((64, 1), np.float32)
    y = np.zeros(64)
    y[0] = 1e30  # Its square overflows float32.
    source = dpreg.ArraySource(x, y)
    trainer = dpreg.Trainer(5, 2, reduction=reduction, seed=1)
    with pytest.raises(dpreg.Diverged, match=r"not finite at step (\d+)") as caught:
        trainer.fit(dpreg.LinearRegressionScratch(1, lr=0.1), dpreg.RegressionData(source, None, 8))
    assert 1 <= caught.value.step <= 8
    assert int(trainer.state.step) == trainer.step == caught.value.step - 1
    trainer.loop.require_idle()  # Otherwise the trainer could not be saved.
    w = 0.0
    model = dpreg.LinearRegressionScratch(1, lr=0.1)
    start = model.init(jax.random.key(1), x[:1])["params"]
    w, b = float(start["w"][0, 0]), 0.0
    for _ in range(trainer.step):  # All other batches are equal: x = 1, y = 0.
        w, b = w - 0.1 * (w + b), b - 0.1 * (w + b)
    np.testing.assert_allclose(trainer.state.params["w"], [[w]], rtol=1e-5)


@pytest.mark.parametrize("steps_per_block", [2, 9, None])
def test_a_run_that_diverges_later_in_a_block_reports_the_steps_before(steps_per_block):
    source, reported = dpreg.ArraySource(np.ones((40, 1)), np.zeros(40)), []
    record = FunctionCallback(lambda progress: reported.append(progress) if progress.train_loss is not None else None)
    trainer = dpreg.Trainer(20, 2, log_every_steps=2, steps_per_block=steps_per_block, callbacks=[record])
    with pytest.raises(dpreg.Diverged) as caught:  # Each step multiplies w + b, and so the gradient, by 1 - 2 * 9.
        trainer.fit(dpreg.LinearRegressionScratch(1, lr=9.0), dpreg.RegressionData(source, None, 8))
    assert trainer.train.block_steps == {2: 2, 9: 5, None: 100}[steps_per_block]
    step = trainer.step
    assert step % 5
    assert step > 10
    assert caught.value.step - 1 == int(trainer.state.step) == step
    epochs = [point for epoch in range(step // 5) for point in (5 * epoch + 2, 5 * epoch + 4, 5 * epoch + 5)]
    assert [p.step for p in reported] == [*epochs, *range(step // 5 * 5 + 2, step + 1, 2)]
    assert [p.audit[0] for p in reported if p.epoch_ended] == [40] * (step // 5)
    assert trainer.loop.audit.used[0] == 8 * (step % 5)
    norms = [p.gradient_norm for p in reported if p.step % 5 == 4]
    np.testing.assert_allclose(np.divide(norms[1:], norms[:-1]), 17.0**5, rtol=1e-4)


def test_a_call_counts_only_the_rows_of_steps_that_were_taken():
    source = Rows(40, seed=3).source()
    source.y[17] = np.float32(1e38)
    trainer = dpreg.Trainer(4, 2)
    trainer.prepare_data(dpreg.RegressionData(source, None, 8))
    trainer.prepare_model(dpreg.LinearRegressionScratch(3, 0.1))
    state, sums, used = trainer.loop.program.train_block(
        trainer.state, *call_arguments(trainer.train, next(iter(trainer.train)))
    )
    took = int(state.step)
    assert 0 < took < 5
    rows = np.asarray(used)[..., 0].sum(axis=0)
    assert rows.tolist() == [8] * took + [0] * (20 - took)
    assert np.isnan(np.asarray(sums)[took:, 0]).all()


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_log_points_cover_the_epoch_without_overlap(reduction):
    records = []
    trainer = dpreg.Trainer(
        2, log_every_steps=3, callbacks=[FunctionCallback(records.append)], reduction=reduction, steps_per_block=4
    )
    trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(80).data(8, num_val=5))
    points = [r for r in records if r.train_loss is not None]
    assert [r.step for r in points] == [3, 6, 9, 10, 13, 16, 19, 20]
    assert [r.step for r in points if r.val_loss is not None] == [10, 20]
    assert [r.epoch for r in points] == pytest.approx([0.3, 0.6, 0.9, 1, 1.3, 1.6, 1.9, 2])
    last = [r.train_loss for r in points[4:]]
    assert np.dot(last, [3, 3, 3, 1]) / 10 == pytest.approx(trainer.train_loss, rel=1e-6)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize(
    ("num_val", "steps_per_block", "dispatched"),
    [(0, 4, 4), (0, 17, 3), (20, 4, 2)],  # Up to 2 calls are in flight beside the one that is fetched.
)
def test_devices_wait_between_epochs_only_for_validation(num_val, steps_per_block, dispatched, placement):
    def trained(epochs_at_once):
        trainer, calls, reported = dpreg.Trainer(12, 3, placement=placement, steps_per_block=steps_per_block), [], []
        trainer.prepare_data(Rows(101).data(16, num_val=num_val))  # Each epoch has 7 steps.
        trainer.prepare_model(Plain(optax.sgd(0.05, 0.9)))
        block = trainer.loop.program.train_block
        counted = lambda *arguments: calls.append(1) or block(*arguments)  # noqa: E731
        trainer.loop.program = dataclasses.replace(trainer.loop.program, train_block=counted)
        trainer.add_callback(FunctionCallback(lambda progress: reported.append((len(calls), progress))))
        while not trainer.done:
            trainer.fit_epochs(epochs_at_once)
        first = next(number for number, progress in reported if progress.epoch_ended)
        curve = [
            (p.step, p.epoch, p.train_loss, p.gradient_norm, p.val_loss, p.metrics, np.array(p.audit).tolist())
            for _, p in reported
            if p.train_loss is not None
        ]
        return first, curve, jax.device_get((trainer.state.step, trainer.state.params, trainer.state.opt_state))

    one_by_one, together = trained(1), trained(None)
    assert together[0] == dispatched
    assert len(one_by_one[1]) == 12 * 7
    assert one_by_one[1] == together[1]
    jax.tree.map(np.testing.assert_array_equal, one_by_one[2], together[2])


def test_sorted_and_periodic_tables_train_as_well_as_shuffled_ones(tmp_path):
    """Batch statistics per contiguous shard need shards that are random samples; reading a table shuffles its rows."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2048, 4))
    y = np.sin(x @ rng.normal(size=(4, 1))) + 0.1 * rng.normal(size=(2048, 1))
    val = dpreg.ArraySource(x[:512], y[:512])
    x, y = x[512:], y[512:]
    by_target = np.argsort(y[:, 0])
    # The targets rise 8 times from low to high.
    orders = {
        "sorted": by_target,
        "periodic": by_target.reshape(-1, 8).T.ravel(),
    }

    def loss(train):
        trainer = dpreg.Trainer(20)
        trainer.fit(Net(optax.adam(0.01)), dpreg.RegressionData(train, val, 128))
        return trainer.val_loss

    def ingested(name):
        columns = {f"x{j}": x[orders[name], j] for j in range(4)} | {"y": y[orders[name], 0]}
        pyarrow.parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        asked = dpreg.Columns(target=("y",), standardize=False, validation_fraction=0.0)
        return dpreg.read_table(str(tmp_path / f"{name}.parquet"), asked, cache_dir=str(tmp_path / "cache")).train

    with jax.numpy_dtype_promotion("standard"):
        mixed = loss(dpreg.ArraySource(x, y))
        contiguous = loss(dpreg.ArraySource(x[by_target], y[by_target]))
        assert contiguous > 5 * mixed  # Shows that the order of the rows matters here.
        # 30 random orders gave losses of 0.021 to 0.035; this one gives 0.026.
        assert loss(dpreg.PermutedSource(dpreg.ArraySource(x[by_target], y[by_target]))) < 1.4 * mixed
        for name in orders:
            assert loss(ingested(name)) < 1.4 * mixed, name


def test_rows_of_another_width_and_models_without_parameters_are_refused():
    class Nothing(dpreg.Module):
        lr: float = 0.1

        def __call__(self, x):
            return x[:, :1]

    data = Rows(80).data(8)
    with pytest.raises(dpreg.InputError, match="num_inputs=2: the rows have 3 features"):
        dpreg.Trainer(1).fit(dpreg.LinearRegressionScratch(2, 0.1), data)
    with pytest.raises(dpreg.InputError, match="no parameters"):
        dpreg.Trainer(1).fit(Nothing(), data)
    trainer = dpreg.Trainer(1)
    trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), data)
    with pytest.raises(dpreg.InputError, match="the rows have 2 features, and the model was trained on 3"):
        trainer.evaluate(dpreg.ArraySource(np.ones((5, 2)), np.ones(5)))


class OverTheBatch(dpreg.Module):
    lr: float = 0.1

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(4)(x))
        return nn.Dense(1)(nn.softplus(x))


def batch_norm_by_hand(params, stats, x, y, weight, lr, steps):
    """Takes SGD steps of a net with BatchNorm over all rows of positive weight, in float64 with central differences."""
    leaves, structure = jax.tree.flatten(params)
    sizes = np.cumsum([0, *(leaf.size for leaf in leaves)])

    def forward(flat):
        tree = jax.tree.unflatten(
            structure, [flat[a:b].reshape(leaf.shape) for a, b, leaf in zip(sizes, sizes[1:], leaves, strict=False)]
        )
        h = x @ tree["Dense_0"]["kernel"] + tree["Dense_0"]["bias"]
        mean, var = h[weight > 0].mean(axis=0), h[weight > 0].var(axis=0)
        h = (h - mean) / np.sqrt(var + 1e-5) * tree["BatchNorm_0"]["scale"] + tree["BatchNorm_0"]["bias"]
        h = np.log1p(np.exp(h)) @ tree["Dense_1"]["kernel"] + tree["Dense_1"]["bias"]
        return (weight * (h[:, 0] - y) ** 2 / 2).sum() / weight.sum(), mean, var

    flat = np.concatenate([np.ravel(leaf) for leaf in leaves])
    for _ in range(steps):
        _, mean, var = forward(flat)
        stats = {"mean": 0.99 * stats["mean"] + 0.01 * mean, "var": 0.99 * stats["var"] + 0.01 * var}
        h = 1e-5 * np.eye(flat.size)
        flat = flat - lr * np.array([(forward(flat + e)[0] - forward(flat - e)[0]) / 2e-5 for e in h])
    return flat, stats


@pytest.fixture
def _float32_again():
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("_float32_again")
# With 5 rows some shards have none.
@pytest.mark.parametrize(
    ("devices", "backend", "rows"),
    [(1, "pmap", 5), (2, "pmap", 37), (3, "jit", 37), (8, "jit", 5)],
)
def test_batch_norm_over_the_batch_agrees_with_float64(devices, backend, rows):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=rows)
    weight = np.where(np.arange(rows) % 4 == 1, 0, rng.uniform(0.5, 2, rows))
    trainer = dpreg.Trainer(3, devices, precision="float64", backend=backend)
    source = dpreg.ArraySource(x, y, weight, dtype=np.dtype("float64"))
    trainer.prepare_data(dpreg.RegressionData(source, None, 40))
    trainer.prepare_model(OverTheBatch())
    start = jax.device_get(trainer.variables)
    trainer.fit_epochs()
    params, stats = batch_norm_by_hand(
        start["params"], start["batch_stats"]["BatchNorm_0"], x, y, weight, lr=0.1, steps=3
    )
    found = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trainer.state.params)])
    np.testing.assert_allclose(found, params, rtol=0, atol=1e-9)
    for name, value in trainer.state.batch_stats["BatchNorm_0"].items():
        np.testing.assert_allclose(value, stats[name], rtol=1e-9)
    for shard in trainer.state.params["Dense_0"]["kernel"].addressable_shards:
        np.testing.assert_array_equal(shard.data, trainer.state.params["Dense_0"]["kernel"])


def test_batch_norm_over_the_batch_cannot_be_ordered():
    with pytest.raises(dpreg.InputError, match="BatchNorm over the whole batch"):
        dpreg.Trainer(1, reduction="ordered").fit(OverTheBatch(), Rows(80).data(8))


def test_an_mlp_normalises_over_the_batch(caplog):
    """Takes a step of all rows, with one or eight shards."""

    def trained(num_shards, **flags):
        config = Config(model="mlp", hidden=(5, 4), batch_norm=True, lr=0.1, **flags)
        trainer = dpreg.Trainer(5, min(2, num_shards), num_shards=num_shards)
        trainer.fit(build_model(config, 3, 1), Rows(80, weighted=True).data(80))
        return jax.device_get(trainer.variables)

    one_shard = trained(1)
    eight_shards = trained(8, sync_batch_norm=True)
    assert "batch statistics" not in caplog.text
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), eight_shards, one_shard)
    over_shards = trained(8)
    assert "batch statistics of 10 rows" in caplog.text
    apart = over_shards["params"]["Dense_0"]["kernel"] - one_shard["params"]["Dense_0"]["kernel"]
    assert np.abs(apart).max() > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_tree_sum_adds_neighbours_first(count):
    parts = [jnp.float32(10.0) ** k for k in range(count)]
    assert float(tree_sum(list(parts))) == sum(10.0**k for k in range(count))
    if count == 3:
        big = [jnp.float32(v) for v in (1e8, -1e8, 1.0)]
        assert float(tree_sum(big)) == 1.0


class Deep(dpreg.Module):
    lr: float = 0.1

    @nn.compact
    def __call__(self, x):
        for width in (16, 16):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(1)(x)


@functools.cache
def program(kind, reduction, backend="jit", accumulate=1, num_devices=None, rows=100):
    model = {"linear": dpreg.LinearRegressionScratch(3, 0.1), "mlp": Deep()}[kind]
    trainer = dpreg.Trainer(1, num_devices, reduction=reduction, backend=backend, accumulate_steps=accumulate)
    trainer.prepare_data(Rows(rows).data(rows // 6 // 8 * 8))
    trainer.prepare_model(model)
    return trainer.loop.program.train_block.as_text()


@pytest.mark.parametrize(
    ("kind", "backend", "accumulate"),
    [("linear", "jit", 1), ("linear", "pmap", 4), ("mlp", "pmap", 1), ("mlp", "jit", 4)],
)
def test_the_compiled_step_communicates_once(kind, backend, accumulate):
    text = program(kind, "pmean", backend, accumulate)
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text
    assert "input_output_alias" in text  # The state is donated.


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_compiled_ordered_step_gathers_once(kind):
    text = program(kind, "ordered")
    assert text.count(" all-gather(") + text.count(" all-gather-start(") == 1
    assert "all-reduce" not in text


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_the_step_of_one_device_has_no_collective(reduction):
    trainer = dpreg.Trainer(1, 1, reduction=reduction)
    trainer.prepare_data(Rows(100).data(16, num_val=20))
    trainer.prepare_model(dpreg.LinearRegressionScratch(3, 0.1))
    program = trainer.loop.program
    assert find_collectives(program.train_block, 1) == find_collectives(program.eval_block[0], 1) == []


@pytest.mark.parametrize(
    ("rows", "most", "parts"), [(1, 8, 1), (8, 8, 1), (9, 8, 3), (5003, 100, 1), (40, 9, 5), (12, 0, 12), (521, 400, 1)]
)
def test_batches_are_cut_into_equal_parts_or_not_at_all(rows, most, parts):
    assert fewest_chunks(rows, most) == parts


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_call_of_an_expensive_model_takes_few_steps(placement, monkeypatch):
    """A call takes as many steps as `_OPERATIONS_OF_CALL` allows, with the same result."""

    def run():
        trainer = dpreg.Trainer(1, 1, placement=placement, reduction="ordered")
        steps = []
        trainer.add_callback(FunctionCallback(lambda progress: steps.append(progress.step)))
        trainer.fit(Deep(), Rows(800).data(16, num_val=100))
        return sorted(set(steps)), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.state.params)]

    _, result = run()
    parameters = 3 * 16 + 16 + 16 * 16 + 16 + 16 + 1
    monkeypatch.setattr("dpreg.step.tuning._OPERATIONS_OF_CALL", 6 * parameters * 16 * 3)
    steps, again = run()
    assert set(range(3, 50, 3)) <= set(steps)
    assert again == result


@pytest.mark.parametrize(
    ("platform", "operations", "alone", "steps"),
    [("cpu", 1 << 30, 8, 64), ("gpu", 1 << 30, 0, 2048), ("gpu", 1 << 20, 512, 64), ("tpu", 1 << 50, 1, 1)],
)
def test_a_call_takes_about_a_second_on_each_platform(platform, operations, alone, steps):
    assert steps_of_call(platform, operations, alone) == steps


@pytest.mark.parametrize(("reduction", "num_devices"), [("pmean", 1), ("pmean", 8), ("ordered", 1)])
def test_loops_are_compiled_as_one_function_where_a_device_has_one_core(reduction, num_devices, monkeypatch):
    monkeypatch.setattr("dpreg.distributed.devices.cores", lambda: 4)
    several_cores = reduction == "pmean" and num_devices == 1
    for kind, rows, whole in (("linear", 100, True), ("linear", 100_000, not several_cores), ("mlp", 3000, False)):
        text = program(kind, reduction, num_devices=num_devices, rows=rows)
        assert ("xla_cpu_small_call" in text) == whole, (kind, rows)


def test_steps_are_traced_once_and_results_are_fetched_once_per_block(monkeypatch):
    traced = []

    class Counting(dpreg.LinearRegressionScratch):
        def loss(self, prediction, target):
            traced.append(1)
            return super().loss(prediction, target)

    trainer = dpreg.Trainer(4, steps_per_block=3)
    data = Rows(100).data(16, num_val=20)
    trainer.prepare_data(data)
    trainer.prepare_model(Counting(3, 0.1))
    before = len(traced)
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda value: fetched.append(1) or get(value))
    for epoch in range(1, 5):
        trainer.fit_epochs(1)
        assert len(fetched) == epoch * (3 + 1)  # 7 steps make 3 blocks; 2 validation steps make one.
    assert len(traced) == before


@pytest.mark.parametrize(("placement", "columns"), [("device", 0), ("host", 4)])
def test_a_block_needs_one_transfer_per_column_and_one_for_its_arguments(placement, columns, monkeypatch):
    trainer = dpreg.Trainer(3, steps_per_block=3, placement=placement)
    trainer.prepare_data(Rows(100).data(16))
    trainer.prepare_model(dpreg.LinearRegressionScratch(3, 0.1))
    put, clocks = [], []
    place, prepare = jax.make_array_from_callback, call_arguments
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *a: put.append(1) or place(*a))
    monkeypatch.setattr("dpreg.train.loop.call_arguments", lambda *a: clocks.append(1) or prepare(*a))
    for epoch in range(1, 4):
        trainer.fit_epochs(1)
        assert (len(put), len(clocks)) == (epoch * 3 * columns, epoch * 3)  # 7 steps make 3 blocks.


def test_a_model_with_other_variables_is_refused():
    class Counter(dpreg.Module):
        lr: float = 0.1

        @nn.compact
        def __call__(self, x):
            self.variable("calls", "count", lambda: jnp.zeros(()))
            return nn.Dense(1)(x)

    with pytest.raises(dpreg.InputError, match="calls"):
        dpreg.Trainer(1).fit(Counter(), Rows(10).data(8))


def test_processes_with_unequal_devices_are_refused(monkeypatch):
    class Device(NamedTuple):
        process_index: int
        platform: str = "cpu"

    there = [Device(0)] * 8 + [Device(1)] * 7
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: there[:8])
    monkeypatch.setattr(jax, "devices", lambda platform=None: there)
    with pytest.raises(dpreg.InputError, match="process 1 has 7 devices and process 0 has 8; give num_devices=7"):
        data_mesh(16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_devices": 0}, "num_devices=0: use 1 or more"),
        ({"num_devices": 9}, "num_devices=9 with num_shards=8"),
        ({"num_devices": 9, "num_shards": 16}, "8 cpu devices"),
        ({"reduction": "mean"}, "reduction='mean': use pmean or ordered"),
        ({"backend": "tf"}, "backend='tf': use jit or pmap"),
        ({"placement": "disk"}, "placement='disk': use"),
        ({"gradient_clip_val": math.nan}, "gradient_clip_val=nan: use a finite"),
        ({"platform": "gpu"}, "platform='gpu': there is none; this machine has 8 cpu devices"),
        ({"max_epochs": 0}, "max_epochs=0: use 1 or more"),
    ],
)
def test_invalid_arguments_of_a_trainer_are_refused_in_one_line(arguments, message):
    with pytest.raises(dpreg.InputError, match=message) as caught:
        dpreg.Trainer(**{"max_epochs": 1, **arguments})
    assert "\n" not in str(caught.value)


def overfitted():
    """Returns data with more columns than rows, whose validation loss has its minimum early."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(400, 30))
    y = x[:, 0] + rng.normal(size=400)
    train, val = (dpreg.ArraySource(x[rows], y[rows]) for rows in (slice(0, 24), slice(24, 400)))
    return dpreg.RegressionData(train, val, 8)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_patience_stops_a_run_and_restores_the_best_epoch(num_devices):
    def trained(max_epochs, **arguments):
        trainer = dpreg.Trainer(max_epochs, num_devices, reduction="ordered", **arguments)
        curve = []
        trainer.add_callback(FunctionCallback(lambda p: curve.append(p.val_loss) if p.epoch_ended else None))
        trainer.fit(dpreg.LinearRegressionScratch(30, lr=0.02), overfitted())
        return trainer, curve

    whole, curve = trained(40)
    best = int(np.argmin(curve)) + 1
    assert 3 < best < 30
    stopped, shorter = trained(40, patience=4)
    assert shorter == curve[: best + 4]
    assert (stopped.step, stopped.loop.best.step) == (3 * (best + 4), 3 * best)
    assert stopped.val_loss == curve[best - 1]
    until_best, _ = trained(best)
    np.testing.assert_array_equal(stopped.state.params["w"], until_best.state.params["w"])
    assert not np.array_equal(stopped.state.params["w"], whole.state.params["w"])
    with pytest.raises(dpreg.InputError, match="no rows held out"):
        dpreg.Trainer(3, patience=1).fit(whole.model, dpreg.RegressionData(overfitted().train, None, 8))


class Plain(Net):
    """A small model with an optimizer that keeps a state."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(1)(x)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_a_state_kept_by_the_user_stays_valid_while_training_goes_on(backend):
    """The steps donate the state, and reading a donated array would crash the process."""
    kept = []
    trainer = dpreg.Trainer(3, 3, backend=backend)
    trainer.add_callback(FunctionCallback(lambda p: kept.append((trainer.state.params, trainer.variables))))
    trainer.prepare_data(Rows(64).data(16, num_val=8))
    trainer.prepare_model(Plain(optax.sgd(0.05, 0.9)))
    start = trainer.state
    copies = jax.device_get(start)
    trainer.fit_epochs(1)
    first, first_values = trainer.state, jax.device_get(trainer.state)
    trainer.fit_epochs()
    end_values = jax.device_get(trainer.state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(start), copies)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), first_values)
    assert np.isfinite([np.sum(leaf) for leaf in jax.tree.leaves(kept)]).all()
    assert not np.array_equal(*(state.params["Dense_0"]["bias"] for state in (first_values, end_values)))
    # An assigned state is not donated, either: training from it twice gives the same bits.
    for _ in range(2):
        trainer.state = first
        assert trainer.step == 4
        trainer.fit_epochs()
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.state), end_values)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), first_values)


def test_a_state_can_move_between_trainers_and_one_that_does_not_fit_is_refused():
    trainers = [dpreg.Trainer(2, num_devices) for num_devices in (2, 1)]
    for trainer in trainers:
        trainer.prepare_data(Rows(64).data(16))
        trainer.prepare_model(dpreg.LinearRegressionScratch(3, 0.1))
    one, other = trainers
    one.fit_epochs(1)
    other.state = one.state
    one.fit_epochs()
    other.fit_epochs()
    np.testing.assert_allclose(other.state.params["w"], one.state.params["w"], rtol=1e-6)
    w = np.ones((3, 1), np.float32)
    other.state = other.state.replace(step=0, params={"w": w, "b": np.zeros(1, np.float32)})
    w[:] = 7
    np.testing.assert_array_equal(other.variables["params"]["w"], np.ones((3, 1)))
    assert other.step == 0
    with pytest.raises(dpreg.InputError, match="are not those of this model"):
        other.state = other.state.replace(params={"w": np.ones((4, 1), np.float32), "b": np.zeros(1, np.float32)})
    with pytest.raises(dpreg.InputError, match=r"after step 3, .* step 0 or the end of an epoch of 4 steps"):
        other.state = other.state.replace(step=3)
    with pytest.raises(dpreg.InputError, match="call fit first"):
        _ = dpreg.Trainer(1).state


def _interrupt_after(seconds):
    """Returns a thread that sends SIGINT to this process after the given seconds."""

    def send():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    return threading.Thread(target=send)


@pytest.mark.parametrize("num_val", [0, 8])
def test_ctrl_c_at_any_time_loses_nothing_and_training_resumes_to_the_same_bits(num_val):
    reported = []
    trainer = dpreg.Trainer(
        40, 2, steps_per_block=3, callbacks=[FunctionCallback(reported.append)], patience=30 if num_val else 0
    )
    trainer.prepare_data(Rows(101).data(16, num_val=num_val))
    trainer.prepare_model(Plain(optax.sgd(0.01, 0.9)))
    start = trainer.state
    began = time.perf_counter()
    trainer.fit_epochs()
    seconds, whole, end = time.perf_counter() - began, [*reported], jax.device_get(trainer.state)
    interrupts, rng = 0, np.random.default_rng(num_val)
    for _ in range(4):
        reported.clear()
        trainer.state = start
        while not trainer.done:
            thread = _interrupt_after(rng.uniform(0, seconds / 2))
            try:
                thread.start()
                trainer.fit_epochs()
                thread.join()
                time.sleep(0.01)
            except KeyboardInterrupt:
                interrupts += 1
                thread.join()
                if not trainer.done:
                    assert int(trainer.state.step) == trainer.step == (reported[-1].step if reported else 0)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.state), end)
        for field in ("step", "train_loss", "gradient_norm", "val_loss"):
            assert [getattr(p, field) for p in reported if p.train_loss] == [
                getattr(p, field) for p in whole if p.train_loss
            ]
    assert interrupts >= 4


def test_a_second_ctrl_c_ends_training_at_once_and_a_kept_state_can_resume():
    trainer = dpreg.Trainer(20, 2, steps_per_block=2)
    trainer.prepare_data(Rows(101).data(16))
    trainer.prepare_model(dpreg.LinearRegressionScratch(3, 0.1))
    start = trainer.state
    trainer.fit_epochs()
    end = trainer.state

    def interrupt(progress):
        if progress.step == 30 and not interrupted:
            interrupted.append(1)
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    interrupted = []
    trainer.add_callback(FunctionCallback(interrupt))
    trainer.state = start
    with pytest.raises(KeyboardInterrupt):
        trainer.fit_epochs()
    with pytest.raises(dpreg.InputError, match="fit anew"):
        trainer.fit_epochs()
    trainer.state = start
    trainer.fit_epochs()
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, end.params)


def test_damaged_entries_of_the_compilation_cache_are_recompiled_and_rewritten(tmp_path, monkeypatch):
    """No warning may appear (it would be an error here); JAX itself would warn at each start and keep the entries."""
    monkeypatch.setattr(jax_cache, "get_file_cache", jax_cache.get_file_cache)
    before = {name: jax.config.values[name] for name in CACHE_OPTIONS}
    x = jnp.arange(3.0)

    def compiled():
        return float(jax.jit(lambda x: jnp.vdot(x, x) + 0.125)(x))

    try:
        jax_cache.reset_cache()
        compilation_cache.use(str(tmp_path))
        value = compiled()
        whole = {file.name: file.read_bytes() for file in tmp_path.glob("*-cache")}
        assert whole
        for damage in (lambda content: content[: len(content) // 2], lambda content: content[:-40] + b"\0" * 40):
            for name, content in whole.items():
                (tmp_path / name).write_bytes(damage(content))
            jax.clear_caches()
            jax_cache.reset_cache()
            assert compiled() == value
            for name in whole:
                content = (tmp_path / name).read_bytes()
                assert content[-16:] == hashlib.blake2b(content[:-16], digest_size=16).digest()
    finally:
        for name, was in before.items():
            jax.config.update(name, was)
        jax_cache.reset_cache()


@pytest.mark.parametrize(
    ("name", "right"),
    [("on_epoch_end", "on_epoch"), ("on_step", "on_steps"), ("on_logs", "on_log"), ("on_sinc", "on_sync")],
)
def test_a_callback_method_that_is_no_event_is_refused_with_a_suggestion(name, right):
    callback = type("Mine", (dpreg.Callback,), {name: lambda self, progress: None, "__module__": __name__})()
    refused = (
        f"^Mine.{name}: dpreg.Callback has no such event; define {right}, or another of on_steps, on_log, on_epoch"
    )
    with pytest.raises(dpreg.InputError, match=refused):
        dpreg.Trainer(1, callbacks=[callback])
    with pytest.raises(dpreg.InputError, match=refused):
        dpreg.Trainer(1).add_callback(callback)


def test_a_helper_method_of_a_callback_may_have_a_name_like_an_event():
    class Counts(dpreg.Callback):
        improved, val_loss = 0, np.inf

        def on_epoch(self, progress):
            if progress.val_loss < self.val_loss:
                self.on_improvement(progress)

        def on_improvement(self, progress):
            self.improved, self.val_loss = self.improved + 1, progress.val_loss

    counts = Counts()
    dpreg.Trainer(2, callbacks=[counts]).fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(80).data(8, num_val=16))
    assert counts.improved
