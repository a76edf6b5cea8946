"""The data pipeline: both placements give the same batches on any number of devices."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from models import Rows

import dpreg
from dpreg.data.reader import in_parts, read_block


def mesh(num_devices):
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",))


def batches(dataset):
    """Returns all batches as [steps, shards, b, ...], read as the compiled step reads them."""
    first, count = (np.asarray(part) for part in dataset.shard_ranges)
    steps = []
    for block in dataset:
        parts = []
        for device in range(dataset.mesh.size):
            local = jax.tree.map(
                lambda leaf, d=device: np.take(np.asarray(leaf), d, axis=dataset.device_axis), block.data
            )
            shards = first[device] + np.arange(dataset.slots)
            held, first_step = jax.tree.map(jnp.asarray, local), jnp.int32(block.first_step)
            read = read_block(dataset, held, jnp.asarray(shards), first_step, jnp.int32(block.num_steps), 5)
            stacked = [read.of_slots(k) for k in range(block.num_steps)]
            for k, slot in itertools.product(range(block.num_steps), range(dataset.slots)):
                for name, column in read.of_slot(k, slot).items():
                    np.testing.assert_array_equal(column, stacked[k][name][slot])
            for name, column in read.rows(0).items():
                np.testing.assert_array_equal(column, np.concatenate(stacked[0][name]))
                halves = [read.rows(0, part, 2)[name] for part in range(2)]
                np.testing.assert_array_equal(column, np.concatenate(halves))
            parts.append(jax.tree.map(lambda *leaves, n=count[device]: np.stack(leaves)[:, :n], *stacked))
        steps.append(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *steps)


@pytest.mark.parametrize(("rows", "run", "at_once"), [(3, 1, 128), (37, 2, 128), (37, 2, 1)])
def test_batches_do_not_depend_on_devices_or_placement(rows, run, at_once, monkeypatch):
    monkeypatch.setattr("dpreg.data.reader._STEPS_AT_ONCE", at_once)
    monkeypatch.setattr("dpreg.data.sampler._FEWEST_STRIPS", 2 if run > 1 else 128)
    source = Rows(rows, weighted=True).source()
    reference = None
    for devices, placement in ((1, "device"), (1, "host"), (3, "device"), (8, "host")):
        dataset = dpreg.Dataset(source).shuffle(5).batch(16).repeat(2).shard(mesh(devices), num_shards=8)
        assert dataset.sampler.strip_rows == run
        result = batches(dataset.place(placement, 2).prefetch(2))
        reference = reference or result
        for name, column in result.items():
            np.testing.assert_array_equal(column, reference[name])
    once = slice(len(reference["y"]) // 2)
    real = reference["weight"][once] > 0
    assert sorted(reference["y"][once][real].ravel()) == sorted(source.y[source.weight > 0].ravel())


@pytest.mark.parametrize("num_steps", [1, 4, 5, 10])
def test_a_short_call_computes_little_more_than_its_own_steps(num_steps, monkeypatch):
    monkeypatch.setattr("dpreg.data.reader._STEPS_AT_ONCE", 4)
    computed = []

    def of_steps(steps):
        jax.debug.callback(lambda steps: computed.extend(steps.tolist()), steps)
        return jnp.stack([steps * 3, steps + 1], axis=1)

    found = jax.jit(lambda n: in_parts(of_steps, n, 10))(num_steps)
    jax.effects_barrier()
    expected = np.stack([np.arange(10) * 3, np.arange(10) + 1], axis=1)
    np.testing.assert_array_equal(found[:num_steps], expected[:num_steps])
    assert found.shape == (10, 2)
    assert sorted(set(computed)) == list(range({1: 4, 4: 4, 5: 8, 10: 10}[num_steps]))


def test_each_device_reads_only_its_own_rows():
    asked = []

    class Recorder(dpreg.ArraySource):
        def __getitem__(self, indices):
            asked.append(indices)
            return super().__getitem__(indices)

    source = Recorder(np.arange(80.0), np.arange(80.0) + 1)
    dataset = dpreg.Dataset(source).shuffle(0).batch(16).shard(mesh(4), num_shards=8).place("host", 2)
    list(dataset.blocks(0, 2))
    asked = [set(indices) for indices in asked if len(indices) > 1]
    assert len(asked) == 4
    for device, indices in enumerate(asked):
        assert indices <= set(range(20 * device, 20 * device + 20))


def test_a_step_limit_holds_until_the_next_one_and_copies_no_rows():
    source = dpreg.ArraySource(np.arange(80.0), np.arange(80.0))
    dataset = dpreg.Dataset(source).batch(8).shard(mesh(2), num_shards=8).place("device")
    rows = dataset.data
    limited = dataset.limit_steps(3)
    assert limited.data is rows
    assert [block.num_steps for block in limited] == [3, 3, 3, 1]
    assert limited.shapes == dataset.shapes
    assert [block.num_steps for block in limited.limit_steps(100)] == [block.num_steps for block in dataset] == [10]


def test_auto_keeps_small_rows_on_the_devices_and_streams_large_ones():
    class Large:
        def __len__(self):
            return 10**10

        def __getitem__(self, indices):
            one = np.ones((len(indices), 1), np.float32)
            return {"x": one, "y": one, "weight": one[:, 0]}

    pipeline = dpreg.Dataset(Large()).batch(8).shard(mesh(2), num_shards=8)
    assert pipeline.resolved_placement == "host"
    assert "take 60,000.0 MB of the" in pipeline.placement_reason
    assert next(iter(pipeline)).data["x"].shape[1:] == (2, 4, 1, 1)
    small = dpreg.Dataset(Rows(10).source()).batch(8).shard(mesh(2), num_shards=8)
    assert small.resolved_placement == "device"


def test_the_memory_limit_of_a_container_is_respected(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("64000\n")
    pipeline = dpreg.Dataset(Rows(1000).source()).batch(8).shard(mesh(2), num_shards=8)
    for name, placement in (("none", "device"), ("max", "device"), ("limit", "host")):
        monkeypatch.setattr("dpreg.data.pipeline._CONTAINER_LIMITS", [str(tmp_path / name)])
        assert dataclasses.replace(pipeline).resolved_placement == placement


def test_a_dataset_without_devices_is_refused():
    with pytest.raises(dpreg.InputError, match="shard"):
        next(iter(dpreg.Dataset(Rows(10).source()).batch(8)))


def test_a_permuted_source_has_the_same_rows_in_a_fixed_order():
    source = Rows(100).source()
    shuffled = dpreg.PermutedSource(source)[np.arange(100)]["y"]
    assert not np.array_equal(shuffled, source.y)
    np.testing.assert_array_equal(np.sort(shuffled, 0), np.sort(source.y, 0))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 33])
def test_a_synthetic_row_does_not_depend_on_the_other_rows_of_the_request(width):
    source = dpreg.SyntheticRegressionData(np.linspace(-3, 3, width), 4.2, num_train=5000).train
    whole = source[np.arange(5000)]
    for indices in (np.arange(1), np.arange(17), np.arange(300), np.arange(4999, 0, -3), np.arange(2000) * 7 % 5000):
        for name, column in source[indices].items():
            np.testing.assert_array_equal(column, whole[name][indices])


def test_synthetic_rows_are_a_function_of_seed_and_index():
    data = dpreg.SyntheticRegressionData((2, -3.4), 4.2, num_train=5000, num_val=10)
    rows = data.train[np.arange(5000)]
    picked = np.array([4999, 0, 77, 77])
    for name, column in data.train[picked].items():
        np.testing.assert_array_equal(column, rows[name][picked])
    expected = rows["x"].astype(np.float64) @ [[2], [-3.4]] + 4.2
    noise = rows["y"] - expected
    assert abs(noise.std() - 0.01) < 5e-4
    assert abs(rows["x"].mean()) < 0.05
    assert abs(rows["x"].std() - 1) < 0.03
    assert not np.isin(data.val[np.arange(10)]["y"], rows["y"]).any()
    other = dpreg.SyntheticRegressionData((2, -3.4), 4.2, num_train=5000, seed=1).train[picked]
    assert not np.isin(other["y"], rows["y"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((3, 2)), np.ones(4)), "x and y have 3 and 4 rows"),
        ((np.array([[1.0], [np.nan]]), np.ones(2)), "x has a value that is not finite in row 2"),
        ((np.ones((2, 2, 2)), np.ones(2)), "x has shape"),
        ((np.ones(2), np.ones(2), np.array([1.0, -1.0])), "weight is negative in row 2"),
        ((np.ones((0, 2)), np.ones(0)), "x has no rows"),
    ],
)
def test_bad_arrays_are_refused(arguments, message):
    with pytest.raises(dpreg.InputError, match=message):
        dpreg.ArraySource(*arguments)
