"""Measures rows per second into the device, of dpreg and of other loaders: `python tests/benchmarks/feeding.py`.

The other loaders need the extra `peers`. All read the same rows from memory, shuffled each epoch, in batches. Each
loader is used as in its own documentation, and its batches are passed to JAX (those of PyTorch stay in PyTorch). The
two NumPy gathers are the least work on the host: the same rows in the same batches, and nothing else. The last lines
are the training of a linear model with either placement.
"""

import functools
import statistics

import numpy as np
from turns import grain, in_turns, median_ratio, rows, steady_rate, tf_data

WORKLOADS = {"narrow": (20_000, 2, 32), "middle": (100_000, 32, 1024), "wide": (40_000, 1024, 4096)}


def dataloader(num_rows, num_inputs, batch, workers):
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(*map(torch.from_numpy, rows(num_rows, num_inputs)))
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def epoch(number):
        for _ in loader:
            pass

    return steady_rate(epoch, num_rows)


def to_jax(num_rows, num_inputs, batch, loader):
    import jax

    batches = loader(*rows(num_rows, num_inputs), batch)

    def epoch(number):
        for found in batches(number):
            jax.block_until_ready(jax.device_put(found))

    return steady_rate(epoch, num_rows // batch * batch)


def gather(num_rows, num_inputs, batch, take):
    x, y = rows(num_rows, num_inputs)
    weight = np.ones(num_rows, np.float32)

    def epoch(number):
        order = np.random.default_rng(number).permutation(num_rows).astype(np.int32)
        for first in range(0, num_rows, batch):
            indices = order[first : first + batch]
            take(x, indices), take(y, indices), take(weight, indices)

    return steady_rate(epoch, num_rows)


def trainer_of(num_rows, num_inputs, batch, placement):
    import dpreg

    trainer = dpreg.Trainer(1_000_000, 1, placement=placement, platform="cpu")
    trainer.prepare_data(dpreg.RegressionData(dpreg.ArraySource(*rows(num_rows, num_inputs)), None, batch))
    return trainer


def host(num_rows, num_inputs, batch):
    import jax

    train = trainer_of(num_rows, num_inputs, batch, "host").train
    steps = 20 * train.sampler.steps_per_epoch

    def epochs(number):
        for block in train.blocks(number * steps, (number + 1) * steps):
            jax.block_until_ready(block.data)

    return steady_rate(epochs, 20 * num_rows)


def training(num_rows, num_inputs, batch, placement):
    import dpreg

    trainer = trainer_of(num_rows, num_inputs, batch, placement)
    trainer.prepare_model(dpreg.LinearRegressionScratch(num_inputs, lr=1e-4))
    return steady_rate(lambda number: trainer.fit_epochs(20), 20 * num_rows)


LOADERS = {"DataLoader": "torch", "DataLoader, 2 workers": "torch", "tf.data": "tensorflow", "Grain": "grain"}
PROGRAMS = {
    "DataLoader": functools.partial(dataloader, workers=0),
    "DataLoader, 2 workers": functools.partial(dataloader, workers=2),
    "tf.data": functools.partial(to_jax, loader=tf_data),
    "Grain": functools.partial(to_jax, loader=grain),
    "column[indices]": functools.partial(gather, take=lambda column, indices: column[indices]),
    "np.take": functools.partial(gather, take=functools.partial(np.take, axis=0)),
    "host": host,
    "training, host": functools.partial(training, placement="host"),
    "training, device": functools.partial(training, placement="device"),
}

if __name__ == "__main__":
    for workload, rates in in_turns(__doc__, PROGRAMS, WORKLOADS, LOADERS):
        print(f"\nrows, inputs, batch {WORKLOADS[workload]}")
        for program, found in rates.items():
            print(f"{program:>24}{statistics.median(found):>16,.0f} rows/s")
        best = min(median_ratio(rates["host"], rates[p]) for p in LOADERS if p in rates)
        bare = ", ".join(f"{median_ratio(rates['host'], rates[g]):.2f} of {g}" for g in ("column[indices]", "np.take"))
        print(f"host placement: {best:.1f}x the best loader, {bare}")
        beside = median_ratio(rates["training, device"], rates["training, host"])
        print(f"training with device placement: {beside:.2f}x that with host placement")
