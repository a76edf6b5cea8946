"""Rows per second of dpreg beside its peers, in one run: `python tests/benchmarks/peers.py`.

Needs `pip install torch scikit-learn` (the CPU build of torch will do). Each program runs in a process of its own, the
programs in turn, on one device and in its steady state: the first epoch is not counted. Each peer's program is the
idiomatic one of its own documentation; "ddp, by hand" gathers batches by index instead of by DataLoader. "x @ w" is the
floor: one product of all rows with a vector, by the BLAS of NumPy on all cores, which reads each row once. Prints the
median of the rounds and ratios. Absolute figures drift with the machine; ratios are what counts.
"""

import functools
import os

from turns import in_turns, steady_rate

WORKLOADS = {"narrow": (20_000, 2, 32), "middle": (100_000, 32, 1024), "wide": (40_000, 1024, 4096)}


def ddp(num_rows: int, num_inputs: int, batch: int, by_hand: bool = False) -> float:
    """The loop of the DistributedDataParallel tutorial: DataLoader, DistributedSampler, gloo, one process."""
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    torch.manual_seed(0)
    x = torch.randn(num_rows, num_inputs)
    y = x @ torch.randn(num_inputs, 1) + 4.2
    dataset = TensorDataset(x, y)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=batch, sampler=sampler)
    model = DistributedDataParallel(torch.nn.Linear(num_inputs, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss_function = torch.nn.MSELoss()

    def batches(number: int):
        if not by_hand:
            sampler.set_epoch(number)
            yield from loader
            return
        order = torch.randperm(num_rows)
        for first in range(0, num_rows, batch):
            chosen = order[first : first + batch]
            yield x[chosen], y[chosen]

    def epoch(number: int) -> None:
        for x_batch, y_batch in batches(number):
            optimizer.zero_grad()
            loss_function(model(x_batch), y_batch).backward()
            optimizer.step()

    rate = steady_rate(epoch, num_rows)
    torch.distributed.destroy_process_group()
    return rate


def sklearn(num_rows: int, num_inputs: int, batch: int) -> float:
    """SGDRegressor, which takes rows one by one: an epoch is `fit` with one iteration."""
    from sklearn.linear_model import SGDRegressor

    del batch
    x, y = rows(num_rows, num_inputs)
    model = SGDRegressor(max_iter=1, tol=None, penalty=None, learning_rate="constant", eta0=1e-5, shuffle=True)
    return steady_rate(lambda number: model.fit(x, y[:, 0]), num_rows)


def jax_loop(num_rows: int, num_inputs: int, batch: int) -> float:
    """The loop of Flax's examples: a jitted step on a TrainState, permuted indices, a call for each batch."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import linen as nn
    from flax.training.train_state import TrainState

    x, y = map(jnp.asarray, rows(num_rows, num_inputs))
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

    def epoch(number: int) -> None:
        nonlocal state
        order = np.asarray(jax.random.permutation(jax.random.key(number), num_rows))
        for chosen in order[: num_rows // batch * batch].reshape(-1, batch):
            state, _ = step(state, x[chosen, ...], y[chosen, ...])
        jax.block_until_ready(state)

    return steady_rate(epoch, num_rows // batch * batch)


def floor(num_rows: int, num_inputs: int, batch: int) -> float:
    """All rows read once, by a product with a vector."""
    import numpy as np

    del batch
    x, _ = rows(num_rows, num_inputs)
    w = np.ones(num_inputs, np.float32)
    return steady_rate(lambda number: x @ w, num_rows)


def rows(num_rows: int, num_inputs: int):
    """X [n, d] and y [n, 1], float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), np.float32)
    return x, x @ rng.standard_normal((num_inputs, 1), np.float32) + np.float32(4.2)


def dpreg(num_rows: int, num_inputs: int, batch: int, reduction: str) -> float:
    """The same work through `Trainer.fit_epoch`: one device, rows on it."""
    import dpreg as package

    data = package.RegressionData(package.ArraySource(*rows(num_rows, num_inputs)), None, batch)
    trainer = package.Trainer(1_000_000, 1, reduction=reduction, placement="device", platform="cpu")
    trainer.prepare_data(data)
    trainer.prepare_model(package.LinearRegressionScratch(num_inputs, lr=1e-4))
    return steady_rate(lambda number: trainer.fit_epoch(), num_rows)


PROGRAMS = {
    "ddp": ddp,
    "ddp, by hand": functools.partial(ddp, by_hand=True),
    "sklearn": sklearn,
    "jax": jax_loop,
    "pmean": functools.partial(dpreg, reduction="pmean"),
    "ordered": functools.partial(dpreg, reduction="ordered"),
    "x @ w": floor,
}

if __name__ == "__main__":
    for workload, rates in in_turns(__doc__, PROGRAMS, WORKLOADS):
        num_rows, num_inputs, batch = WORKLOADS[workload]
        least = 4 * (num_inputs + 2)
        print(f"\nrows, inputs, batch {WORKLOADS[workload]}: {least:,} bytes and {4 * num_inputs:,} operations a row")
        for program, rate in rates.items():
            print(f"{program:>16} {rate:>16,.0f} rows/s  {rate * least / 1e9:>7.2f} GB/s")
        for ours in ("pmean", "ordered"):
            beside = ", ".join(f"{rates[ours] / rates[p]:.1f}x {p}" for p in PROGRAMS if p not in ("pmean", "ordered"))
            print(f"{ours}: {beside}")
        print(f"ordered costs {rates['pmean'] / rates['ordered']:.2f}x of pmean")
