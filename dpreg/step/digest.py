"""Digests of a model's traced programs: they stay the same when its code is rewritten to compute the same."""

import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dpreg.distributed.devices import AXIS
from dpreg.models.losses import loss_of, row_losses
from dpreg.step.checks import comes_with_dpreg, mode_arguments, model_errors
from dpreg.step.reduce import PyTree, gradient_of_shards
from dpreg.step.state import Model, TrainState, forward
from dpreg.step.step import Statistics, shard_loss, update_state
from dpreg.tracing import make_key, pinned_settings

_ROWS = 2  # rows of the traced batch; the digest does not depend on how many rows a run has


def digest_values(tree: PyTree) -> str:
    """A SHA-256 of the paths and the values of all arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def digest_training(
    model: Model, state: TrainState, num_inputs: int, num_targets: int, optimizer: str = ""
) -> str | None:
    """A digest of the initial parameters, the gradient of the loss and the update, whatever the devices.

    Args:
      state: shapes suffice.
      optimizer: the `digest_values` of its initial state, which holds settings such as an injected learning rate.

    Returns:
      the digest, followed in parentheses by the versions of the libraries that it depends on (see `differ`); None for
      dpreg's own models, which their settings define.
    """
    if comes_with_dpreg(model):
        return None

    def step(state: TrainState, batches: PyTree) -> tuple[TrainState, Array]:
        def loss(params: PyTree, batch: PyTree, shard: Array) -> tuple[Array, Statistics]:
            return shard_loss(model, params, state.batch_stats, batch, jax.random.fold_in(make_key(0), shard), "cpu")

        sums = gradient_of_shards(loss, state.params, batches, jnp.arange(1))
        return update_state(state, sums, jnp.asarray(state.step))

    def init(row: Array) -> PyTree:
        return model.init(make_key(0), row, **mode_arguments(model, False))

    mesh = AbstractMesh((1,), (AXIS,), axis_types=(AxisType.Auto,))
    everywhere = PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    dtype = jax.tree.leaves(state.params)[0].dtype
    shapes = {"x": (1, _ROWS, num_inputs), "y": (1, _ROWS, num_targets), "weight": (1, _ROWS)}
    batches = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    with model_errors(model):
        with pinned_settings():
            texts = [_program(init, jax.ShapeDtypeStruct((1, num_inputs), jnp.float32))]
        with pinned_settings(dtype == np.float64):
            texts.append(_program(mapped, state, batches))
    return _digest([*texts, optimizer])


def digest_prediction(model: Model, variables: Mapping[str, PyTree], num_inputs: int, num_targets: int) -> str | None:
    """A digest of the predictions and of their losses, in the form of `digest_training`."""
    if comes_with_dpreg(model):
        return None

    def evaluate(variables: PyTree, batch: PyTree) -> tuple[Array, Array]:
        prediction, _ = forward(model, variables, batch, False)
        return loss_of(model).mean(prediction), row_losses(model, variables, prediction, batch)

    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(variables))
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    shapes = {"x": (_ROWS, num_inputs), "y": (_ROWS, num_targets), "weight": (_ROWS,)}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    with model_errors(model), pinned_settings(dtype == np.float64):
        return _digest([_program(evaluate, variables, batch)])


def differ(one: str | None, other: str | None) -> bool:
    """Whether two digests show different computations. Digests made by different library versions never do."""
    if one is None or other is None:
        return False
    (digest, versions), (other_digest, other_versions) = (text.split(" ", 1) for text in (one, other))
    return versions == other_versions and digest != other_digest


def _program(function: Any, *arguments: Any) -> str:
    """The StableHLO of a function, lowered for CPU whatever the platform of this process."""
    return str(jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text())


def _digest(texts: list[str]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("flax", "jax", "jaxlib", "optax"))
    return f"{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:32]} ({versions})"
