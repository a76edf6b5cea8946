"""The settings of JAX under which everything of dpreg is traced, whatever the process has set."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src import config  # the offset of seeds has no public context manager
from jax.typing import ArrayLike

PRNG = "threefry2x32"  # counter-based: what it draws depends on key and index alone, if it is partitionable
FULL_PRECISION = "highest"  # products of float32 as such, also where a chip would round their factors by default


@contextlib.contextmanager
def pinned_settings(float64: bool = False) -> Iterator[None]:
    """Traces, and draws, alike in every process: the generator, the precision of products, and the widest dtype.

    Otherwise the environment (JAX_DEFAULT_PRNG_IMPL, JAX_RANDOM_SEED_OFFSET, JAX_DEFAULT_MATMUL_PRECISION), or a
    run of another precision in this process, would decide what a run computes, and some of it by the number of devices.

    Args:
      float64: whether float64 is computed as such, not as float32.
    """
    with (
        jax.enable_x64(float64),
        jax.default_prng_impl(PRNG),
        jax.threefry_partitionable(True),
        jax.default_matmul_precision(FULL_PRECISION),
        config.random_seed_offset(0),
    ):
        yield


def key_of(seed: ArrayLike) -> Array:
    """The random key of a seed in [0, 2**32): the words (0, seed), whatever JAX_RANDOM_SEED_OFFSET says."""
    seed = jnp.asarray(seed).astype(np.uint32)
    key: Array = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl=PRNG)
    return key
