"""The API of *Dive into Deep Learning*: the code of its section 3.4 runs unchanged, on all devices.

`from dpreg import d2l` replaces `from d2l import jax as d2l`:

- `add_to_class`, `HyperParameters`, `ProgressBoard`: the utilities of section 3.2.1.
- `Module`, `LinearRegressionScratch`, `SGD`: the base class of models (3.2.2), and the classes of section 3.4.
- `DataModule`, `SyntheticRegressionData`: data (3.2.3 and 3.3).
- `Trainer`, `TrainState`: training (3.2.4 and 3.4.4), based on `dpreg.Trainer`.

The `loss(params, X, y, state)` of a model returns one number, the mean over the rows of a batch, as in the book.
Training applies it to each row, and so gives the results of `dpreg.LinearRegressionScratch` on any number of devices.

>>> from dpreg import d2l
>>> trainer = d2l.Trainer(max_epochs=10)
>>> data = d2l.SyntheticRegressionData(w=[2, -3.4], b=4.2)
>>> trainer.fit(d2l.LinearRegressionScratch(2, lr=0.1), data)
>>> bool(abs(trainer.state.params["b"] - data.b).max() < 0.01)
True
"""

from dpreg.d2l.data import DataModule, Loader, SyntheticRegressionData
from dpreg.d2l.module import LinearRegressionScratch, Module
from dpreg.d2l.tools import HyperParameters, ProgressBoard, add_to_class
from dpreg.d2l.trainer import Trainer, TrainState
from dpreg.models.sgd import SGD

__all__ = [
    "SGD",
    "DataModule",
    "HyperParameters",
    "LinearRegressionScratch",
    "Loader",
    "Module",
    "ProgressBoard",
    "SyntheticRegressionData",
    "TrainState",
    "Trainer",
    "add_to_class",
]
