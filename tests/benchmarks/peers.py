"""Measures rows per second of dpreg and its peers, in one run: `python tests/benchmarks/peers.py`.

The peers are the extra `peers`; those that are not installed are left out. Each program runs in its own process, or in
two that average their gradients ("x2": one core each, over Gloo), in turns, in steady state. The program of each peer
is the idiomatic one of its documentation; "ddp, by hand" gathers batches by index instead of with DataLoader.
"x @ w" is one product of all rows with a vector, by NumPy's BLAS on all cores, which reads each row once.
"pmean, 2 devices" is one process that simulates two devices; "a core" is a process on one core; "half, a core" is such
a process with half of the rows and of the batch: two of them ("x2") have at best twice its rate.

It prints medians of the rounds, and medians of ratios within a round, since absolute figures drift with the machine.
The limit is that of the memory or of the cores: each value of a row must be read once and takes four operations. Rows
that fit in cache are read faster than from memory, so their shares of the limit can be above 1.
"""

import atexit
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable

from turns import grain, in_turns, in_two_processes, median_ratio, on_one_core, rows, steady_rate, tf_data

Loader = Callable[..., Callable[[int], Iterable]]
WORKLOADS = {"narrow": (20_000, 2, 32), "middle": (100_000, 32, 1024), "wide": (40_000, 1024, 4096)}
ADDRESS = "127.0.0.1"


def ddp(num_rows: int, num_inputs: int, batch: int, by_hand: bool = False, rank: int | None = None) -> float:
    """Runs the loop of the DistributedDataParallel tutorial: DataLoader, DistributedSampler, gloo."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    world = 1 if rank is None else 2
    os.environ |= {"MASTER_ADDR": ADDRESS, "MASTER_PORT": "29511"}
    torch.distributed.init_process_group("gloo", rank=rank or 0, world_size=world)
    torch.manual_seed(0)
    x = torch.randn(num_rows, num_inputs)
    y = x @ torch.randn(num_inputs, 1) + 4.2
    dataset = TensorDataset(x, y)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=batch // world, sampler=sampler)
    model = DistributedDataParallel(torch.nn.Linear(num_inputs, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss_function = torch.nn.MSELoss()

    def batches(number: int):
        if not by_hand:
            sampler.set_epoch(number)
            yield from loader
            return
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(number))[rank or 0 :: world]
        for first in range(0, len(order), batch // world):
            chosen = order[first : first + batch // world]
            yield x[chosen], y[chosen]

    def epoch(number: int) -> None:
        for x_batch, y_batch in batches(number):
            optimizer.zero_grad()
            loss_function(model(x_batch), y_batch).backward()
            optimizer.step()

    rate = steady_rate(epoch, num_rows, epochs=None if world == 1 else 3)
    torch.distributed.destroy_process_group()
    atexit.register(os._exit, 0)  # PyTorch's threads may abort when the interpreter ends
    return rate


def sklearn(num_rows: int, num_inputs: int, batch: int) -> float:
    """Runs SGDRegressor, which takes rows one by one: an epoch is `fit` with one iteration."""
    from sklearn.linear_model import SGDRegressor

    del batch
    x, y = rows(num_rows, num_inputs)
    model = SGDRegressor(max_iter=1, tol=None, penalty=None, learning_rate="constant", eta0=1e-5, shuffle=True)
    return steady_rate(lambda number: model.fit(x, y[:, 0]), num_rows)


def jax_loop(num_rows: int, num_inputs: int, batch: int, loader: Loader | None = None) -> float:
    """Runs the loop of Flax's examples: a jitted step on a TrainState, one call per batch, permuted indices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import linen as nn
    from flax.training.train_state import TrainState

    x, y = rows(num_rows, num_inputs)
    load = loader(x, y, batch) if loader else None
    x, y = jnp.asarray(x), jnp.asarray(y)
    model = nn.Dense(1)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x[:1])["params"], tx=optax.sgd(1e-4)
    )

    @jax.jit
    def step(state, x_batch, y_batch):
        def loss(params):
            return optax.l2_loss(state.apply_fn({"params": params}, x_batch), y_batch).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    def batches(number: int):
        order = np.asarray(jax.random.permutation(jax.random.key(number), num_rows))
        for chosen in order[: num_rows // batch * batch].reshape(-1, batch):
            yield x[chosen, ...], y[chosen, ...]

    def epoch(number: int) -> None:
        nonlocal state
        for x_batch, y_batch in (load or batches)(number):
            state, _ = step(state, x_batch, y_batch)
        jax.block_until_ready(state)

    return steady_rate(epoch, num_rows // batch * batch)


def floor(num_rows: int, num_inputs: int, batch: int) -> float:
    """Reads all rows once, by a product with a vector."""
    import numpy as np

    del batch
    x, _ = rows(num_rows, num_inputs)
    w = np.ones(num_inputs, np.float32)
    return steady_rate(lambda number: x @ w, num_rows)


def best_rate(work: Callable[[], object], amount: float) -> float:
    """Returns the best rate, in units of `amount` per second."""
    found = 0.0
    for _ in range(9):
        started = time.perf_counter()
        work()
        found = max(found, amount / (time.perf_counter() - started))
    return found


def limits() -> tuple[float, float]:
    """Returns (bytes/s read from memory, float32 operations/s) of the machine, by NumPy's BLAS on all cores."""
    import numpy as np

    x, w = np.ones((1 << 17, 1 << 10), np.float32), np.ones(1 << 10, np.float32)
    square = np.ones((1 << 11, 1 << 11), np.float32)
    return best_rate(lambda: x @ w, x.nbytes), best_rate(lambda: square @ square, 2 * len(square) ** 3)


def dpreg(
    num_rows: int, num_inputs: int, batch: int, reduction: str = "pmean", devices: int = 1, rank: int | None = None
) -> float:
    """Runs the same work with `Trainer.fit_epochs`, rows on the devices."""
    import dpreg as package
    from dpreg.distributed.devices import start

    address = (None, None, None) if rank is None else (f"{ADDRESS}:29512", 2, rank)
    start("cpu", devices, *address)
    data = package.RegressionData(package.ArraySource(*rows(num_rows, num_inputs)), None, batch)
    trainer = package.Trainer(1_000_000, devices, reduction=reduction, placement="device", platform="cpu")
    trainer.prepare_data(data)
    trainer.prepare_model(package.LinearRegressionScratch(num_inputs, lr=1e-4))
    return steady_rate(lambda number: trainer.fit_epochs(20), 20 * num_rows, None if rank is None else 4)


def half(num_rows: int, num_inputs: int, batch: int) -> float:
    """Runs the work of one of two processes alone."""
    return dpreg(num_rows // 2, num_inputs, batch // 2)


PROGRAMS = {
    "ddp": ddp,
    "ddp, by hand": functools.partial(ddp, by_hand=True),
    "ddp x2": in_two_processes(ddp),
    "ddp x2, by hand": in_two_processes(functools.partial(ddp, by_hand=True)),
    "sklearn": sklearn,
    "jax": jax_loop,
    "jax, tf.data": functools.partial(jax_loop, loader=tf_data),
    "jax, grain": functools.partial(jax_loop, loader=grain),
    "x @ w": floor,
    "pmean": dpreg,
    "ordered": functools.partial(dpreg, reduction="ordered"),
    "pmean, 2 devices": functools.partial(dpreg, devices=2),
    "pmean x2": in_two_processes(dpreg),
    "ddp, by hand, a core": on_one_core(functools.partial(ddp, by_hand=True)),
    "x @ w, a core": on_one_core(floor),
    "pmean, a core": on_one_core(dpreg),
    "ordered, a core": on_one_core(functools.partial(dpreg, reduction="ordered")),
    "half, a core": on_one_core(half),
}
NEEDS = {program: "torch" for program in PROGRAMS if program.startswith("ddp")} | {
    "sklearn": "sklearn",
    "jax, tf.data": "tensorflow",
    "jax, grain": "grain",
}
ALONE = ("ddp", "ddp, by hand", "sklearn", "jax", "jax, tf.data", "jax, grain", "x @ w")
OURS = {  # the programs of dpreg, and the peers of each
    "pmean": ALONE,
    "ordered": (*ALONE, "pmean"),
    "pmean, 2 devices": (*ALONE, "pmean"),
    "pmean x2": ("ddp x2", "ddp x2, by hand", "pmean", "half, a core"),
    "pmean, a core": ("ddp, by hand, a core", "x @ w, a core"),
    "ordered, a core": ("pmean, a core",),
}

if __name__ == "__main__":
    bandwidth, operations = 0.0, 0.0
    for workload, rates in in_turns(__doc__, PROGRAMS, WORKLOADS, NEEDS, some=True):
        if not bandwidth:
            bandwidth, operations = limits()
            print(f"memory {bandwidth / 1e9:.1f} GB/s, matrix products {operations / 1e9:.0f} G operations/s")
        num_rows, num_inputs, batch = WORKLOADS[workload]
        least, work = 4 * (num_inputs + 2), 4 * num_inputs
        limit = min(bandwidth / least, operations / work)
        print(f"\nrows, inputs, batch {WORKLOADS[workload]}: {least:,} bytes and {work:,} operations per row")
        print(f"{'limit':>20} {limit:>16,.0f} rows/s")
        for program, found in rates.items():
            rate = statistics.median(found)
            print(f"{program:>20} {rate:>16,.0f} rows/s  {rate * least / 1e9:>7.2f} GB/s  {rate / limit:>6.3f} of it")
        for ours, others in ((ours, others) for ours, others in OURS.items() if ours in rates):
            beside = [f"{median_ratio(rates[ours], rates[other]):.2f}x {other}" for other in others if other in rates]
            print(f"{ours}: {', '.join(beside) or 'no peer'}", flush=True)
