"""The loop: takes blocks through the compiled step and tells the observers."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.data.dataset import PLACEMENTS, Block, Dataset
from dpreg.data.sources import RegressionData
from dpreg.errors import Diverged, InputError
from dpreg.parallel import devices
from dpreg.parallel.step import (
    BACKENDS,
    REDUCTIONS,
    Carried,
    Clock,
    Layout,
    Model,
    Moments,
    TrainState,
    compile_eval_block,
    compile_train_block,
)

# Calls dispatched and not yet finished. Simulated CPU devices deadlock when a program runs far ahead of them.
_MAX_IN_FLIGHT = 8


@dataclasses.dataclass(frozen=True)
class Progress:
    """What an observer is told after some steps.

    Attributes:
      step, num_steps: steps done, steps of the run.
      epoch, max_epochs: epochs done, in parts; epochs of the run.
      train_loss: mean loss per weight over the steps since the last log point; None between log points.
      val_loss, metrics: the mean loss and the metrics on the validation rows; only at the end of an epoch.
      rows_per_second: training speed since the last log point.
    """

    step: int
    num_steps: int
    epoch: float
    max_epochs: int
    train_loss: float | None = None
    val_loss: float | None = None
    metrics: Mapping[str, float] | None = None
    rows_per_second: float | None = None

    @property
    def epoch_ended(self) -> bool:
        """Whether this closes an epoch: validation is done."""
        return self.metrics is not None


Observer = Callable[[Progress], None]


class Trainer:
    """Trains a model on all devices, to the same result on any number of them (D2L section 3.2.3).

    After `fit`, `state` is the trained state; the other attributes say how the run went.

    Args:
      max_epochs: how often every row is used.
      num_devices: devices to use; None takes all there are, but not more than `num_shards`.
      gradient_clip_val: the largest norm of the global gradient; larger ones are scaled to it. 0: no limit.
      num_shards: logical shards, L: a property of the run, which its result depends on (by rounding at least).
      reduction: "pmean", or "ordered" for the same bits on any number of devices.
      backend: "jit" (shard_map) or "pmap": the same results.
      placement: where rows wait for their step: "device", "host" or "auto".
      seed: of the initial parameters, the order of rows and dropout.
      platform: "cpu", "gpu" or "tpu"; None takes JAX's default.
      log_every_steps: steps between log points; 0 for eight an epoch.
      steps_per_block: steps of one compiled call; None chooses by bytes. The result does not depend on it.
      observers: called with a `Progress` after every block, log point and epoch.

    Attributes:
      state: the TrainState, replicated over the devices.
      step: steps done.
      train_loss, val_loss, metrics: of the last epoch.
      seconds: where the time went: "ingest" (rows to the devices), "compile", "train", "eval".

    Raises:
      InputError: for arguments out of range.
    """

    def __init__(
        self,
        max_epochs: int,
        num_devices: int | None = None,
        gradient_clip_val: float = 0.0,
        *,
        num_shards: int = 8,
        reduction: str = "pmean",
        backend: str = "jit",
        placement: str = "auto",
        seed: int = 0,
        platform: str | None = None,
        log_every_steps: int = 0,
        steps_per_block: int | None = None,
        observers: Iterable[Observer] = (),
    ):
        for name, value, allowed in (
            ("reduction", reduction, REDUCTIONS),
            ("backend", backend, BACKENDS),
            ("placement", placement, PLACEMENTS),
        ):
            if value not in allowed:
                raise InputError(f"--{name}={value}: use one of {', '.join(allowed)}")
        if not (math.isfinite(gradient_clip_val) and gradient_clip_val >= 0):
            raise InputError(f"--gradient_clip_val={gradient_clip_val}: use a norm above 0, or 0 for no limit")
        if max_epochs < 1:
            raise InputError(f"--max_epochs={max_epochs}: use 1 or more")
        self.max_epochs, self.gradient_clip_val, self.num_shards = max_epochs, gradient_clip_val, num_shards
        self.reduction, self.backend, self.seed, self.observers = reduction, backend, seed, tuple(observers)
        self.log_every_steps, self.steps_per_block, self.placement = log_every_steps, steps_per_block, placement
        self.mesh: Mesh = devices.data_mesh(num_shards, platform, num_devices)
        self.seconds = dict.fromkeys(("ingest", "compile", "train", "eval"), 0.0)
        self.train_loss = math.nan
        self.val_loss: float | None = None
        self.metrics: dict[str, float] = {}
        self._replicated = NamedSharding(self.mesh, PartitionSpec())

    def fit(self, model: Model, data: RegressionData) -> None:
        """Trains the model for `max_epochs`, validating after each.

        Args:
          model: a `dpreg.Module`, or any flax module with its `loss` and `configure_optimizers`.
          data: the rows; also anything with `train`, `val` and `batch_size`.

        Raises:
          InputError: when the data cannot be cut into the run's shards and batches.
          Diverged: when the loss is no longer finite; `state` is then the last good one.
        """
        self.prepare_data(data)
        self.prepare_model(model)
        for _ in range(self.max_epochs):
            self.fit_epoch()

    def prepare_data(self, data: RegressionData) -> None:
        """Brings the rows to where the steps read them."""
        started = time.perf_counter()
        self.train = self._placed(Dataset(data.train).shuffle(self.seed).batch(data.batch_size).repeat(self.max_epochs))
        self.val = self._placed(Dataset(data.val).batch(data.batch_size)) if data.val else None
        self._carried = Carried(*self.train.carried)
        jax.block_until_ready([dataset.data for dataset in (self.train, self.val) if dataset])
        self.seconds["ingest"] += time.perf_counter() - started

    def _placed(self, dataset: Dataset) -> Dataset:
        return dataset.shard(self.mesh, self.num_shards).place(self.placement, self.steps_per_block).prefetch(2)

    def prepare_model(self, model: Model) -> None:
        """Initialises the state and compiles the steps, ahead of the first."""
        started = time.perf_counter()
        optimizer = model.configure_optimizers()
        if self.gradient_clip_val:
            optimizer = optax.chain(optax.clip_by_global_norm(self.gradient_clip_val), optimizer)
        row = self.train.source[np.zeros(1, np.int32)]["x"]
        variables = dict(model.init(jax.random.key(self.seed), jnp.asarray(row)))
        params, batch_stats = variables.pop("params"), variables.pop("batch_stats", {})
        if variables:
            raise InputError(f"the model has variables {sorted(variables)}: only params and batch_stats can be trained")
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer, batch_stats=batch_stats)
        self.state = jax.device_put(state.replace(step=jnp.int32(0)), self._replicated)
        self.step = 0
        self._train_block = self._compiled(compile_train_block, model, self.train)
        self._eval_block = self._compiled(compile_eval_block, model, self.val) if self.val else None
        self.seconds["compile"] += time.perf_counter() - started

    def _compiled(self, compile_block: Callable[..., Any], model: Model, dataset: Dataset) -> Callable[..., Any]:
        layout = Layout(
            reader=dataset.reader,
            device_axis=dataset.device_axis,
            block_steps=dataset.block_steps,
            slots=dataset.slots,
            num_shards=self.num_shards,
            batch_bytes=dataset.row_bytes * dataset.sampler.shard_batch * dataset.slots,
        )
        example = self.prepare_batch(next(iter(dataset)))
        return compile_block(model, self.state, layout, self.mesh, example, self.reduction, self.backend)

    def prepare_batch(self, block: Block) -> tuple[Any, Carried, np.ndarray]:
        """What the compiled steps take for a block: rows, shards and clock."""
        return block.data, self._carried, Clock(block.first_step, block.num_steps, self.seed).packed()

    def fit_epoch(self) -> None:
        """One pass over the training rows, then validation.

        Raises:
          Diverged: when the loss is no longer finite.
        """
        steps, rows = self.train.sampler.steps_per_epoch, len(self.train.source)
        every = self.log_every_steps or max(1, steps // 8)
        start, logged = self.step, 0
        sums = np.zeros((steps, 2))  # of losses and weights, by step
        began = logged_at = time.perf_counter()
        for block, block_sums in self._in_order(self._train_blocks(start, start + steps)):
            done = block.first_step - start + block.num_steps
            sums[done - block.num_steps : done] = block_sums[: block.num_steps]
            finite = np.isfinite(sums[:done, 0])
            if not finite.all():
                self.step = start + int(finite.argmin())
                raise Diverged(self.step + 1)
            self.step = start + done
            now = time.perf_counter()
            speed = rows / steps * (done - logged) / (now - logged_at)
            self._tell(self.step, rows_per_second=speed)
            for point in range(logged + every, min(done + 1, steps), every):
                self._tell(start + point, train_loss=_mean(sums[logged:point]), rows_per_second=speed)
                logged, logged_at = point, now
        self.seconds["train"] += time.perf_counter() - began
        self.train_loss = _mean(sums)
        self.validate()
        if self.val_loss is not None and not math.isfinite(self.val_loss):
            raise Diverged(self.step)
        self._tell(
            self.step,
            train_loss=_mean(sums[logged:]),
            val_loss=self.val_loss,
            metrics=self.metrics,
            rows_per_second=speed,
        )

    def _train_blocks(self, start: int, stop: int) -> Iterator[tuple[Block, Any]]:
        for block in self.train.blocks(start, stop):
            self.state, sums = self._train_block(self.state, *self.prepare_batch(block))
            yield block._replace(data=None), sums

    def validate(self) -> None:
        """Sets `val_loss` and `metrics`: exact weighted means over all validation rows, whatever their batches."""
        if self.val is None or self._eval_block is None:
            self.val_loss, self.metrics = None, {}
            return
        started = time.perf_counter()
        blocks = ((b, self._eval_block(self.state, *self.prepare_batch(b))) for b in self.val)
        self.val_loss, self.metrics = _metrics([moments for _, moments in self._in_order(blocks)])
        self.seconds["eval"] += time.perf_counter() - started

    @staticmethod
    def _in_order(dispatched: Iterable[tuple[Block, Any]]) -> Iterator[tuple[Block, Any]]:
        """Results on the host, in order, while a bounded number of later calls is under way."""
        under_way: collections.deque[tuple[Block, Any]] = collections.deque()
        for call in dispatched:
            under_way.append(call)
            if len(under_way) > _MAX_IN_FLIGHT:
                block, result = under_way.popleft()
                yield block, jax.device_get(result)
        for block, result in under_way:
            yield block, jax.device_get(result)

    def _tell(self, step: int, **values: Any) -> None:
        steps = self.train.sampler.steps_per_epoch
        progress = Progress(step, self.train.num_steps, step / steps, self.max_epochs, **values)
        for observer in self.observers:
            observer(progress)


def _mean(sums: np.ndarray) -> float:
    """The mean loss per weight of steps, from their [steps, 2] sums; 0 where nothing has a weight."""
    loss, weight = sums.sum(axis=0)
    return float(loss / weight) if weight > 0 else 0.0


def _metrics(blocks: list[Moments]) -> tuple[float, dict[str, float]]:
    """(mean loss, {"rmse", "mae", "r2"}) from the moments of all batches, added in float64 in one fixed order.

    The spread of all targets is put together from that within the batches and that of their means (Chan,
    Golub and LeVeque 1983). With several targets rmse and mae are over all values, r2 is the targets' mean.
    Without spread there is no r2.
    """
    moments: Any = Moments(
        *(
            np.concatenate([leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]).astype(np.float64)  # type: ignore[arg-type]
            for leaves in zip(*blocks, strict=True)
        )
    )
    weight = moments.weight.sum()
    if weight == 0:
        return 0.0, {}
    squared = moments.squared_error.sum(axis=0)
    center = moments.weight @ moments.mean / weight
    spread = moments.spread.sum(axis=0) + moments.weight @ np.square(moments.mean - center)
    metrics = {
        "rmse": math.sqrt(squared.mean() / weight),
        "mae": float(moments.absolute_error.sum(axis=0).mean() / weight),
    }
    if (spread > 0).all():
        metrics["r2"] = float((1 - squared / spread).mean())
    return float(moments.loss.sum() / weight), metrics
