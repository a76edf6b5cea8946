"""Times exact solutions of dpreg and other packages: `python tests/benchmarks/solvers.py` (20 minutes).

The time is from the rows to the parameters, of dpreg with what its standard errors need. All packages run in the same
process on the same rows. The peers have them in memory in float64, to which they would convert others, and dpreg in
float32. The 10,000,000 rows dpreg reads from its row cache, a memory-mapped file, which it opens again each time; the
memory that this takes is without the pages of the file, which the system may drop.

A round calls each package once the threads of the one before are idle, and again at once where that takes less than a
second. Times are the best of three rounds, or of as many as take 20 s; the ratio of a peer is its time over that of
dpreg. The errors are those of the coefficients against dpreg's, relative to the largest one. For 2,048 features, a
tolerance of 1e-12 brings lbfgs no nearer than 1e-10.

    python tests/benchmarks/solvers.py [--loss=squared] [--size=60000x54] [--rounds=3]
"""

import argparse
import collections
import contextlib
import ctypes
import importlib.util
import pathlib
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import jax
import numpy as np
import statsmodels.api as sm
from jax.sharding import Mesh
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge

import dpreg
from dpreg.config import Columns, Config
from dpreg.data.sources import Source
from dpreg.solvers.solver import Solver

Program = Callable[[np.ndarray, np.ndarray], np.ndarray]

SIZES = ((60_000, 54), (6_000, 2_048), (1_000_000, 30), (10_000_000, 30))
LOSSES = ("squared", "logistic", "poisson")
STREAMED = 10_000_000  # So many rows, or more, dpreg reads from its row cache.
_LEAST_SECONDS = 20.0
_SETTLED = 0.02  # seconds, of whose processor time at most a tenth is used
_PATIENCE = 500  # times that this is waited for
_SHORT = 1.0  # The most seconds of a call that is repeated at once, where memory and threads are still there.
_SLOWEST = 60.0  # A program that takes more seconds gets no further round.
_COPIES = {"statsmodels GLM": 8}  # The copies of the rows that a peer holds, where this is many.
_MEMORY = 16e9  # The bytes that these copies may take.


def rows(loss: str, num_rows: int, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns X [n, d] and y [n], float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, num_inputs), dtype=np.float32)
    z = x @ (rng.standard_normal(num_inputs) / np.sqrt(num_inputs)).astype(np.float32)
    if loss == "logistic":
        return x, (rng.random(num_rows) < 1 / (1 + np.exp(-z))).astype(np.float32)
    if loss == "poisson":
        return x, rng.poisson(np.exp(z)).astype(np.float32)
    return x, z + 0.5 * rng.standard_normal(num_rows, dtype=np.float32)


def solve(loss: str, source: Source) -> np.ndarray:
    """Returns the weights of dpreg's exact solution, as `--solver=exact` computes it."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    return Solver(source, mesh, 8).solve(Config(loss=loss)).w[:, 0]


def fit_dpreg(loss: str) -> Program:
    """Returns a function that solves for rows in memory."""
    return lambda x, y: solve(loss, dpreg.ArraySource(x, y))


@contextlib.contextmanager
def fit_stream(loss: str, x: np.ndarray, y: np.ndarray) -> Iterator[Program]:
    """Puts the rows into a row cache, and yields a function that opens it and solves for its rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "rows.npy")
        np.save(file, np.column_stack([x, y]))
        columns = Columns(target=(f"c{x.shape[1]}",), validation_fraction=0.0, standardize=False)

        def program(*_: np.ndarray) -> np.ndarray:
            return solve(loss, dpreg.read_table(str(file), columns, cache_dir=folder).train)

        dpreg.read_table(str(file), columns, cache_dir=folder)
        yield program


def fit_sklearn(model: object) -> Program:
    """Returns a function that computes the coefficients of a scikit-learn model."""
    return lambda x, y: np.ravel(model.fit(x, y).coef_)  # type: ignore[attr-defined]


def fit_glum(family: str) -> Program:
    """Returns a function that fits a GLM of glum without a penalty."""
    from glum import GeneralizedLinearRegressor

    return lambda x, y: GeneralizedLinearRegressor(family=family, alpha=0, gradient_tol=1e-8).fit(x, y).coef_


def fit_statsmodels(family: object) -> Program:
    """Returns a function that fits a GLM of statsmodels by iteratively reweighted least squares."""
    return lambda x, y: sm.GLM(y, sm.add_constant(x), family=family).fit().params[1:]


def programs(loss: str, num_inputs: int) -> dict[str, Program]:
    """Returns the peers by name."""
    if loss == "squared":
        found = {
            "sklearn LinearRegression": fit_sklearn(LinearRegression()),
            "sklearn Ridge(alpha=0)": fit_sklearn(Ridge(alpha=0.0)),
            "numpy lstsq": lambda x, y: np.linalg.lstsq(np.c_[np.ones(len(x)), x], y)[0][1:],
        }
    elif loss == "logistic":
        found = {
            f"sklearn {name}": fit_sklearn(LogisticRegression(C=np.inf, solver=name, tol=1e-10, max_iter=1000))
            for name in ("newton-cholesky", "lbfgs")
        }
        found["LIBLINEAR (C=1e6)"] = fit_sklearn(LogisticRegression(C=1e6, solver="liblinear", tol=1e-8))
    else:
        found = {
            f"sklearn {name}": fit_sklearn(PoissonRegressor(alpha=0, solver=name, tol=1e-10, max_iter=1000))
            for name in ("newton-cholesky", "lbfgs")
        }
    if importlib.util.find_spec("glum"):
        found["glum"] = fit_glum({"squared": "normal", "logistic": "binomial"}.get(loss, loss))
    if loss != "squared" and num_inputs < 100:
        found["statsmodels GLM"] = fit_statsmodels(
            {"logistic": sm.families.Binomial()}.get(loss, sm.families.Poisson())
        )
    return found


def settle() -> None:
    """Waits until no thread of this process is busy: those of a BLAS look for more work for a while."""
    for _ in range(_PATIENCE):
        before = time.process_time()
        time.sleep(_SETTLED)
        if time.process_time() - before <= 0.1 * _SETTLED:
            return
    raise SystemExit("a thread of this process does not come to rest; no time would be right")


def measure(program: Program, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns (the seconds of one call, or of the faster one of two short ones, the coefficients)."""
    settle()
    best = np.inf
    for _ in range(2):
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            w = program(x, y)
        best = min(best, time.perf_counter() - began)
        if best > _SHORT:
            break
    return best, w


def peak_memory(program: Callable[[], object]) -> float:
    """Returns the most bytes that a call has added to the memory of this process, without mapped files."""

    def used() -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    ctypes.CDLL(None).malloc_trim(0)  # or else the call would use again what the process has already freed
    before, most, done = used(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], used() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        program()
    finally:
        done.set()
        watcher.join()
    return most[0]


def compare(loss: str, num_rows: int, num_inputs: int, rounds: int) -> None:
    """Prints the times of dpreg and of its peers for one loss and one size."""
    x, y = rows(loss, num_rows, num_inputs)
    x_of_peers, y_of_peers = x.astype(np.float64), y.astype(np.float64)
    peers, memory = programs(loss, num_inputs), ""
    for name in [name for name in peers if _COPIES.get(name, 0) * x_of_peers.nbytes > _MEMORY]:
        print(f"{name} needs about {_COPIES[name] * x_of_peers.nbytes / 1e9:.0f} GB of memory", flush=True)
        del peers[name]
    streamed = num_rows >= STREAMED
    with fit_stream(loss, x, y) if streamed else contextlib.nullcontext(fit_dpreg(loss)) as own:
        if streamed:
            memory = f", {peak_memory(lambda: own(x, y)) / 1e6:.0f} MB beside the row cache"
        seconds, found = collections.defaultdict[str, list[float]](list), dict[str, np.ndarray]()
        began = time.perf_counter()
        while len(seconds["dpreg"]) < rounds or time.perf_counter() - began < _LEAST_SECONDS:
            of_round, found["dpreg"] = measure(own, x, y)
            seconds["dpreg"].append(of_round)
            for name, program in peers.items():
                if max(seconds[name], default=0.0) < _SLOWEST:
                    of_round, found[name] = measure(program, x_of_peers, y_of_peers)
                    seconds[name].append(of_round)
    best, w = min(seconds["dpreg"]), found["dpreg"]
    print(f"\n{loss}, {num_rows:,} x {num_inputs}: dpreg {best:.3f} s{memory}", flush=True)
    for name in peers:
        theirs, apart = min(seconds[name]), np.abs(found[name] - w).max() / np.abs(w).max()
        print(f"  {name:<28} {theirs:8.3f} s {theirs / best:7.2f}x   coefficients {apart:.0e} apart", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES)
    parser.add_argument("--size", help="such as 60000x54")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [tuple(map(int, arguments.size.split("x")))] if arguments.size else SIZES
    for loss in [arguments.loss] if arguments.loss else LOSSES:
        for num_rows, num_inputs in sizes:
            compare(loss, num_rows, num_inputs, arguments.rounds)
