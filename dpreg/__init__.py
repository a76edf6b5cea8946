"""Distributed data-parallel regression in JAX: the answer does not depend on how many devices computed it."""

from dpreg.config import Columns
from dpreg.data.dataset import Block, Dataset
from dpreg.data.ingest import read_table
from dpreg.data.sources import ArraySource, RegressionData, Shuffled, Source
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.errors import Diverged, InputError
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.losses import squared_loss
from dpreg.models.module import Module
from dpreg.models.sgd import SGD
from dpreg.parallel.devices import start
from dpreg.parallel.step import TrainState
from dpreg.trainer import Progress, Trainer

__all__ = [
    "SGD",
    "ArraySource",
    "Block",
    "Columns",
    "Dataset",
    "Diverged",
    "InputError",
    "LinearRegressionScratch",
    "Module",
    "Progress",
    "RegressionData",
    "Shuffled",
    "Source",
    "SyntheticRegressionData",
    "TrainState",
    "Trainer",
    "read_table",
    "squared_loss",
    "start",
]

__version__ = "0.1.0"
