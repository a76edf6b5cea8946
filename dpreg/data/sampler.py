"""Which row a shard reads at which position: arithmetic on (seed, epoch, shard, position), nothing stored."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpreg.errors import InputError
from dpreg.spelling import spell

Integers = Any  # a NumPy or a JAX array of integers, or an int

ORDER = 2  # raised with each change to which row is where: a run is only taken up in the order that it began with
_ROUNDS = 6
_SMALLEST_DOMAIN = 64  # with fewer, orders of a few elements are measurably unequal in frequency
# Rows that lie together are read several times as fast. They stay together where a shard and a global batch have many
# such runs, so that its order and they are hardly less random.
_LARGEST_RUN, _FEWEST_RUNS, _FEWEST_RUNS_OF_BATCH = 32, 128, 8


def _mix(word: Integers, key: Integers) -> Integers:
    """Keyed 32-bit hash with full avalanche (the finaliser of MurmurHash3, Appleby 2011). uint32 -> uint32."""
    word = (word ^ key) * np.uint32(0x9E3779B1)
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def keyed_hash(index: Integers, *key: int) -> Integers:
    """A pseudo-random uint32 for each index: a function of it and the key. NumPy or JAX, as `index` is."""
    word = np.zeros(1, np.uint32)
    for part in key:
        word = _mix(np.full(1, part, np.uint32), word + np.uint32(1))
    return _mix(index.astype(np.uint32), word)


def row_tag(index: Integers) -> Integers:
    """A pseudo-random odd uint32 for each row index: their sums distinguish sets of rows, in any order."""
    return keyed_hash(index, 0x7A6) | np.uint32(1)


def permute(position: Integers, size: Integers, *key: Integers) -> Integers:
    """The element that a keyed pseudo-random permutation of `range(size)` puts at `position`.

    An alternating Feistel network over pairs of a number below ceil(size / 2**w) and w bits, w about half of the bits
    of `size`, with cycle walking: the few values outside `range(size)`, under 2**w, are sent through again until they
    fall inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). NumPy arrays give a NumPy array,
    JAX arrays a JAX array with the same values; all arguments broadcast.

    Args:
      position: integers in `[0, size)`. Positions outside are returned unchanged.
      size: number of elements, at most 2**31.
      *key: non-negative integers, such as (seed, epoch, shard); each different tuple is another order.

    Returns:
      int32 array: a bijection of `range(size)` for each size and key.
    """
    xp = jnp if any(isinstance(v, Array) for v in (position, size, *key)) else np
    shape = np.broadcast_shapes(*(np.shape(v) for v in (position, size, *key)))
    rank = max(len(shape), 1)  # of arrays, also where scalars are given: NumPy warns when a scalar wraps around

    def word_of(value: Integers) -> Integers:
        return xp.asarray(value).astype(np.uint32).reshape((1,) * (rank - np.ndim(value)) + np.shape(value))

    position, size = word_of(position), word_of(size)
    mixed = word_of(0)
    for part in key:
        mixed = _mix(word_of(part), mixed + np.uint32(1))
    round_keys = _mix(np.arange(_ROUNDS, dtype=np.uint32).reshape(-1, *[1] * rank), mixed[None])

    last = xp.maximum(size, np.uint32(_SMALLEST_DOMAIN)) - np.uint32(1)
    width = np.uint32(32) - (lax.clz(last) if xp is jnp else _leading_zeros(last))
    low_width = (width + np.uint32(1)) >> np.uint32(1)
    low_mask = (np.uint32(1) << low_width) - np.uint32(1)
    highs = (last >> low_width) + np.uint32(1)

    def network(value: Integers, low_width: Integers, low_mask: Integers, highs: Integers, *keys: Integers) -> Integers:
        high, low = value >> low_width, value & low_mask
        for r in range(0, _ROUNDS, 2):
            high = high + _scaled(_mix(low, keys[r]), highs)
            high = xp.minimum(high, high - highs)  # modulo `highs`: what is below it wraps around, to more
            low = (low ^ _mix(high, keys[r + 1])) & low_mask
        return (high << low_width) | low

    of_all = (low_width, low_mask, highs)
    inside = position < size
    if xp is jnp:

        def once_more(walk: tuple[Array, Array]) -> tuple[Array, Array]:
            value, outside = walk
            value = jnp.where(outside, network(value, *of_all, *round_keys), value)
            return value, outside & (value >= size)

        # The first time, too, within the loop: the network is compiled once, and the keys are mixed before it.
        start = jnp.broadcast_to(position, shape or (1,)), jnp.broadcast_to(inside, shape or (1,))
        value, _ = lax.while_loop(lambda walk: walk[1].any(), once_more, start)
    else:
        value = xp.where(inside, network(position, *of_all, *round_keys), position)
        # Of those outside alone: they are few. Each takes its part of what belongs to its shard and epoch.
        parts = np.broadcast_arrays(size, *of_all, *round_keys)
        which = np.broadcast_to(np.arange(parts[0].size).reshape(parts[0].shape), value.shape).ravel()
        value, outside = value.ravel(), np.flatnonzero(inside & (value >= size))
        while len(outside):
            limit, *of_some = (part.ravel()[which[outside]] for part in parts)
            moved = value[outside] = network(value[outside], *of_some)
            outside = outside[moved >= limit]
    return value.astype(np.int32).reshape(shape)


def _divided(number: Integers, by: int) -> tuple[Integers, Integers]:
    """(quotient, remainder) of numbers from 0 on: no signs for the compiler to look after."""
    if isinstance(number, Array):
        return lax.div(number, number.dtype.type(by)), lax.rem(number, number.dtype.type(by))
    quotient, remainder = divmod(number, by)
    return quotient, remainder


def _scaled(word: Integers, size: Integers) -> Integers:
    """floor(word * size / 2**32), in uint32: a uniform word becomes a number below `size`, which is at most 2**16."""
    half = np.uint32(16)
    return ((word >> half) * size + (((word & np.uint32(0xFFFF)) * size) >> half)) >> half


def _leading_zeros(word: np.ndarray) -> np.ndarray:
    """`lax.clz` for a NumPy array of uint32 below 2**31. Exact: float64 holds every uint32."""
    return (32 - np.frexp(word.astype(np.float64))[1]).astype(np.uint32)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The rows of every batch of a run: stateless, so a step number is the whole position in the data.

    Rows `[0, num_rows)` are cut into `num_shards` contiguous logical shards whose sizes differ by one at
    most. At each step every shard gives `shard_batch` rows; an epoch uses every row exactly once and pads
    the ragged ends. PermutedSource are runs of `run` neighbouring rows. None of it knows of devices.

    Raises:
      InputError: when `num_shards` does not divide `global_batch`, which names the nearest values that work; or a shard
        has more rows than int32 counts, with the padding of its last batch.
    """

    num_rows: int
    num_shards: int
    global_batch: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        shards, batch = self.num_shards, self.global_batch
        if shards < 1 or batch < 1 or batch % shards:
            near = sorted({max(batch // max(shards, 1), 1) * shards, -(-batch // max(shards, 1)) * shards})
            raise InputError(
                f"{spell('batch_size', batch)}: is not a multiple of {spell('num_shards', shards)}; "
                f"use {spell('batch_size', *near)}, or another {spell('num_shards')}"
            )
        if self.shard_capacity + self.shard_batch + 2 * _LARGEST_RUN >= 2**31:
            raise InputError(
                f"{spell('num_shards', shards)}: {self.num_rows:,} rows are too many for so few; use more shards"
            )

    @property
    def shard_batch(self) -> int:
        """Rows that one shard gives to one step."""
        return self.global_batch // self.num_shards

    @property
    def shard_capacity(self) -> int:
        """Rows of the largest shard."""
        return -(-self.num_rows // self.num_shards)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that use every row once."""
        return -(-self.shard_capacity // self.shard_batch)

    @property
    def run(self) -> int:
        """Neighbouring rows that stay together in every epoch: a power of two that divides `shard_batch`.

        1 where a shard has few rows, 32 at most.
        """
        most = min(_LARGEST_RUN, self.shard_capacity // _FEWEST_RUNS, self.global_batch // _FEWEST_RUNS_OF_BATCH)
        return math.gcd(self.shard_batch, 1 << max(1, most).bit_length() - 1)

    @property
    def shard_runs(self) -> int:
        """Runs of the largest shard, of which the last may be shorter."""
        return -(-self.shard_capacity // self.run)

    def shard_size(self, shard: Integers) -> Integers:
        """Rows of a shard: 0 for shards at or past `num_shards`, the empty slots of the last devices."""
        shard = shard if isinstance(shard, Array) else np.asarray(shard, np.int32)
        size = self.num_rows // self.num_shards + (shard < self.num_rows % self.num_shards).astype(np.int32)
        return size * (shard < self.num_shards).astype(np.int32)

    def shard_start(self, shard: np.ndarray | int) -> np.ndarray:
        """The first row of a shard, or of each; `num_rows` for shards past the last. int64."""
        quotient, remainder = divmod(self.num_rows, self.num_shards)
        shard = np.asarray(shard, np.int64)
        start: np.ndarray = np.minimum(quotient * shard + np.minimum(shard, remainder), self.num_rows)
        return start

    def runs(self, step: Integers, shard: Integers, seed: Integers) -> Integers:
        """Which runs of its shard a batch is made of. `step` and `shard` broadcast, NumPy or JAX.

        Returns:
          int32 [..., shard_batch // run]: run i is the rows from `i * run` on. Those of `run` rows of the shard are
          permuted, a shorter one is the epoch's last; where the batch is padded, runs are past the shard's end.
        """
        full = _divided(self.shard_size(shard), self.run)[0][..., None]
        runs = self.shard_batch // self.run
        epoch, step_of_epoch = _divided(step, self.steps_per_epoch)
        offset = (step_of_epoch * runs)[..., None]
        within = np.arange(runs, dtype=np.int32).reshape((1,) * (offset.ndim - 1) + (-1,))
        position = offset + within
        if self.shuffle:
            position = permute(position, full, seed, epoch[..., None], shard[..., None])
        xp = jnp if isinstance(position, Array) else np
        # A shorter run is the last, if there is one: where there is none, there is one of padding alone.
        return xp.minimum(position, self.shard_runs).astype(np.int32)

    def positions(self, step: np.ndarray, shard: np.ndarray, seed: int) -> np.ndarray:
        """Where in its shard each row of a batch lies. `step` and `shard` broadcast.

        Returns:
          int32 [..., shard_batch]: in `[0, shard_size)`, or `shard_size` where the batch is padded.
        """
        runs = self.runs(step, shard, seed)
        rows = runs[..., None] * np.int32(self.run) + np.arange(self.run, dtype=np.int32)
        positions: np.ndarray = np.minimum(
            rows.reshape(*runs.shape[:-1], self.shard_batch), self.shard_size(shard)[..., None]
        )
        return positions
