"""Reads the rows of a step from the data of a block on its device, inside the compiled step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from dpreg.data.pipeline import Batch, Dataset


class BatchReader(NamedTuple):
    """Functions that read the rows of a step; each can read one of `chunks` equal chunks of them.

    Attributes:
      rows: (k, chunk, chunks) -> the rows of step k of the block, concatenated over all slots.
      of_slots: (k, chunk, chunks) -> the rows of all slots, stacked along the first axis.
      of_slot: (k, slot, chunk, chunks) -> the rows of one slot.
    """

    rows: Callable[..., Batch]
    of_slots: Callable[..., Batch]
    of_slot: Callable[..., Batch]


_STEPS_AT_ONCE = 128  # whose strips are computed by one operation


def in_parts(of_steps: Callable[[Array], Array], num_steps: Array, block_steps: int) -> Array:
    """[block_steps, ...]: what a function gives for the steps of a block, computed only as far as a call takes them.

    Args:
      of_steps: (numbers of steps within the block, [n] int32) -> [n, ...].
      num_steps: those that the call takes, an int32 scalar; the result is unspecified from there on.
      block_steps: the steps of the block, K.
    """
    if block_steps <= _STEPS_AT_ONCE:
        return of_steps(jnp.arange(block_steps, dtype=jnp.int32))
    part = jnp.arange(_STEPS_AT_ONCE, dtype=jnp.int32)
    shape = jax.eval_shape(of_steps, part)

    def fill(i: Array, found: Array) -> Array:
        start = jnp.minimum(i * _STEPS_AT_ONCE, block_steps - _STEPS_AT_ONCE)
        return lax.dynamic_update_slice_in_dim(found, of_steps(start + part), start, 0)

    found = jnp.zeros((block_steps, *shape.shape[1:]), shape.dtype)
    filled: Array = lax.fori_loop(0, -(-num_steps // _STEPS_AT_ONCE), fill, found)
    return filled


def read_block(
    dataset: Dataset, data: Batch, shards: Array, first_step: Array, num_steps: Array, seed: Array
) -> BatchReader:
    """The reader of a block of a dataset, for use in a traced function on one device.

    Args:
      dataset: the pipeline of the rows.
      data: this device's part of `Block.data`.
      shards: [slots] int32, the shards of this device.
      first_step, num_steps, seed: int32 scalars; step `num_steps` of the block is not read, nor any later one.

    Returns:
      Functions that read rows of step `first_step + k`: {"x": [b, d], "y": [b, t], "weight": [b]}; with tags also
      "tag": [b] uint32, 0 for padding.
    """

    def of_step(column: Array, k: Array | int) -> Array:
        at_step: Array = lax.dynamic_index_in_dim(column, jnp.uint32(k), keepdims=False)
        return at_step

    def of_slot(column: Array, k: Array | int, slot: Array | int) -> Array:
        # Slots are flattened into the axis that is read: an axis of length 1 would be compiled differently.
        return of_step(column.reshape(-1, *column.shape[2:]), k * dataset.slots + slot)

    fetch = _fetch_from_block(data)
    if dataset.resolved_placement == "device":

        def strips(steps: Array) -> Array:
            found: Array = dataset.sampler.strips((first_step + steps)[:, None], shards[None, :], seed)
            return found

        fetch = _fetch_by_strips(dataset, data, in_parts(strips, num_steps, dataset.block_steps))
    return BatchReader(
        rows=lambda k, *chunk: fetch(lambda c: of_step(c, k).reshape(-1, *c.shape[3:]), 0, *chunk),
        of_slots=lambda k, *chunk: fetch(lambda c: of_step(c, k), 1, *chunk),
        of_slot=lambda k, slot, *chunk: fetch(lambda c: of_slot(c, k, slot), 0, *chunk),
    )


def _fetch_from_block(data: Batch) -> Callable[..., Batch]:
    """Reads batches `[K, slots, b, ...]`: see `_fetch_by_strips`."""

    def fetch(chosen: Callable[[Array], Array], axis: int, chunk: Array | int = 0, chunks: int = 1) -> Batch:
        return {name: _chunk(chosen(column), axis, chunk, chunks) for name, column in data.items()}

    return fetch


def _fetch_by_strips(dataset: Dataset, data: Batch, strips: Array) -> Callable[..., Batch]:
    """Reads resident rows `[slots, rows, ...]` by the numbers of strips in their shards, `[K, slots, b / strip_rows]`.

    Returns:
      `fetch(chosen, axis, chunk, chunks)`: selects from [K, slots, ...] by the function `chosen`, and takes one of
      `chunks` equal chunks of the rows, which are along `axis`.
    """
    mesh: Mesh = dataset.mesh  # type: ignore[assignment]  # it is sharded
    sampler, strip_rows = dataset.sampler, dataset.sampler.strip_rows
    strips = strips + (sampler.shard_strips + 1) * jnp.arange(dataset.slots, dtype=jnp.int32)[None, :, None]
    strips = strips.astype(jnp.uint32)  # never negative, so that no check for negative indices is emitted
    # On CPU, a strip is read as one long row. XLA:TPU takes minutes to compile that. It would also convert the layout
    # of a column of scalars in every step, unless they are along one axis as here.
    long = mesh.devices.flat[0].platform == "cpu"

    def in_rows(column: Array) -> Array:
        width = math.prod(column.shape[2:])
        return column.reshape(-1, strip_rows * width) if long else column.reshape(-1, *[width] * (width > 1))

    flat = {name: in_rows(column) for name, column in data.items()}

    def fetch(chosen: Callable[[Array], Array], axis: int, chunk: Array | int = 0, chunks: int = 1) -> Batch:
        which = chosen(strips)
        whole_strips = which.shape[axis] % chunks == 0
        if whole_strips:
            which = _chunk(which, axis, chunk, chunks)
        lead = (*which.shape[:axis], which.shape[axis] * strip_rows)
        if not long:
            which = (which[..., None] * strip_rows + jnp.arange(strip_rows, dtype=jnp.uint32)).reshape(lead)

        def gathered(name: str, column: Array) -> Array:
            rows = flat[name].at[which].get(mode="promise_in_bounds").reshape(*lead, *column.shape[2:])
            return rows if whole_strips else _chunk(rows, axis, chunk, chunks)

        return {name: gathered(name, column) for name, column in data.items()}

    return fetch


def _chunk(rows: Array, axis: int, chunk: Array | int, chunks: int) -> Array:
    """Chunk number `chunk` of `chunks` equal chunks along an axis."""
    size = rows.shape[axis] // chunks
    return rows if chunks == 1 else lax.dynamic_slice_in_dim(rows, jnp.uint32(chunk * size), size, axis)
