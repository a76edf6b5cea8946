"""Measures XLA's loops on the wide workload without dpreg: `python tests/benchmarks/bare.py`.

The loops read rows in order, in slices that fit in cache. They run on one core, on two simulated devices of one
process, and in two processes with one core each, which exchange their sums over Gloo. The first program computes the
two products on rows that stay in cache. The others read rows from memory: the prediction alone, the prediction and the
gradient, and both with a sum over the devices and an update in each step, which is the least work of training.

For comparison, rows are also read by one product of NumPy's BLAS on all cores, and by PyTorch's DDP with batches
gathered by hand, if PyTorch is installed. Figures are GB/s of all devices, medians of 15 calls, and shares of BLAS.
"""

import functools
import os
import statistics
import time

from peers import ddp
from turns import in_turns, in_two_processes, median_ratio, on_one_core

NUM_INPUTS, ROWS, STEP, SLICE, EPOCHS, CALLS = 1024, 20_480, 2048, 32, 6, 15  # ROWS is per device, EPOCHS per call.
ADDRESS = "127.0.0.1:29514"
STEPS = "both, with a sum and an update a step"
FLAGS = (  # A loop without collectives is compiled as one function.
    "--xla_force_host_platform_device_count={} --xla_cpu_multi_thread_eigen=false "
    f"--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold={2**63 - 1}"
)


def gigabytes(call, size):
    """Returns GB/s of calls that read the given number of bytes."""
    call(), call()
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds) / 1e9


def values(devices):
    """Returns the rows [n, d] of the given number of devices, float32."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((devices * ROWS, NUM_INPUTS), np.float32)


def limit():
    """Returns the GB/s of one product on all cores."""
    import numpy as np

    x, ones = values(2), np.ones(NUM_INPUTS, np.float32)
    return gigabytes(lambda: x @ ones, x.nbytes)


def reached(devices, rank=None):
    """Returns {program: GB/s} of all devices of this process, or of two processes if `rank` is given."""
    os.environ |= {"XLA_FLAGS": FLAGS.format(devices), "JAX_PLATFORMS": "cpu"}
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if rank is not None:
        # Otherwise Gloo's thread occupies the core for 3 ms.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(ADDRESS, 2, rank)

    def slices(x, first, count, turn, start):
        def one(i, carry):
            return turn(lax.dynamic_slice_in_dim(x, first + i * SLICE, SLICE), carry)

        return lax.fori_loop(0, count, one, start)

    def prediction(rows, carry, w):
        return carry.at[:SLICE].add(rows @ w)

    def both(rows, carry, w):
        return carry + (rows @ w - 1) @ rows

    def in_cache(x, w, steps):
        del steps
        rows = x[:SLICE]
        return lax.fori_loop(0, EPOCHS * ROWS // SLICE, lambda _, carry: both(rows, carry, w + 0 * carry), 0 * w)

    def sum_of_processes(sums):
        return lax.all_to_all(jnp.stack([sums, sums]), "data", 0, 0)

    def epoch(x, w, steps, turn, exchange):
        def step(k, w):
            carry = slices(x, k % (ROWS // STEP) * STEP, STEP // SLICE, functools.partial(turn, w=w), 0 * w)
            if exchange:
                carry = lax.pmean(carry, "data") if rank is None else sum_of_processes(carry).mean(axis=0)
            return w - 1e-9 * carry

        return lax.fori_loop(0, steps, step, w)

    programs = {
        "both products, rows in cache": in_cache,
        "prediction, from memory": functools.partial(epoch, turn=prediction, exchange=False),
        "both products, from memory": functools.partial(epoch, turn=both, exchange=False),
        STEPS: functools.partial(epoch, turn=both, exchange=True),
    }
    mesh = Mesh(np.array(jax.devices()), ("data",))
    along, replicated = PartitionSpec("data"), PartitionSpec()
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, along), values(devices))
    w = jax.make_array_from_process_local_data(NamedSharding(mesh, replicated), np.ones(NUM_INPUTS, np.float32))
    found = {}
    for name, program in programs.items():
        mapped = jax.shard_map(
            program, mesh=mesh, in_specs=(along, replicated, replicated), out_specs=replicated, check_vma=False
        )
        steps = EPOCHS * ROWS // STEP
        call = functools.partial(jax.jit(mapped), x, w, jnp.int32(steps) if rank is None else steps)
        found[name] = gigabytes(lambda call=call: jax.block_until_ready(call()), EPOCHS * x.nbytes)
    return found


def ddp_by_hand():
    """Returns the GB/s of training in PyTorch, with rows gathered by hand."""
    return 4 * (NUM_INPUTS + 2) * ddp(2 * ROWS, NUM_INPUTS, 2 * STEP, by_hand=True) / 1e9


PROGRAMS = {
    "BLAS, all cores": limit,
    "DDP, by hand": ddp_by_hand,
    "a core": on_one_core(functools.partial(reached, 1)),
    "two devices": functools.partial(reached, 2),
    "two processes": in_two_processes(functools.partial(reached, 1)),
}

if __name__ == "__main__":
    for _, rounds in in_turns(__doc__, PROGRAMS, {"wide": ()}, {"DDP, by hand": "torch"}):
        limits, ddp_rates = rounds.pop("BLAS, all cores"), rounds.pop("DDP, by hand", None)
        print(f"one product of BLAS on all cores: {statistics.median(limits):.1f} GB/s; shares of it:")
        for program, found in rounds.items():
            for name in found[0]:
                typical = statistics.median(rates[name] for rates in found)
                share = statistics.median(rates[name] / most for rates, most in zip(found, limits, strict=True))
                print(f"{program:>14}: {name:40} {typical:6.1f} GB/s  {share:5.2f}")
        for program in ("two devices", "two processes"):
            pairs = zip(rounds[program], rounds["a core"], strict=True)
            gained = statistics.median(two[STEPS] / (2 * one[STEPS]) for two, one in pairs)
            beside = (
                f", {median_ratio([rates[STEPS] for rates in rounds[program]], ddp_rates):.2f}x DDP"
                if ddp_rates
                else ""
            )
            print(f"{program}: efficiency {gained:.2f}{beside}, {STEPS}", flush=True)
