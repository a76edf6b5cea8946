"""Rows per second of dpreg beside PyTorch DDP, in one run: `python tests/benchmarks/peers.py`.

Needs `pip install torch` (the CPU build will do). Each program runs in a process of its own, the programs in
turn, on one device and in its steady state: the first epoch is not counted. Prints the median of the rounds
and its ratio to DDP's. Absolute figures drift with the machine; ratios are what counts.
"""

import functools
import os

from turns import in_turns, steady_rate

WORKLOADS = {"narrow": (20_000, 2, 32), "middle": (100_000, 32, 1024), "wide": (40_000, 1024, 4096)}


def ddp(num_rows: int, num_inputs: int, batch: int) -> float:
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

    def epoch(number: int) -> None:
        sampler.set_epoch(number)
        for x_batch, y_batch in loader:
            optimizer.zero_grad()
            loss_function(model(x_batch), y_batch).backward()
            optimizer.step()

    rate = steady_rate(epoch, num_rows)
    torch.distributed.destroy_process_group()
    return rate


def dpreg(num_rows: int, num_inputs: int, batch: int, reduction: str) -> float:
    """The same work through `Trainer.fit_epoch`: one device, rows on it."""
    import numpy as np

    import dpreg as package

    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), np.float32)
    y = x @ rng.standard_normal((num_inputs, 1), np.float32) + np.float32(4.2)
    trainer = package.Trainer(1_000_000, 1, reduction=reduction, placement="device", platform="cpu")
    trainer.prepare_data(package.RegressionData(package.ArraySource(x, y), None, batch))
    trainer.prepare_model(package.LinearRegressionScratch(num_inputs, lr=1e-4))
    return steady_rate(lambda number: trainer.fit_epoch(), num_rows)


PROGRAMS = {
    "ddp": ddp,
    "pmean": functools.partial(dpreg, reduction="pmean"),
    "ordered": functools.partial(dpreg, reduction="ordered"),
}

if __name__ == "__main__":
    for workload, rates in in_turns(__doc__, PROGRAMS, WORKLOADS):
        ratios = ", ".join(f"{p} {rates[p] / rates['ddp']:.0f}x" for p in ("pmean", "ordered"))
        print(f"{WORKLOADS[workload]!s:>20}: {', '.join(f'{p} {r:,.0f} rows/s' for p, r in rates.items())}; {ratios}")
