"""What a compiled call is given, and how rows reach it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.data.dataset import Dataset, Read
from dpreg.parallel.reduce import AXIS, PyTree


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
