"""What the compiler's loops reach at the wide workload without dpreg: `python tests/benchmarks/bare.py`.

Rows in their order, in slices that stay in cache; on one core, and on two simulated devices of one process. First the
two products alone over rows that are in cache, then from memory: the prediction alone, the prediction and the gradient,
and both with a sum over the devices and an update each step, which is the least that training does. Beside it the rows
read by one product of NumPy's BLAS on all cores. GB/s, medians of 15 calls, and shares of the latter.
"""

import functools
import os
import statistics
import time

NUM_INPUTS, ROWS, STEP, SLICE, CALLS = 1024, 20_480, 2048, 32, 15  # rows: of each device


def gigabytes(call, size):
    """A second, of so many bytes a call."""
    call(), call()
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds) / 1e9


def main():
    """Prints the table."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    values = np.random.default_rng(0).standard_normal((2 * ROWS, NUM_INPUTS), np.float32)
    ones = np.ones(NUM_INPUTS, np.float32)
    limit = gigabytes(lambda: values @ ones, values.nbytes)
    print(f"{'read by one product of BLAS, all cores':48} {limit:6.1f} GB/s")

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
        return lax.fori_loop(0, ROWS // SLICE, lambda _, carry: both(rows, carry, w + 0 * carry), 0 * w)

    def epoch(x, w, steps, turn, exchange):
        def step(k, w):
            carry = slices(x, k * STEP, STEP // SLICE, functools.partial(turn, w=w), 0 * w)
            return w - 1e-9 * (lax.pmean(carry, "data") if exchange else carry)

        return lax.fori_loop(0, steps, step, w)

    for count in (1, 2):
        mesh = Mesh(jax.devices()[:count], ("data",))
        x = jax.device_put(values[: count * ROWS], NamedSharding(mesh, PartitionSpec("data")))
        programs = {
            "both products, rows in cache": in_cache,
            "prediction, from memory": functools.partial(epoch, turn=prediction, exchange=False),
            "both products, from memory": functools.partial(epoch, turn=both, exchange=False),
            "both, with a sum and an update a step": functools.partial(epoch, turn=both, exchange=True),
        }
        for name, program in programs.items():
            specs = (PartitionSpec("data"), PartitionSpec(), PartitionSpec())
            mapped = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
            compiled = jax.jit(mapped)
            call = functools.partial(compiled, x, jnp.asarray(ones), jnp.int32(ROWS // STEP))
            found = gigabytes(lambda call=call: jax.block_until_ready(call()), x.nbytes)
            print(f"{count} x {name:44} {found:6.1f} GB/s  {found / limit:5.2f}", flush=True)


if __name__ == "__main__":
    main()
