"""The settings of JAX under which dpreg traces all its functions, independent of those of the process."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax._src import config  # `random_seed_offset` has no public context manager
from jax.typing import ArrayLike

PRNG = "threefry2x32"  # counter-based: if partitionable, each value depends only on the key and its index
FULL_PRECISION = "highest"  # products in full float32, also on chips that round their factors by default


@contextlib.contextmanager
def pinned_settings(float64: bool = False) -> Iterator[None]:
    """Pins the random generator, the precision of matrix products, and whether float64 is enabled.

    Otherwise the result would depend on the environment (JAX_DEFAULT_PRNG_IMPL, JAX_RANDOM_SEED_OFFSET,
    JAX_DEFAULT_MATMUL_PRECISION), on runs of another precision in this process, and on the number of devices.

    Args:
      float64: whether to enable float64; otherwise JAX computes in float32.
    """
    with (
        jax.enable_x64(float64),
        jax.default_prng_impl(PRNG),
        jax.threefry_partitionable(True),
        jax.default_matmul_precision(FULL_PRECISION),
        config.random_seed_offset(0),
    ):
        yield


def make_key(seed: ArrayLike) -> Array:
    """The random key of a seed in [0, 2**32): the words (0, seed), independent of JAX_RANDOM_SEED_OFFSET."""
    seed = jnp.asarray(seed).astype(np.uint32)
    key: Array = jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(seed), seed]), impl=PRNG)
    return key
