"""The tests run on 8 simulated CPU devices, strictly."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _no_reused_keys():
    """A random key used twice is an error."""
    with jax.debug_key_reuse(True):
        yield
