"""Ahead-of-time compilation of the training and evaluation steps, by jit with shard_map or by pmap."""

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from dpreg.distributed import devices, processes
from dpreg.distributed.devices import AXIS
from dpreg.errors import InputError
from dpreg.spelling import spell
from dpreg.step.checks import normalises_over_batch
from dpreg.step.layout import BatchLayout, CallArgs, ShardRange
from dpreg.step.reduce import PyTree, Reduction, from_all_devices, gradient_of_shards, isolated, opaque_loop
from dpreg.step.state import Model, TrainState, forward
from dpreg.step.step import Statistics, StepSpec, shard_loss, train_block, update_state
from dpreg.step.tuning import compiler_options, multiplies_vectors_only, schedule_for
from dpreg.tracing import make_key, pinned_settings

_ALIKE = "give all processes the same model, with the same settings of its loss and its optimizer"


def _describe_program(text: str) -> tuple[str, str]:
    """A short and a long digest of a program before it is optimized, without the addresses of Python functions."""
    digest = hashlib.sha256(re.sub("[0-9]{12,}", "", text).encode()).hexdigest()
    return digest[:8], digest


def _has_float64(tree: PyTree) -> bool:
    return any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(tree))


def operations_of_step(model: Model, state: TrainState, batches: PyTree) -> float:
    """FLOPs of a training step on one device, as XLA counts them before optimization.

    Args:
      state: the train state; shapes suffice.
      batches: the rows of each shard of the device, [shards, b, ...]; shapes suffice.
    """

    def step(state: TrainState, batches: PyTree, shards: Array, key: Array) -> tuple[TrainState, Array]:
        def loss(params: PyTree, batch: PyTree, shard: Array) -> tuple[Array, Statistics]:
            return shard_loss(model, params, state.batch_stats, batch, jax.random.fold_in(key, shard), "cpu")

        sums = gradient_of_shards(loss, state.params, batches, shards)
        return update_state(state, sums, jnp.asarray(state.step))

    mesh, everywhere = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), (AXIS,)), PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    state, batches = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, batches))
    shards = jax.ShapeDtypeStruct(batches["weight"].shape[:1], jnp.int32)
    with pinned_settings(_has_float64(state)):
        lowered = jax.jit(mapped).lower(state, batches, shards, make_key(0))
    counted: Any = lowered.cost_analysis()
    return float(counted["flops"])


def compile_train_block(
    model: Model,
    state: TrainState,
    layout: BatchLayout,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    accumulate_steps: int,
    reduction: Reduction,
    backend: str,
) -> Callable[..., tuple[TrainState, Array, Array]]:
    """Compiles `num_steps` consecutive training steps into one call.

    Args:
      arguments: (data, shard_range, packed call arguments) with the shapes of the calls.
      accumulate_steps: the number of chunks of a shard's batch whose gradients are accumulated one after the other.

    Returns:
      `f(state, data, shard_range, call_args) -> (state, sums, used)`, which donates `state`. `sums` is
      [block_steps, 3]: for each step the weighted loss sum and the weight sum, both scaled as `mean_over_devices` says,
      and the norm of the mean gradient. `used` is [devices, block_steps, 2] uint32, sharded over the devices: the
      number of tagged rows that each step used on a device, and the sum of their tags. If the loss or the new
      parameters of a step are not finite, that step and all later ones leave the state unchanged, use no rows and have
      a loss of NaN.
    """
    platform = mesh.devices.flat[0].platform
    sync_batch_norm = normalises_over_batch(model, state, arguments[0]["x"].shape[-1])
    if sync_batch_norm and reduction.shard_by_shard:
        raise InputError(
            f"{spell('reduction', reduction.name)}: a BatchNorm over the whole batch needs all its shards at once, and "
            f"{reduction.name} computes them one by one; use {spell('reduction', 'pmean')}, or normalise over shards "
            f"({spell('sync_batch_norm', False)}; no axis_name)"
        )
    schedule = schedule_for(model, state, layout, mesh, accumulate_steps, reduction, sync_batch_norm)

    # XLA's threads share matrix-matrix products; in evaluation even if the loop of training is compiled as a whole.
    shared = not multiplies_vectors_only(model, state)
    if reduction.same_bits and platform == "cpu" and shared and devices.threads() != layout.num_shards:
        logging.warning(
            "%s: products are shared by %d threads of XLA, and other numbers of them have other bits; call "
            "dpreg.start(threads=%d), as many as shards, before any use of JAX",
            reduction.name,
            devices.threads(),
            layout.num_shards,
        )

    spec = StepSpec(model, layout, mesh, reduction, schedule)

    def block(*values: Any) -> tuple[TrainState, Array, Array]:
        return train_block(spec, *values)

    options = compiler_options(reduction, platform, schedule.whole_loops)
    return _compile(block, layout, mesh, (state, *arguments), backend, options, (None, None, 0), donate=True)


def compile_eval_block(
    model: Model,
    variables: Mapping[str, PyTree],
    layout: BatchLayout,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    evaluate: Callable[[PyTree, Array, PyTree], PyTree],
    reduction: Reduction,
    backend: str,
) -> tuple[Callable[..., Array], Callable[[np.ndarray], PyTree]]:
    """Compiles the evaluation of `num_steps` consecutive batches into one call.

    The model is called with `train=False`, in a trace separate from that of training.

    Args:
      variables: "params" and "batch_stats".
      evaluate: (variables, predictions [b, t], batch of one shard) -> a tree of results.

    Returns:
      `f(variables, data, shard_range, call_args) -> [block_steps, shards, n]`, the raveled results, which are zero
      beyond `num_steps`; and a function that unravels them on the host into leaves [block_steps, shards, ...].
    """
    platform = mesh.devices.flat[0].platform
    shapes: list[PyTree] = []  # of the results for a batch of one shard, once the block is traced

    def block(variables: PyTree, data: PyTree, shard_range: ShardRange, packed: Array) -> Array:
        call_args = CallArgs(*packed)
        shards = shard_range.first + jnp.arange(layout.slots, dtype=jnp.int32)
        read = layout.reader(data, shards, call_args.first_step, call_args.num_steps, call_args.seed)

        def wanted(variables: PyTree, batch: PyTree) -> PyTree:
            return evaluate(variables, forward(model, variables, batch, train=False, platform=platform)[0], batch)

        def raveled(variables: PyTree, batch: PyTree) -> Array:
            return ravel_pytree(wanted(variables, batch))[0]

        shapes.append(jax.eval_shape(lambda: wanted(variables, read.of_slot(jnp.int32(0), jnp.int32(0)))))
        leaves, slots = jax.tree.leaves(shapes[0]), max(layout.slots, 2)

        def step(k: Array, history: Array) -> Array:
            def fill(slot: Array, history: Array) -> Array:
                return history.at[k, slot].set(isolated(raveled, call_args.one, variables, read.of_slot(k, slot)))

            if reduction.same_bits:
                filled: Array = opaque_loop(fill, shard_range.count, history)
                return filled
            return history.at[k, : layout.slots].set(jax.vmap(raveled, (None, 0))(variables, read.of_slots(k)))

        dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
        history = jnp.zeros((layout.block_steps, slots, sum(leaf.size for leaf in leaves)), dtype)
        history = lax.fori_loop(0, call_args.num_steps, step, history)
        return from_all_devices(history[:, : layout.slots], mesh, axis=1)[:, : layout.num_shards]

    options = compiler_options(reduction, platform)
    compiled = _compile(block, layout, mesh, (variables, *arguments), backend, options, None, donate=False)
    return compiled, functools.partial(_unravel, shapes[0])


def _unravel(shapes: PyTree, found: np.ndarray) -> PyTree:
    """The results [steps, shards, n] of a block as leaves [steps, shards, ...] of these shapes."""
    leaves, structure = jax.tree.flatten(shapes)
    parts = np.split(found, np.cumsum([leaf.size for leaf in leaves])[:-1], axis=-1)
    shaped = [
        part.reshape(*found.shape[:2], *leaf.shape).astype(leaf.dtype, copy=False)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)


def _compile(
    block: Callable[..., Any],
    layout: BatchLayout,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    backend: str,
    options: dict[str, str],
    outputs: Any,
    donate: bool,
) -> Callable[..., Any]:
    """Compiles `block(state, data, shard_range, call_args)` for the mesh ahead of its first call, on either backend.

    Args:
      outputs: for each output, None if it is the same on all devices, or 0 to stack the outputs of the devices along a
        first axis.
    """
    axis, donated = layout.device_axis, (0,) if donate else ()
    if backend == "pmap":
        function = jax.pmap(
            block,
            axis_name=AXIS,
            in_axes=(None, axis, 0, None),
            out_axes=outputs,
            devices=list(mesh.devices.flat),
            donate_argnums=donated,
        )
    else:

        def local(state: PyTree, data: PyTree, shard_range: ShardRange, call_args: Array) -> Any:
            data = jax.tree.map(lambda leaf: leaf.squeeze(axis), data)
            found = block(state, data, jax.tree.map(lambda leaf: leaf.squeeze(0), shard_range), call_args)
            return (
                found
                if outputs is None
                else tuple(part if axis is None else part[None] for part, axis in zip(found, outputs, strict=True))
            )

        along, replicated = PartitionSpec(*[None] * axis, AXIS), PartitionSpec()
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(replicated, along, PartitionSpec(AXIS), replicated),
            out_specs=jax.tree.map(
                lambda axis: replicated if axis is None else PartitionSpec(AXIS),
                outputs,
                is_leaf=lambda axis: axis is None,
            ),
            check_vma=False,
        )
        function = jax.jit(mapped, donate_argnums=donated)
    with pinned_settings(_has_float64(arguments[0])):
        lowered = function.lower(*arguments)
    processes.require_alike("compiling", _ALIKE, lambda: {"programs": _describe_program(lowered.as_text())})
    compiled: Callable[..., Any] = lowered.compile(compiler_options=options)
    return compiled
