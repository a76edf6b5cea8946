"""The program of the two processes of `test_parts.py`: trains on its own rows, and makes calls that must be refused."""

import hashlib
import json
import sys

import jax
import numpy as np
import optax

import dpreg
from dpreg.data.pipeline import CastSource
from dpreg.models.losses import make_loss
from dpreg.solvers.solver import Solver

ROWS, HELD_OUT, CUTS = 203, 50, (61, 50)  # CUTS: rows of process 0. Process 1 has the others, and no held-out rows.


def arrays(number, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, 3)).astype(np.float32)
    x[::7] *= -0.0
    return x, (x @ [1.0, -2.0, 0.5] + rng.normal(size=number)).astype(np.float32), rng.uniform(0, 2, number)


def source(number, seed, cut=slice(None)):
    x, y, weight = (array[cut] for array in arrays(number, seed))
    return dpreg.ArraySource(x, y, weight) if len(x) else None


def sha_of(*values):
    return hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in values)).hexdigest()


def results(data, placement):
    """Returns all results of training on the rows, bit by bit."""
    trainer = dpreg.Trainer(3, num_shards=4, reduction="ordered", placement=placement, seed=3)
    trainer.fit(dpreg.LinearRegressionScratch(3, 0.05), data)
    params = trainer.state.params
    exact = Solver(CastSource(data.train, "float32"), trainer.mesh, 4).least_squares()
    predicted, observed, *_ = trainer.predictor().compared(data.train, 9)
    return trainer, {
        "params": sha_of(params["w"], params["b"]),
        "losses": [trainer.train_loss, trainer.val_loss],
        "evaluated": trainer.evaluate(data.train),
        "exact": sha_of(exact.w, exact.b),
        "compared": sha_of(predicted, observed),
    }


def refusals(process, trainer):
    """Returns the error messages of calls whose arguments differ between the processes."""
    model, messages = dpreg.LinearRegressionScratch(3, 0.05), {}

    def refused(name, function):
        try:
            function()
        except dpreg.InputError as error:
            messages[name] = str(error)

    def fit(data, model=model, **settings):
        settings = {"max_epochs": 1, "num_shards": 4} | settings
        return lambda: dpreg.Trainer(**settings).fit(model, data)

    same, x = dpreg.RegressionData(source(100, 0)), arrays(100, 0)[0]
    refused("unequal lengths", fit(dpreg.RegressionData(source(100 + 30 * process, 0))))
    refused("other values", fit(dpreg.RegressionData(source(100, process))))
    refused("other rows held out", fit(dpreg.RegressionData(source(100, 0), source(9, 0) if process else None)))
    refused("epochs", fit(same, max_epochs=1 + process))
    refused("batch size", fit(dpreg.RegressionData(source(100, 0), batch_size=32 << process)))
    refused("learning rate", fit(same, dpreg.LinearRegressionScratch(3, 0.05 + process)))
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=(0.1, 0.01)[process])
    refused("optimizer state", fit(same, dpreg.LinearRegressionScratch(3, 0.05, optimizer=injected)))
    state = trainer.state.replace(step=0)
    moved = state.replace(params=jax.tree.map(lambda leaf: leaf + np.float32(process), state.params))
    refused("assigned state", lambda: setattr(trainer, "state", moved))
    refused("predict", lambda: trainer.predict(x[: 50 + 20 * process]))
    refused("predict values", lambda: trainer.predict(x[process : 50 + process]))
    refused("evaluate", lambda: trainer.evaluate(source(100, process)))
    refused("calls", lambda: trainer.evaluate(source(100, 0)) if process else trainer.predict(x))
    narrow = dpreg.ArraySource(x[:, : 3 - process], x[:, 0])
    refused("columns", lambda: dpreg.RegressionData.from_parts(narrow))
    refused("no rows", lambda: dpreg.RegressionData.from_parts(None))
    labels = dpreg.ArraySource(x, np.full(100, process * 7.0))
    logistic = dpreg.LinearRegressionScratch(3, 0.05, objective=make_loss("logistic"))
    refused("target", fit(dpreg.RegressionData.from_parts(labels), logistic))
    refused("shuffled", lambda: dpreg.PermutedSource(dpreg.RegressionData.from_parts(narrow and source(9, 0)).train))
    return messages


def main(address, process):
    dpreg.start("cpu", 2, address, 2, process)
    cuts = [slice(0, cut) if process == 0 else slice(cut, None) for cut in CUTS]
    data = dpreg.RegressionData.from_parts(source(ROWS, 1, cuts[0]), source(HELD_OUT, 2, cuts[1]), batch_size=16)
    found = {"fingerprint": data.fingerprint(), "rows": [len(data.train), len(data.val)]}
    for placement in ("device", "host"):
        trainer, found[placement] = results(data, placement)
    found["own predictions"] = trainer.predict(data.train).tolist()
    found["all predictions"] = trainer.predict(arrays(ROWS, 1)[0]).tolist()
    print("found", json.dumps(found | {"refusals": refusals(process, trainer)}))


if __name__ == "__main__":
    main(sys.argv[1].partition("=")[2], int(sys.argv[2]))
