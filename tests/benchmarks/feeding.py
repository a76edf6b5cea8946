"""Rows per second into the device, of dpreg beside the loaders of others: `python tests/benchmarks/feeding.py`.

Needs `pip install torch grain tensorflow-cpu`. The same rows in memory, shuffled each epoch, in batches; each loader as
its own documentation uses it, its batches handed to JAX (PyTorch's stay PyTorch's). The two gathers of NumPy are the
least that can be done on the host: the same rows in the same batches, and nothing else. Below, training of a linear
model from either placement.
"""

import functools

import numpy as np
from turns import in_turns, steady_rate

WORKLOADS = {"narrow": (20_000, 2, 32), "middle": (100_000, 32, 1024), "wide": (40_000, 1024, 4096)}


def rows(num_rows, num_inputs):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), np.float32)
    return x, x @ rng.standard_normal((num_inputs, 1), np.float32) + np.float32(4.2)


def dataloader(num_rows, num_inputs, batch, workers):
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(*map(torch.from_numpy, rows(num_rows, num_inputs)))
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def epoch(number):
        for _ in loader:
            pass

    return steady_rate(epoch, num_rows)


def to_jax(batches, num_rows):
    import jax

    def epoch(number):
        for batch in batches(number):
            jax.block_until_ready(jax.device_put(batch))

    return steady_rate(epoch, num_rows)


def tf_data(num_rows, num_inputs, batch):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(rows(num_rows, num_inputs))
    dataset = dataset.shuffle(num_rows).batch(batch).prefetch(tf.data.AUTOTUNE)
    return to_jax(lambda number: dataset.as_numpy_iterator(), num_rows)


def grain(num_rows, num_inputs, batch):
    import grain as package

    class Source:
        x, y = rows(num_rows, num_inputs)

        def __len__(self):
            return num_rows

        def __getitem__(self, index):
            return self.x[index], self.y[index]

    def batches(number):
        return package.MapDataset.source(Source()).shuffle(seed=number).batch(batch).to_iter_dataset()

    return to_jax(batches, num_rows)


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
    steps = train.sampler.steps_per_epoch

    def epoch(number):
        for block in train.blocks(number * steps, (number + 1) * steps):
            jax.block_until_ready(block.data)

    return steady_rate(epoch, num_rows)


def training(num_rows, num_inputs, batch, placement):
    import dpreg

    trainer = trainer_of(num_rows, num_inputs, batch, placement)
    trainer.prepare_model(dpreg.LinearRegressionScratch(num_inputs, lr=1e-4))
    return steady_rate(lambda number: trainer.fit_epoch(), num_rows)


PROGRAMS = {
    "DataLoader": functools.partial(dataloader, workers=0),
    "DataLoader, 2 workers": functools.partial(dataloader, workers=2),
    "tf.data": tf_data,
    "Grain": grain,
    "column[indices]": functools.partial(gather, take=lambda column, indices: column[indices]),
    "np.take": functools.partial(gather, take=functools.partial(np.take, axis=0)),
    "host": host,
    "training, host": functools.partial(training, placement="host"),
    "training, device": functools.partial(training, placement="device"),
}

if __name__ == "__main__":
    for workload, rates in in_turns(__doc__, PROGRAMS, WORKLOADS):
        print(f"\nrows, inputs, batch {WORKLOADS[workload]}")
        for program, rate in rates.items():
            print(f"{program:>24}{rate:>16,.0f} rows/s")
        best = max(rates[p] for p in ("DataLoader", "DataLoader, 2 workers", "tf.data", "Grain"))
        bare = ", ".join(
            f"{rates['host'] / rates[gather]:.2f} of {gather}" for gather in ("column[indices]", "np.take")
        )
        print(f"host placement: {rates['host'] / best:.1f}x the best loader, {bare}")
        print(f"training from devices: {rates['training, device'] / rates['training, host']:.2f}x that from the host")
