"""The loop: takes blocks through the compiled step and tells the observers."""

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.config import Columns, Config, check_settings
from dpreg.data.dataset import PRECISIONS, Block, Dataset
from dpreg.data.order import Sampler
from dpreg.data.schema import Number, Schema
from dpreg.data.sources import RegressionData, describe_rows, first_outside
from dpreg.errors import AuditFailed, Diverged, InputError, Preempted
from dpreg.interrupts import deferred
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.losses import loss_of
from dpreg.models.mlp import LinearRegression
from dpreg.observer import Observer, Progress
from dpreg.parallel import devices, processes
from dpreg.parallel.audit import Audit
from dpreg.parallel.checks import comes_with_dpreg, normalises_over_batch, require_model, traced
from dpreg.parallel.compile import compile_eval_block, compile_train_block
from dpreg.parallel.digest import digest_training, digest_values
from dpreg.parallel.donated import DonatedState
from dpreg.parallel.hooks import OF_DATA, OF_TRAINER, require_no_hooks
from dpreg.parallel.layout import Carried, Clock, example_of, layout_of
from dpreg.parallel.state import Model, TrainState, initial_state
from dpreg.predictor import ROWS_IN_PARTS, Predictor, errors_of, metrics_of
from dpreg.spelling import spell

# A second or so of a CPU, and of the slowest chips: signals, saves and progress wait for the calls in flight. On a chip
# a shard that is taken alone takes at least as long as so many operations would.
_OPERATIONS_OF_CALL, _OPERATIONS_OF_CALL_OF_CHIP, _LEAST_OPERATIONS_OF_SHARD = 1 << 36, 1 << 41, 1 << 26
_FEW_ROWS = 16  # fewer make poor batch statistics
_MOST_STEPS = 2**31 - 1  # an int32 on the devices
_SETTINGS = (
    *("max_epochs", "num_shards", "precision", "reduction", "backend", "placement", "seed", "steps_per_block"),
    *("gradient_clip_val", "accumulate_steps", "patience", "log_every_steps"),
)


@dataclasses.dataclass(frozen=True)
class Best:
    """The epoch of least validation loss so far, on the host.

    Attributes:
      val_loss: infinite before the first.
      step: at its end.
      variables: {"params", "batch_stats"} as NumPy arrays.
    """

    val_loss: float
    step: int
    variables: Mapping[str, Any]


class Saver(Protocol):
    """What the trainer asks of that which saves it, see `dpreg.observers.checkpoint`."""

    every_steps: int  # save when the step is a multiple of it; 0 for no such rule
    preempted: str  # "stop" or "interrupt" where the run is to end once it is saved, else ""

    def due(self) -> bool:
        """Whether to save as soon as the steps in flight are done."""

    def save(self, trainer: "Trainer") -> None:
        """Saves the trainer, no step of which is in flight."""


class Trainer:
    """Trains a model on all devices, to the same result on any number of them (D2L section 3.2.3).

    After `fit`, `state` is the trained state; the other attributes say how the run went.

    Args:
      max_epochs: how often every row is used.
      num_devices: devices to use; None takes all there are, but not more than `num_shards`.
      gradient_clip_val: the largest norm of the global gradient; larger ones are scaled to it. 0: no limit.
      mesh: the devices, with the single axis "data", where they are not to be found by `num_devices` and `platform`.
      num_shards: logical shards, L: a property of the run, which its result depends on (by rounding at least).
      precision: "float32"; "bfloat16" for features and, where a chip is faster so, the factors of products, with sums
        in float32; or "float64", of rows that are float64, which switches all of JAX in this process to
        `jax_enable_x64`.
      reduction: "pmean", or "ordered" for the same bits on any number of devices.
      backend: "jit" (shard_map) or "pmap": the same results.
      placement: where rows wait for their step: "device", "host" or "auto".
      seed: of the initial parameters, the order of rows and dropout.
      platform: "cpu", "gpu" or "tpu"; None takes JAX's default.
      log_every_steps: steps between log points; 0 for eight an epoch.
      steps_per_block: steps of one compiled call; None chooses by bytes. The result does not depend on it.
      accumulate_steps: batches whose gradients are added up for one step: the same step as with a batch that many
        times as large, with the activations of one. (BatchNorm and Dropout see them one by one.)
      patience: epochs in a row without a lower validation loss after which training ends; the parameters of the best
        epoch are taken. 0: no such end.
      audit: whether to count the rows that the steps used, and to check each epoch that it used every row once.
      observers: called with a `Progress` after every block, log point and epoch.

    Attributes:
      dtype: of targets, weights and sums, and of parameters that models have as float32: float32, or float64.
      state: a copy of the TrainState, replicated over the devices: it stays as it is while training goes on. A state
        that is assigned is copied as well: its step, parameters, optimizer state and batch statistics are taken, while
        the model and the optimizer stay the trainer's.
      step, steps_trained: steps done and told of; those of them that this trainer did, not one that it goes on from.
      steps_of_call: how many steps one compiled call takes at most, about a second of them; from the host 2 at least.
      audit: the rows used in this epoch.
      best: with `patience`, the best epoch so far.
      epoch_sums: [steps of an epoch, 3] weighted loss sum, weight sum and norm of the gradient of each step of this
        epoch so far.
      checkpoints: what saves the run while it trains; None for nothing.
      pauses: steps before which none is in flight: where an observer begins or ends what it does to them.
      heartbeat: called whenever results have come from the devices, or a checkpoint has been taken.
      train_loss, val_loss, metrics: of the last epoch.
      seconds: where the time went: "ingest" (rows to the devices), "compile", "train", "eval".

    Raises:
      InputError: for arguments out of range.

    >>> import dpreg
    >>> data = dpreg.SyntheticRegressionData(w=[2, -3.4], b=4.2)
    >>> trainer = dpreg.Trainer(max_epochs=10)
    >>> trainer.fit(dpreg.LinearRegressionScratch(2, lr=0.1), data)
    >>> trainer.predict([[1.0, 1.0], [0.0, 0.0]]).round(1)
    array([[2.8],
           [4.2]])
    """

    def __init__(
        self,
        max_epochs: int,
        num_devices: int | None = None,
        gradient_clip_val: float = Config.gradient_clip_val,
        *,
        mesh: Mesh | None = None,
        num_shards: int = Config.num_shards,
        precision: str = Config.precision,
        reduction: str = Config.reduction,
        backend: str = Config.backend,
        placement: str = Config.placement,
        seed: int = Config.seed,
        platform: str | None = None,
        log_every_steps: int = Config.log_every_steps,
        steps_per_block: int | None = None,
        accumulate_steps: int = Config.accumulate_steps,
        patience: int = Config.patience,
        audit: bool = Config.audit,
        observers: Iterable[Observer] = (),
    ):
        check_settings(
            max_epochs=max_epochs,
            gradient_clip_val=gradient_clip_val,
            precision=precision,
            reduction=reduction,
            backend=backend,
            placement=placement,
            seed=seed,
            log_every_steps=log_every_steps,
            accumulate_steps=accumulate_steps,
            patience=patience,
            audit=audit,
        )
        self.max_epochs, self.gradient_clip_val, self.num_shards = max_epochs, gradient_clip_val, num_shards
        self.reduction, self.backend, self.seed, self.observers = reduction, backend, seed, tuple(observers)
        self.log_every_steps, self.steps_per_block, self.placement = log_every_steps, steps_per_block, placement
        self.precision, self.dtype = precision, np.dtype(PRECISIONS[precision][1])
        devices.enable(self.dtype)
        self.mesh = mesh or devices.data_mesh(num_shards, platform, num_devices)
        self.seconds = dict.fromkeys(("ingest", "compile", "train", "eval"), 0.0)
        self.train_loss = math.nan
        self.val_loss: float | None = None
        self.metrics: dict[str, float] = {}
        self.steps_trained, self._speed = 0, 0.0
        self.checkpoints: Saver | None = None
        self.pauses: tuple[int, ...] = ()
        self.best = Best(math.inf, 0, {})
        self._predictor: Predictor | None = None
        self._held: DonatedState | None = None
        self._training, self._whole = False, True  # in `fit_epochs`; whether all of the state was reported
        self.heartbeat: Callable[[], None] = lambda: None
        self.audit, self.accumulate_steps, self.patience = Audit(audit), accumulate_steps, patience

    def fit(self, model: Model, data: RegressionData) -> None:
        """Trains the model for `max_epochs`, validating after each.

        Args:
          model: a `dpreg.Module`, or any flax module with its `loss` and `configure_optimizers`.
          data: the rows; also anything with `train`, `val` and `batch_size`.

        Raises:
          InputError: when the data cannot be cut into the run's shards and batches, or a target is none that the loss
            is defined for.
          Diverged: when the loss is no longer finite; `state` is then the last good one.
          KeyboardInterrupt: as `fit_epochs`, which then goes on with this fit.
        """
        self.prepare_data(data)
        self.prepare_model(model)
        self.fit_epochs()
        self.take_best()

    @property
    def done(self) -> bool:
        """Whether all epochs are trained, or no more are worth it."""
        in_vain = self.step - self.best.step
        out_of_patience = self.patience and in_vain >= self.patience * self.train.sampler.steps_per_epoch
        return self.step >= self.train.num_steps or bool(out_of_patience)

    def take_best(self) -> bool:
        """With `patience`, goes back to the parameters of the best epoch; whether that is not the last one."""
        if not (self.patience and 0 < self.best.step < self.step):
            return False
        self._trained.replace(**self.best.variables)
        self.validate()
        return True

    @processes.together("laying out rows")
    def prepare_data(self, data: RegressionData) -> None:
        """Brings the rows to where the steps read them. A state that was trained on other rows is given up."""
        require_no_hooks(self, OF_TRAINER)
        require_no_hooks(data, OF_DATA)
        self._held = None
        started = time.perf_counter()
        self.lay_out(data)
        self._carried = Carried(*self.train.carried)
        jax.block_until_ready([dataset.data for dataset in (self.train, self.val) if dataset])
        self._tags = self.train.tags if self.audit.on else None  # of all rows: once, before the first step
        self.seconds["ingest"] += time.perf_counter() - started

    def lay_out(self, data: RegressionData) -> None:
        """Decides where rows are to be, and moves none but those in parts, see `RegressionData.from_parts`."""
        processes.require_alike("fit", ROWS_IN_PARTS, functools.partial(self._describe_run, data))
        self._schema: Schema | None = getattr(data, "schema", None)
        self._columns: Columns | None = getattr(data, "columns", None)
        self.seconds, self.steps_trained = dict.fromkeys(self.seconds, 0.0), 0
        if self.dtype == np.float64 and data.train[np.zeros(1, np.int32)]["x"].dtype != np.float64:
            precision = spell("precision", self.precision)
            logging.warning("%s: the rows are float32, and have its digits; give them as float64", precision)
        Sampler(len(data.train), self.num_shards, data.batch_size)  # raises: shards divide each batch, not their sum
        batch_size = data.batch_size * self.accumulate_steps
        train = Dataset(data.train).shuffle(self.seed).batch(batch_size).repeat(self.max_epochs, across=not data.val)
        self.train = self._placed(train.tag(self.audit.on))
        if self.train.num_steps > _MOST_STEPS:
            most = _MOST_STEPS // self.train.sampler.steps_per_epoch
            raise InputError(
                f"{spell('max_epochs', self.max_epochs)}: that is {self.train.num_steps:,} steps, and they are counted "
                f"up to {_MOST_STEPS:,}; use {spell('max_epochs', most)} or less"
            )
        if self.patience and not data.val:
            raise InputError(
                f"{spell('patience', self.patience)}: there are no rows held out to measure by; hold some out"
            )
        self.val = self._placed(Dataset(data.val).batch(data.batch_size)) if data.val else None

    def _describe_run(self, data: RegressionData) -> dict[str, tuple[str, str]]:
        """What all processes have to give alike to train together, besides the model."""
        settings = {name: str(getattr(self, name)) for name in _SETTINGS} | {"audit": str(self.audit.on)}
        settings |= {"batch_size": str(data.batch_size), "devices": devices.describe(self.mesh.devices.flat)}
        return {
            "training rows": describe_rows(data.train),
            "validation rows": describe_rows(data.val) if data.val else ("none", ""),
            **{name: (value, "") for name, value in settings.items()},
        }

    def _placed(self, dataset: Dataset) -> Dataset:
        sharded = dataset.cast(self.precision).shard(self.mesh, self.num_shards).prefetch(2)
        placed = sharded.place(self.placement, self.steps_per_block)
        if jax.process_count() > 1:
            everywhere = {*processes.exchange(placed.resolved_placement)}
            if len(everywhere) > 1:  # one has less memory than others, and all have to be alike
                return sharded.place("host", self.steps_per_block)
        return placed

    @processes.together("compiling")
    def prepare_model(self, model: Model) -> None:
        """Initialises the state and compiles the steps, ahead of the first."""
        started = time.perf_counter()
        require_model(model)
        self.check_targets(model)
        state = self.initial_state(model)
        rows_together = self.train.sampler.shard_batch // self.accumulate_steps
        num_inputs = self.train.source[np.zeros(1, np.int32)]["x"].shape[1]
        if state.batch_stats and rows_together < _FEW_ROWS and not normalises_over_batch(model, state, num_inputs):
            logging.warning(
                "batch statistics of %d rows: BatchNorm sees the rows of one shard, %s / %s; give it %d or more, or "
                "all rows of the batch with %s",
                *(rows_together, spell("batch_size"), spell("num_shards"), _FEW_ROWS, spell("sync_batch_norm", True)),
            )
        self._model, self._predictor = model, None
        self._computation: str | None = None
        self._optimizer_start = "" if comes_with_dpreg(model) else digest_values(state.opt_state)
        self.bound_calls(state)
        held = DonatedState(state, self.mesh)
        with traced(model):
            self._train_block, self._eval_block = self.compile_train(model, held.current), None
        self._to_all: Callable[[Any], Any] = lambda used: np.zeros(used.shape, used.dtype)
        if self.audit.on:
            shape = self.mesh.size, self.train.block_steps, 2
            self._to_all = devices.compile_gather(self.mesh, shape, np.uint32)
        if self.val:
            with traced(model):
                self._eval_block = compile_eval_block(
                    model,
                    held.variables,
                    layout_of(self.val),
                    self.mesh,
                    self._example(self.val),
                    errors_of(model, self._schema),
                    self.reduction,
                    self.backend,
                )
        self._held = held
        self._go_to(0)
        self.seconds["compile"] += time.perf_counter() - started

    def bound_calls(self, state: TrainState) -> None:
        """Decides how many steps a call takes at most, of a model with such a state: also of rows from the host."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        alone = self.train.slots if self.reduction == "ordered" else 0
        operations = 6 * parameters * self.train.global_batch
        self.steps_of_call = most = _steps_of_call(self.mesh.devices.flat[0].platform, operations, alone)

        def bounded(dataset: Dataset) -> Dataset:
            if dataset.resolved_placement == "device" or dataset.block_steps <= most:
                return dataset
            return dataset.place(dataset.placement, most)

        self.train, self.val = bounded(self.train), self.val and bounded(self.val)

    def check_targets(self, model: Model) -> None:
        """Raises InputError for a target that the model's loss is not defined for."""
        loss = loss_of(model)
        for dataset in (self.train, self.val):
            if dataset is not None and loss.domain and (wrong := first_outside(dataset.source, loss.allowed)):
                raise loss.refusal(*wrong)

    def initial_state(self, model: Model) -> TrainState:
        """The state before the first step, a function of model and seed.

        On a table, dpreg's linear models start at 0 where they name no `sigma`: in a direction that the rows say
        nothing about, such as the difference of two equal columns, no step would change the initial draw.

        Raises:
          InputError: when a constant column of a table is not used, and the model has no intercept in its place.
        """
        row, from_zero = self.train.source[np.zeros(1, np.int32)]["x"], False
        if self._schema is not None and isinstance(model, (LinearRegressionScratch, LinearRegression)):
            from_zero = model.sigma is None
            for column in () if model.intercept else self._schema.inputs:
                if isinstance(column, Number) and column.constant and column.mean != 0:
                    raise InputError(
                        f"column {column.name!r} has one value, {column.mean:g}, which an intercept stands for, and "
                        "the model has none; read the table with Columns(intercept=False), or leave the column out"
                    )
        return initial_state(model, row, self.seed, self.dtype, self.gradient_clip_val, from_zero)

    def _example(self, dataset: Dataset) -> tuple[Any, ...]:
        """What to compile by: pmap takes shapes for those of this process alone."""
        return example_of(dataset) if self.backend == "jit" else self.prepare_batch(next(iter(dataset)))

    def compile_train(self, model: Model, state: TrainState) -> Callable[..., Any]:
        """The compiled training steps; with the backend "jit" also of a state without values, before any rows move."""
        return compile_train_block(
            model,
            state,
            layout_of(self.train),
            self.mesh,
            self._example(self.train),
            self.accumulate_steps,
            self.reduction,
            self.backend,
        )

    @property
    def state(self) -> TrainState:
        """A copy of the state, see `Trainer`.

        Raises:
          InputError: where nothing is trained yet, or a second Ctrl-C ended a call of the steps.
        """
        return self._trained.copy()

    @state.setter
    def state(self, state: TrainState) -> None:
        """Takes a copy of another state's values, and goes on from its step."""
        steps, step = self.train.sampler.steps_per_epoch, int(state.step)
        if self._training:
            self.require_rest()
        moves = step != self.step or not (self._whole or self._training)
        if moves and (step % steps or self._training):
            raise InputError(
                f"trainer.state: it is after step {step:,}, and the trainer goes on from step {self.step:,} or the end "
                f"of an epoch of {steps:,} steps; give state.replace(step=0) to begin with its parameters"
            )
        self._trained.take(state)
        if moves:
            self._go_to(step)

    def _go_to(self, step: int) -> None:
        """Goes to the end of an epoch, whose state has been taken."""
        self.step, self._whole = step, True
        self.epoch_sums = np.zeros((self.train.sampler.steps_per_epoch, 3))
        self.audit.begin()
        self.best = Best(math.inf, step, jax.device_get(self.variables) if self.patience else {})

    @property
    def _trained(self) -> DonatedState:
        if self._held is None:
            raise InputError("there is no trained state; call fit first, or prepare_data and prepare_model")
        return self._held

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return self._model

    @property
    def computation(self) -> str | None:
        """What the model computes, see `dpreg.parallel.digest.digest_training`."""
        if self._computation is None:
            row, shapes = self.train.source[np.zeros(1, np.int32)], self._trained.shapes
            widths = row["x"].shape[1], row["y"].shape[1]
            self._computation = digest_training(self._model, shapes, *widths, self._optimizer_start)
        return self._computation

    @property
    def variables(self) -> dict[str, Any]:
        """A copy of what the model predicts with: "params" and "batch_stats"."""
        return self._trained.copy_variables()

    @property
    def exchange_bytes(self) -> int:
        """Bytes of what a step sums over devices: gradients, batch statistics and their rows, loss and weight.

        Ordered, those of each shard. What a BatchNorm over the batch exchanges in its layer is not among them.
        """
        shapes = self._trained.shapes
        leaves = jax.tree.leaves((shapes.params, shapes.batch_stats))
        sums = sum(leaf.size for leaf in leaves) + (3 if shapes.batch_stats else 2)
        return int(sums) * self.dtype.itemsize * (self.num_shards if self.reduction == "ordered" else 1)

    def prepare_batch(self, block: Block) -> tuple[Any, Carried, np.ndarray]:
        """What the compiled steps take for a block: rows, shards and clock."""
        return block.data, self._carried, Clock(block.first_step, block.num_steps, self.seed).packed()

    def resume(
        self, state: TrainState, epoch_sums: np.ndarray, rows_used: np.ndarray | None = None, best: Best | None = None
    ) -> None:
        """Goes on from a state: its step, the sums of the steps of its epoch so far, the rows they used, the best.

        Raises:
          Diverged: when it is of the end of an epoch, and the loss on validation rows is not finite.
        """
        self._trained.take(state)
        self._go_to(int(state.step))
        self.best, self.epoch_sums = best or self.best, epoch_sums.astype(np.float64)
        self.audit.begin(rows_used)
        if self.step and self.step % self.train.sampler.steps_per_epoch == 0:
            self.train_loss = _mean(self.epoch_sums)
            self._validate_finitely()

    def accept(self, w: np.ndarray, b: np.ndarray, train_loss: float) -> None:
        """Takes the parameters [d, t] and [t] of a linear model as they are, validates and tells of it."""
        leaves, structure = jax.tree.flatten(self._trained.shapes.params)
        given = [np.asarray(w if leaf.ndim > 1 else b, leaf.dtype) for leaf in leaves]
        self._trained.replace(params=jax.tree.unflatten(structure, given))
        self.train_loss = train_loss
        self.validate()
        self._tell(self.step, train_loss=train_loss, val_loss=self.val_loss, metrics=self.metrics)

    def fit_epochs(self, number: int | None = None) -> None:
        """Trains to the end of so many epochs, or of all that are left and worth it, and validates after each.

        While it trains, `state` is ahead of what observers are told, by the calls in flight. Where nothing is validated
        it is so at an epoch's end, too: the devices do not wait. An observer that raises leaves it there, and then this
        trainer has to `fit` anew, or take another `state`.

        Ctrl-C lets the calls in flight end, about a second, and a validation: then KeyboardInterrupt is raised in all
        processes, the state is that of the last step that was reported, and `fit_epochs` goes on from it. A second
        Ctrl-C raises at once, and leaves the trainer as an observer that raises does.

        Args:
          number: that under way is one.

        Raises:
          Diverged: when the loss is no longer finite.
          Preempted: when the run was asked to stop; its state is saved.
          AuditFailed: when an epoch did not use every row once.
          KeyboardInterrupt: after Ctrl-C.
        """
        self.require_rest()
        if not self._whole:
            raise InputError("fit_epochs is running, or was ended between steps and reports; fit anew")
        alike = {"number of epochs": (str(number), ""), "step": (f"{self.step:,}", "")}
        processes.require_alike("fit_epochs", "give the same in all processes", lambda: alike)
        steps, stop = self.train.sampler.steps_per_epoch, self.train.num_steps
        if number is not None:
            stop = min(stop, (self.step // steps + number) * steps)
        with deferred() as self._interrupts:
            while self.step < stop and not self.done:
                self._training, self._whole = True, False
                try:
                    self._train_to(self._next_rest(stop))
                    self._whole = True
                except (Diverged, AuditFailed):  # in all processes: none may leave while calls need it
                    jax.block_until_ready(self._dispatched)
                    self._whole = True
                    raise
                finally:
                    self._training = False
                self._rest()

    def fit_epoch(self) -> None:
        """Trains one epoch and validates (D2L section 3.4.4): `fit_epochs(1)`, or nothing where all are trained."""
        self.fit_epochs(1)

    def require_rest(self) -> None:
        """Raises InputError while observers are told, or where one raised, and the state holds more than was told."""
        step = int(self._trained.current.step)
        if step != self.step:
            raise InputError(
                f"the state is after step {step:,}, and observers are not told of all of it: steps are in flight, or "
                "were ended by Ctrl-C or an observer that raised; let fit_epochs return, or fit anew"
            )

    def _next_rest(self, stop: int) -> int:
        """The step up to `stop` at which none may be in flight, unless it is time to save before."""
        every = (self.val and self.train.sampler.steps_per_epoch, self.checkpoints and self.checkpoints.every_steps)
        due = (self.step - self.step % steps + steps for steps in every if steps)
        return min([stop, *(step for step in self.pauses if step > self.step), *due])

    def _train_to(self, stop: int) -> None:
        """Trains up to a step, or until it is time to save, and tells of it."""
        steps, first = self.train.sampler.steps_per_epoch, self.step
        began, evaluated = time.perf_counter(), self.seconds["eval"]
        with contextlib.closing(self._train_blocks(stop)) as calls:
            for block, (sums, used) in devices.arrived(calls, self.heartbeat):
                finite = np.isfinite(sums[: block.num_steps, 0])
                good = block.num_steps if finite.all() else int(finite.argmin())
                speed = (block.first_step + good - first) / (time.perf_counter() - began)
                self._speed = speed * len(self.train.source) / steps
                taken = 0
                while taken < good:
                    end = min(taken + steps - self.step % steps, good)
                    self._take(sums[taken:end], used[:, taken:end])
                    taken = end
                if good < block.num_steps:
                    raise Diverged(self.step + 1)
        self.seconds["train"] += time.perf_counter() - began - (self.seconds["eval"] - evaluated)
        self.steps_trained += self.step - first

    def _take(self, sums: np.ndarray, used: np.ndarray) -> None:
        """Takes the [n, 3] sums of the next steps of an epoch, and [devices, n, 2] what they used; tells of them."""
        steps, every = self.train.sampler.steps_per_epoch, self._log_every
        before = self.step % steps
        start, done = self.step - before, before + len(sums)
        if before == 0:
            self.epoch_sums = np.zeros((steps, 3))
            self.audit.begin()
        self.epoch_sums[before:done] = sums
        self.audit.add(used)
        for point in range(before // every * every + every, min(done + 1, steps), every):
            norm = float(self.epoch_sums[point - 1, 2])
            self._tell(start + point, train_loss=_mean(self.epoch_sums[point - every : point]), gradient_norm=norm)
        self._tell(start + done)
        self.step = start + done  # not before: an observer that raises leaves a step that is not the state's
        if done == steps:
            self._end_epoch()

    def _train_blocks(self, stop: int) -> Generator[tuple[Block, Any]]:
        """Dispatches blocks up to a step, or until it is time to save or to stop."""
        first = self.step
        for block in self.train.blocks(first, stop, self.steps_of_call):
            if block.first_step > first:
                interrupted, due = self._interrupts.poll(), self.checkpoints is not None and self.checkpoints.due()
                if interrupted or due:
                    return
            arguments = self.prepare_batch(block)
            with jax.profiler.StepTraceAnnotation("train", step_num=block.first_step):
                sums, used = self._trained.step(self._train_block, *arguments)
            self._dispatched = sums, self._to_all(used)
            yield block._replace(data=None), self._dispatched

    def _end_epoch(self) -> None:
        """Checks the epoch that the last step ended, validates, and tells of it."""
        self.train_loss = _mean(self.epoch_sums)
        used = None if self._tags is None else self.audit.check(self.step, self._tags)
        self._validate_finitely()
        if self.patience and self.val_loss is not None and self.val_loss < self.best.val_loss:
            self.best = Best(self.val_loss, self.step, jax.device_get(self.variables))
        steps = len(self.epoch_sums)
        unlogged = (steps - 1) // self._log_every * self._log_every
        self._tell(
            self.step,
            train_loss=_mean(self.epoch_sums[unlogged:]),
            gradient_norm=float(self.epoch_sums[-1, 2]),
            val_loss=self.val_loss,
            metrics=self.metrics,
            audit=used,
        )

    def _rest(self) -> None:
        """With no step in flight: saves where that is due, and leaves where that was asked for."""
        if self.checkpoints is not None:
            every = self.checkpoints.every_steps
            if self.checkpoints.due() or (every and self.step % every == 0):
                self.checkpoints.save(self)
                self.heartbeat()
            if self.checkpoints.preempted:
                raise Preempted(self.step, interrupted=self.checkpoints.preempted == "interrupt")
        if self._interrupts.pending:
            raise KeyboardInterrupt

    @property
    def _log_every(self) -> int:
        return self.log_every_steps or -(-self.train.sampler.steps_per_epoch // 8)

    def _validate_finitely(self) -> None:
        self.validate()
        if self.val_loss is not None and not math.isfinite(self.val_loss):
            raise Diverged(self.step, validation=True)

    def validate(self) -> None:
        """Sets `val_loss` and `metrics`: exact weighted means over all validation rows, whatever their batches."""
        if self.val is None or self._eval_block is None:
            self.val_loss, self.metrics = None, {}
            return
        started = time.perf_counter()
        blocks = self.val.blocks(0, self.val.num_steps, self.steps_of_call)
        evaluated, unpacked = self._eval_block
        calls = ((b, evaluated(self._trained.variables, *self.prepare_batch(b))) for b in blocks)
        found = [unpacked(errors) for _, errors in devices.arrived(calls, self.heartbeat)]
        self.val_loss, self.metrics = metrics_of(self._model, self._schema, found)
        if self.train_loss == 0 and 0 < self.val_loss < float(np.finfo(np.float32).tiny):
            logging.warning(
                "the training loss and the norm of the gradient are 0 as %s, for the targets are tiny; use %s, or "
                "another unit",
                *(self.dtype, spell("target_transform", "standardize")),
            )
        if self.patience and not any(errors.weight.sum() > 0 for errors in found):
            raise InputError(
                f"{spell('patience', self.patience)}: no row held out has a weight to measure by; hold out others"
            )
        self.seconds["eval"] += time.perf_counter() - started

    def predict(self, x: Any) -> np.ndarray:
        """What the trained model predicts for rows: [n, t] float64, in original units.

        Args:
          x: [n, d]; after training on a table its columns as they are there, see `Predictor.predict`.
        """
        return self.predictor().predict(x)

    @processes.together()
    def evaluate(self, rows: Any) -> tuple[float, dict[str, float]]:
        """(mean loss, metrics in original units) of the trained model over rows.

        Args:
          rows: a `Source`; after training on a table also its columns, with the targets, see `Predictor.pieces`.
        """
        processes.require_alike("evaluate", ROWS_IN_PARTS, lambda: {"rows": describe_rows(rows)})
        predictor = self.predictor()
        return predictor.evaluate(predictor.pieces(rows))

    def predictor(self) -> Predictor:
        """The trained model, as it is now, on the trainer's devices; compiled once."""
        variables = self.variables
        if self._predictor is None:
            rows = self.train.source[np.zeros(1, np.int32)]
            self._predictor = Predictor(
                self._model,
                variables,
                rows["x"].shape[1],
                rows["y"].shape[1],
                mesh=self.mesh,
                num_shards=self.num_shards,
                batch_size=self.train.global_batch // self.accumulate_steps,
                schema=self._schema,
                columns=self._columns,
                precision=self.precision,
                reduction=self.reduction,
                backend=self.backend,
                heartbeat=self.heartbeat,
            )
        predictor = copy.copy(self._predictor)
        predictor.variables = variables
        return predictor

    def _tell(self, step: int, **values: Any) -> None:
        steps = self.train.sampler.steps_per_epoch
        progress = Progress(
            step, self.train.num_steps, step / steps, self.max_epochs, rows_per_second=self._speed, **values
        )
        for observer in self.observers:
            observer(progress)


def _steps_of_call(platform: str, operations: int, alone: int) -> int:
    """How many steps a call may take, of so many operations each and so many shards that are taken one by one."""
    if platform == "cpu":
        return max(1, _OPERATIONS_OF_CALL // operations)
    return max(1, _OPERATIONS_OF_CALL_OF_CHIP // max(operations, alone * _LEAST_OPERATIONS_OF_SHARD))


def _mean(sums: np.ndarray) -> float:
    """The mean loss per weight of steps, from their [steps, 3] sums; 0 where nothing has a weight."""
    loss, weight = sums[:, :2].sum(axis=0)
    return float(loss / weight) if weight > 0 else 0.0
