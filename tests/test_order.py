"""Order is arithmetic: every row once an epoch, positions uniformly permuted, NumPy and JAX alike."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

import dpreg
from dpreg.data.order import Sampler, keyed_hash, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33, 64, 65, 1000, 4097])
def test_permute_is_a_bijection_and_the_same_in_numpy_and_jax(size):
    positions = np.arange(size + 3)
    there = permute(positions, size, 5, 2, 3)
    assert sorted(there[:size]) == list(range(size))
    assert list(there[size:]) == [size, size + 1, size + 2]
    np.testing.assert_array_equal(permute(jnp.asarray(positions), size, 5, 2, 3), there)
    assert permute(0, size, 5, 2, 3) == there[0]


def test_permute_depends_on_every_part_of_the_key():
    orders = [permute(np.arange(50), 50, *key) for key in itertools.product(range(3), repeat=3)]
    assert len({order.tobytes() for order in orders}) == 27


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_rows_are_equally_frequent(size):
    seeds = 50_000
    orders = permute(np.arange(size)[None], size, np.arange(seeds)[:, None], 1, 0)
    _, counts = np.unique(orders @ size ** np.arange(size), return_counts=True)
    orders_there_are = math.factorial(size)
    assert len(counts) == orders_there_are
    expected = seeds / orders_there_are
    freedom = orders_there_are - 1
    chi_square = np.square(counts - expected).sum() / expected
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


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


def test_padding_comes_last_and_empty_slots_are_all_padding():
    sampler = Sampler(11, 4, 16)
    assert sampler.positions(np.array(0), np.array(3), 0).tolist()[2:] == [2, 2]
    assert sampler.positions(np.array(0), np.array(5), 0).tolist() == [0, 0, 0, 0]


def test_without_shuffle_rows_keep_their_order():
    sampler = Sampler(10, 2, 4, shuffle=False)
    assert [sampler.positions(np.array(s), np.array(1), 0).tolist() for s in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("batch", "near"), [(30, "24 or 32"), (3, "8"), (9, "8 or 16")])
def test_a_batch_that_shards_do_not_divide_is_refused_with_the_nearest_that_work(batch, near):
    with pytest.raises(dpreg.InputError, match=f"--batch_size={batch} .* use --batch_size={near},"):
        Sampler(100, 8, batch)
