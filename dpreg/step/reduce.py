"""Sums over the global batch from the losses of logical shards, with all communication between devices in a step."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from dpreg.distributed.devices import AXIS
from dpreg.step.rounding import round_products

SLOTS = "slots"  # the vmapped axis of the shards on one device

# Between processes on CPU, sums of up to this many bytes over all devices are exchanged by one all-to-all, which takes
# 0.24 to 0.64 of the time of Gloo's all-reduce (2 to 4 processes on one machine). Larger ones are all-reduced, which
# sends fewer bytes.
_SENT_TO_ALL_BYTES = 1 << 18

PyTree = Any
# (params, batch of one shard, shard number) -> (weighted loss sum, further sums)
ShardLoss = Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]


class Reduction(NamedTuple):
    """How a step sums over the global batch, and what this asks of the computation of the terms.

    Attributes:
      name: the setting of a run.
      shard_by_shard: whether the sums of each shard are computed by themselves and exchanged, by `ordered_sum`.
        Otherwise the sums over all shards of a device are, by `mean_over_devices`.
      same_bits: whether the result has the same bits on any number of devices: then everything that computes it is
        `isolated`.
    """

    name: str
    shard_by_shard: bool
    same_bits: bool


REDUCTION_BY_NAME = {
    reduction.name: reduction
    for reduction in (
        Reduction("pmean", shard_by_shard=False, same_bits=False),
        Reduction("ordered", shard_by_shard=True, same_bits=True),
    )
}


class Sums(NamedTuple):
    """Sums over rows."""

    gradient: PyTree
    loss: Array  # weighted
    statistics: PyTree  # the further sums that the loss of a shard returns


def gradient_of_shard(loss: ShardLoss, params: PyTree, batch: PyTree, shard: Array) -> Sums:
    """The sums of one shard."""
    with jax.named_scope("gradient"):
        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, shard)
    return Sums(gradient, value, statistics)


def gradient_of_shards(loss: ShardLoss, params: PyTree, batches: PyTree, shards: Array) -> Sums:
    """The sums over shards stacked in the first axis: one gradient of the summed losses, not a sum of gradients."""

    def summed(params: PyTree) -> tuple[Array, PyTree]:
        values, statistics = jax.vmap(loss, in_axes=(None, 0, 0), axis_name=SLOTS)(params, batches, shards)
        return values.sum(), jax.tree.map(lambda leaf: leaf.sum(axis=0), statistics)

    with jax.named_scope("gradient"):
        (value, statistics), gradient = jax.value_and_grad(summed, has_aux=True)(params)
    return Sums(gradient, value, statistics)


def sum_over_batch(of_shard: Array) -> Array:
    """The sum over all shards of a batch, for use inside the loss of one shard under `gradient_of_shards`."""
    # XLA emits a collective even for one device; skip it.
    total: Array = lax.psum(of_shard, SLOTS if lax.axis_size(AXIS) == 1 else (SLOTS, AXIS))
    return total


def opaque_loop(turn: Callable[[Array, PyTree], PyTree], count: Array, start: PyTree) -> PyTree:
    """Applies `turn(i, value)` for i in [0, count) in a loop whose trip count the compiler does not know.

    The compiler can therefore neither unroll the loop nor fuse its body with the surrounding operations, which depend
    on the number of devices. It may still move loop-invariant code out of the loop: see `isolated`.
    """
    return lax.fori_loop(0, count, turn, start)


def isolated(function: Callable[..., PyTree], one: Array, *inputs: PyTree) -> PyTree:
    """`function(*inputs)`, compiled to the same operations whatever surrounds it.

    It becomes the body of a loop of `one` iteration, a number that the compiler does not know. The body selects between
    the inputs and zeros by the number of the iteration, so that everything that it computes depends on that number. XLA
    then finds no loop-invariant code to move out of the loop, where it would be fused with the surrounding operations.
    LLVM may still move operations across the selection and out of the loop. This does not change a result, because each
    product is rounded before it is added to something: see `round_products`.

    Args:
      function: traced values that it closes over are not isolated.
      one: int32 scalar, 1 at run time.
      inputs: trees of arrays.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*inputs)

    def turn(i: Array, _: PyTree) -> PyTree:
        of_turn = jax.tree.map(functools.partial(_or_zeros, i == 0), inputs)
        results = round_products(traced, i, *jax.tree.leaves(of_turn))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    outputs: PyTree = opaque_loop(turn, one, _zeros_like(shapes))
    return outputs


def accumulate(sums_of: Callable[[Array], PyTree], count: Array) -> PyTree:
    """The sum of `sums_of(i)` for i in [0, count), added in this order in an `opaque_loop`."""
    sums_of = jax.jit(sums_of, inline=True)
    zeros = _zeros_like(jax.eval_shape(sums_of, jnp.int32(0)))
    return opaque_loop(lambda i, total: jax.tree.map(jnp.add, total, sums_of(i)), count, zeros)


def _or_zeros(chosen: Array, leaf: Any) -> Any:
    """`leaf` if `chosen`, else zeros."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # by its words: JAX's check of key reuse counts a selection
        words = _or_zeros(chosen, jax.random.key_data(leaf))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    return lax.select(chosen, leaf, jnp.zeros_like(leaf))


def _zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the same shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _sent_to_all(of_device: Array, mesh: Mesh) -> bool:
    """Whether arrays of this size are exchanged by one all-to-all."""
    few = mesh.size * of_device.size * of_device.dtype.itemsize <= _SENT_TO_ALL_BYTES
    return few and bool(mesh.is_multi_process) and mesh.devices.flat[0].platform == "cpu"


def from_all_devices(of_device: Array, mesh: Mesh, axis: int = 0) -> Array:
    """The arrays of all devices, concatenated along an axis: an all-gather.

    For few bytes between processes on CPU it is an all-to-all of copies instead: Gloo sends those at once, whereas its
    all-gather takes several rounds.
    """
    if mesh.size == 1:  # XLA emits a collective even for one device
        return of_device
    if _sent_to_all(of_device, mesh):
        copies = jnp.tile(of_device, [mesh.size if i == axis else 1 for i in range(of_device.ndim)])
        of_all: Array = lax.all_to_all(copies, AXIS, axis, axis, tiled=True)
    else:
        of_all = lax.all_gather(of_device, AXIS, axis=axis, tiled=True)
    return of_all


def mean_over_devices(sums: PyTree, mesh: Mesh) -> PyTree:
    """`lax.pmean` of all leaves in one buffer, so that a step has one collective whatever the compiler would combine.

    It is an all-reduce. For few bytes between processes on CPU, each device receives the sums of all others and
    computes the mean itself.

    So under pmean all sums over the global batch are divided by the number of devices. This cancels in everything that
    is computed from them: the mean loss, the mean gradient and the batch statistics are quotients of two such sums.
    """
    if mesh.size == 1:  # XLA emits a collective even for one device
        return sums
    flat, unravel = ravel_pytree(sums)
    with jax.named_scope("exchange"):
        if _sent_to_all(flat, mesh):
            return unravel(from_all_devices(flat[None], mesh).mean(axis=0))
        return unravel(lax.pmean(flat, AXIS))


def ordered_sum(sums_of: Callable[[Array], PyTree], slots: int, count: Array, num_shards: int, mesh: Mesh) -> PyTree:
    """The sum over all logical shards, with the same bits on any number of devices.

    Each device computes its shards one by one. Then the sums of all shards are gathered on every device and added in
    one fixed binary tree over the shards.

    Args:
      sums_of: the sums of the shard in a slot of this device.
      slots: slots of a device (static); num_shards: logical shards of the run (static).
      count: the number of slots of this device that hold a shard: int32, known only at run time.
    """
    sums_of = jax.jit(sums_of, inline=True)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.zeros_like, jax.eval_shape(sums_of, jnp.int32(0))))

    def fill(slot: Array, buffer: Array) -> Array:
        # Keeps XLA:GPU from fusing the reductions into this concatenation, where one thread would reduce a column.
        sums = lax.optimization_barrier(sums_of(slot))
        filled: Array = lax.dynamic_update_index_in_dim(buffer, ravel_pytree(sums)[0], slot, 0)
        return filled

    # At least two rows: with one, the compiler would know where the loop writes, and fuse differently.
    buffer = opaque_loop(fill, count, jnp.zeros((max(slots, 2), flat.size), flat.dtype))
    with jax.named_scope("exchange"):
        of_shards = from_all_devices(buffer[:slots], mesh)
    return unravel(tree_sum(list(of_shards[:num_shards])))


def tree_sum(terms: Sequence[Any], add: Callable[[Any, Any], Any] = operator.add) -> Any:
    """Adds neighbours, then the sums of neighbours, and so on, in an order that depends on `len(terms)` alone."""
    while len(terms) > 1:
        terms = [functools.reduce(add, terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]
