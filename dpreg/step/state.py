"""The train state of a run, and the forward pass of a model on the rows of a shard."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from jax import Array, lax
from numpy.typing import ArrayLike

from dpreg.config import Config
from dpreg.errors import InputError
from dpreg.step.checks import (
    is_batch_norm,
    mode_arguments,
    model_errors,
    require_model,
    require_modes,
    uses_running_average,
)
from dpreg.step.optimizer import prepare_optimizer
from dpreg.step.reduce import PyTree, sum_over_batch
from dpreg.tracing import FULL_PRECISION, make_key, pinned_settings

# How bfloat16 features are multiplied, except on CPU: factors in bfloat16, sums in float32. On a GPU not if all
# parameters are vectors: such products are bound by memory, and XLA would first copy the rows.
_BFLOAT16_PRODUCTS = "BF16_BF16_F32"


class TrainState(train_state.TrainState):
    """flax's TrainState with the running statistics of BatchNorm.

    Attributes:
      step: the number of completed steps, int32.
      params: the parameters of the model, a tree of arrays.
      opt_state: the state of the optimizer.
      batch_stats: the running statistics of the model's `nn.BatchNorm`s; empty without one.

    >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.5), batch_stats={})
    >>> state.apply_gradients(grads={"w": jnp.array([1.0, 2.0])}).params
    {'w': Array([0.5, 0. ], dtype=float32)}
    """

    batch_stats: PyTree

    def apply_gradients(self, *, grads: PyTree, value: Array | None = None, **changes: Any) -> "TrainState":
        """The state after a step of the optimizer.

        Args:
          grads: the gradient of the mean loss.
          value: the mean loss, for optimizers that read it, such as `optax.contrib.reduce_on_plateau`.
          changes: new values of other attributes.
        """
        optimizer, of_loss = optax.with_extra_args_support(self.tx), {} if value is None else {"value": value}
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params, **of_loss)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)


class Model(Protocol):
    """A flax module with a loss per row and an optimizer, see `dpreg.Module`."""

    @property
    def init(self) -> Callable[..., PyTree]:
        """As of `flax.linen.Module`."""

    @property
    def apply(self) -> Callable[..., Any]:
        """As of `flax.linen.Module`."""

    def loss(self, prediction: Array, target: Array) -> Array:
        """The loss of each row: [n, t], [n, t] -> [n]."""

    def configure_optimizers(self) -> optax.GradientTransformation:
        """The optimizer."""


def initial_state(
    model: Model,
    row: ArrayLike,
    seed: int,
    dtype: np.dtype,
    gradient_clip_val: float = Config.gradient_clip_val,
    from_zero: bool = False,
) -> TrainState:
    """The state before the first step, drawn as float32 and kept as `dtype`.

    Args:
      row: any row [1, d].
      gradient_clip_val: the largest norm of the global gradient; 0 for no limit.
      from_zero: whether all weights start at 0 rather than as the model draws them; biases start as the model says.

    Raises:
      InputError: when the model or its optimizer cannot be trained; see `dpreg.step.checks`.
    """
    require_model(model)
    with pinned_settings(), model_errors(model):
        init = jax.jit(lambda key, row: model.init(key, row, **mode_arguments(model, False)))
        variables = dict(init(make_key(seed), jnp.asarray(row, jnp.float32)))
    params, batch_stats = variables.pop("params", None), variables.pop("batch_stats", {})
    if not params:
        raise InputError("the model has no parameters; give one that has some to train")
    if variables:
        raise InputError(
            f"the model has variables {sorted(variables)}, and only params and batch_stats can be trained; "
            "keep no others"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats}):
        if leaf.dtype != jnp.float32:
            raise InputError(
                f"the model keeps {jax.tree_util.keystr(path)} as {leaf.dtype}; keep float32, without param_dtype, and "
                "compute in another type by precision, or by the dtype of a layer"
            )
    if from_zero:
        params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.ndim > 1 else leaf, params)
    with pinned_settings(dtype == np.float64), model_errors(model):
        params, batch_stats = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, batch_stats))
        require_modes(model, {"params": params, "batch_stats": batch_stats}, np.shape(row)[1])
        optimizer = prepare_optimizer(model, params, gradient_clip_val)
        state: TrainState = TrainState.create(
            apply_fn=model.apply, params=params, tx=optimizer, batch_stats=batch_stats
        ).replace(step=jnp.int32(0))
    return state


def forward(
    model: Model,
    variables: Mapping[str, PyTree],
    batch: PyTree,
    train: bool,
    key: Array | None = None,
    platform: str = "cpu",
) -> tuple[Array, PyTree]:
    """Predictions [n, t] for the rows of one shard, and the batch statistics after them.

    `train` is passed to models whose `__call__` has an argument for it, by any name of `checks.MODES`. Rows of weight 0
    are masked in every `nn.BatchNorm`. If all rows of the shard have weight 0, none is masked: flax would compute NaN,
    and the statistics of such a shard have weight 0. In training, a BatchNorm with an `axis_name` normalises over all
    rows of the batch: see `checks.normalises_over_batch`.
    """
    mode = mode_arguments(model, train)
    real = batch["weight"] > 0
    mask = real | ~real.any()

    def adapt_batch_norm(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if is_batch_norm(context):
            module, x = context.module, args[0] if args else kwargs["x"]
            rows = (-1, *[1] * (x.ndim - 1))
            if module.axis_name is not None and not uses_running_average(module, args, kwargs):
                return _normalised_over_batch(module, x, real.reshape(rows))
            kwargs = {"mask": mask.reshape(rows), **kwargs}
        return next_call(*args, **kwargs)

    x = batch["x"]
    rounded = x.dtype == jnp.bfloat16 and platform != "cpu"
    if platform == "gpu":
        rounded &= not all_are_vectors(variables["params"])
    products = jax.default_matmul_precision(_BFLOAT16_PRODUCTS if rounded else FULL_PRECISION)
    with nn.intercept_methods(adapt_batch_norm), products:
        prediction, collections = model.apply(
            variables,
            x.astype(batch["weight"].dtype),
            **mode,
            mutable=["batch_stats"] if train else [],
            rngs=None if key is None else {"dropout": key},
        )
    return prediction, collections.get("batch_stats", {})


def all_are_vectors(params: PyTree) -> bool:
    """Whether no parameter is a matrix."""
    return all(sum(n > 1 for n in leaf.shape) <= 1 for leaf in jax.tree.leaves(params))


def _normalised_over_batch(module: nn.BatchNorm, x: Array, real: Array) -> Array:
    """Normalises x [n, ...] by the mean and variance of all rows with a weight in the batch, over all shards.

    flax would average the means of shards without regard to how many rows each has.
    """
    features = {axis % x.ndim for axis in np.atleast_1d(module.axis)}
    across = tuple(axis for axis in range(x.ndim) if axis not in features)
    real = jnp.broadcast_to(real, x.shape)
    count = jnp.maximum(sum_over_batch(real.sum(across, x.dtype)), 1)
    mean = sum_over_batch(jnp.where(real, x, 0).sum(across)) / count
    centre = jnp.expand_dims(mean, across)
    variance = sum_over_batch(jnp.square(jnp.where(real, x, centre) - centre).sum(across)) / count
    for name, of_batch in (("mean", mean), ("var", variance)):
        before: Array = module.get_variable("batch_stats", name)
        module.put_variable("batch_stats", name, module.momentum * before + (1 - module.momentum) * of_batch)
    factor = lax.rsqrt(variance + module.epsilon)
    if module.use_scale:
        factor *= module.get_variable("params", "scale")
    normalised = (x - centre) * jnp.expand_dims(factor, across)
    if module.use_bias:
        normalised += jnp.expand_dims(module.get_variable("params", "bias"), across)
    return normalised
