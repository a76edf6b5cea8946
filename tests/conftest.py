"""Runs the tests on 8 simulated CPU devices, with strict JAX settings."""

import gc
import signal

import jax

from dpreg.distributed import devices

devices.start("cpu", 8, threads=8)  # As a run does, with the compilation cache.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell starts commands in the background with SIGINT ignored, and so would the programs of these tests be.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    gc.freeze()  # Otherwise each garbage collection during tracing scans all imported objects.
