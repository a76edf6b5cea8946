"""Distributed data-parallel regression in JAX: the answer does not depend on how many devices computed it.

Data, which `Trainer.fit` takes:

- `SyntheticRegressionData`: rows whose true parameters are known.
- `RegressionData`: rows to fit and rows held out, of any `Source`; `RegressionData.from_parts` where each of several
  processes holds its own.
- `ArraySource`, `PermutedSource`: a source over arrays; one over another, in a mixed order.
- `read_table`, `Columns`: rows of a table, and what to take from it.
- `Dataset`, `Block`: the pipeline to the devices, and the steps that it hands over at once.

Models:

- `LinearRegressionScratch`: linear regression, from scratch.
- `Module`: what your own model derives from.
- `squared_loss`, `SGD`: the loss and the optimizer where a model names no others.

Training:

- `start`: chooses platform and devices, and joins processes, before anything else uses JAX.
- `Trainer`: fits, predicts and evaluates, on all devices.
- `TrainState`: what it trains; `Callback`, `Progress`: the events of a run.

Errors:

- `InputError`: what was asked for cannot be done; says what to do instead.
- `Diverged`: the loss is no longer finite.

The command `dpreg` is `python -m dpreg.main`; `dpreg.plan`, `dpreg.scaling` and `dpreg.report` are others, and
`dpreg.sklearn` has estimators of scikit-learn. `dpreg.d2l` has the names of *Dive into Deep Learning*.
"""

import warnings
from typing import Any

from dpreg.config import Columns
from dpreg.data.pipeline import Block, Dataset
from dpreg.data.sources import ArraySource, PermutedSource, RegressionData, Source
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.distributed.devices import start
from dpreg.errors import Diverged, InputError
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.losses import squared_loss
from dpreg.models.module import Module
from dpreg.models.sgd import SGD
from dpreg.step.state import TrainState
from dpreg.tables.ingest import read_table
from dpreg.train.callback import Callback, Progress
from dpreg.train.trainer import Trainer

__all__ = [
    "SGD",
    "ArraySource",
    "Block",
    "Callback",
    "Columns",
    "Dataset",
    "Diverged",
    "InputError",
    "LinearRegressionScratch",
    "Module",
    "PermutedSource",
    "Progress",
    "RegressionData",
    "Source",
    "SyntheticRegressionData",
    "TrainState",
    "Trainer",
    "read_table",
    "squared_loss",
    "start",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Former names, which warn."""
    if name == "Shuffled":
        warnings.warn("dpreg.Shuffled is deprecated; it is dpreg.PermutedSource", DeprecationWarning, 2)
        return PermutedSource
    raise AttributeError(f"module 'dpreg' has no attribute {name!r}")
