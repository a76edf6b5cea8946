"""Runs the tests on 8 simulated CPU devices, with strict JAX settings."""

import gc

import jax

from dpreg.distributed import devices

devices.start("cpu", 8, threads=8)  # As a run does, with the compilation cache.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    gc.freeze()  # Otherwise each garbage collection during tracing scans all imported objects.
