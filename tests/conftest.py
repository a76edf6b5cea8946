"""The tests run on 8 simulated CPU devices, strictly."""

import gc

import jax

from dpreg.distributed import devices

devices.start("cpu", 8, threads=8)  # as a run does, the compilation cache included
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    gc.freeze()  # what was imported, or the collector looks at all of it for each of the many programs that are traced
