"""The book's data modules and loaders, which yield batches (X, y) (D2L sections 3.2.3 and 3.3)."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from dpreg.config import Config
from dpreg.d2l.tools import HyperParameters
from dpreg.data import synthetic
from dpreg.data.sampler import Sampler
from dpreg.data.sources import ArraySource, RegressionData, Source
from dpreg.errors import InputError


class Loader:
    """Iterates over batches (X, y) of a source, [b, d] and [b, t]; the last batch of an epoch may be smaller.

    Args:
      source: the rows.
      sampler: determines their order and the size of the batches.
      seed: the seed of the order.

    Attributes:
      epoch: the number of the next epoch, from 0; each iteration over the loader is an epoch.

    >>> loader = Loader(ArraySource(np.arange(5), np.arange(5)), Sampler(5, 1, 2, shuffle=False))
    >>> len(loader), [y.ravel().tolist() for _, y in loader]
    (3, [[0.0, 1.0], [2.0, 3.0], [4.0]])
    """

    def __init__(self, source: Source, sampler: Sampler, seed: int = Config.seed):
        self.source, self.sampler, self.seed, self.epoch = source, sampler, seed, 0

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        sampler, epoch = self.sampler, self.epoch
        shards = np.arange(sampler.num_shards, dtype=np.int32)
        self.epoch += 1
        for step in range(epoch * len(self), (epoch + 1) * len(self)):
            positions = sampler.positions(np.full_like(shards, step), shards, self.seed)
            real = positions < sampler.shard_size(shards)[:, None]
            rows = self.source[(sampler.shard_start(shards)[:, None] + positions)[real]]
            if (rows["weight"] != 1).any():
                raise InputError(
                    "batches (X, y) carry no weights, and some rows have one; do not override fit_epoch, or the "
                    "methods that it calls"
                )
            yield jnp.asarray(rows["x"].astype(rows["y"].dtype)), jnp.asarray(rows["y"])


class DataModule(HyperParameters):
    """The base class of data (D2L section 3.2.3).

    A subclass has an attribute `batch_size` and a method `get_dataloader(train)`. It returns
    `self.get_tensorloader((X, y), train, indices)`, or None if there are no validation rows.

    Args:
      root, num_workers: saved as attributes, for subclasses that download or read files.

    >>> class Data(DataModule):
    ...     def __init__(self, X, y, batch_size=2):
    ...         self.save_hyperparameters()
    ...     def get_dataloader(self, train):
    ...         return self.get_tensorloader((self.X, self.y), train, slice(0, 4) if train else slice(4, None))
    >>> data = Data(np.arange(10).reshape(5, 2), np.arange(5))
    >>> len(data.train_dataloader()), len(data.val_dataloader())
    (2, 1)
    """

    batch_size: int

    def __init__(self, root: str = "../data", num_workers: int = 4):
        self.save_hyperparameters()

    def get_dataloader(self, train: bool) -> Any:
        """The batches of training rows, or of validation rows. Subclasses override this."""
        raise InputError(
            f"{type(self).__name__} has no get_dataloader; define get_dataloader(self, train), which returns "
            "self.get_tensorloader((X, y), train, indices)"
        )

    def train_dataloader(self) -> Any:
        """`get_dataloader(train=True)`."""
        return self.get_dataloader(train=True)

    def val_dataloader(self) -> Any:
        """`get_dataloader(train=False)`."""
        return self.get_dataloader(train=False)

    def get_tensorloader(
        self, tensors: Sequence[Any], train: bool, indices: slice | ArrayLike = slice(0, None)
    ) -> Loader:
        """A loader of batches of `batch_size` rows of arrays (D2L section 3.3.3).

        Args:
          tensors: X [n, d] and y [n] or [n, t]; float64 if X is, otherwise converted to float32.
          train: whether to shuffle the rows in each epoch.
          indices: the indices of the rows to use.

        Raises:
          InputError: unless there are two arrays, and for values that are not finite.
        """
        if len(tensors) != 2:
            raise InputError(f"get_tensorloader: {len(tensors)} arrays; give two, the features X and the targets y")
        rows: Any = indices
        x, y = (np.asarray(tensor)[rows] for tensor in tensors)
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        source = ArraySource(x, y, dtype=dtype)
        return Loader(source, Sampler(len(source), 1, self.batch_size, shuffle=train))


def read_rows(data: DataModule) -> RegressionData:
    """The rows of both loaders of a data module, as data for `dpreg.Trainer`.

    Raises:
      InputError: for a loader that is not made by `get_tensorloader`, as devices read rows by their numbers.
    """
    train, val = data.train_dataloader(), data.val_dataloader()
    for name, loader in (("train", train), ("val", val)):
        if not isinstance(loader, Loader) and not (loader is None and name == "val"):
            raise InputError(
                f"{type(data).__name__}.{name}_dataloader returns {type(loader).__name__}, and devices read rows by "
                "their numbers; return self.get_tensorloader((X, y), train, indices)"
            )
    return RegressionData(train.source, None if val is None else val.source, data.batch_size)


class SyntheticRegressionData(synthetic.SyntheticRegressionData, DataModule):
    """Synthetic rows y = X w + b + noise, the same as `dpreg.SyntheticRegressionData` (D2L section 3.3.1).

    Args:
      w: [d] the true weights.
      b: the true bias.
      noise: the standard deviation of the noise.
      num_train, num_val: the numbers of training and validation rows; `num_val=0` for no validation.
      batch_size: the rows of a global batch, over all devices.

    >>> data = SyntheticRegressionData(w=jnp.array([2, -3.4]), b=4.2)
    >>> X, y = next(iter(data.train_dataloader()))
    >>> X.shape, y.shape
    ((32, 2), (32, 1))
    """

    def __init__(
        self,
        w: ArrayLike,
        b: ArrayLike,
        noise: float = Config.noise,
        num_train: int = Config.num_train,
        num_val: int = Config.num_val,
        batch_size: int = Config.batch_size,
    ):
        super().__init__(w, b, noise, num_train, num_val, batch_size)
        self.save_hyperparameters(ignore=["w", "b"])  # the base class has saved both as arrays

    @functools.cached_property
    def _all_rows(self) -> tuple[Array, Array]:
        sources = [source[np.arange(len(source))] for source in (self.train, self.val) if source is not None]
        x, y = (jnp.asarray(np.concatenate([rows[name] for rows in sources])) for name in ("x", "y"))
        return x, y

    @property
    def X(self) -> Array:  # noqa: N802 (the book's name)
        """[num_train + num_val, d] float32: the features, training rows first."""
        return self._all_rows[0]

    @property
    def y(self) -> Array:
        """[num_train + num_val, t] float32: the targets."""
        return self._all_rows[1]

    def get_dataloader(self, train: bool) -> Loader | None:
        """Batches of the training rows, in a new order each epoch, or of the validation rows if there are any."""
        source = self.train if train else self.val
        if source is None:
            return None
        return Loader(source, Sampler(len(source), 1, self.batch_size, shuffle=train))
