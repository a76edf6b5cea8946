"""The training step as every device computes it, to be read from top to bottom; tuning.py chooses its schedule."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from dpreg.data.reader import BatchReader, in_parts
from dpreg.models.losses import row_losses
from dpreg.step.layout import BatchLayout, CallArgs, ShardRange
from dpreg.step.reduce import (
    PyTree,
    Reduction,
    ShardLoss,
    Sums,
    accumulate,
    gradient_of_shard,
    gradient_of_shards,
    isolated,
    mean_over_devices,
    ordered_sum,
)
from dpreg.step.state import Model, TrainState, forward
from dpreg.step.tuning import Schedule, Traversal
from dpreg.tracing import make_key

TRAINING_KEY = 1  # folded into the run's random key for dropout, so that it differs from the key of the parameters


class Statistics(NamedTuple):
    """`Sums.statistics`, the sums besides those of the gradient and the loss."""

    weight: Array  # of the rows
    rows: Array | None  # the number of rows with a weight; None for models without batch statistics
    batch_stats: PyTree  # times the number of rows


class Variables(NamedTuple):
    """What the loss of a shard depends on besides its rows."""

    params: PyTree
    batch_stats: PyTree
    key: Array  # of this step


class StepSpec(NamedTuple):
    """The static part of a train step: what is known when it is compiled."""

    model: Model
    layout: BatchLayout
    mesh: Mesh
    reduction: Reduction
    schedule: Schedule

    @property
    def platform(self) -> str:
        """The platform of the devices."""
        name: str = self.mesh.devices.flat[0].platform
        return name


class Call(NamedTuple):
    """The run-time arguments that all steps of a compiled call share on one device."""

    args: CallArgs
    shard_range: ShardRange
    shards: Array  # [slots], the shard numbers of this device
    read: BatchReader
    key: Array

    @property
    def one(self) -> Array:
        """1, a value that the compiler does not know."""
        one: Array = self.args.one
        return one


def train_block(
    spec: StepSpec, state: TrainState, data: PyTree, shard_range: ShardRange, packed: Array
) -> tuple[TrainState, Array, Array]:
    """Runs `num_steps` consecutive steps; `compile_train_block` documents what it returns."""
    call_args, layout = CallArgs(*packed), spec.layout
    shards = shard_range.first + jnp.arange(layout.slots, dtype=jnp.int32)
    read = layout.reader(data, shards, call_args.first_step, call_args.num_steps, call_args.seed)
    call = Call(call_args, shard_range, shards, read, jax.random.fold_in(make_key(call_args.seed), TRAINING_KEY))

    def step(k: Array, carry: tuple[TrainState, Array]) -> tuple[TrainState, Array]:
        state, record = train_step(spec, call, carry[0], k)
        return state, lax.dynamic_update_index_in_dim(carry[1], record, k, 0)

    history = jnp.zeros((layout.block_steps, 3), data["weight"].dtype)
    state, history = lax.fori_loop(0, call_args.num_steps, step, (state, history))
    return state, history, rows_used(call, state, layout.block_steps, tagged="tag" in data)


def train_step(spec: StepSpec, call: Call, state: TrainState, k: Array) -> tuple[TrainState, Array]:
    """One step: the gradient of the weighted loss sum over all rows, divided once by their weight; then the optimizer.

    Returns:
      the new state, and [3], which `LOSS`, `WEIGHT` and `NORM` of layout.py index: the weighted loss sum (NaN if the
      state is unchanged) and the weight sum, both scaled as `mean_over_devices` says; the norm of the mean gradient.
    """
    step = call.args.first_step + k
    variables = Variables(state.params, state.batch_stats, jax.random.fold_in(call.key, step))
    if spec.reduction.shard_by_shard:
        sums = ordered_sum(
            lambda slot: sums_of_slot(spec, call, variables, k, slot),
            spec.layout.slots,
            call.shard_range.count,
            spec.layout.num_shards,
            spec.mesh,
        )
    else:
        sums = mean_over_devices(sums_of_device(spec, call, variables, k), spec.mesh)
    if spec.reduction.same_bits:
        new, norm = isolated(update_state, call.one, state, sums, step)
    else:
        new, norm = update_state(state, sums, step)
    loss_sum = jnp.where(new.step > step, sums.loss, jnp.nan)
    return new, jnp.stack([loss_sum, sums.statistics.weight, norm])


def sums_of_device(spec: StepSpec, call: Call, variables: Variables, k: Array) -> Sums:
    """The sums over all rows of this device, in the order of the schedule."""
    traversal, chunks = spec.schedule.traversal, spec.schedule.num_chunks
    loss = bind_shard_loss(spec, variables)

    def of_chunk(c: Array) -> Sums:
        if traversal is Traversal.ROWS:
            any_shard = jnp.int32(0)
            return gradient_of_shard(loss, variables.params, call.read.rows(k, c, chunks), any_shard)
        numbers = call.shards + c * spec.layout.num_shards
        return gradient_of_shards(loss, variables.params, call.read.of_slots(k, c, chunks), numbers)

    if traversal is Traversal.SHARD_BY_SHARD:
        sums: Sums = accumulate(lambda slot: sums_of_slot(spec, call, variables, k, slot), call.shard_range.count)
        return sums
    return in_chunks(chunks, call, of_chunk)


def sums_of_slot(spec: StepSpec, call: Call, variables: Variables, k: Array, slot: Array) -> Sums:
    """The sums over the rows of one shard; for the same bits isolated from the surrounding operations."""
    chunks, layout = spec.schedule.num_chunks, spec.layout
    shard = call.shard_range.first + slot  # not shards[slot]: with one slot, the compiler would know its value

    def of_chunk(c: Array) -> Sums:
        batch, number = call.read.of_slot(k, slot, c, chunks), shard + c * layout.num_shards
        if not spec.reduction.same_bits:
            return gradient_of_shard(bind_shard_loss(spec, variables), variables.params, batch, number)
        # Features of row-wise models are not isolated: they only enter products, and a copy takes a fifth of a step.
        kept = {"x": batch.pop("x")} if spec.schedule.row_wise else {}

        def gradient(variables: Variables, batch: PyTree, number: Array) -> Sums:
            return gradient_of_shard(bind_shard_loss(spec, variables), variables.params, kept | batch, number)

        sums: Sums = isolated(gradient, call.one, variables, batch, number)
        return sums

    return in_chunks(chunks, call, of_chunk)


def in_chunks(chunks: int, call: Call, of_chunk: Callable[[Array], Sums]) -> Sums:
    """The sums over `chunks` chunks, one after the other."""
    if chunks == 1:
        return of_chunk(jnp.int32(0))
    sums: Sums = accumulate(of_chunk, call.one * chunks)
    return sums


def bind_shard_loss(spec: StepSpec, variables: Variables) -> ShardLoss:
    """`shard_loss` as a function of the parameters, the batch of one shard, and the shard's number."""

    def loss(params: PyTree, batch: PyTree, shard: Array) -> tuple[Array, Statistics]:
        key = jax.random.fold_in(variables.key, shard)
        return shard_loss(spec.model, params, variables.batch_stats, batch, key, spec.platform)

    return loss


def shard_loss(
    model: Model, params: PyTree, batch_stats: PyTree, batch: PyTree, key: Array, platform: str
) -> tuple[Array, Statistics]:
    """The weighted loss sum of a shard's batch, and the further sums."""
    variables = {"params": params, "batch_stats": batch_stats}
    prediction, new = forward(model, variables, batch, True, key, platform)
    weight = batch["weight"]
    rows = (weight > 0).sum(dtype=weight.dtype) if batch_stats else None
    losses = row_losses(model, variables, prediction, batch)
    return jnp.vdot(losses, weight), Statistics(weight.sum(), rows, jax.tree.map(lambda leaf: leaf * rows, new))


def update_state(state: TrainState, sums: Sums, step: Array) -> tuple[TrainState, Array]:
    """The state after a step with these sums, and the norm of the mean gradient.

    If the loss or the new parameters are not finite, the state is unchanged.
    """
    gradient, value, statistics = sums
    # A multiplication by the inverse: the compiler would rewrite a division to it in some of the programs only.
    per_weight = 1 / jnp.where(statistics.weight > 0, statistics.weight, 1)
    batch_stats = state.batch_stats
    if statistics.rows is not None:
        any_row, per_row = statistics.rows > 0, 1 / jnp.where(statistics.rows > 0, statistics.rows, 1)
        batch_stats = jax.tree.map(
            lambda new, old: jnp.where(any_row, new * per_row, old), statistics.batch_stats, batch_stats
        )
    gradient = jax.tree.map(lambda leaf: leaf * per_weight, gradient)
    new = state.apply_gradients(grads=gradient, value=value * per_weight, batch_stats=batch_stats)
    finite = jnp.isfinite(value) & jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new.params)]).all()
    good = finite & (state.step == step)  # after a bad step the counter lags, so later steps of the call are dropped
    kept: TrainState = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, state)
    return kept, optax.tree.norm(gradient).astype(value.dtype)


def rows_used(call: Call, state: TrainState, block_steps: int, tagged: bool) -> Array:
    """[block_steps, 2] uint32: how many tagged rows each step used on this device, and the sum of their tags."""
    if not tagged:
        return jnp.zeros((block_steps, 2), jnp.uint32)

    def of_steps(steps: Array) -> Array:
        tags = jax.vmap(lambda k: call.read.rows(k)["tag"])(steps)
        tags = jnp.where((call.args.first_step + steps < state.step)[:, None], tags, 0)
        return jnp.stack([(tags > 0).sum(axis=1, dtype=tags.dtype), tags.sum(axis=1, dtype=tags.dtype)], 1)

    return in_parts(of_steps, call.args.num_steps, block_steps)
