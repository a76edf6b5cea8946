"""How a compiled step reads the rows of a block from what lies on its device."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from dpreg.data.pipeline import Batch, Dataset


class BatchReader(NamedTuple):
    """How a step finds its rows in what lies on its device; each may be asked for one of `parts` equal parts of them.

    Attributes:
      rows: (k, part, parts) -> those of step k of the block, of all slots one after the other.
      of_slots: (k, part, parts) -> those of all slots, stacked in the first axis.
      of_slot: (k, slot, part, parts) -> those of one.
    """

    rows: Callable[..., Batch]
    of_slots: Callable[..., Batch]
    of_slot: Callable[..., Batch]


def read_block(dataset: Dataset, data: Batch, shards: Array, first_step: Array, seed: Array) -> BatchReader:
    """Reads a block of a dataset: traced, on one device.

    Args:
      data: this device's part of `Block.data`.
      shards: [slots] int32, the shards it carries.
      first_step, seed: int32 scalars.

    Returns:
      Functions that read rows of step `first_step + k`: {"x": [b, d], "y": [b, t], "weight": [b]}; with tags also
      "tag": [b] uint32, 0 for padding.
    """

    def of_step(column: Array, k: Array | int) -> Array:
        at_step: Array = lax.dynamic_index_in_dim(column, jnp.uint32(k), keepdims=False)
        return at_step

    def of_slot(column: Array, k: Array | int, slot: Array | int) -> Array:
        # Slots are flattened into the axis read from: an axis of length 1 would be compiled otherwise.
        return of_step(column.reshape(-1, *column.shape[2:]), k * dataset.slots + slot)

    fetch = _fetch_from_block(data)
    if dataset.resolved_placement == "device":
        steps = first_step + jnp.arange(dataset.block_steps, dtype=jnp.int32)
        fetch = _fetch_by_runs(dataset, data, dataset.sampler.runs(steps[:, None], shards[None, :], seed))
    return BatchReader(
        rows=lambda k, *part: fetch(lambda c: of_step(c, k).reshape(-1, *c.shape[3:]), 0, *part),
        of_slots=lambda k, *part: fetch(lambda c: of_step(c, k), 1, *part),
        of_slot=lambda k, slot, *part: fetch(lambda c: of_slot(c, k, slot), 0, *part),
    )


def _fetch_from_block(data: Batch) -> Callable[..., Batch]:
    """Reads batches `[K, slots, b, ...]`: see `_fetch_by_runs`."""

    def fetch(chosen: Callable[[Array], Array], axis: int, part: Array | int = 0, parts: int = 1) -> Batch:
        return {name: _part(chosen(column), axis, part, parts) for name, column in data.items()}

    return fetch


def _fetch_by_runs(dataset: Dataset, data: Batch, runs: Array) -> Callable[..., Batch]:
    """Reads resident rows `[slots, rows, ...]` by the numbers of runs in their shards, `[K, slots, b / run]`.

    Returns:
      `fetch(chosen, axis, part, parts)`: what `chosen` leaves of [K, slots, ...], and of its rows, which lie along an
      axis, one of so many equal parts.
    """
    mesh: Mesh = dataset.mesh  # type: ignore[assignment]  # it is sharded
    sampler, run = dataset.sampler, dataset.sampler.run
    runs = runs + (sampler.shard_runs + 1) * jnp.arange(dataset.slots, dtype=jnp.int32)[None, :, None]
    runs = runs.astype(jnp.uint32)  # never negative: no counting from the end to be looked for
    # On CPU a run is read as one long row. The compiler for TPUs takes minutes over those, and would bring a column of
    # single numbers into another form, all of it in each step, if they did not lie along one axis here.
    long = mesh.devices.flat[0].platform == "cpu"

    def in_rows(column: Array) -> Array:
        width = math.prod(column.shape[2:])
        return column.reshape(-1, run * width) if long else column.reshape(-1, *[width] * (width > 1))

    flat = {name: in_rows(column) for name, column in data.items()}

    def fetch(chosen: Callable[[Array], Array], axis: int, part: Array | int = 0, parts: int = 1) -> Batch:
        which = chosen(runs)
        whole_runs = which.shape[axis] % parts == 0
        if whole_runs:
            which = _part(which, axis, part, parts)
        lead = (*which.shape[:axis], which.shape[axis] * run)
        if not long:
            which = (which[..., None] * run + jnp.arange(run, dtype=jnp.uint32)).reshape(lead)

        def gathered(name: str, column: Array) -> Array:
            rows = flat[name].at[which].get(mode="promise_in_bounds").reshape(*lead, *column.shape[2:])
            return rows if whole_runs else _part(rows, axis, part, parts)

        return {name: gathered(name, column) for name, column in data.items()}

    return fetch


def _part(rows: Array, axis: int, part: Array | int, parts: int) -> Array:
    """One of so many equal parts of what lies along an axis."""
    size = rows.shape[axis] // parts
    return rows if parts == 1 else lax.dynamic_slice_in_dim(rows, jnp.uint32(part * size), size, axis)
