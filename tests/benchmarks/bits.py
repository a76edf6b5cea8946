"""Searches for runs whose result depends on the devices: `python tests/benchmarks/bits.py --minutes=60 --seed=1`.

Case `number` of a seed is a random run: rows, model, loss, optimizer, shards and more. Under `ordered`, the bits of its
parameters, optimizer state, curve, metrics and predictions must be equal on all layouts drawn for it: devices,
processes, backend, placement and steps per call. Under `pmean` they must agree to a relative tolerance of 1e-5.
Differences are printed with the command that reproduces them, and the exit code is then 1.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dpreg
from dpreg.config import Config
from dpreg.distributed import devices, processes
from dpreg.train.build import build_model, objective_and_optimizer
from dpreg.train.callback import FunctionCallback

THREADS, MOST_DEVICES, MOST_STEPS = 8, 8, 40
STATUS_SECONDS, CACHED_CASES = 60.0, 50  # seconds between status lines; cases whose programs stay in memory
PROCESSES_EVERY = 25  # One case of so many also runs in two processes, which take seconds to start.
TOLERANCE = 1e-5
NAMED = ("linear", "concise", "mlp")
OWN = ("weight norm", "layer norm", "gru", "attention", "embedding", "conv")
OURS = ("sgd", "momentum", "adam", "adamw", "lbfgs")
OPTAX = ("adagrad", "rmsprop", "lamb", "lars", "lion", "adafactor", "novograd", "yogi", "adabelief", "nadam", "agc")
SMOOTH = ("sgd", "momentum")  # These updates are smooth in the gradient and do not amplify its rounding.


@dataclasses.dataclass(frozen=True)
class Case:
    """The settings of a run that determine its result."""

    seed: int
    rows: int
    features: int
    targets: int
    val_rows: int
    shards: int
    shard_batch: int
    reduction: str
    model: str
    loss: str
    optimizer: str
    schedule: str
    penalty: float
    clip: float
    weights: str
    accumulate: int
    precision: str
    batch_norm: bool
    dropout: float
    epochs: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices, processes and options that compute a run."""

    devices: int
    backend: str
    placement: str
    steps_per_block: int | None


def draw(seed: int, number: int) -> tuple[Case, list[Layout]]:
    """Draws the case of a number, and the layouts on which to compute it."""
    rng = np.random.default_rng((seed, number))

    def one(*values):
        return values[rng.integers(len(values))]

    def size(most):  # small and large sizes equally often
        return int(np.exp(rng.uniform(0, np.log(most + 1))))

    reduction = one("ordered", "ordered", "ordered", "pmean")
    smooth = reduction == "pmean"
    shards, shard_batch, model = int(rng.integers(1, 17)), size(64), one(*NAMED, *NAMED, *OWN)
    loss = one("squared", "squared", "huber", "logistic", "poisson", "softmax")
    loss = loss if smooth else one(loss, loss, "absolute", "quantile", "gamma")
    case = Case(
        seed=int(rng.integers(2**31)),
        rows=min(size(5000), MOST_STEPS * shards * shard_batch),
        features=size(300),
        targets=1 if loss == "softmax" or model in OWN else one(1, 1, 2, 3),
        val_rows=one(0, 1, size(300)),
        shards=shards,
        shard_batch=shard_batch,
        reduction=reduction,
        model=model,
        loss=loss,
        optimizer=one(*SMOOTH) if smooth else one(*OURS, *OPTAX),
        schedule=one("constant", "constant", "linear", "cosine", "inverse_sqrt"),
        penalty=one(0.0, 0.0, 0.01),
        clip=one(0.0, 0.5),
        weights=one("none", "some 0", "most 0"),
        accumulate=one(1, 1, 1, 3),
        precision=one("float32", "float32", "float32", "float64", "bfloat16"),
        batch_norm=bool(rng.random() < 0.3),
        dropout=one(0.0, 0.3),
        epochs=one(1, 2),
    )
    most = min(shards, MOST_DEVICES)
    counts = sorted({1, most, *(int(n) for n in rng.integers(1, most + 1, 2))})
    how = [(one("jit", "jit", "pmap"), one("auto", "device", "host"), one(None, None, 1, 3)) for _ in counts]
    return case, [Layout(count, *rest) for count, rest in zip(counts, how, strict=True)]


def rows_of(case: Case, number: int, key: int) -> dpreg.ArraySource:
    """Returns rows with targets in the domain of the loss."""
    rng = np.random.default_rng((case.seed, key))
    x = rng.normal(size=(number, case.features))
    z = x @ rng.normal(size=(case.features, case.targets)) / case.features**0.5 + rng.normal(
        size=(number, case.targets)
    )
    y = {
        "logistic": lambda: z > 0,
        "softmax": lambda: np.clip(np.floor(z + 1), 0, 2),
        "poisson": lambda: rng.poisson(np.exp(np.clip(z, -3, 3))),
        "gamma": lambda: np.exp(np.clip(z, -3, 3)),
    }.get(case.loss, lambda: z)()
    share = {"none": 0.0, "some 0": 0.2, "most 0": 0.9}[case.weights]
    weight = None if not share else rng.uniform(0.5, 2, number) * (rng.random(number) >= share)
    dtype = np.float64 if case.precision == "float64" else np.float32
    return dpreg.ArraySource(x, y, weight, dtype)


class Own(dpreg.Module):
    """A model as users write them, with flax layers that mix the values of a row."""

    kind: str = ""
    outputs: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        dense = functools.partial(nn.Dense, dtype=x.dtype, param_dtype=x.dtype)
        if self.kind == "weight norm":
            w = self.param("w", nn.initializers.normal(1.0), (x.shape[-1], self.outputs), x.dtype)
            return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))
        if self.kind == "layer norm":
            x = nn.LayerNorm(dtype=x.dtype, param_dtype=x.dtype)(dense(12)(x))
        elif self.kind == "embedding":
            which = jnp.clip(jnp.floor(x[:, 0] * 3 + 5), 0, 9).astype(jnp.int32)
            x = nn.Embed(10, 6, dtype=x.dtype, param_dtype=x.dtype)(which)
        else:
            sequence = jnp.pad(x[:, :24], ((0, 0), (0, -x[:, :24].shape[1] % 4))).reshape(len(x), -1, 4)
            if self.kind == "gru":
                x = nn.RNN(nn.GRUCell(6, dtype=x.dtype, param_dtype=x.dtype))(sequence)[:, -1]
            elif self.kind == "attention":
                x = nn.MultiHeadDotProductAttention(2, dtype=x.dtype, param_dtype=x.dtype)(sequence).mean(axis=1)
            else:
                x = nn.Conv(5, (3,), dtype=x.dtype, param_dtype=x.dtype)(sequence).max(axis=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(x))
        return dense(self.outputs)(x)


def optax_optimizer(name: str):
    """Returns an optimizer of optax."""
    if name == "agc":
        return optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.01, momentum=0.9, nesterov=True))
    return getattr(optax, name)(0.003)


def model_of(case: Case, num_steps: int):
    """Returns the model with its loss and its optimizer."""
    named = case.model in NAMED
    config = Config(
        model=case.model if named else "linear",
        hidden=(9, 16),
        loss=case.loss,
        num_classes=3,
        optimizer=case.optimizer if case.optimizer in OURS else "sgd",
        lr=0.003,
        lr_schedule=case.schedule,
        l1=case.penalty if case.optimizer == "sgd" else 0.0,
        l2=case.penalty,
        batch_norm=case.batch_norm and case.model == "mlp",
        dropout=case.dropout if case.model == "mlp" else 0.0,
    )
    parts = objective_and_optimizer(config, num_steps)
    if case.optimizer in OPTAX:
        parts["optimizer"] = optax_optimizer(case.optimizer)
    if not named:
        return Own(kind=case.model, outputs=parts["objective"].outputs(case.targets), dropout=case.dropout, **parts)
    return build_model(config, case.features, case.targets, num_steps).clone(**parts)


def compute(case: Case, layout: Layout) -> dict[str, np.ndarray]:
    """Computes the run on a layout and returns all its numbers by name."""
    val = rows_of(case, case.val_rows, 1) if case.val_rows else None
    if val is not None and not val.weight.any():
        val = None
    data = dpreg.RegressionData(rows_of(case, case.rows, 0), val, case.shards * case.shard_batch)
    records = []
    trainer = dpreg.Trainer(
        case.epochs,
        layout.devices,
        case.clip,
        num_shards=case.shards,
        precision=case.precision,
        reduction=case.reduction,
        backend=layout.backend,
        placement=layout.placement,
        seed=case.seed,
        steps_per_block=layout.steps_per_block,
        accumulate_steps=case.accumulate,
        log_every_steps=1,
        callbacks=(FunctionCallback(records.append),),
    )
    trainer.prepare_data(data)
    trainer.prepare_model(model_of(case, trainer.train.num_steps))
    diverged = 0
    try:
        trainer.fit_epochs()
    except dpreg.Diverged as error:
        diverged = error.step
    found = {"diverged": np.array(diverged)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.state):
        keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found[jax.tree_util.keystr(path)] = np.asarray(jax.random.key_data(leaf) if keys else leaf)
    curve = [(r.train_loss, r.gradient_norm) for r in records if r.gradient_norm is not None]
    found["curve"] = np.array(curve, np.float64)
    ends = [[r.val_loss or 0.0, *r.metrics.values()] for r in records if r.metrics is not None]
    found["metrics"] = np.array(ends, np.float64)
    if not diverged:
        found["predictions"] = trainer.predict(rows_of(case, 50, 2).x)
    return found


def digest(found: dict[str, np.ndarray]) -> str:
    """Returns a digest of all bits."""
    whole = hashlib.sha256()
    for name, value in sorted(found.items()):
        whole.update(f"{name} {value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return whole.hexdigest()


def differences(case: Case, one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Returns the names of arrays that differ: in any bit, or under pmean by more than the tolerance."""
    if case.reduction == "ordered":
        return [name for name in one if digest({name: one[name]}) != digest({name: other[name]})]
    tolerance = TOLERANCE if case.precision != "bfloat16" else 1e-2  # the precision of bfloat16
    wrong = []
    for name, value in one.items():
        a, b = value.astype(np.float64), other[name].astype(np.float64)
        scale = max(1.0, float(np.abs(a).max(initial=0.0)))
        if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True):
            wrong.append(f"{name} by {np.abs(a - b).max(initial=0.0) / scale:.1e}")
    return wrong


def digest_of_two_processes(seed: int, number: int) -> str:
    """Returns the digest of a case computed by two processes, each with half of the maximal number of devices."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, f"--seed={seed}", f"--case={number}", f"--address={address}"]
    started = [subprocess.Popen([*command, f"--process={p}"], stdout=subprocess.PIPE, text=True) for p in (0, 1)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        return "a process failed"
    return json.loads(outputs[0].splitlines()[-1])


def check(seed: int, number: int, many: bool) -> list[str]:
    """Returns a description of what differs in a case, as lines."""
    case, layouts = draw(seed, number)
    first, *others = layouts
    expected = compute(case, first)
    differing = {layout: differences(case, expected, compute(case, layout)) for layout in others}
    wrong = [f"{first} and {layout} differ in {', '.join(n)[:300]}" for layout, n in differing.items() if n]
    if (
        many
        and case.reduction == "ordered"
        and case.shards > 1
        and digest_of_two_processes(seed, number) != digest(expected)
    ):
        wrong.append(f"{first} and two processes differ")
    return wrong and [f"{case}", *wrong, f"python tests/benchmarks/bits.py --seed={seed} --case={number}"]


def search(seed: int, minutes: float, first: int) -> int:
    """Checks case after case until the time is over, and returns how many differ."""
    ends, shown, number, found = time.monotonic() + 60 * minutes, time.monotonic(), first, 0
    while time.monotonic() < ends:
        lines = check(seed, number, many=number % PROCESSES_EVERY == PROCESSES_EVERY - 1)
        found, number = found + bool(lines), number + 1
        if lines or time.monotonic() - shown > STATUS_SECONDS:
            shown = time.monotonic()
            print(*lines, f"seed {seed}: {number - first:,} cases, {found} differ", sep="\n", flush=True)
        if number % CACHED_CASES == 0:
            jax.clear_caches()
    print(f"seed {seed}: cases {first:,} to {number - 1:,}, {found} differ", flush=True)
    return found


def main() -> None:
    """Searches, reproduces a case, or runs as one of two processes."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--minutes", type=float, default=2.0)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--first", type=int, default=0, help="the number of the first case")
    flags.add_argument("--case", type=int, help="check only this case")
    flags.add_argument("--address", help=argparse.SUPPRESS)
    flags.add_argument("--process", type=int, help=argparse.SUPPRESS)
    asked = flags.parse_args()
    # Warnings about the number of threads do not matter: it is equal for all layouts here.
    logging.disable(logging.WARNING)
    if asked.address:
        devices.start("cpu", MOST_DEVICES // 2, asked.address, 2, asked.process, threads=THREADS)
        case, _ = draw(asked.seed, asked.case)
        found = compute(case, Layout(max(1, min(case.shards, MOST_DEVICES) // 2), "jit", "auto", None))
        print(json.dumps(digest(found)), flush=True)
        processes.allgather_text()
        return
    devices.start("cpu", MOST_DEVICES, threads=THREADS)
    if asked.case is None:
        sys.exit(1 if search(asked.seed, asked.minutes, asked.first) else 0)
    lines = check(asked.seed, asked.case, many=True)
    print(*(lines or [f"{draw(asked.seed, asked.case)[0]}: no difference"]), sep="\n")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
