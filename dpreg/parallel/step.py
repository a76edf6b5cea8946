"""The compiled train and evaluation steps: the algorithm, on every device."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.data.dataset import Dataset, Read
from dpreg.errors import InputError
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.losses import row_losses
from dpreg.models.mlp import LinearRegression
from dpreg.parallel import devices
from dpreg.parallel.reduce import (
    AXIS,
    PyTree,
    added_up,
    from_all_devices,
    mean_over_devices,
    on_its_own,
    one_by_one,
    ordered_sum,
    value_and_gradient,
    value_and_gradient_together,
)
from dpreg.parallel.state import IN_FULL, Model, TrainState, all_are_vectors, forward, normalises_over_batch

TRAINING_KEY = 1  # of the run's random key: the part for dropout, apart from that for the first parameters

# Under `ordered` the program of one device must compute the bits of the program of many. Only the latter
# has its common subexpressions merged (by the partitioner) before the first algebraic simplification, and
# that one rewrites x / s as x * (1 / s) where s has a single user. Without merging, both are simplified alike.
_MERGING = "cse"

# On CPU a loop is one function, or each operation in it is dispatched, for 60 ns, and shared by the cores of a device.
# The former is up to twice as fast where they are small. The bits of the two differ: under `ordered`, which it is must
# not depend on the number of devices, or of their cores.
_WHOLE_LOOPS = "small-while-loop-hoisting"
_MOST_FACTORS_OF_WHOLE_LOOPS = 9 << 9

# On GPUs a loop becomes a graph of kernels, or the host would count its turns and the GPU wait for it in each. (With
# CUDA from 12.3 on, and where no GPUs meet within it.) And the compiler chooses among the ways to make a product by
# rule: timed, as it would, processes choose differently, and so compute other bits.
_OF_GPU = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_autotune_level": "0",
}

# On CPU the rows of a step are taken in parts that stay in cache, so that the gradient finds there what the prediction
# has read: in the cache of a core; or, where cores share operations, in the common one, since the compiler shares out
# large parts alone. Where rows are not to be parted, the shards of a device are taken one by one if they are large.
_PART_BYTES, _PART_BYTES_OF_CORES, _LARGE_SHARD_BYTES = 5 << 16, 5 << 20, 5 << 18


class Clock(NamedTuple):
    """What a call is told at run time, replicated int32 scalars.

    `one` is 1: the compiler does not know it, which keeps a loop of `one` turn a loop.
    """

    first_step: Any
    num_steps: Any
    seed: Any
    one: Any = 1

    def packed(self) -> np.ndarray:
        """As one array: one transfer."""
        return np.array(self, np.int32)


class Carried(NamedTuple):
    """Which logical shards a device carries: [devices] int32 outside a step, scalars inside."""

    first: Any
    count: Any


def example_of(dataset: Dataset) -> tuple[Any, ...]:
    """(data, carried, packed clock) as the calls for a dataset take them, without their values: to compile by."""
    mesh: Mesh = dataset.mesh  # type: ignore[assignment]  # it is sharded
    carried = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
    clock = jax.ShapeDtypeStruct((len(Clock._fields),), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return dataset.shapes, Carried(carried, carried), clock


class Layout(NamedTuple):
    """How rows reach the steps: all that is static, besides the model.

    Attributes:
      reader: (data, shards [slots], first step, seed) -> Read, traced inside the step.
      device_axis: the axis of the data that devices lie along.
      block_steps: steps that one call takes at most, K.
      slots: slots for shards on a device; the last devices may carry fewer shards.
      num_shards: logical shards of the run, L.
      shard_batch: rows that a shard gives to a step.
      row_bytes: of one of them.
    """

    reader: Callable[[PyTree, Array, Array, Array], Read]
    device_axis: int
    block_steps: int
    slots: int
    num_shards: int
    shard_batch: int
    row_bytes: int


def layout_of(dataset: Dataset) -> Layout:
    """How the rows of a dataset reach the steps."""
    return Layout(
        reader=dataset.reader,
        device_axis=dataset.device_axis,
        block_steps=dataset.block_steps,
        slots=dataset.slots,
        num_shards=dataset.num_shards,
        shard_batch=dataset.sampler.shard_batch,
        row_bytes=dataset.row_bytes,
    )


def _has_float64(tree: PyTree) -> bool:
    return any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(tree))


class _Rest(NamedTuple):
    """What is summed over shards besides gradients and losses."""

    weight: Array  # of the rows
    rows: Array | None  # those with a weight, counted; None for models without batch statistics
    batch_stats: PyTree  # times rows


def _loss_of_shard(
    model: Model, params: PyTree, batch_stats: PyTree, batch: PyTree, key: Array, platform: str
) -> tuple[Array, _Rest]:
    """The weighted loss sum of a shard's batch, and what else is summed."""
    prediction, new = forward(model, {"params": params, "batch_stats": batch_stats}, batch, True, key, platform)
    weight = batch["weight"]
    rows = (weight > 0).sum(dtype=weight.dtype) if batch_stats else None
    losses = row_losses(model, prediction, batch)
    return jnp.vdot(losses, weight), _Rest(weight.sum(), rows, jax.tree.map(lambda leaf: leaf * rows, new))


def operations_of_step(model: Model, state: TrainState, batches: PyTree) -> float:
    """Operations of a training step on one device, as XLA counts them before it makes any of them quicker.

    Args:
      state: and `batches`, the rows of each of its shards, [shards, b, ...]: shapes will do.
    """

    def step(state: TrainState, batches: PyTree, shards: Array, key: Array) -> tuple[TrainState, Array]:
        def loss(params: PyTree, batch: PyTree, shard: Array) -> tuple[Array, _Rest]:
            return _loss_of_shard(model, params, state.batch_stats, batch, jax.random.fold_in(key, shard), "cpu")

        sums = value_and_gradient_together(loss, state.params, batches, shards)
        return _updated(state, sums, jnp.asarray(state.step))

    mesh, everywhere = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), (AXIS,)), PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    state, batches = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (state, batches))
    shards = jax.ShapeDtypeStruct(batches["weight"].shape[:1], jnp.int32)
    with jax.enable_x64(_has_float64(state)):
        lowered = jax.jit(mapped).lower(state, batches, shards, jax.random.key(0))
    counted: Any = lowered.cost_analysis()
    return float(counted["flops"])


def compile_train_block(
    model: Model,
    state: TrainState,
    layout: Layout,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    accumulate: int,
    reduction: str,
    backend: str,
) -> Callable[..., tuple[TrainState, Array, Array]]:
    """Compiles `num_steps` consecutive training steps into one call.

    Args:
      arguments: (data, carried, packed clock), as the calls will give them.
      accumulate: parts of a shard's batch that go through the model one after the other, before they are reduced.

    Returns:
      `f(state, data, carried, clock) -> (state, sums, used)`; the state given is consumed. `sums` is [block_steps, 3]:
      each step's weighted loss sum and weight sum (under pmean, both divided by the number of devices), and the norm
      of the gradient of their quotient. `used` is [devices, block_steps, 2] uint32 and lies along them: how many tagged
      rows each step used there, and the sum of their tags. A step whose loss or new parameters are not finite
      leaves the state as it was, as do all after it, uses no rows and gives NaN for the loss.
    """
    platform = mesh.devices.flat[0].platform
    together = normalises_over_batch(model, state, arguments[0]["x"].shape[-1])
    if together and reduction == "ordered":
        raise InputError(
            "--reduction=ordered: a BatchNorm over the whole batch needs its shards at once, and ordered takes one by "
            "one; use --reduction=pmean, or normalise over shards (--nosync_batch_norm; no axis_name)"
        )
    parts, apart, one_by_one_shard, whole_loops = _way(model, state, layout, mesh, accumulate, reduction, together)

    shared = not _multiplies_vectors_alone(model, state)  # also in evaluation, where loops are never whole
    if reduction == "ordered" and platform == "cpu" and shared and devices.threads() != layout.num_shards:
        logging.warning(
            "ordered: products are shared by %d threads of XLA, and other numbers of them have other bits; call "
            "dpreg.start(threads=%d), as many as shards, before any use of JAX",
            devices.threads(),
            layout.num_shards,
        )

    def block(state: TrainState, data: PyTree, carried: Carried, packed: Array) -> tuple[TrainState, Array, Array]:
        clock = Clock(*packed)
        shards = carried.first + jnp.arange(layout.slots, dtype=jnp.int32)
        read = layout.reader(data, shards, clock.first_step, clock.seed)
        seed_key = jax.random.fold_in(jax.random.key(clock.seed), TRAINING_KEY)

        def step(k: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
            state, history = carry
            step_key = jax.random.fold_in(seed_key, clock.first_step + k)

            def loss(params: PyTree, batch: PyTree, shard: Array) -> tuple[Array, _Rest]:
                key = jax.random.fold_in(step_key, shard)
                return _loss_of_shard(model, params, state.batch_stats, batch, key, platform)

            def over_parts(part_sums: Callable[[Array], PyTree]) -> PyTree:
                if parts == 1:
                    return part_sums(jnp.int32(0))
                return added_up(part_sums, clock.one * parts)

            def sums_of(slot: Array) -> tuple[PyTree, Array, _Rest]:
                # Not shards[slot]: of a single slot the compiler would know the shard before the loop runs.
                shard = carried.first + slot

                def part_sums(part: Array) -> tuple[PyTree, Array, _Rest]:
                    batch = read.of_slot(k, slot, part, parts)
                    if reduction == "ordered":
                        # Of linear models not the features: their only use is in products, and a copy of wide rows
                        # takes a fifth of a step.
                        as_it_is = {"x": batch["x"]} if apart else {}
                        names = [name for name in batch if name not in as_it_is]
                        alone = on_its_own(
                            lambda: {name: read.of_slot(k, slot, part, parts)[name] for name in names}, clock.one
                        )
                        batch = as_it_is | alone
                    return value_and_gradient(loss, state.params, batch, shard + part * layout.num_shards)

                of_shard: tuple[PyTree, Array, _Rest] = over_parts(part_sums)
                return of_shard

            if reduction == "ordered":
                sums = ordered_sum(sums_of, layout.slots, carried.count, layout.num_shards, mesh)
            elif apart:
                any_shard = jnp.int32(0)
                sums = mean_over_devices(
                    over_parts(
                        lambda part: value_and_gradient(loss, state.params, read.rows(k, part, parts), any_shard)
                    ),
                    mesh,
                )
            elif one_by_one_shard:
                sums = mean_over_devices(added_up(sums_of, carried.count), mesh)
            else:

                def parts_together(part: Array) -> tuple[PyTree, Array, _Rest]:
                    rows = read.of_slots(k, part, parts)
                    return value_and_gradient_together(loss, state.params, rows, shards + part * layout.num_shards)

                sums = mean_over_devices(over_parts(parts_together), mesh)

            def update(_: Array, before: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
                with jax.named_scope("update"):
                    return _updated(before[0], sums, clock.first_step + k)

            before = state, jnp.zeros((), history.dtype)
            new, norm = one_by_one(update, clock.one, before) if reduction == "ordered" else update(k, before)
            _, value, rest = sums
            value = jnp.where(new.step > clock.first_step + k, value, jnp.nan)
            return new, lax.dynamic_update_index_in_dim(history, jnp.stack([value, rest.weight, norm]), k, 0)

        steps = jnp.arange(layout.block_steps, dtype=jnp.int32)
        nothing = jnp.zeros((layout.block_steps, 3), data["weight"].dtype)
        state, history = lax.fori_loop(0, clock.num_steps, step, (state, nothing))
        used = jnp.zeros((layout.block_steps, 2), jnp.uint32)
        if "tag" in data:
            tags = jax.vmap(lambda k: read.rows(k)["tag"])(steps)
            tags = jnp.where((clock.first_step + steps < state.step)[:, None], tags, 0)
            used = jnp.stack([(tags > 0).sum(axis=1, dtype=tags.dtype), tags.sum(axis=1, dtype=tags.dtype)], 1)
        return state, history, used

    options = _options(reduction, platform, whole_loops)
    return _compile(block, layout, mesh, (state, *arguments), backend, options, (None, None, 0), donate=True)


class _Way(NamedTuple):
    """How a device goes through the rows of a step.

    Attributes:
      parts: into which a shard's batch is cut, or under pmean that of all shards where rows are apart.
      apart: whether parts are of any rows, for the model says that it may be given rows so.
      one_by_one_shard: under pmean, whether a shard at a time goes through the model, not all together.
      whole_loops: whether a loop is one function.
    """

    parts: int
    apart: bool
    one_by_one_shard: bool = False
    whole_loops: bool = False


def _way(
    model: Model, state: TrainState, layout: Layout, mesh: Mesh, accumulate: int, reduction: str, together: bool
) -> _Way:
    """The fastest way known for a platform, the same in all processes; under `ordered` for any number of devices.

    Args:
      together: whether all shards of a device have to go through the model together.
    """
    apart = _in_any_parts(model, state)
    if mesh.devices.flat[0].platform != "cpu":
        return _Way(accumulate, apart)
    rows = layout.shard_batch // accumulate
    if reduction == "ordered":
        # Shared by cores, an operation has the bits that it has on one, but for products of matrices.
        by_cores = _multiplies_vectors_alone(model, state) and rows * layout.row_bytes > _PART_BYTES
    else:
        rows *= layout.slots
        by_cores = devices.have_several_cores(mesh)
    if not apart:
        large = _PART_BYTES_OF_CORES if by_cores else _LARGE_SHARD_BYTES
        return _Way(accumulate, apart, one_by_one_shard=not together and rows * layout.row_bytes > large)
    width = max(layout.row_bytes // 4, sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    part_bytes = _PART_BYTES_OF_CORES if by_cores else _PART_BYTES
    return _Way(
        accumulate * _fewest_parts(rows, part_bytes // layout.row_bytes),
        apart,
        whole_loops=not by_cores or rows * width <= _MOST_FACTORS_OF_WHOLE_LOOPS,
    )


def _in_any_parts(model: Model, state: TrainState) -> bool:
    """Whether a model says that it may be given rows in any parts, and has few gradients to add up."""
    says = next((of for of in type(model).__mro__ if "rows_apart" in vars(of)), None)
    rows_apart = says is not None and vars(says)["rows_apart"] and type(model).__call__ is says.__call__
    gradient_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    return rows_apart and gradient_bytes * 4 <= _PART_BYTES


def _multiplies_vectors_alone(model: Model, state: TrainState) -> bool:
    """Whether all products of a model are known to be of its rows, or their errors, with vectors."""
    linear = type(model).__call__ in (LinearRegressionScratch.__call__, LinearRegression.__call__)
    return linear and all_are_vectors(state.params)


def _fewest_parts(rows: int, most: int) -> int:
    """Into how many equal parts to cut rows, for one to have at most so many; 1 where that takes many more."""
    fewest = -(-rows // max(most, 1))
    return next((parts for parts in range(fewest, 2 * fewest + 1) if rows % parts == 0), 1)


def _updated(state: TrainState, sums: tuple[PyTree, Array, _Rest], step: Array) -> tuple[TrainState, Array]:
    """The state after a step with these sums; as it was, where that is not finite or an earlier step stopped.

    And the norm of the mean gradient.
    """
    gradient, value, rest = sums
    # A multiplication by the inverse, as the compiler would make it anyway in some of the programs.
    per_weight = 1 / jnp.where(rest.weight > 0, rest.weight, 1)
    batch_stats = state.batch_stats
    if rest.rows is not None:
        any_row, per_row = rest.rows > 0, 1 / jnp.where(rest.rows > 0, rest.rows, 1)
        batch_stats = jax.tree.map(
            lambda summed, old: jnp.where(any_row, summed * per_row, old), rest.batch_stats, batch_stats
        )
    gradient = jax.tree.map(lambda leaf: leaf * per_weight, gradient)
    new = state.apply_gradients(grads=gradient, batch_stats=batch_stats)
    finite = jnp.isfinite(value) & jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params)]).all()
    good = finite & (state.step == step)
    kept: TrainState = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
    return kept, optax.tree.norm(gradient).astype(value.dtype)


def compile_eval_block(
    model: Model,
    variables: Mapping[str, PyTree],
    layout: Layout,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    of: Callable[[Array, PyTree], PyTree],
    reduction: str,
    backend: str,
) -> tuple[Callable[..., Array], Callable[[np.ndarray], PyTree]]:
    """Compiles the evaluation of `num_steps` consecutive batches into one call.

    Traced apart from training: the model is told `train=False`.

    Args:
      variables: "params" and "batch_stats".
      of: (predictions [b, t], batch of one shard) -> what is wanted of them.

    Returns:
      `f(variables, data, carried, clock) -> [block_steps, shards, n]`, all that is wanted in one array, zero past
      `num_steps`; and what makes of it, on the host, what is wanted: each leaf [block_steps, shards, ...].
    """
    platform = mesh.devices.flat[0].platform
    one: list[PyTree] = []  # what is wanted of a batch of one shard, without its values

    def block(variables: PyTree, data: PyTree, carried: Carried, packed: Array) -> Array:
        clock = Clock(*packed)
        shards = carried.first + jnp.arange(layout.slots, dtype=jnp.int32)
        read = layout.reader(data, shards, clock.first_step, clock.seed)

        def wanted(batch: PyTree) -> PyTree:
            return of(forward(model, variables, batch, train=False, platform=platform)[0], batch)

        one.append(jax.eval_shape(lambda: wanted(read.of_slot(jnp.int32(0), jnp.int32(0)))))
        leaves, slots = jax.tree.leaves(one[0]), max(layout.slots, 2)

        def step(k: Array, history: Array) -> Array:
            def fill(slot: Array, history: Array) -> Array:
                batch = on_its_own(lambda: read.of_slot(k, slot), clock.one)
                return history.at[k, slot].set(ravel_pytree(wanted(batch))[0])

            if reduction == "ordered":
                filled: Array = one_by_one(fill, carried.count, history)
                return filled
            return history.at[k, : layout.slots].set(
                jax.vmap(lambda batch: ravel_pytree(wanted(batch))[0])(read.of_slots(k))
            )

        dtype = jnp.result_type(*(leaf.dtype for leaf in leaves))
        history = jnp.zeros((layout.block_steps, slots, sum(leaf.size for leaf in leaves)), dtype)
        history = lax.fori_loop(0, clock.num_steps, step, history)
        return from_all_devices(history[:, : layout.slots], mesh, axis=1)[:, : layout.num_shards]

    def unpacked(found: np.ndarray) -> PyTree:
        leaves, structure = jax.tree.flatten(one[0])
        parts = np.split(found, np.cumsum([leaf.size for leaf in leaves])[:-1], axis=-1)
        shaped = [
            part.reshape(*found.shape[:2], *leaf.shape).astype(leaf.dtype, copy=False)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, shaped)

    options = _options(reduction, platform)
    return _compile(block, layout, mesh, (variables, *arguments), backend, options, None, donate=False), unpacked


def _options(reduction: str, platform: str, whole_loops: bool = False) -> dict[str, str]:
    """What the compiler is told: above all the passes to leave out."""
    left_out = [_MERGING] if reduction == "ordered" else []
    if platform == "cpu" and not (whole_loops and devices.makes_whole_loops()):
        left_out.append(_WHOLE_LOOPS)
    options = {"xla_disable_hlo_passes": ",".join(left_out)} if left_out else {}
    if platform == "gpu":
        options |= {name: value for name, value in _OF_GPU.items() if not devices.in_xla_flags(name)}
    return options


def _compile(
    block: Callable[..., Any],
    layout: Layout,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    backend: str,
    options: dict[str, str],
    outputs: Any,
    donate: bool,
) -> Callable[..., Any]:
    """Compiles `block(state, data, carried, clock)` for the mesh ahead of its first call, on either backend.

    Args:
      outputs: for each output None where all devices have the same, or 0 to lay theirs along a first axis.
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

        def local(state: PyTree, data: PyTree, carried: Carried, clock: Array) -> Any:
            data = jax.tree.map(lambda leaf: leaf.squeeze(axis), data)
            found = block(state, data, jax.tree.map(lambda leaf: leaf.squeeze(0), carried), clock)
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
    # As if no other run of this process had another precision.
    with jax.default_matmul_precision(IN_FULL), jax.enable_x64(_has_float64(arguments[0])):
        lowered = function.lower(*arguments)
    compiled: Callable[..., Any] = lowered.compile(compiler_options=options)
    return compiled
