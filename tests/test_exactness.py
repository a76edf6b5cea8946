"""Exactness: the result of a run does not depend on the number of devices."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from typing import ClassVar

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cluster import ROOT
from flax import linen as nn
from jax import lax
from jax._src import config as jax_config
from models import Net, Rows

import dpreg
from dpreg.config import Config
from dpreg.data.sampler import Sampler
from dpreg.step import tuning
from dpreg.step.rounding import round_products
from dpreg.train.build import build_model
from dpreg.train.callback import FunctionCallback

sys.path.insert(0, os.path.join(ROOT, "tests", "benchmarks"))

import bits

DEVICES = (1, 2, 3, 6, 8)  # There are 8 shards; of six devices the last two have none.
LAYOUTS = list(itertools.product(("jit", "pmap"), ("device", "host")))
OPTIMIZERS = {
    "adam": optax.adam(0.01),
    "clip+momentum": optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.05, momentum=0.9)),
}
# (rows, global batch): ragged, fewer than a batch, fewer than the shards
SIZES = {"ragged": (203, 64), "less than a batch": (21, 64), "less than the shards": (5, 16)}


def trained(model, data, max_epochs=2, num_devices=None, **arguments):
    trainer = dpreg.Trainer(max_epochs, num_devices, **arguments)
    records = []
    trainer.add_callback(FunctionCallback(records.append))
    with jax.numpy_dtype_promotion("standard" if isinstance(model, Net) else "strict"):  # optax.adam needs it
        trainer.fit(model, data)
    curve = [(r.step, r.train_loss, r.val_loss) for r in records if r.train_loss is not None]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((trainer.state.params, trainer.state.batch_stats))]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    return leaves, curve


def digest(result):
    leaves, curve = result
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves) + repr(curve).encode()).hexdigest()


def linear_run(w=(2, -3.4), num_train=1003, **arguments):
    data = dpreg.SyntheticRegressionData(w, 4.2, num_train=num_train, num_val=101, batch_size=64)
    return digest(trained(dpreg.LinearRegressionScratch(len(w), 0.03), data, reduction="ordered", **arguments))


def test_ordered_holds_for_rows_generated_in_chunks_of_any_size():
    run = functools.partial(linear_run, (1.5, -2.7, 3.1, 0.3, -0.9), 5000)
    assert len({run(num_devices=n, placement=p) for n, p in ((1, "device"), (8, "device"), (3, "host"))}) == 1


@pytest.mark.parametrize(
    ("inputs", "rows", "batch"),
    [(2, 3001, 32), (8, 5003, 1024), (32, 9001, 1024), (200, 3001, 256), (64, 20_003, 16_384), (3, 250_007, 200_000)],
)
def test_ordered_holds_for_batches_of_any_size(inputs, rows, batch):
    """The loops of the step and the copies of rows differ with these sizes."""
    rng = np.random.default_rng(0)
    source = dpreg.ArraySource(rng.standard_normal((rows, inputs)), rng.standard_normal((rows, 1)))

    def run(num_devices, placement):
        data = dpreg.RegressionData(source, None, batch)
        model = dpreg.LinearRegressionScratch(inputs, 0.01)
        return digest(trained(model, data, 1, num_devices, reduction="ordered", placement=placement))

    assert len({run(*layout) for layout in ((1, "device"), (3, "host"), (8, "device"))}) == 1


class Centred(dpreg.LinearRegressionScratch):
    """Subtracts the mean of all rows of a shard."""

    def __call__(self, x):
        return super().__call__(x - x.mean(axis=0, keepdims=True))


class Noisy(dpreg.Module):
    """Draws random numbers although it has no argument for the training mode."""

    lr: float = 0.01

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x))


@pytest.mark.parametrize("model", [Centred(3, 0.01), Noisy()])
def test_models_that_combine_rows_see_whole_shards_on_any_number_of_devices(model):
    def run(num_devices):
        return trained(model, Rows(1003).data(64), 1, num_devices)[0]

    one, *others = (run(n) for n in (1, 2, 8))
    for other in others:
        for leaf, same in zip(one, other, strict=True):
            np.testing.assert_allclose(leaf, same, rtol=1e-5, atol=1e-6)


@functools.cache
def network_run(optimizer, size, num_devices=8, num_val=0, **arguments):
    num_rows, batch = SIZES[size]
    data = Rows(num_rows, weighted=True).data(batch, num_val)
    return digest(trained(Net(OPTIMIZERS[optimizer]), data, 2, num_devices, reduction="ordered", **arguments))


@pytest.mark.parametrize(("reduction", "rows"), [("pmean", 90), ("ordered", 1003)])
def test_accumulated_batches_equal_one_larger_batch_on_any_number_of_devices(reduction, rows):
    def trained(batch, accumulate, devices, backend="jit", placement="device"):
        trainer = dpreg.Trainer(
            3,
            devices,
            reduction=reduction,
            backend=backend,
            placement=placement,
            accumulate_steps=accumulate,
            log_every_steps=1,
        )
        losses = []
        trainer.add_callback(
            FunctionCallback(lambda p: losses.append(p.train_loss) if p.train_loss is not None else None)
        )
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(rows, weighted=True).data(batch, num_val=20))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trainer.state.params)]), losses

    whole, losses = trained(128, 1, 8)
    found = [trained(32, 4, *how) for how in ((1,), (3, "pmap"), (8, "jit", "host"))]
    for params, own_losses in found:
        np.testing.assert_allclose(params, whole, atol=1e-6)
        np.testing.assert_allclose(own_losses, losses, rtol=1e-5)
    if reduction == "ordered":
        assert len({params.tobytes() for params, _ in found}) == 1


def per_leaf_norms():
    """Scales each leaf by the norm of its gradient, as LARS and LAMB do, and adds the spread of the gradients."""

    def update(updates, state, params):
        del params
        norms = jax.tree.map(lambda leaf: leaf / (1 + jnp.linalg.norm(leaf)) + leaf.var() / (1 + leaf.size), updates)
        return jax.tree.map(lambda leaf: -0.1 * leaf, norms), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def largest_only():
    """Keeps the larger half of the gradient's values, which needs a sort."""

    def update(updates, state, params):
        del params
        kept = jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) >= jnp.median(jnp.abs(leaf)), leaf, 0), updates)
        return jax.tree.map(lambda leaf: -0.1 * leaf, kept), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class WeightNormed(dpreg.Module):
    """Uses a value that depends only on the parameters, and so is the same in every shard of a step."""

    optimizer: optax.GradientTransformation

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1], 1))
        scale = self.param("scale", nn.initializers.ones, (1,))
        return x @ (w * (scale / jnp.linalg.norm(w))[None])


@pytest.mark.parametrize(
    ("optimizer", "inputs"),
    [
        *(("clip", 33), ("clip", 127), ("per-leaf norms", 17), ("per-leaf norms", 33), ("per-leaf norms", 127)),
        *(("sort", 17), ("weight norm", 33)),
    ],
)
def test_ordered_holds_for_any_function_of_the_gradient_in_the_update(optimizer, inputs):
    """XLA would hoist a function of only the gradient out of a loop in which only the state changes."""
    model = {
        "clip": dpreg.LinearRegressionScratch(inputs, 0.1),
        "per-leaf norms": dpreg.LinearRegressionScratch(inputs, 0.1, optimizer=per_leaf_norms()),
        "sort": dpreg.LinearRegressionScratch(inputs, 0.1, optimizer=largest_only()),
        "weight norm": WeightNormed(optimizer=optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))),
    }[optimizer]

    def run(num_devices):
        data, clip = Rows(503, inputs).data(64), 0.5 * (optimizer == "clip")
        return digest(trained(model, data, 2, num_devices, gradient_clip_val=clip, reduction="ordered"))

    assert len({run(n) for n in (1, 2, 8)}) == 1


@pytest.mark.parametrize(("seed", "case"), [(42, 101), (43, 35), (51, 23), (52, 45)])
def test_ordered_holds_for_the_failures_that_the_random_search_has_found(seed, case):
    """Found by tests/benchmarks/bits.py: squared gradients in the optimizer's state, and divisions by a scalar.

    LLVM contracted the former into fused multiply-adds in some programs; XLA replaced the latter by multiplications.
    """
    with jax.numpy_dtype_promotion("standard"):
        assert bits.check(seed, case, many=False) == []


def test_products_are_rounded_before_they_are_added():
    """Compares all kinds of control flow with IEEE arithmetic that rounds after each operation."""
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(1000).astype(np.float32) for _ in range(3))
    product = (a * b) + c  # NumPy rounds after each operation

    @jax.custom_jvp
    def own(a, b, c):
        return a * b + c

    own.defjvp(lambda primals, tangents: (own(*primals), tangents[0]))

    def repeated(a, b, c):
        return lax.scan(lambda carry, _: (carry * 0 + (a * b + c), None), c, None, length=2)[0]

    def in_while(a, b, c):
        return lax.while_loop(lambda carry: carry[0] < 1, lambda carry: (carry[0] + 1, a * b + carry[1]), (0, c))[1]

    def in_branch(a, b, c):
        return lax.cond(a[0] > -1e9, lambda: a * b + c, lambda: c)

    def reduced(a, b, c):  # The reducer is traced, but not called on these operands.
        return lax.reduce(jnp.stack([a * b, c]), np.float32(0), lambda p, q: jnp.where(p > 1e9, p, p + q), (0,))

    def moved(a, b, c):
        return (jnp.negative((a * b).reshape(10, 100)) - c.reshape(10, 100)).reshape(-1) * -1

    def dot_of_one_term(a, b, c):
        return jax.vmap(jnp.dot)(a[:, None], b[:, None]) + c

    functions = [own, repeated, in_while, in_branch, reduced, moved, dot_of_one_term]
    functions += [jax.jit(own), jax.checkpoint(lambda a, b, c: a * b + c)]
    for function in functions:
        traced = jax.make_jaxpr(function)(a, b, c)
        (found,) = jax.jit(functools.partial(round_products, traced))(jnp.int32(0), a, b, c)
        assert np.asarray(found).tobytes() == product.tobytes(), function


class Drawing(Net):
    """A small network whose optimizer also draws random numbers, with a key that it makes itself."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(1)(nn.Dropout(0.25, deterministic=not train)(x))

    def configure_optimizers(self):
        return optax.chain(optax.add_noise(0.1, 0.5, 3), self.optimizer)


def test_random_numbers_of_a_run_do_not_depend_on_the_jax_settings_of_the_process():
    def run(num_devices):
        data = dpreg.SyntheticRegressionData([1.0, 2.0, 3.0], 4.2, num_train=203, num_val=21, batch_size=64)
        return digest(trained(Drawing(OPTIMIZERS["adam"]), data, 1, num_devices, reduction="ordered"))

    expected = run(1)
    for num_devices, settings in (
        (3, [jax.default_prng_impl("rbg")]),
        (1, [jax.threefry_partitionable(False), jax_config.random_seed_offset(5)]),
        (3, [jax.default_matmul_precision("bfloat16"), jax.enable_x64(True)]),
    ):
        with contextlib.ExitStack() as stack:
            for setting in settings:
                stack.enter_context(setting)
            assert run(num_devices) == expected


def test_metrics_do_not_depend_on_how_many_steps_a_call_takes():
    """Steps that pad the last call do not count, either."""
    rows = Rows(1003, weighted=True).source()

    def run(steps, num_devices):
        trainer = dpreg.Trainer(1, num_devices, reduction="ordered", steps_per_block=steps, placement="host")
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), dpreg.RegressionData(rows, rows, 8))
        return trainer.val_loss, trainer.metrics

    assert run(7, 1) == run(50, 8) == run(None, 3)


@pytest.mark.parametrize(("backend", "placement"), LAYOUTS)
def test_ordered_linear_gives_the_same_bits_on_any_number_of_devices(backend, placement):
    devices = DEVICES if (backend, placement) == ("jit", "device") else (1, 3)
    results = {n: linear_run(num_devices=n, backend=backend, placement=placement) for n in devices}
    assert results == dict.fromkeys(devices, linear_run(num_devices=8))


@pytest.mark.parametrize(
    ("backend", "placement", "optimizer", "devices"),
    [
        ("jit", "device", "adam", (1, 6)),
        ("jit", "host", "clip+momentum", (1, 3)),
        ("pmap", "device", "clip+momentum", (3, 8)),  # The step is the same for both placements.
    ],
)
def test_ordered_network_gives_the_same_bits_on_any_number_of_devices(backend, placement, optimizer, devices):
    """Validation losses agree as well."""
    run = functools.partial(network_run, optimizer, "ragged", num_val=37)
    results = {n: run(n, backend=backend, placement=placement) for n in devices}
    assert results == dict.fromkeys(devices, run(8))


@pytest.mark.parametrize(
    ("backend", "placement", "optimizer", "size"),
    [("jit", "host", "adam", "less than a batch"), ("pmap", "device", "clip+momentum", "less than the shards")],
)
def test_ordered_network_with_few_rows_gives_the_same_bits(backend, placement, optimizer, size):
    one, eight = (network_run(optimizer, size, n, backend=backend, placement=placement) for n in (1, 8))
    assert one == eight


@pytest.mark.parametrize(("model", "optimizer"), [("linear", "lbfgs"), ("mlp", "momentum")])
def test_ordered_holds_for_several_targets(model, optimizer):
    """Reported losses agree as well: how rows are read from memory must not change the arithmetic."""
    x = np.random.default_rng(0).normal(size=(403, 5))
    rows = dpreg.ArraySource(x, np.stack([x.sum(axis=1), x[:, 0]], axis=1))
    data = dpreg.RegressionData(rows, dpreg.ArraySource(*(rows[np.arange(77)][name] for name in "xy")), 32)
    config = Config(model=model, optimizer=optimizer, lr=0.02, hidden=(8,))
    results = {
        digest(trained(build_model(config, 5, 2), data, 2, n, reduction="ordered", placement=placement))
        for n, placement in ((1, "device"), (8, "device"), (3, "host"))
    }
    assert len(results) == 1


def test_every_process_compiles_the_same_program(tmp_path):
    """The program must not depend on Python's hash seed; otherwise no process finds it in the cache of another."""
    program = (
        "import dpreg; from dpreg.train.build import build_model; from dpreg.config import Config\n"
        "dpreg.start('cpu', 2, threads=8)\n"
        "model = build_model(Config(model='mlp', hidden=(4,), dropout=0.1, batch_norm=True), 2, 1)\n"
        "data = dpreg.SyntheticRegressionData([1.0, 2.0], 3.0, num_train=64, num_val=16)\n"
        "dpreg.Trainer(1, reduction='ordered').fit(model, data)\n"
    )
    found = []
    for seed in "12":  # A hash seed needs a fresh process.
        environment = os.environ | {"PYTHONHASHSEED": seed, "XDG_CACHE_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, timeout=240)
        found.append({path.name for path in tmp_path.rglob("*-cache")})
    assert found[0]
    assert found[1] == found[0]


def test_ordered_holds_on_any_number_of_cores(tmp_path):
    """XLA divides products of this size among its threads, and the division determines the order of the sums."""
    flags = "--platform=cpu --reduction=ordered --model=mlp --num_train=8192 --batch_size=8192 --num_val=4096"
    cores = sorted(os.sched_getaffinity(0))
    runs = {"one": (1, cores[:1]), "all": (1, cores), "eight": (8, cores)}
    for name, (n, on) in runs.items():
        bound = f"import os; os.sched_setaffinity(0, {on}); from dpreg.main import main; main()"
        done = forked.run(
            *("-c", bound, *flags.split(), f"--num_devices={n}", f"--workdir={tmp_path / name}"), env={"NPROC": None}
        )
        assert done.returncode == 0, done.stderr
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in runs]
    assert len({(s["params_sha256"], s["val_loss"], s["train_loss"]) for s in summaries}) == 1


def test_ordered_linear_holds_on_any_number_of_threads():
    """Threads divide large shards, but the order of the sums in a matrix-vector product does not depend on them."""
    program = (
        "import sys, hashlib, numpy, dpreg\n"
        "dpreg.start('cpu', int(sys.argv[1]), threads=int(sys.argv[2]))\n"
        "x = numpy.random.default_rng(0).standard_normal((20_003, 65), numpy.float32)\n"
        "data = dpreg.RegressionData(dpreg.ArraySource(x[:, 1:], x[:, :1]), None, 16_384)\n"
        "trainer = dpreg.Trainer(2, reduction='ordered', platform='cpu')\n"
        "trainer.fit(dpreg.LinearRegressionScratch(64, lr=0.03), data)\n"
        "print(hashlib.sha256(numpy.asarray(trainer.state.params['w']).tobytes()).hexdigest(), trainer.train_loss)\n"
    )
    found = set()
    for how in ((1, 1), (1, 2), (1, 8), (8, 8)):  # devices, threads
        done = forked.run("-c", program, *how)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


@pytest.mark.parametrize("targets", [1, 2])
def test_products_whose_sums_depend_on_the_number_of_threads_cause_a_warning(caplog, targets):
    data = dpreg.RegressionData(dpreg.ArraySource(np.zeros((40, 3)), np.zeros((40, targets))), None, 8)
    model = dpreg.LinearRegressionScratch(3, 0.1, num_targets=targets)
    trained(model, data, 1, 2, reduction="ordered", num_shards=4)
    assert ("products are shared by 8 threads" in caplog.text) == (targets > 1)


class Features(dpreg.LinearRegressionScratch):
    """Has a product of matrices, but not one with parameters."""

    row_wise: ClassVar[bool] = True

    def __call__(self, x):
        return super().__call__(jnp.tanh(x @ jnp.eye(self.num_inputs)))


def test_a_matrix_product_without_parameters_causes_the_thread_warning(caplog):
    data, how = Rows(40).data(8), {"reduction": "ordered", "num_shards": 4}
    for model, warns in ((dpreg.LinearRegressionScratch(3, 0.1), False), (Features(3, 0.1), True)):
        trained(model, data, 1, 2, **how)
        assert ("products are shared by 8 threads" in caplog.text) == warns


def test_ordered_holds_for_another_activation():
    """With one shard per device XLA once specialized the program to that shard, which changed a gelu network."""
    data, model = Rows(150, num_inputs=5).data(40), Net(optax.sgd(0.05), activation=nn.gelu)
    assert len({digest(trained(model, data, 1, n, reduction="ordered")) for n in (1, 8)}) == 1


@pytest.mark.parametrize(
    ("reduction", "model"), [("pmean", dpreg.LinearRegressionScratch(3, 0.03)), ("ordered", Net(OPTIMIZERS["adam"]))]
)
def test_steps_per_block_do_not_change_the_result(reduction, model):
    def run(steps):
        data = Rows(203, weighted=True).data(16)
        return digest(trained(model, data, reduction=reduction, steps_per_block=steps, num_devices=2))

    assert run(2) == run(None)


def sgd_in_float64(x, y, weight, lr, batches, start):
    """Weighted minibatch SGD on linear least squares as in the book, without any code of dpreg."""
    w, b = np.array(start[0], np.float64), np.array(start[1], np.float64)
    losses = []
    for rows in batches:
        x_b, y_b, c = x[rows].astype(np.float64), y[rows].astype(np.float64), weight[rows].astype(np.float64)
        error = x_b @ w + b - y_b
        losses.append((c @ (error**2).sum(1) / 2, c.sum()))
        total = c.sum() or 1.0
        w -= lr * (x_b.T @ (c[:, None] * error)) / total
        b -= lr * (c @ error) / total
    return w, b, losses


def batches_of(sampler, seed, epochs):
    for step in range(epochs * sampler.steps_per_epoch):
        rows = []
        for shard in range(sampler.num_shards):
            size = sampler.shard_size(shard)
            positions = sampler.positions(np.array(step), np.array(shard), seed)
            rows += [sampler.shard_start(shard) + p for p in positions if p < size]
        yield np.array(rows)


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
@pytest.mark.parametrize(
    ("backend", "placement", "weighted"), [*((*layout, True) for layout in LAYOUTS), (*LAYOUTS[0], False)]
)
def test_agrees_with_sgd_in_float64(reduction, backend, placement, weighted):
    source = Rows(1003, num_inputs=5, weighted=weighted).source()
    model = dpreg.LinearRegressionScratch(5, 0.03)
    start = model.init(jax.random.key(0), source.x[:1])["params"]
    sampler = Sampler(1003, 8, 64)
    batches = list(batches_of(sampler, 0, 3))
    assert sorted(np.concatenate(batches)) == sorted(list(range(1003)) * 3)
    w, b, losses = sgd_in_float64(source.x, source.y, source.weight, 0.03, batches, (start["w"], start["b"]))
    last_epoch = np.array(losses[-sampler.steps_per_epoch :]).sum(0)
    for n in DEVICES if (backend, placement, weighted) == ("jit", "device", True) else (3,):
        trainer = dpreg.Trainer(3, n, reduction=reduction, backend=backend, placement=placement)
        trainer.fit(model, dpreg.RegressionData(source, None, 64))
        np.testing.assert_allclose(trainer.state.params["w"], w, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(trainer.state.params["b"], b, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(trainer.train_loss, last_epoch[0] / last_epoch[1], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
@pytest.mark.parametrize(("batch", "accumulate", "run"), [(256, 1, 8), (256, 3, 8), (24, 4, 4)])
def test_agrees_with_float64_for_any_strip_length_and_accumulated_batches(
    reduction, batch, accumulate, run, monkeypatch
):
    monkeypatch.setattr("dpreg.data.sampler._FEWEST_STRIPS", 8)
    monkeypatch.setattr(tuning, "_CHUNK_BYTES_ONE_CORE", 300)
    monkeypatch.setattr(tuning, "_CHUNK_BYTES_SHARED", 300)
    source, model = Rows(1003, weighted=True).source(), dpreg.LinearRegressionScratch(3, 0.1)
    start = model.init(jax.random.key(0), source.x[:1])["params"]
    sampler = Sampler(1003, 8, batch * accumulate)
    assert sampler.strip_rows == run
    batches = list(batches_of(sampler, 0, 3))
    w, b, _ = sgd_in_float64(source.x, source.y, source.weight, 0.1, batches, (start["w"], start["b"]))
    found = set()
    for n, backend, placement in (
        (1, "jit", "device"),
        (3, "pmap", "device"),
        (8, "jit", "host"),
    ):
        trainer = dpreg.Trainer(
            3, n, reduction=reduction, backend=backend, placement=placement, accumulate_steps=accumulate
        )
        trainer.fit(model, dpreg.RegressionData(source, None, batch))
        np.testing.assert_allclose(trainer.state.params["w"], w, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(trainer.state.params["b"], b, rtol=1e-6, atol=1e-7)
        found.add(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.state.params)))
    assert len(found) == 1 or reduction == "pmean"


def network_in_float64(model, source, batch_size, seed, epochs):
    """Trains `Net` shard by shard in float64 on real rows only: no padding, no masks, no code of dpreg.

    Rows of weight 0 are left out as well. Dropout draws its mask in float32, as the float32 model does.
    """
    sampler = Sampler(len(source), 8, batch_size)
    variables = model.init(jax.random.key(seed), jnp.asarray(source.x[:1]))
    with jax.enable_x64(True):
        to_float64 = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)  # noqa: E731
        params, stats = to_float64(variables["params"]), to_float64(variables["batch_stats"])
        optimizer = model.configure_optimizers()
        opt_state = optimizer.init(params)

        def shard_loss(params, stats, x, y, weight, kept, key):
            def masked_dropout(next_call, args, kwargs, context):
                if not isinstance(context.module, nn.Dropout):
                    return next_call(*args, **kwargs)
                drawn = (sampler.shard_batch, args[0].shape[1])
                keep = jax.random.bernoulli(context.module.make_rng("dropout"), jnp.float32(0.75), drawn)[kept]
                return jnp.where(keep, args[0] / 0.75, 0)

            with nn.intercept_methods(masked_dropout):
                prediction, new = model.apply(
                    {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"], rngs={"dropout": key}
                )
            return (weight * jnp.square(prediction - y)[:, 0] / 2).sum(), new["batch_stats"]

        gradient_of = jax.jit(jax.value_and_grad(shard_loss, has_aux=True))
        for step in range(epochs * sampler.steps_per_epoch):
            step_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
            totals, weights, count = None, 0.0, 0
            for shard in range(8):
                positions = sampler.positions(np.array(step), np.array(shard), seed)
                rows = sampler.shard_start(shard) + np.minimum(positions, sampler.shard_size(shard) - 1)
                kept = np.flatnonzero((positions < sampler.shard_size(shard)) & (source.weight[rows] > 0))
                if not len(kept):
                    continue
                x, y, weight = (np.float64(c[rows[kept]]) for c in (source.x, source.y, source.weight))
                key = jax.random.fold_in(step_key, shard)
                (_, new), gradient = gradient_of(params, stats, x, y, weight, kept, key)
                part = (gradient, jax.tree.map(lambda leaf, n=kept.size: leaf * n, new))
                totals = part if totals is None else jax.tree.map(jnp.add, totals, part)
                weights, count = weights + weight.sum(), count + len(kept)
            gradient, new = totals
            updates, opt_state = optimizer.update(jax.tree.map(lambda g, w=weights: g / w, gradient), opt_state, params)
            params, stats = optax.apply_updates(params, updates), jax.tree.map(lambda leaf, n=count: leaf / n, new)
        return [np.asarray(leaf) for leaf in jax.tree.leaves((params, stats))]


@pytest.mark.parametrize(
    ("optimizer", "ways"),
    [
        ("adam", ((2, "pmean"), (8, "ordered"))),
        ("clip+momentum", ((3, "pmean"), (1, "ordered"))),
    ],
)
def test_network_agrees_with_float64(optimizer, ways):
    model, data = Net(OPTIMIZERS[optimizer]), Rows(203, weighted=True).data(64)
    with jax.numpy_dtype_promotion("standard"):
        expected = np.concatenate([leaf.ravel() for leaf in network_in_float64(model, data.train, 64, 0, 1)])
    for n, reduction in ways:
        leaves, _ = trained(model, data, 1, n, reduction=reduction)
        result = np.concatenate([leaf.ravel() for leaf in leaves])
        assert np.linalg.norm(result - expected) <= 1e-6 * np.linalg.norm(expected), (n, reduction)
