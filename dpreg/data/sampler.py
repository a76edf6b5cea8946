"""The order of rows, computed from (seed, epoch, shard, position) without any stored state."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpreg.errors import InputError
from dpreg.spelling import spell

Integers = Any  # a NumPy or a JAX array of integers, or an int

ORDER = 2  # version of the order of rows; a run is only continued with the version that it began with
_ROUNDS = 6
_SMALLEST_DOMAIN = 64  # in smaller domains, the permutations of a few elements are measurably not uniform
# Neighbouring rows are read several times as fast. They stay together in strips if a shard and a global batch have so
# many strips that their order is hardly less random.
_LARGEST_STRIP, _FEWEST_STRIPS, _FEWEST_STRIPS_OF_BATCH = 32, 128, 8


def _mix(word: Integers, key: Integers) -> Integers:
    """Keyed 32-bit hash with full avalanche (the finaliser of MurmurHash3, Appleby 2011). uint32 -> uint32."""
    word = (word ^ key) * np.uint32(0x9E3779B1)
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def keyed_hash(index: Integers, *key: int) -> Integers:
    """A pseudo-random uint32 for each index, a function of the index and the key, in NumPy or JAX as `index` is."""
    word = np.zeros(1, np.uint32)
    for part in key:
        word = _mix(np.full(1, part, np.uint32), word + np.uint32(1))
    return _mix(index.astype(np.uint32), word)


def row_tag(index: Integers) -> Integers:
    """A pseudo-random odd uint32 for each row index. Sums of tags distinguish sets of rows, whatever their order."""
    return keyed_hash(index, 0x7A6) | np.uint32(1)


def permute(position: Integers, size: Integers, *key: Integers) -> Integers:
    """The element that a keyed pseudo-random permutation of `range(size)` puts at `position`.

    An alternating Feistel network over pairs of a number below ceil(size / 2**w) and w bits, w about half of the bits
    of `size`, with cycle walking: the few values outside `range(size)`, under 2**w, are sent through again until they
    fall inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). NumPy arrays give a NumPy array,
    JAX arrays a JAX array with the same values; all arguments broadcast.

    Args:
      position: integers in `[0, size)`. Positions outside are returned unchanged.
      size: the number of elements, at most 2**31.
      *key: non-negative integers, such as (seed, epoch, shard); each tuple gives another permutation.

    Returns:
      int32 array: a bijection of `range(size)` for each size and key.
    """
    xp = jnp if any(isinstance(v, Array) for v in (position, size, *key)) else np
    shape = np.broadcast_shapes(*(np.shape(v) for v in (position, size, *key)))
    rank = max(len(shape), 1)  # scalars become arrays, since NumPy warns when a scalar overflows

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

    of_all = (low_width, low_mask, highs)
    inside = position < size
    if xp is jnp:

        def once_more(walk: tuple[Array, Array]) -> tuple[Array, Array]:
            value, outside = walk
            value = jnp.where(outside, _encipher(xp, value, *of_all, *round_keys), value)
            return value, outside & (value >= size)

        # The first pass is inside the loop as well, so that the network is compiled once, after the keys are mixed.
        start = jnp.broadcast_to(position, shape or (1,)), jnp.broadcast_to(inside, shape or (1,))
        value, _ = lax.while_loop(lambda walk: walk[1].any(), once_more, start)
    else:
        value = xp.where(inside, _encipher(xp, position, *of_all, *round_keys), position)
        # Cycle-walk only the few values outside the range, each with the keys of its own shard and epoch.
        parts = np.broadcast_arrays(size, *of_all, *round_keys)
        which = np.broadcast_to(np.arange(parts[0].size).reshape(parts[0].shape), value.shape).ravel()
        value, outside = value.ravel(), np.flatnonzero(inside & (value >= size))
        while len(outside):
            limit, *of_some = (part.ravel()[which[outside]] for part in parts)
            moved = value[outside] = _encipher(xp, value[outside], *of_some)
            outside = outside[moved >= limit]
    return value.astype(np.int32).reshape(shape)


def _encipher(
    xp: Any, value: Integers, low_width: Integers, low_mask: Integers, highs: Integers, *keys: Integers
) -> Integers:
    """The rounds of the Feistel network of `permute`, with one key each."""
    high, low = value >> low_width, value & low_mask
    for r in range(0, _ROUNDS, 2):
        high = high + _scaled(_mix(low, keys[r]), highs)
        high = xp.minimum(high, high - highs)  # modulo `highs`: a negative difference wraps to a large uint32
        low = (low ^ _mix(high, keys[r + 1])) & low_mask
    return (high << low_width) | low


def _divided(number: Integers, by: int) -> tuple[Integers, Integers]:
    """(quotient, remainder) of non-negative numbers.

    For these, the truncating `lax.div` and `lax.rem` equal the flooring `divmod`, which corrects signs.
    """
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
    """The rows of every batch of a run. It is stateless: the step number is the whole position in the data.

    The rows `[0, num_rows)` are split into `num_shards` contiguous logical shards whose sizes differ by at most one. In
    each step every shard contributes `shard_batch` rows. An epoch uses every row once and pads the last batches.
    Strips of `strip_rows` neighbouring rows are shuffled. Nothing here depends on the devices.

    Raises:
      InputError: when `num_shards` does not divide `global_batch` (the message names the nearest valid values), or when
        a shard with the padding of its last batch has more rows than an int32 can count.
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
                f"{spell('batch_size', batch)}: it is not a multiple of {spell('num_shards', shards)}; "
                f"use {spell('batch_size', *near)}, or another {spell('num_shards')}"
            )
        if self.shard_capacity + self.shard_batch + 2 * _LARGEST_STRIP >= 2**31:
            raise InputError(
                f"{spell('num_shards', shards)}: {self.num_rows:,} rows are too many for so few shards; use more"
            )

    @property
    def shard_batch(self) -> int:
        """The number of rows of a shard in each step."""
        return self.global_batch // self.num_shards

    @property
    def shard_capacity(self) -> int:
        """The number of rows of the largest shard."""
        return -(-self.num_rows // self.num_shards)

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch, which uses every row once."""
        return -(-self.shard_capacity // self.shard_batch)

    @property
    def strip_rows(self) -> int:
        """The number of neighbouring rows that stay together: a power of two up to 32 that divides `shard_batch`.

        It is 1 if a shard has few rows.
        """
        most = min(_LARGEST_STRIP, self.shard_capacity // _FEWEST_STRIPS, self.global_batch // _FEWEST_STRIPS_OF_BATCH)
        return math.gcd(self.shard_batch, 1 << max(1, most).bit_length() - 1)

    @property
    def shard_strips(self) -> int:
        """The number of strips of the largest shard; the last one may be shorter."""
        return -(-self.shard_capacity // self.strip_rows)

    def shard_size(self, shard: Integers) -> Integers:
        """The number of rows of a shard; 0 for shards from `num_shards` on, the empty slots of the last devices."""
        shard = shard if isinstance(shard, Array) else np.asarray(shard, np.int32)
        size = self.num_rows // self.num_shards + (shard < self.num_rows % self.num_shards).astype(np.int32)
        return size * (shard < self.num_shards).astype(np.int32)

    def shard_start(self, shard: np.ndarray | int) -> np.ndarray:
        """The first row of each shard, int64; `num_rows` for shards from `num_shards` on."""
        quotient, remainder = divmod(self.num_rows, self.num_shards)
        shard = np.asarray(shard, np.int64)
        start: np.ndarray = np.minimum(quotient * shard + np.minimum(shard, remainder), self.num_rows)
        return start

    def strips(self, step: Integers, shard: Integers, seed: Integers) -> Integers:
        """The strips of a shard that form a batch. `step` and `shard` broadcast, and may be of NumPy or JAX.

        Returns:
          int32 [..., shard_batch // strip_rows]: strip i consists of the rows from `i * strip_rows` on. Complete
          strips are permuted; a shorter one is the last of the epoch. Padding is given as strips beyond the end of the
          shard.
        """
        full = _divided(self.shard_size(shard), self.strip_rows)[0][..., None]
        strips = self.shard_batch // self.strip_rows
        epoch, step_of_epoch = _divided(step, self.steps_per_epoch)
        offset = (step_of_epoch * strips)[..., None]
        within = np.arange(strips, dtype=np.int32).reshape((1,) * (offset.ndim - 1) + (-1,))
        position = offset + within
        if self.shuffle:
            position = permute(position, full, seed, epoch[..., None], shard[..., None])
        xp = jnp if isinstance(position, Array) else np
        # Position `full` is the shorter strip, if there is one; positions from `shard_strips` on are always padding.
        return xp.minimum(position, self.shard_strips).astype(np.int32)

    def positions(self, step: np.ndarray, shard: np.ndarray, seed: int) -> np.ndarray:
        """The position of each row of a batch in its shard. `step` and `shard` broadcast.

        Returns:
          int32 [..., shard_batch] in `[0, shard_size)`, or `shard_size` for padding.
        """
        strips = self.strips(step, shard, seed)
        rows = strips[..., None] * np.int32(self.strip_rows) + np.arange(self.strip_rows, dtype=np.int32)
        positions: np.ndarray = np.minimum(
            rows.reshape(*strips.shape[:-1], self.shard_batch), self.shard_size(shard)[..., None]
        )
        return positions
