"""The tests run on 8 simulated CPU devices, strictly."""

import jax
import pytest

from dpreg.parallel import devices

devices.start("cpu", 8, threads=8)  # as a run does, the compilation cache included
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _no_reused_keys():
    """A random key used twice is an error."""
    with jax.debug_key_reuse(True):
        yield
