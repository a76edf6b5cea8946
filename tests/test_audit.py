"""The audit: each epoch must use each row exactly once; otherwise the run ends with an error."""

import numpy as np
import pytest
from models import Net, Rows
from optax import sgd

import dpreg
from dpreg.data.sampler import Sampler, row_tag
from dpreg.errors import AuditFailed
from dpreg.train.callback import FunctionCallback


def tag(index):
    """Returns the tag of a row, computed with Python integers."""

    def mix(word, key):
        word = (word ^ key) * 0x9E3779B1 % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    return mix(index, mix(0x7A6, 1)) | 1


def audits_of(trainer, data):
    audits = []
    trainer.add_callback(FunctionCallback(lambda p: audits.append(p.audit) if p.epoch_ended else None))
    trainer.fit(dpreg.LinearRegressionScratch(3, 0.01), data)
    return audits


def test_tags_are_odd_and_differ_between_rows():
    tags = row_tag(np.arange(100_000))
    assert tags[:50].tolist() == [tag(i) for i in range(50)]
    assert (tags % 2 == 1).all()
    assert len(np.unique(tags)) > 99_990  # Among 2**31 tags a few collide (birthday problem).


LAYOUTS = ((1, "device", "jit"), (1, "host", "pmap"), (3, "device", "pmap"), (8, "host", "jit"))


@pytest.mark.parametrize(("rows", "layouts"), [(3, LAYOUTS[2:]), (37, LAYOUTS), (160, LAYOUTS[::3])])
def test_an_epoch_uses_each_row_once_on_any_number_of_devices(rows, layouts):
    due = [rows, sum(map(tag, range(rows))) % 2**32]
    data = Rows(rows, weighted=True).data(16, num_val=5)
    for devices, placement, backend in layouts:
        trainer = dpreg.Trainer(
            3, devices, placement=placement, backend=backend, steps_per_block=2, reduction="ordered"
        )
        assert [audit.tolist() for audit in audits_of(trainer, data)] == [due] * 3


def test_a_run_without_an_audit_reports_none():
    assert audits_of(dpreg.Trainer(3, audit=False), Rows(37).data(16)) == [None] * 3


def repeated(self, step, shard, seed):
    """Samples like dpreg (strips have one row here), but replaces the last row of each shard by its first row."""
    strips, size = Sampler.true_strips(self, step, shard, seed), self.shard_size(shard)[..., None]
    return strips * (strips != size - 1).astype(np.int32)


def dropped(self, step, shard, seed):
    """Samples like dpreg, but drops the last row of each shard."""
    strips, size = Sampler.true_strips(self, step, shard, seed), self.shard_size(shard)[..., None]
    return strips + (strips == size - 1).astype(np.int32)


@pytest.mark.parametrize("placement", ["device", "host"])
@pytest.mark.parametrize("fault", [repeated, dropped])
def test_a_row_that_is_repeated_or_dropped_ends_the_run(monkeypatch, fault, placement):
    monkeypatch.setattr(Sampler, "true_strips", Sampler.strips, raising=False)
    monkeypatch.setattr(Sampler, "strips", fault)
    trainer = dpreg.Trainer(2, 4, placement=placement)
    with pytest.raises(AuditFailed, match="the epoch that ends at step 10 did not use every row once") as caught:
        audits_of(trainer, Rows(153).data(16))
    assert "\n" not in str(caught.value)
    assert f" {153 - 8 * (fault is dropped)} rows with tags" in str(caught.value)


def test_the_audit_does_not_count_steps_that_were_not_taken():
    data = Rows(160).data(16)
    data.train.y[100] = np.float32(1e38)
    trainer = dpreg.Trainer(5)
    with pytest.raises(dpreg.Diverged):
        trainer.fit(Net(sgd(0.01)), data)
    assert 0 < trainer.step < 10
    assert trainer.loop.audit.used[0] == 16 * trainer.step
