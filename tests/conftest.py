"""The tests run on 8 simulated CPU devices, strictly."""

import jax

from dpreg.parallel import devices

devices.start("cpu", 8, threads=8)  # as a run does, the compilation cache included
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
