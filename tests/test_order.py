"""The order of rows: each row once per epoch, positions uniformly permuted, and NumPy and JAX agree."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import dpreg
from dpreg.data import sampler
from dpreg.data.sampler import Sampler, keyed_hash, permute
from dpreg.errors import InputError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33, 64, 65, 1000, 4097])
def test_permute_is_a_bijection_and_the_same_in_numpy_and_jax(size):
    positions = np.arange(size + 3)
    permuted = permute(positions, size, 5, 2, 3)
    assert sorted(permuted[:size]) == list(range(size))
    assert list(permuted[size:]) == [size, size + 1, size + 2]
    np.testing.assert_array_equal(permute(jnp.asarray(positions), size, 5, 2, 3), permuted)
    assert permute(0, size, 5, 2, 3) == permuted[0]


def test_permute_accepts_positions_in_any_memory_layout():
    position = np.arange(20_000, dtype=np.int32).reshape(200, 100)
    turned = permute(np.asfortranarray(position), np.int32(20_000), 1)
    np.testing.assert_array_equal(turned, permute(position, np.int32(20_000), 1))


def test_permute_depends_on_every_part_of_the_key():
    orders = [permute(np.arange(50), 50, *key) for key in itertools.product(range(3), repeat=3)]
    assert len({order.tobytes() for order in orders}) == 27


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_few_rows_are_equally_frequent(size):
    seeds = 50_000
    orders = permute(np.arange(size)[None], size, np.arange(seeds)[:, None], 1, 0)
    _, counts = np.unique(orders @ size ** np.arange(size), return_counts=True)
    orders_there_are = math.factorial(size)
    assert len(counts) == orders_there_are
    expected = seeds / orders_there_are
    freedom = orders_there_are - 1
    chi_square = np.square(counts - expected).sum() / expected
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # Five standard deviations.


@pytest.mark.parametrize("size", [7, 13, 33, 100])
def test_each_position_and_pair_of_positions_is_uniform(size):
    seeds = 200 * size
    orders = permute(np.arange(size)[None], size, np.arange(seeds)[:, None], 0, 3)
    counts = np.stack([np.bincount(column, minlength=size) for column in orders.T])
    freedom = (size - 1) ** 2
    assert np.square(counts - 200).sum() / 200 < freedom + 5 * math.sqrt(2 * freedom)
    for a, b in ((0, 1), (0, size - 1), (2, 5)):
        pairs = np.bincount(orders[:, a] * size + orders[:, b], minlength=size * size).reshape(size, size)
        pairs = pairs[~np.eye(size, dtype=bool)]
        expected = seeds / len(pairs)
        freedom = len(pairs) - 1
        assert np.square(pairs - expected).sum() / expected < freedom + 5 * math.sqrt(2 * freedom)


def test_keyed_hash_is_uniform():
    share = (keyed_hash(np.arange(100_000), 1) < np.uint32(0.1 * 2**32)).mean()
    assert abs(share - 0.1) < 5 * math.sqrt(0.09 / 100_000)


@pytest.mark.parametrize(("shards", "per_shard"), [(1, 1), (1, 8), (3, 2), (4, 1), (8, 4)])
def test_every_row_is_used_exactly_once_an_epoch(shards, per_shard):
    for rows in range(1, 51):
        sampler = Sampler(rows, shards, shards * per_shard)
        assert sum(int(sampler.shard_size(s)) for s in range(shards)) == rows
        steps = np.arange(2 * sampler.steps_per_epoch)
        for epoch in (0, 1):
            used = []
            for shard in range(shards):
                size = int(sampler.shard_size(shard))
                at = sampler.positions(
                    steps[sampler.steps_per_epoch * epoch :][: sampler.steps_per_epoch], np.array(shard), 7
                )
                used += (sampler.shard_start(shard) + at[at < size]).tolist()
            assert sorted(used) == list(range(rows)), (rows, epoch)


@pytest.mark.parametrize(
    ("shards", "batch", "strip"), [(1, 256, 16), (2, 64, 8), (2, 24, 2), (4, 28, 1), (8, 64, 2), (3, 60, 4)]
)
def test_rows_stay_together_in_strips_and_each_epoch_permutes_the_strips(shards, batch, strip):
    for rows in range(2100, 2117):
        sampler = Sampler(rows, shards, batch)
        assert sampler.strip_rows == strip
        steps = np.arange(3 * sampler.steps_per_epoch)
        for shard in range(shards):
            size = int(sampler.shard_size(shard))
            at = sampler.positions(steps, np.array(shard), 7)
            epochs = [epoch[epoch < size] for epoch in at.reshape(3, -1)]
            assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
            full = size // strip * strip
            firsts = np.array([epoch[:full].reshape(-1, strip) for epoch in epochs])
            assert (firsts[:, :, :1] + np.arange(strip) == firsts).all()
            assert (firsts[:, :, 0] % strip == 0).all()
            assert all((epoch[full:] == np.arange(full, size)).all() for epoch in epochs)
            assert len({epoch.tobytes() for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("rows", "shards", "batch", "strip"),
    [(1000, 8, 32, 1), (20_000, 8, 32, 4), (100_000, 8, 1024, 32), (40_000, 8, 4096, 32), (10**9, 1, 32, 4)],
)
def test_strips_are_short_compared_with_a_shard_and_a_batch(rows, shards, batch, strip):
    assert Sampler(rows, shards, batch).strip_rows == strip


@pytest.mark.parametrize("size", [2**31, 2**31 - 1, 2**16 + 1, 2**20, 999_999])
def test_permute_stays_in_range_and_is_injective_at_any_size(size):
    positions = np.unique(np.random.default_rng(0).integers(0, size, 50_000)).astype(np.uint32)
    permuted = permute(positions, size, 1).astype(np.int64)
    assert len(np.unique(permuted)) == len(positions)
    assert permuted.min() >= 0
    assert permuted.max() < size
    np.testing.assert_array_equal(permute(jnp.asarray(positions), np.uint32(size), 1), permuted)


def test_a_hash_maps_uniformly_to_numbers_below_any_bound():
    words = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    for size in (1, 2, 3, 1000, 2**15 + 1, 2**16):
        exact = (words.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)
        np.testing.assert_array_equal(sampler._scaled(words, np.uint32(size)), exact)


def test_padding_comes_last_and_shards_without_rows_are_all_padding():
    sampler = Sampler(11, 4, 16)
    assert sampler.positions(np.array(0), np.array(3), 0).tolist()[2:] == [2, 2]
    assert sampler.positions(np.array(0), np.array(5), 0).tolist() == [0, 0, 0, 0]


def test_without_shuffle_rows_keep_their_order():
    sampler = Sampler(10, 2, 4, shuffle=False)
    assert [sampler.positions(np.array(s), np.array(1), 0).tolist() for s in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("batch", "near"), [(30, "24 or 32"), (3, "8"), (9, "8 or 16")])
def test_a_batch_that_shards_do_not_divide_is_refused_with_the_nearest_that_work(batch, near):
    with pytest.raises(dpreg.InputError, match=f"^batch_size={batch}: .* use batch_size={near},"):
        Sampler(100, 8, batch)


def test_more_rows_than_int32_counts_are_refused():
    with pytest.raises(InputError, match="too many for so few shards; use more"):
        Sampler(2**31 - 1, 1, 3072)
    sampler = Sampler(2**31 - 4096, 1, 1024)
    last = sampler.positions(np.int32(sampler.steps_per_epoch - 1), np.int32(0), seed=0)
    assert last.min() >= 0
    assert (last < sampler.num_rows).sum() == (sampler.num_rows - 1) % 1024 + 1
