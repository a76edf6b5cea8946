"""Measures rows per second of dpreg on a GPU against its memory bandwidth: `python tests/benchmarks/gpu.py`.

The rows are on the device, and `Trainer.fit_epochs` trains on them. Each program runs in its own process, in turns, in
steady state. "copy" copies 4 GB within device memory and counts bytes read and written; the shares of it count the
bytes of each row once. "ddp" is PyTorch's DistributedDataParallel over NCCL, with batches gathered by index on the
device (left out without PyTorch); "jax" is the loop of Flax's examples, with one call for each batch.
"""

import functools
import statistics
import subprocess
import time

from peers import ADDRESS, jax_loop
from turns import in_turns, median_ratio, steady_rate

WORKLOADS = {"wide": (1_000_000, 1024, 65_536), "narrow": (10_000_000, 64, 65_536)}


def copy(num_rows: int, num_inputs: int, batch: int) -> float:
    """Returns bytes/s, read and written."""
    import jax
    import jax.numpy as jnp

    del num_rows, num_inputs, batch
    values = jnp.ones(1 << 30, jnp.float32, device=jax.devices("gpu")[0])
    copied = jax.jit(jnp.copy)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        jax.block_until_ready(copied(values))
        seconds.append(time.perf_counter() - started)
    return 2 * values.nbytes / statistics.median(seconds)


def dpreg(num_rows: int, num_inputs: int, batch: int, reduction: str = "pmean", precision: str = "float32") -> float:
    """Returns rows/s of `Trainer.fit_epochs` with rows on the device."""
    import jax
    import numpy as np

    import dpreg as package
    from dpreg.distributed.devices import start

    start("gpu")
    x = np.asarray(jax.random.normal(jax.random.key(0), (num_rows, num_inputs)))
    y = x @ np.ones((num_inputs, 1), np.float32)
    data = package.RegressionData(package.ArraySource(x, y), None, batch)
    trainer = package.Trainer(
        1_000_000, 1, reduction=reduction, precision=precision, placement="device", platform="gpu"
    )
    trainer.prepare_data(data)
    trainer.prepare_model(package.LinearRegressionScratch(num_inputs, lr=1e-4))
    return steady_rate(lambda number: trainer.fit_epochs(20), 20 * num_rows)


def ddp(num_rows: int, num_inputs: int, batch: int) -> float:
    """Returns rows/s of the same work in PyTorch on the GPU."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("nccl", init_method=f"tcp://{ADDRESS}:29511", rank=0, world_size=1)
    x = torch.randn(num_rows, num_inputs, device="cuda")
    y = x @ torch.ones(num_inputs, 1, device="cuda")
    model = DistributedDataParallel(torch.nn.Linear(num_inputs, 1).cuda(), device_ids=[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss_function = torch.nn.MSELoss()

    def epochs(number: int) -> None:
        for _ in range(20):
            order = torch.randperm(num_rows, device="cuda")
            for chosen in order.split(batch):
                optimizer.zero_grad()
                loss_function(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
        torch.cuda.synchronize()

    rate = steady_rate(epochs, 20 * num_rows)
    torch.distributed.destroy_process_group()
    return rate


PROGRAMS = {
    "copy": copy,
    "pmean": dpreg,
    "pmean, bfloat16": functools.partial(dpreg, precision="bfloat16"),
    "ordered": functools.partial(dpreg, reduction="ordered"),
    "ordered, bfloat16": functools.partial(dpreg, reduction="ordered", precision="bfloat16"),
    "ddp": ddp,
    "jax": jax_loop,
}

if __name__ == "__main__":
    for workload, rates in in_turns(__doc__, PROGRAMS, WORKLOADS, {"ddp": "torch"}):
        named = subprocess.run(
            ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        copied = statistics.median(rates.pop("copy"))
        print(f"\n{named.stdout.strip()}: rows, inputs, batch {WORKLOADS[workload]}; copy {copied / 1e12:.2f} TB/s")
        for program, found in rates.items():
            rate, features = statistics.median(found), 2 if "bfloat16" in program else 4
            reached = rate * (WORKLOADS[workload][1] * features + 8)
            print(f"{program:>20} {rate:>16,.0f} rows/s  {reached / 1e12:>6.3f} TB/s  {reached / copied:>6.3f} of copy")
        for ours in ("pmean", "ordered"):
            others = (other for other in ("ddp", "jax") if other in rates)
            beside = (f"{median_ratio(rates[ours], rates[other]):.2f}x {other}" for other in others)
            print(f"{ours}: {', '.join(beside)}", flush=True)
