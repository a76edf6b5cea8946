"""Times the run of D2L section 3.4 from the shell to its end, with dpreg and with the book's library, in turns.

`python tests/benchmarks/book.py` needs `d2l` and what its JAX module imports (`pip install d2l --no-deps`, then
tensorflow, tensorflow-datasets, gym, pandas, requests, matplotlib, ipython). It prints medians and their ratio, for a
first run of dpreg, which compiles, and for later runs.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 5

# The model of the section, on the library's data and trainer.
D2L = """
import jax
jax.random.PRNGKeyArray = jax.Array  # The library needs it; JAX removed it.
from d2l import jax as d2l
from flax import linen as nn
from jax import numpy as jnp
import optax

class LinearRegressionScratch(d2l.Module):
    num_inputs: int
    lr: float
    sigma: float = 0.01

    def setup(self):
        self.w = self.param("w", nn.initializers.normal(self.sigma), (self.num_inputs, 1))
        self.b = self.param("b", nn.initializers.zeros, (1,))

    def forward(self, x):
        return jnp.matmul(x, self.w) + self.b

    def loss(self, params, x, y, state):
        return ((state.apply_fn({"params": params}, *x) - y.reshape(-1, 1)) ** 2 / 2).mean()

    def configure_optimizers(self):
        return optax.sgd(self.lr)

data = d2l.SyntheticRegressionData(w=jnp.array([2, -3.4]), b=4.2)
trainer = d2l.Trainer(max_epochs=3)
trainer.fit(LinearRegressionScratch(2, lr=0.03), data)
"""


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Returns the seconds that a command takes."""
    began = time.perf_counter()
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    found: dict[str, list[float]] = {"d2l": [], "dpreg, first": [], "dpreg": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            found["d2l"].append(seconds([sys.executable, "-c", D2L], {}))
            for which in ("dpreg, first", "dpreg"):
                command = [sys.executable, "-m", "dpreg.main", f"--workdir={folder}/{which}"]
                found[which].append(seconds(command, {"XDG_CACHE_HOME": folder}))
    for which, times in found.items():
        median = statistics.median(times)
        print(f"{which:>14}: {median:6.2f} s, {median / statistics.median(found['d2l']):.2f} of the time of d2l")
