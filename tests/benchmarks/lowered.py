"""Compares the programs that two checkouts pass to XLA: `python tests/benchmarks/lowered.py --other=../before`.

A change that only moves or renames code changes neither the programs before XLA optimizes them nor their compiler
options. This script compares digests of the programs of many configurations between this checkout and the other, lists
those that differ, and then ends with exit code 1. It trains nothing, and stores no digest, as they change with JAX.

`--print=CHECKOUT` prints the digests of one checkout, one line for each program. Both checkouts need only
`dpreg.start`, `dpreg.Trainer`, its `fit`, and `dpreg.models.mlp.MLP`.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent.parent.parent
SMALL = 4000  # Programs with fewer characters are not steps; they are compiled, because the steps need them.


def configurations():
    """Yields (name, function that returns the model, data and trainer arguments) of each configuration."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import linen as nn

    import dpreg
    from dpreg.models.mlp import MLP

    class Net(dpreg.Module):
        """With BatchNorm, Dropout and an optimizer that keeps a state."""

        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(16, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)(x)
            x = nn.Dropout(0.25, deterministic=not train)(nn.relu(x))
            return nn.Dense(1)(nn.relu(nn.Dense(16)(x)))

    class Foreign(nn.Module):
        """A flax module that is not a `dpreg.Module`."""

        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(x)

        def loss(self, prediction, target):
            return jnp.abs(prediction - target).sum(axis=1)

        def configure_optimizers(self):
            return optax.sgd(0.05)

    rng = np.random.default_rng(0)

    def rows(number, features, targets=1, weighted=False, dtype=np.float32):
        weight = (rng.random(number) > 0.2) + 0.5 if weighted else None
        x, y = rng.standard_normal((number, features)), rng.standard_normal((number, targets))
        return dpreg.ArraySource(x, y, weight, dtype=dtype)

    def linear(features=3, targets=1):
        return lambda: dpreg.LinearRegressionScratch(features, 0.03, num_targets=targets)

    def net(optimizer=None):
        return lambda: Net(optimizer=optimizer or optax.adam(0.01))

    def case(name, model, data, **settings):
        return name, model, data, settings

    few = dpreg.RegressionData(rows(203, 3, weighted=True), rows(20, 3), 64)
    many, double = rows(40_003, 64), rows(40_003, 64, 2, dtype=np.float64)
    weighted = rows(40_003, 64, 2, weighted=True)
    over_batch = MLP((8,), 2, batch_norm=True, sync_batch_norm=True)
    product = itertools.product
    for how in ("pmean", "ordered"):
        for name, model in (("linear", linear()), ("net", net()), ("foreign", Foreign)):
            for backend, place, n in product(("jit", "pmap"), ("device", "host"), (1, 3, 8)):
                yield case(name, model, few, num_devices=n, reduction=how, backend=backend, placement=place)
        for (name, model), n in product((("linear", linear()), ("net", net())), (1, 8)):
            yield case(f"{name}, accumulated", model, few, num_devices=n, reduction=how, accumulate_steps=4)
        for n, place in product((1, 3, 8), ("device", "host")):
            data = dpreg.RegressionData(weighted, None, 16_384)
            yield case("chunks", linear(64, 2), data, num_devices=n, reduction=how, placement=place)
        for n in (1, 8):
            yield case("shard by shard", net(), dpreg.RegressionData(many, None, 32_768), num_devices=n, reduction=how)
        data = dpreg.RegressionData(weighted, None, 1024)
        yield case("bfloat16", linear(64, 2), data, num_devices=8, reduction=how, precision="bfloat16")
        data = dpreg.RegressionData(many, None, 1024)
        yield case("clipped", net(optax.sgd(0.1)), data, reduction=how, audit=False, gradient_clip_val=0.5)
        data = dpreg.RegressionData(double, None, 1024)
        yield case("float64", linear(64, 2), data, num_devices=8, reduction=how, precision="float64")
    for n in (1, 8):
        data = dpreg.RegressionData(weighted, None, 1024)
        yield case("BatchNorm over the batch", lambda: over_batch, data, num_devices=n)


class NotRunError(Exception):
    """Raised when a step is called, as steps are not compiled."""


def print_digests(tree: str) -> None:
    """Prints a line for each program: the configuration, digest, size and compiler options."""
    import jax

    import dpreg

    assert pathlib.Path(dpreg.__file__).is_relative_to(pathlib.Path(tree).resolve()), dpreg.__file__
    dpreg.start("cpu", 8, threads=8)
    compiled = jax.stages.Lowered.compile
    lowered = []

    def not_run(*_):
        raise NotRunError

    def record(self, compiler_options=None):
        text = self.as_text()
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        lowered.append((digest, len(text), json.dumps(compiler_options, sort_keys=True)))
        return compiled(self, compiler_options) if len(text) < SMALL else not_run

    jax.stages.Lowered.compile = record
    for name, model, data, settings in configurations():
        lowered.clear()
        try:
            dpreg.Trainer(2, **settings).fit(model(), data)
        except NotRunError:
            pass
        else:
            raise AssertionError(f"{name}: no step was recorded; raise SMALL")
        for number, program in enumerate(lowered):
            print(name, json.dumps(settings), number, *program, sep="\t", flush=True)


def digests(tree: pathlib.Path) -> "subprocess.Popen[str]":
    """Starts a process that prints the digests of a checkout."""
    command = [sys.executable, __file__, f"--print={tree}"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def compare(other: pathlib.Path) -> int:
    """Prints the programs that differ between this checkout and the other, and returns their number."""
    running = [digests(tree) for tree in (HERE, other.resolve())]
    both = []
    for process in running:
        printed = process.communicate()[0]
        if process.returncode:
            sys.exit(process.returncode)
        found = collections.defaultdict(list)
        for line in printed.splitlines():
            name, settings, _, *program = line.split("\t")
            found[name, settings].append(program)
        both.append(found)
    here, others = both
    differing = 0
    for key in sorted(here.keys() | others.keys()):
        pairs = itertools.zip_longest(here.get(key, []), others.get(key, []))
        for number, (one, two) in enumerate(pairs):
            if one != two:
                differing += 1
                print(*key, f"program {number}:", one, "in the other", two)
    print(f"{sum(map(len, here.values()))} programs of {len(here)} configurations: {differing} differ")
    return differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--other", type=pathlib.Path, metavar="CHECKOUT", help="the checkout to compare this one with")
    which.add_argument("--print", metavar="CHECKOUT", help="print the digests of this checkout")
    given = parser.parse_args()
    if given.print:
        print_digests(given.print)
    else:
        sys.exit(bool(compare(given.other)))
