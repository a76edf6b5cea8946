"""The book's trainer (D2L sections 3.2.4 and 3.4.4), based on `dpreg.Trainer`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import dpreg.train.trainer
from dpreg.config import Config
from dpreg.d2l import module
from dpreg.d2l.data import DataModule, Loader, read_rows
from dpreg.d2l.module import Module
from dpreg.d2l.tools import HyperParameters
from dpreg.data.parts import rows_everywhere
from dpreg.data.pipeline import CastSource
from dpreg.data.sampler import Sampler
from dpreg.data.sources import RegressionData
from dpreg.errors import Diverged, InputError
from dpreg.step import state
from dpreg.step.checks import mode_arguments
from dpreg.step.foreign_methods import OF_DATA, OF_MODEL, OF_TRAINER, refuse_foreign_methods, user_methods
from dpreg.tracing import make_key, pinned_settings

# The methods that this trainer calls, while dpreg.Trainer does not.
_TRAINER_METHODS = frozenset({"fit_epoch", "prepare_batch", "clip_gradients"})
_MODEL_METHODS = frozenset({"training_step", "validation_step", "plot", "apply_init"})
_DATA_METHODS = frozenset({"get_dataloader", "get_tensorloader", "train_dataloader", "val_dataloader"})
# If the user overrides one of these, epochs run step by step.
_STEP_METHODS = frozenset({"prepare_batch", "clip_gradients", "training_step", "validation_step"})
_CHECKED_ROWS = 8
_OVERRIDE_NOTHING = "do not override fit_epoch, or the methods that it calls"


class TrainState(state.TrainState):
    """`dpreg.TrainState` with the random key of Dropout (D2L section 5.6)."""

    dropout_rng: Array


class Trainer(HyperParameters):
    """Trains a `d2l.Module` on the rows of a `d2l.DataModule`, on all devices (D2L section 3.2.4).

    By default an epoch is a compiled, data-parallel program on all devices. It runs step by step on one device, as in
    the book, if a subclass or `d2l.add_to_class` overrides `fit_epoch`, `prepare_batch` or `clip_gradients` of the
    trainer, or `training_step` or `validation_step` of the model. Then it is many times slower, and its parameters are
    the same within 1e-5, except that Dropout draws other masks.

    Args:
      max_epochs: the number of passes over the training rows.
      num_gpus: the number of GPUs to use; 0 for all devices that JAX has.
      gradient_clip_val: the largest norm of the gradient; larger ones are scaled to it. 0: no limit.
      settings: further arguments of `dpreg.Trainer`, such as `seed`, `num_devices` and `reduction`.

    Attributes:
      engine: the `dpreg.Trainer` that trains; it has `predict`, `evaluate`, `val_loss`, `metrics` and so on.
      model: the model that was given to `fit`.
      train_dataloader, val_dataloader: loaders of batches (X, y), JAX arrays [b, d] and [b, t], of the training rows in
        the order of the compiled epoch, and of the validation rows; None if there are none.
      num_train_batches, num_val_batches: the number of batches of an epoch.
      epoch: the current epoch, counted from 0.
      train_batch_idx, val_batch_idx: the number of batches processed in all epochs.

    Raises:
      InputError: for arguments out of range.
    """

    max_epochs: int
    gradient_clip_val: float
    model: Module
    train_dataloader: Loader
    val_dataloader: Loader | None
    num_train_batches: int
    num_val_batches: int

    def __init__(
        self, max_epochs: int, num_gpus: int = 0, gradient_clip_val: float = Config.gradient_clip_val, **settings: Any
    ):
        self.save_hyperparameters(ignore=["settings"])
        gpus: dict[str, Any] = {"num_devices": num_gpus, "platform": "gpu"} if num_gpus else {}
        self._settings = gpus | settings
        self.engine = self._make_engine()
        self.epoch = self.train_batch_idx = self.val_batch_idx = 0
        self._state: TrainState | None = None  # the state that was assigned; None if the engine has the current one
        self._dropout_rng: Array = make_key(self.engine.settings.seed)

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError; the message says whether `fit` sets the attribute."""
        reason = "there is none before fit" if name in Trainer.__annotations__ else "there is no such attribute"
        raise AttributeError(f"d2l.Trainer.{name}: {reason}", name=name, obj=self)

    def fit(self, model: Module, data: DataModule | RegressionData, key: Array | None = None) -> None:
        """Trains the model: calls `fit_epoch` `max_epochs` times.

        Args:
          model: a model with `forward`, `loss` and `configure_optimizers`.
          data: a data module with `get_dataloader`, or data of dpreg.
          key: the random key of the initial parameters; None derives it from the seed.

        Raises:
          InputError: for a model or data that cannot be used, and for overridden methods that dpreg never calls.
          Diverged: when the loss or the parameters are not finite.
        """
        self.prepare_data(data)
        self.prepare_model(model)
        if key is not None or "apply_init" in _list_user_methods(model):
            self._draw_parameters(key)
        self.epoch = self.train_batch_idx = self.val_batch_idx = 0
        for epoch in range(self.max_epochs):
            if self.engine.done:
                break
            self.epoch = epoch
            self.train_dataloader.epoch = epoch
            with pinned_settings(self.engine.settings.dtype == np.float64):
                self.fit_epoch()
            self._store_state(epoch + 1)
        if self._state is None:
            self.engine.restore_best()
        else:
            self.engine.loop.validate()

    def prepare_data(self, data: DataModule | RegressionData) -> None:
        """Places the rows on the devices, and creates the loaders of batches (X, y)."""
        refuse_foreign_methods(self, OF_TRAINER, _TRAINER_METHODS)
        if isinstance(data, DataModule):
            refuse_foreign_methods(data, OF_DATA, _DATA_METHODS)
            data = read_rows(data)
        if missing := [name for name in ("train", "val", "batch_size") if not hasattr(data, name)]:
            raise InputError(f"data: {type(data).__name__} has no {missing[0]}; give an object of d2l.DataModule")
        self.engine, self._state = self._make_engine(), None
        self._dropout_rng, precision = make_key(self.engine.settings.seed), self.engine.settings.precision
        self.engine.prepare_data(data)
        self.train_dataloader = Loader(
            CastSource(data.train, precision), self.engine.train.sampler, self.engine.settings.seed
        )
        self.val_dataloader = None
        if data.val:
            in_order = Sampler(len(data.val), 1, data.batch_size, shuffle=False)
            self.val_dataloader = Loader(CastSource(data.val, precision), in_order)
        self.num_train_batches = len(self.train_dataloader)
        self.num_val_batches = len(self.val_dataloader) if self.val_dataloader else 0

    def prepare_model(self, model: Module) -> None:
        """Initialises the state and compiles the steps.

        Raises:
          InputError: for a model whose loss is not a mean over rows, or that lacks a method, see `d2l.Module`.
        """
        if not isinstance(model, Module):
            name = model.__name__ if isinstance(model, type) else type(model).__name__
            raise InputError(f"model: {name} is not an instance of a class derived from d2l.Module; give one")
        refuse_foreign_methods(model, OF_MODEL, _MODEL_METHODS)
        model.trainer, model.board.xlim = self, (0, self.max_epochs)
        model.board.clear()
        source = self.engine.train.source
        number = min(_CHECKED_ROWS, len(source))
        rows = rows_everywhere(source, np.linspace(0, len(source) - 1, number).astype(np.int64))
        rows = {name: column.astype(self.engine.settings.dtype) for name, column in rows.items()}
        self.model = model
        prepared: Any = module.prepare(model, rows, _MODEL_METHODS)
        self.engine.prepare_model(prepared)

    def fit_epoch(self) -> None:
        """Trains an epoch and validates (D2L section 3.4.4): compiled, or step by step if a method is overridden."""
        if _STEP_METHODS & (_list_user_methods(self) | _list_user_methods(self.model)):
            self._fit_epoch_by_steps()
            return
        self._store_state(self.epoch)
        self._state, before = None, self.engine.step
        self.engine.fit_epoch()
        if self.engine.step == before:
            return
        for loss, weight, _ in self.engine.loop.epoch_sums:
            self.model.plot("loss", loss / weight if weight else 0.0, train=True)
            self.train_batch_idx += 1
        for _ in range(self.num_val_batches):  # `plot` draws the mean of this number of values
            self.model.plot("loss", self.engine.val_loss, train=False)
            self.val_batch_idx += 1

    def prepare_batch(self, batch: tuple[Array, Array]) -> tuple[Array, ...]:
        """Prepares a batch (X, y) for a step. If overridden, epochs run step by step."""
        return batch

    def clip_gradients(self, grad_clip_val: float, grads: Any) -> Any:
        """Scales the gradient to a norm of at most `grad_clip_val` (D2L section 9.5), as compiled steps do."""
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
        return jax.tree.map(lambda leaf: leaf * jnp.minimum(1, grad_clip_val / norm).astype(leaf.dtype), grads)

    @property
    def state(self) -> TrainState:
        """The state, on JAX's default device. Training continues from a state that is assigned.

        It has `params`, `batch_stats`, `opt_state`, `step`, `dropout_rng`, `apply_fn` and `tx`.

        Raises:
          InputError: before `fit` or `prepare_model`.
        """
        if self._state is not None:
            return self._state
        trained = self.engine.state
        values = {name: getattr(trained, name) for name in ("step", "params", "opt_state", "batch_stats")}
        # Uncommitted arrays, which can be combined with arrays on any device.
        values = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf.addressable_data(0))), values)
        return TrainState(apply_fn=self._predict, tx=trained.tx, dropout_rng=self._dropout_rng, **values)

    @state.setter
    def state(self, state: TrainState) -> None:
        """Continues from another state.

        Raises:
          InputError: with several processes, and for settings that have no effect if epochs run step by step.
        """
        if jax.process_count() > 1:
            raise InputError(
                f"an epoch that runs step by step needs a single process; start one, or {_OVERRIDE_NOTHING}"
            )
        for name in ("callbacks", "observers", "patience"):
            if self._settings.get(name):
                raise InputError(f"{name}: an epoch that runs step by step does not use it; {_OVERRIDE_NOTHING}")
        self._state = state

    def _predict(self, variables: Any, *X: Array, **kwargs: Any) -> Any:
        """The model's `apply`, in training mode if `model.training`."""
        state, training = self.state, getattr(self.model, "training", False)
        if training and state.batch_stats:
            raise InputError(
                f"an epoch that runs step by step does not update the statistics of BatchNorm; {_OVERRIDE_NOTHING}"
            )
        modes = mode_arguments(self.model, training)
        return self.model.apply(variables, *X, **{"rngs": {"dropout": state.dropout_rng}, **modes, **kwargs})

    def _make_engine(self) -> dpreg.train.trainer.Trainer:
        # No clipping in compiled steps if the user overrides it, as then epochs run step by step.
        clip = 0.0 if "clip_gradients" in _list_user_methods(self) else self.gradient_clip_val
        return dpreg.train.trainer.Trainer(self.max_epochs, gradient_clip_val=clip, **self._settings)

    def _draw_parameters(self, key: Array | None) -> None:
        """Sets the initial parameters to those of the model's `apply_init`."""
        root = make_key(self.engine.settings.seed) if key is None else key
        params_key, self._dropout_rng = jax.random.split(root)
        keys = {"params": root if key is None else params_key, "dropout": self._dropout_rng}
        row = self.engine.train.source[np.zeros(1, np.int32)]["x"]
        trained = self.engine.state
        with pinned_settings():
            params = self.model.apply_init((jnp.asarray(row, jnp.float32),), key=keys)["params"]
        self.engine.state = trained.replace(
            params=jax.tree.map(lambda leaf: leaf.astype(self.engine.settings.dtype), params)
        )

    def _fit_epoch_by_steps(self) -> None:
        """Trains an epoch as in the book: a step for each batch, and then the validation."""
        self.model.training = True
        for batch in self.train_dataloader:
            loss, gradient = self.model.training_step(self.state.params, self.prepare_batch(batch), self.state)
            if self.gradient_clip_val > 0:
                gradient = self.clip_gradients(self.gradient_clip_val, gradient)
            stepped: Any = self.state.apply_gradients(grads=gradient, value=loss)
            if not _all_finite((loss, stepped.params)):
                raise Diverged(int(self.state.step) + 1)
            self.state = stepped.replace(dropout_rng=jax.random.split(stepped.dropout_rng)[0])
            self.train_batch_idx += 1
        self.model.training = False
        for batch in self.val_dataloader or ():
            self.model.validation_step(self.state.params, self.prepare_batch(batch), self.state)
            self.val_batch_idx += 1

    def _store_state(self, epochs: int) -> None:
        """Passes a state that was assigned to the engine, as the state after `epochs` epochs."""
        if self._state is None:
            return
        if not _all_finite(self._state.params):
            self._state = None
            raise Diverged(self.train_batch_idx)
        self._dropout_rng = self._state.dropout_rng
        self.engine.state = self._state.replace(step=jnp.int32(epochs * self.num_train_batches))


def _list_user_methods(owner: Any) -> set[str]:
    """The names of the methods of an object that the user defined."""
    return {name for _, name in user_methods(owner)}


def _all_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
