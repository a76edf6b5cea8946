"""The book's base class of models (D2L section 3.2.2). Training applies its loss, a mean over rows, to each row."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from dpreg.d2l.tools import HyperParameters, ProgressBoard
from dpreg.errors import InputError
from dpreg.models.linear import LinearRegressionScratch as LinearScratch
from dpreg.models.mlp import LinearRegression as LinearConcise
from dpreg.models.sgd import SGD
from dpreg.step.checks import mode_arguments, model_errors, require_model
from dpreg.tracing import make_key, pinned_settings

_LOOP_ATTRIBUTES = "trainer", "training"


class _Attributes:
    """Lets a training loop set attributes of a module, which flax freezes.

    It is not a flax module itself, as flax would wrap its `__setattr__`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets `trainer` or `training`; other attributes only if flax allows it."""
        if name in _LOOP_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class _StepKey:
    """A placeholder for the random key of a step, which Dropout has already used for the prediction."""


_STEP_KEY = _StepKey()


@dataclasses.dataclass(frozen=True)
class RowState:
    """The argument `state` of `loss` in compiled steps.

    Attributes:
      apply_fn: (variables, X) -> prediction.
      variables: "params", the same as the argument of `loss`, and "batch_stats".
      dropout_rng: a placeholder, to be passed only to `apply_fn`.
    """

    apply_fn: Callable[..., Array]
    variables: Mapping[str, Any]
    dropout_rng: Any = _STEP_KEY

    @property
    def params(self) -> Any:
        """The parameters as constants: `loss` is differentiated only by its argument `params`, as in the book."""
        return jax.tree.map(jax.lax.stop_gradient, self.variables["params"])

    @property
    def batch_stats(self) -> Any:
        """The running statistics of BatchNorm; empty if the model has none."""
        return self.variables.get("batch_stats", {})


class Module(_Attributes, nn.Module, HyperParameters, kw_only=True):
    """The base class of models (D2L section 3.2.2): a flax module, trained by `d2l.Trainer`.

    A subclass defines `forward(X)` or `__call__(X)`, [n, d] -> [n, t]; `loss(params, X, y, state)`; and
    `configure_optimizers()`. Methods can be added later with `d2l.add_to_class`. If the model differs between training
    and evaluation, its `forward` has an argument `train`, which the trainer passes.

    Training applies `loss` to each row as a batch of one, since batches are distributed over devices and rows have
    weights. So the loss must be the mean of the losses of single rows, plus at most a penalty on `params`; sums and
    maxima are refused. `state.apply_fn({"params": params}, *X)` is the prediction, in training with dropout and batch
    statistics. It accepts other parameters and features only if the model predicts each row by itself (without Dropout
    and BatchNorm). The state also has `params`, `batch_stats` and `dropout_rng`, which only `apply_fn` can use.

    Attributes:
      plot_train_per_epoch, plot_valid_per_epoch: the number of points of the curves per epoch.
      board: the curves.
      trainer: the last `d2l.Trainer` that trained the model.
    """

    plot_train_per_epoch: int = dataclasses.field(default=2, init=False)
    plot_valid_per_epoch: int = dataclasses.field(default=1, init=False)
    board: ProgressBoard = dataclasses.field(
        default_factory=ProgressBoard, init=False, repr=False, hash=False, compare=False
    )

    def loss(self, params: Any, X: tuple[Array, ...], y: Array, state: Any) -> Array:
        """The mean loss over rows, a scalar. Subclasses override this.

        Args:
          params: the parameters of the model.
          X: the features, a tuple of one array [n, d].
          y: the targets, [n, t].
          state: an object with `apply_fn`, `params` and `batch_stats`.
        """
        raise InputError(
            f"{type(self).__name__} has no loss; define loss(self, params, X, y, state), the mean over the rows"
        )

    def configure_optimizers(self) -> optax.GradientTransformation:
        """The optimizer, an optax transformation or an object with `init` and `update`. Subclasses override this."""
        raise InputError(
            f"{type(self).__name__} has no configure_optimizers; define configure_optimizers(self), which returns an "
            "optimizer, such as optax.sgd(self.lr)"
        )

    def forward(self, X: Array, *args: Any, **kwargs: Any) -> Any:
        """The prediction, [n, d] -> [n, t]. By default it is that of the attribute `net`."""
        if not hasattr(self, "net"):
            raise InputError(f"{type(self).__name__} has no forward; define forward(self, X), or set self.net in setup")
        return self.net(X, *args, **kwargs)

    def __call__(self, X: Array, *args: Any, **kwargs: Any) -> Any:
        """`forward`."""
        return self.forward(X, *args, **kwargs)

    def apply_init(self, dummy_input: tuple[Array, ...], key: Any) -> Mapping[str, Any]:
        """The initial variables (D2L section 6.4).

        Args:
          dummy_input: example features, a tuple of one array [n, d].
          key: a random key, or a dict of keys for "params" and "dropout".
        """
        modes: Any = mode_arguments(self, False)
        variables: Mapping[str, Any] = self.init(key, *dummy_input, **modes)
        return variables

    def training_step(self, params: Any, batch: tuple[Array, ...], state: Any) -> tuple[Array, Any]:
        """Plots the loss of a batch (X, y), and returns (loss, gradient). If overridden, epochs run step by step."""
        value, gradient = jax.value_and_grad(self.loss)(params, batch[:-1], batch[-1], state)
        self.plot("loss", value, train=True)
        return value, gradient

    def validation_step(self, params: Any, batch: tuple[Array, ...], state: Any) -> None:
        """Plots the loss of a batch (X, y). If overridden, epochs run step by step."""
        self.plot("loss", self.loss(params, batch[:-1], batch[-1], state), train=False)

    def plot(self, key: str, value: Any, train: bool) -> None:
        """Adds a value to the curve `train_<key>` or `val_<key>`, at the current epoch of the trainer.

        It is called for each batch. The curve has `plot_train_per_epoch` or `plot_valid_per_epoch` points per epoch,
        each the mean of consecutive values.
        """
        trainer = getattr(self, "trainer", None)
        if trainer is None:
            raise InputError(f"{type(self).__name__}.plot: the model has no trainer yet; call d2l.Trainer.fit first")
        if train:
            x = trainer.train_batch_idx / trainer.num_train_batches
            every_n = trainer.num_train_batches / self.plot_train_per_epoch
        else:
            x, every_n = trainer.epoch + 1, trainer.num_val_batches / self.plot_valid_per_epoch
        self.board.xlabel = "epoch"
        self.board.draw(x, value, ("train_" if train else "val_") + key, int(every_n))

    def row_losses(self, variables: Mapping[str, Any], prediction: Array, batch: Mapping[str, Array]) -> Array:
        """The loss of each row as a batch of one, see `dpreg.models.losses.row_losses`.

        Args:
          variables: "params" and "batch_stats".
          prediction: [n, t] the prediction with these variables.
          batch: "x" [n, d], "y" [n, t].

        Returns:
          the losses, [n].
        """
        if not hasattr(self, "called_methods"):
            raise InputError(f"{type(self).__name__} derives from d2l.Module; train it with dpreg.d2l.Trainer")

        def loss_of_row(prediction: Array, x: Array, y: Array) -> Array:
            x, prediction = x[None], prediction[None]
            apply_fn = functools.partial(self._predict_row, variables, x, prediction)
            return _compute_loss(self, apply_fn, variables, x, y[None])

        x = batch["x"].astype(batch["weight"].dtype)
        losses: Array = jax.vmap(loss_of_row)(prediction, x, batch["y"])
        return losses

    def _predict_row(
        self,
        variables: Mapping[str, Any],
        x: Array,
        prediction: Array,
        given: Mapping[str, Any],
        *X: Array,
        **kwargs: Any,
    ) -> Any:
        """`state.apply_fn(given, *X, **kwargs)` in the loss of a row x [1, d], whose prediction [1, t] is known."""
        other_key = {"rngs"} if any(key is not _STEP_KEY for key in (kwargs.get("rngs") or {}).values()) else set()
        if names := sorted({name for name, value in kwargs.items() if name != "rngs" and value} | other_key):
            raise InputError(
                f"{type(self).__name__}.loss calls state.apply_fn with {', '.join(names)}; call it as "
                "state.apply_fn({'params': params}, *X): the trainer passes the mode and the keys of Dropout"
            )
        same_row = len(X) == 1 and X[0] is x and "params" in given
        if same_row and all(_have_same_leaves(given[name], variables.get(name)) for name in given):
            return prediction
        if mode_arguments(self, True) or variables.get("batch_stats"):
            raise InputError(
                f"{type(self).__name__}.loss calls state.apply_fn for other parameters or features than those of the "
                "batch, and the model (Dropout, BatchNorm) does not predict each row by itself; call it as "
                "state.apply_fn({'params': params}, *X)"
            )
        return self.apply(given, *X)


def _have_same_leaves(one: Any, other: Any) -> bool:
    """Whether the leaves of two trees are the same objects."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


def _compute_loss(
    model: Module, apply_fn: Callable[..., Array], variables: Mapping[str, Any], x: Array, y: Array
) -> Array:
    """The model's loss of a batch x [n, d], y [n, t], a scalar.

    Raises:
      InputError: if the model returns something else.
    """
    value: Any = model.loss(variables["params"], (x,), y, RowState(apply_fn, variables))
    if isinstance(value, tuple) or np.shape(value) != ():
        returned = "a tuple" if isinstance(value, tuple) else f"an array {list(np.shape(value))}"
        raise InputError(
            f"{type(model).__name__}.loss returns {returned} for {len(y)} rows; return one number, the mean over the "
            "rows"
        )
    return jnp.asarray(value)


def prepare(model: Module, rows: Mapping[str, np.ndarray], called_methods: frozenset[str]) -> Module:
    """Checks that the loss of a model is a mean over rows, and returns a copy that `dpreg.Trainer` can train.

    Args:
      model: the model, which is not changed.
      rows: some training rows, {"x": [n, d], "y": [n, t]}.
      called_methods: the methods that the caller calls while dpreg.Trainer does not.

    Raises:
      InputError: for a model that cannot be trained row by row.
    """
    copy: Any = model.clone()
    name = type(model).__name__
    object.__setattr__(copy, "called_methods", called_methods)
    require_model(copy)
    if "training" in type(model).__dataclass_fields__:
        raise InputError(f"{name} has a field 'training', which no step sets; give forward an argument 'train'")
    dtype = rows["x"].dtype
    row = jax.ShapeDtypeStruct((1, rows["x"].shape[1]), jnp.float32)
    with model_errors(copy), pinned_settings():
        shapes: Any = jax.eval_shape(lambda x: copy.init(make_key(0), x, **mode_arguments(copy, False)), row)
    with model_errors(copy), pinned_settings(dtype == np.float64):
        x = jnp.asarray(rows["x"])
        _require_mean(copy, shapes, x, jnp.asarray(rows["y"]))
        if known := _known_class(copy, shapes, x):
            object.__setattr__(copy, "same_as", known)
    prepared: Module = copy
    return prepared


def _draw(shapes: Mapping[str, Any], scale: float, dtype: Any) -> dict[str, Any]:
    """Random variables with non-negative statistics. Initial ones may be zero, and predict the same for all rows."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        values: np.ndarray = (scale * rng.standard_normal(leaf.shape)).astype(dtype)
        return np.abs(values) if path[0].key == "batch_stats" else values

    drawn: dict[str, Any] = jax.tree_util.tree_map_with_path(draw, dict(shapes))
    return drawn


def _require_mean(model: Module, shapes: Mapping[str, Any], x: Array, y: Array) -> None:
    """Raises InputError if the loss of a batch, in evaluation, is not the mean of the losses of its rows."""
    modes: Any = mode_arguments(model, False)

    @jax.jit
    def compute_losses(variables: Mapping[str, Any], x: Array, y: Array) -> tuple[Array, Array]:
        def predict(given: Mapping[str, Any], *X: Array, **_: Any) -> Any:
            return model.apply({**variables, **given}, *X, **modes)

        single = jax.vmap(lambda x, y: _compute_loss(model, predict, variables, x[None], y[None]))(x, y)
        return _compute_loss(model, predict, variables, x, y), single

    x = x * jnp.linspace(1, 2, len(x), dtype=x.dtype)[:, None]  # with equal rows, sums and means of losses look alike
    for scale in (0.0, 0.01, 1.0):
        variables = _draw(shapes, scale, x.dtype)
        batch, single = (np.asarray(value, np.float64) for value in compute_losses(variables, x, y))
        if not (np.isfinite(batch) and np.isfinite(single).all()):
            continue
        tolerance = np.sqrt(np.finfo(x.dtype).eps) * max(abs(batch), np.abs(single).max())
        if abs(batch - single.mean()) > tolerance:
            raise InputError(
                f"{type(model).__name__}.loss of {len(y)} rows is {batch:.6g}, and the mean of the losses of each row "
                f"is {single.mean():.6g}; return the mean over the rows, of a model that predicts each row by itself"
            )


def _known_class(model: Module, shapes: Mapping[str, Any], x: Array) -> type[nn.Module] | None:
    """The linear model of dpreg that predicts with the same operations, if any; see `tuning.known_class`."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, x.dtype), shapes["params"])
    if len(shapes) > 1 or mode_arguments(model, False):
        return None

    def trace(model: nn.Module, structure: Any) -> str:
        def predict(leaves: list[Array], x: Array) -> Any:
            return model.apply({"params": jax.tree.unflatten(structure, leaves)}, x)

        return str(jax.make_jaxpr(predict)(jax.tree.leaves(params), x))

    own = trace(model, jax.tree.structure(params))
    targets = jax.tree.leaves(params)[-1].shape[-1:]
    for known in (LinearScratch(x.shape[1], 1.0, num_targets=targets[0]), LinearConcise(targets[0])) if targets else ():
        known_params = jax.eval_shape(known.init, make_key(0), x)["params"]
        same_shapes = [leaf.shape for leaf in jax.tree.leaves(known_params)] == [
            leaf.shape for leaf in jax.tree.leaves(params)
        ]
        if same_shapes and trace(known, jax.tree.structure(known_params)) == own:
            return type(known)
    return None


class LinearRegressionScratch(Module):
    """Linear regression from scratch, X w + b, as in D2L section 3.4.

    Attributes:
      num_inputs: the number of features, d.
      lr: the learning rate of minibatch SGD.
      sigma: the standard deviation of the initial weights.
    """

    num_inputs: int
    lr: float
    sigma: float = 0.01

    def setup(self) -> None:
        """Creates `w` [num_inputs, 1] and `b` [1]."""
        self.w = self.param("w", nn.initializers.normal(self.sigma), (self.num_inputs, 1))
        self.b = self.param("b", nn.initializers.zeros, (1,))

    def forward(self, X: Array) -> Array:
        """The predictions: [n, num_inputs] -> [n, 1]."""
        if X.shape[-1] != self.num_inputs:
            raise InputError(f"num_inputs={self.num_inputs}: the rows have {X.shape[-1]:,} features; give that number")
        return jnp.matmul(X, self.w) + self.b[None]

    def loss(self, params: Any, X: tuple[Array, ...], y: Array, state: Any) -> Array:
        """The mean over the rows of half the squared error."""
        prediction = state.apply_fn({"params": params}, *X)
        return jnp.mean((prediction - y.reshape(prediction.shape)) ** 2 / 2)

    def configure_optimizers(self) -> optax.GradientTransformation:
        """`SGD(lr)`."""
        return SGD(self.lr)
