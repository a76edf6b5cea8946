"""From the losses of logical shards to the sums over the global batch: where devices meet."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from dpreg.distributed.devices import AXIS
from dpreg.step.rounding import round_products

SLOTS = "slots"  # the axis of those on one device, where they go through the model together

# Between processes on CPU, each device sends all others what comes to so many bytes of all devices together at most: it
# takes 0.24 to 0.64 of the time of Gloo's all-reduce (2 to 4 processes on one machine), which sends less of more bytes.
_SENT_TO_ALL_BYTES = 1 << 18

PyTree = Any
# (params, batch of one shard, shard number) -> (weighted loss sum, whatever else is to be summed)
ShardLoss = Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]


def gradient_of_shard(loss: ShardLoss, params: PyTree, batch: PyTree, shard: Array) -> tuple[PyTree, Array, PyTree]:
    """The sums of one shard: (gradient, loss, the rest)."""
    with jax.named_scope("gradient"):
        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, shard)
    return gradient, value, rest


def gradient_of_shards(loss: ShardLoss, params: PyTree, batches: PyTree, shards: Array) -> tuple[PyTree, Array, PyTree]:
    """The sums over shards stacked in the first axis: one gradient of the summed losses, not a sum of gradients."""

    def summed(params: PyTree) -> tuple[Array, PyTree]:
        values, rest = jax.vmap(loss, in_axes=(None, 0, 0), axis_name=SLOTS)(params, batches, shards)
        return values.sum(), jax.tree.map(lambda leaf: leaf.sum(axis=0), rest)

    with jax.named_scope("gradient"):
        (value, rest), gradient = jax.value_and_grad(summed, has_aux=True)(params)
    return gradient, value, rest


def sum_over_batch(of_shard: Array) -> Array:
    """The sum over all shards of a batch, within the loss of one of them as `gradient_of_shards` takes it."""
    # Of one device, the compiler would still call a meeting.
    total: Array = lax.psum(of_shard, SLOTS if lax.axis_size(AXIS) == 1 else (SLOTS, AXIS))
    return total


def opaque_loop(turn: Callable[[Array, PyTree], PyTree], count: Array, start: PyTree) -> PyTree:
    """Applies `turn(i, value)` for i in [0, count) in a loop whose trip count the compiler cannot know.

    So it can neither unroll the loop nor fuse its body with the surrounding operations, which differ with the number of
    devices. It may still move out of the loop what is the same in every turn: see `isolated`.
    """
    return lax.fori_loop(0, count, turn, start)


def isolated(function: Callable[..., PyTree], one: Array, *inputs: PyTree) -> PyTree:
    """`function(*inputs)`, compiled to the same operations whatever surrounds it.

    It is the body of a loop of `one` turn, a number that the compiler does not know. In that turn, the first, the
    inputs are selected instead of zeros: what `function` computes from them depends on the number of the turn. So none
    of it is loop-invariant code, which the compiler would move out of the loop and fuse with the surroundings. LLVM may
    still move operations through the selection and out of the loop, which changes no result once products are rounded
    before they are added: see `round_products`.

    Args:
      function: must read no traced value but its arguments.
      one: int32 scalar, 1 at run time.
      inputs: trees of arrays.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)

    def turn(i: Array, _: PyTree) -> PyTree:
        of_turn = jax.tree.map(functools.partial(lax.select, i == 0), inputs, _zeros_like(inputs))
        results = round_products(traced, i, *jax.tree.leaves(of_turn))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    outputs: PyTree = opaque_loop(turn, one, _zeros_like(shapes))
    return outputs


def accumulate(sums_of: Callable[[Array], PyTree], count: Array) -> PyTree:
    """The sum of `sums_of(i)` for i in [0, count), one after the other, in an `opaque_loop`."""
    sums_of = jax.jit(sums_of, inline=True)
    zeros = _zeros_like(jax.eval_shape(sums_of, jnp.int32(0)))
    return opaque_loop(lambda i, total: jax.tree.map(jnp.add, total, sums_of(i)), count, zeros)


def _zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the same shapes and dtypes; for typed random keys, keys of zero words."""

    def zeros(leaf: Any) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        words = jax.eval_shape(jax.random.key_data, leaf)
        key: Array = jax.random.wrap_key_data(jnp.zeros(words.shape, words.dtype), impl=jax.random.key_impl(leaf))
        return key

    return jax.tree.map(zeros, tree)


def _sent_to_all(of_device: Array, mesh: Mesh) -> bool:
    """Whether a device's array goes from each to all others at once."""
    few = mesh.size * of_device.size * of_device.dtype.itemsize <= _SENT_TO_ALL_BYTES
    return few and bool(mesh.is_multi_process) and mesh.devices.flat[0].platform == "cpu"


def from_all_devices(of_device: Array, mesh: Mesh, axis: int = 0) -> Array:
    """What all devices have of it, one after the other along an axis: an all-gather.

    Or, for few bytes between processes on CPU, an all-to-all of copies: Gloo sends them at once, and gathers in rounds.
    """
    if mesh.size == 1:  # of one, the compiler would still call a meeting
        return of_device
    if _sent_to_all(of_device, mesh):
        copies = jnp.tile(of_device, [mesh.size if i == axis else 1 for i in range(of_device.ndim)])
        of_all: Array = lax.all_to_all(copies, AXIS, axis, axis, tiled=True)
    else:
        of_all = lax.all_gather(of_device, AXIS, axis=axis, tiled=True)
    return of_all


def mean_over_devices(sums: PyTree, mesh: Mesh) -> PyTree:
    """`lax.pmean` of all leaves in one buffer: one exchange a step, whatever the compiler would combine.

    It is an all-reduce; or, for few bytes between processes on CPU, each device averages those of all.
    """
    if mesh.size == 1:  # of one, the compiler would still call a meeting
        return sums
    flat, unravel = ravel_pytree(sums)
    with jax.named_scope("exchange"):
        if _sent_to_all(flat, mesh):
            return unravel(from_all_devices(flat[None], mesh).mean(axis=0))
        return unravel(lax.pmean(flat, AXIS))


def ordered_sum(sums_of: Callable[[Array], PyTree], slots: int, count: Array, num_shards: int, mesh: Mesh) -> PyTree:
    """The sum over all logical shards, to the same bits on any number of devices.

    Each device computes its shards one by one; the partial sums of all shards are gathered and added in one
    fixed binary tree over the shards.

    Args:
      sums_of: the sums of the shard in a slot of this device.
      slots: slots of a device (static); num_shards: logical shards of the run (static).
      count: how many slots of this device hold a shard: int32, known only at run time.
    """
    sums_of = jax.jit(sums_of, inline=True)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, jax.eval_shape(sums_of, jnp.int32(0))))

    def fill(slot: Array, buffer: Array) -> Array:
        # Or a GPU would finish sums while it lays them side by side: one thread all of a column.
        sums = lax.optimization_barrier(sums_of(slot))
        filled: Array = lax.dynamic_update_index_in_dim(buffer, ravel_pytree(sums)[0], slot, 0)
        return filled

    # Two rows at least: with one, the compiler knows where the loop writes, and fuses otherwise.
    buffer = opaque_loop(fill, count, jnp.zeros((max(slots, 2), flat.size), flat.dtype))
    with jax.named_scope("exchange"):
        of_shards = from_all_devices(buffer[:slots], mesh)
    return unravel(tree_sum(list(of_shards[:num_shards])))


def tree_sum(parts: Sequence[Any], add: Callable[[Any, Any], Any] = operator.add) -> Any:
    """The sum of neighbours, of neighbouring pairs, and so on: an order that depends on `len(parts)` alone."""
    while len(parts) > 1:
        parts = [functools.reduce(add, parts[i : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]
