"""The rows of a run, laid out over the devices, and its compiled steps."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.config import Columns
from dpreg.data.pipeline import PRECISIONS, Dataset
from dpreg.data.sampler import Sampler
from dpreg.data.schema import Schema
from dpreg.data.sources import RegressionData, describe_rows, first_outside
from dpreg.distributed import devices, processes
from dpreg.errors import InputError
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.losses import loss_of
from dpreg.models.mlp import LinearRegression
from dpreg.spelling import spell
from dpreg.step.checks import comes_with_dpreg, model_errors, normalises_over_batch, require_model
from dpreg.step.compile import compile_eval_block, compile_train_block
from dpreg.step.digest import digest_training, digest_values
from dpreg.step.layout import batch_layout, call_arguments, example_arguments
from dpreg.step.reduce import REDUCTION_BY_NAME
from dpreg.step.state import Model, TrainState, initial_state
from dpreg.step.tuning import steps_of_call
from dpreg.tables.standalone import are_codes, label_text
from dpreg.train.predictor import ROWS_IN_PARTS, bind_eval_sums

_FEW_ROWS = 16  # of a shard; batch statistics of fewer rows are poor
_MOST_STEPS = 2**31 - 1  # steps are counted in int32 on the devices


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a trainer, which it has checked: each field is the argument of `Trainer` with the same name.

    Attributes:
      mesh: the devices, with the single axis "data": as given, or as chosen by `num_devices` and `platform`.
    """

    mesh: Mesh
    max_epochs: int
    gradient_clip_val: float
    num_shards: int
    precision: str
    reduction: str
    backend: str
    placement: str
    seed: int
    log_every_steps: int
    steps_per_block: int | None
    accumulate_steps: int
    patience: int
    audit: bool

    @property
    def dtype(self) -> np.dtype:
        """The dtype of targets, weights, sums and float32 parameters of models: float32 or float64."""
        return np.dtype(PRECISIONS[self.precision][1])

    def describe(self) -> dict[str, str]:
        """All settings as text, which must be equal in processes that train together."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "mesh"]
        texts = {name: str(getattr(self, name)) for name in names}
        return texts | {"devices": devices.describe(self.mesh.devices.flat)}


@dataclasses.dataclass(frozen=True)
class LaidOutData:
    """The rows of a run, split into shards and batches for its devices.

    Attributes:
      settings: the settings of the trainer.
      train, val: the pipelines of the rows to fit and of the validation rows.
      schema: the schema of the table that the rows come from, if any.
      columns: the columns that were read from that table.
    """

    settings: Settings
    train: Dataset
    val: Dataset | None
    schema: Schema | None
    columns: Columns | None

    @property
    def num_inputs(self) -> int:
        """The number of features of a row, d."""
        return int(self.first_row["x"].shape[1])

    @property
    def num_targets(self) -> int:
        """The number of targets of a row, t."""
        return int(self.first_row["y"].shape[1])

    @property
    def first_row(self) -> dict[str, np.ndarray]:
        """The first row to fit: for each column an array [1, ...]."""
        return dict(self.train.source[np.zeros(1, np.int32)])

    def limit_steps(self, state: TrainState) -> "LaidOutData":
        """The same rows with blocks of as many steps as the FLOPs of a model with this state allow."""
        mesh, one_by_one = self.settings.mesh, REDUCTION_BY_NAME[self.settings.reduction].shard_by_shard
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        operations = 6 * parameters * self.train.global_batch
        most = steps_of_call(mesh.devices.flat[0].platform, operations, self.train.slots if one_by_one else 0)
        val = self.val and self.val.limit_steps(most)
        return dataclasses.replace(self, train=self.train.limit_steps(most), val=val)

    def check_targets(self, model: Model) -> None:
        """Raises InputError for a target that the model's loss is not defined for."""
        loss = loss_of(model)
        labels = self.schema.labels if self.schema else ()
        if self.schema and labels and (loss.num_classes or not are_codes(labels)):
            loss.check_labels(self.schema.targets[0].name, [*map(label_text, labels)])
        for dataset in (self.train, self.val):
            if dataset is not None and loss.domain and (wrong := first_outside(dataset.source, loss.allowed)):
                raise loss.refusal(*wrong)

    def initial_state(self, model: Model) -> TrainState:
        """The state before the first step, a function of the model and the seed.

        On a table, weights of dpreg's linear models start at 0 unless they set `sigma`: no step would change their
        values in a direction that the rows do not determine, such as the difference of two equal columns.

        Raises:
          InputError: when a constant column of a table is left out, and the model has no intercept.
        """
        from_zero = False
        if self.schema is not None and isinstance(model, (LinearRegressionScratch, LinearRegression)):
            from_zero = model.sigma is None
            constants = zip(self.schema.features, self.schema.constant, self.schema.units[0], strict=False)
            for name, constant, mean in () if model.intercept else constants:
                if constant and mean != 0:
                    raise InputError(
                        f"column {name!r} has one value, {mean:g}, which an intercept stands for, and "
                        "the model has none; read the table with Columns(intercept=False), or leave the column out"
                    )
        settings, x = self.settings, self.first_row["x"]
        return initial_state(model, x, settings.seed, settings.dtype, settings.gradient_clip_val, from_zero)

    def compile_train(self, model: Model, state: TrainState) -> Callable[..., Any]:
        """The compiled training steps. With the backend "jit", shapes of the state suffice, and no rows are moved."""
        settings = self.settings
        return compile_train_block(
            model,
            state,
            batch_layout(self.train),
            settings.mesh,
            self._example(self.train),
            settings.accumulate_steps,
            REDUCTION_BY_NAME[settings.reduction],
            settings.backend,
        )

    def compile_eval(self, model: Model, variables: Any) -> tuple[Callable[..., Any], Callable[[Any], Any]] | None:
        """The compiled evaluation on validation rows and the function that unpacks its results; None without rows."""
        if self.val is None:
            return None
        settings = self.settings
        return compile_eval_block(
            model,
            variables,
            batch_layout(self.val),
            settings.mesh,
            self._example(self.val),
            bind_eval_sums(model, self.schema),
            REDUCTION_BY_NAME[settings.reduction],
            settings.backend,
        )

    def _example(self, dataset: Dataset) -> tuple[Any, ...]:
        """Example arguments for compilation; pmap takes the shapes of this process's arrays."""
        if self.settings.backend == "jit":
            return example_arguments(dataset)
        return call_arguments(dataset, next(iter(dataset)))


def lay_out(data: RegressionData, settings: Settings) -> LaidOutData:
    """Decides the placement of the rows. Only rows of `RegressionData.from_parts` are moved here.

    Raises:
      InputError: when the data cannot be split into the run's shards and batches, or differs between processes.
    """

    def describe_run() -> dict[str, tuple[str, str]]:
        texts = settings.describe() | {"batch_size": str(data.batch_size)}
        return {
            "training rows": describe_rows(data.train),
            "validation rows": describe_rows(data.val) if data.val else ("none", ""),
            **{name: (text, "") for name, text in texts.items()},
        }

    processes.require_alike("fit", ROWS_IN_PARTS, describe_run)
    if settings.dtype == np.float64 and data.train[np.zeros(1, np.int32)]["x"].dtype != np.float64:
        precision = spell("precision", settings.precision)
        logging.warning("%s: the rows are float32, and have its digits; give them as float64", precision)
    Sampler(len(data.train), settings.num_shards, data.batch_size)  # InputError unless shards divide each batch
    batch_size, epochs = data.batch_size * settings.accumulate_steps, settings.max_epochs
    # Without validation nothing waits for the end of an epoch, so a call may span several.
    rows = Dataset(data.train).shuffle(settings.seed).batch(batch_size).repeat(epochs, across=not data.val)
    train = _place(rows.tag(settings.audit), settings)
    if train.num_steps > _MOST_STEPS:
        most = _MOST_STEPS // train.sampler.steps_per_epoch
        raise InputError(
            f"{spell('max_epochs', epochs)}: that is {train.num_steps:,} steps, and they are counted up to "
            f"{_MOST_STEPS:,}; use {spell('max_epochs', most)} or less"
        )
    if settings.patience and not data.val:
        patience = spell("patience", settings.patience)
        raise InputError(f"{patience}: there are no rows held out to measure by; hold some out")
    val = _place(Dataset(data.val).batch(data.batch_size), settings) if data.val else None
    return LaidOutData(settings, train, val, getattr(data, "schema", None), getattr(data, "columns", None))


def _place(dataset: Dataset, settings: Settings) -> Dataset:
    """The dataset on the devices of the run, with the same placement in all processes."""
    sharded = dataset.cast(settings.precision).shard(settings.mesh, settings.num_shards).prefetch(2)
    placed = sharded.place(settings.placement, settings.steps_per_block)
    if jax.process_count() > 1 and len({*processes.allgather_text(placed.resolved_placement)}) > 1:
        return sharded.place("host", settings.steps_per_block)  # if one process has less memory than others
    return placed


@dataclasses.dataclass(frozen=True)
class Program:
    """The rows and the compiled steps of a run.

    Attributes:
      data: the rows.
      model: as for `Trainer.fit`.
      train_block: see `dpreg.step.compile.compile_train_block`; None of a run that takes no steps.
      eval_block: see `compile_eval_block`; None without validation rows.
      gather_used: gathers the counts of the audit from all devices in all processes.
      optimizer_start: a digest of the optimizer's initial state; "" for a model of dpreg.
    """

    data: LaidOutData
    model: Model
    train_block: Callable[..., Any] | None
    eval_block: tuple[Callable[..., Any], Callable[[Any], Any]] | None
    gather_used: Callable[[Any], Any]
    optimizer_start: str

    @property
    def steps_per_epoch(self) -> int:
        """The number of steps of an epoch."""
        return int(self.data.train.sampler.steps_per_epoch)

    @functools.cached_property
    def audit_total(self) -> np.ndarray | None:
        """What the audit expects of an epoch, see `Dataset.audit_total`; None without an audit."""
        return self.data.train.audit_total if self.data.settings.audit else None

    def digest(self, shapes: TrainState) -> str | None:
        """A digest of what the model computes, see `dpreg.step.digest.digest_training`."""
        return digest_training(self.model, shapes, self.data.num_inputs, self.data.num_targets, self.optimizer_start)


def first_state(model: Model, data: LaidOutData) -> TrainState:
    """The state before the first step, after a check that the model can be trained on the rows.

    Raises:
      InputError: when the model cannot be trained on them.
    """
    require_model(model)
    data.check_targets(model)
    state, settings = data.initial_state(model), data.settings
    rows_together = data.train.sampler.shard_batch // settings.accumulate_steps
    if state.batch_stats and rows_together < _FEW_ROWS and not normalises_over_batch(model, state, data.num_inputs):
        logging.warning(
            "batch statistics of %d rows: BatchNorm sees the rows of one shard, %s / %s; give it %d or more, or "
            "all rows of the batch with %s",
            *(rows_together, spell("batch_size"), spell("num_shards"), _FEW_ROWS, spell("sync_batch_norm", True)),
        )
    return state


def compile_program(model: Model, data: LaidOutData, state: TrainState, trains: bool = True) -> Program:
    """Compiles the steps of a run for a state that is on its devices; without `trains` only those of validation."""
    settings = data.settings
    # Cached, and transferred before the first call.
    jax.block_until_ready([dataset.shard_ranges for dataset in (data.train, data.val) if dataset])
    optimizer_start = "" if comes_with_dpreg(model) else digest_values(state.opt_state)
    train_block: Callable[..., Any] | None = None
    if trains:
        with model_errors(model):
            train_block = data.compile_train(model, state)
    gather_used: Callable[[Any], Any] = _zeros_on_host
    if trains and settings.audit:
        gather_used = devices.compile_gather(settings.mesh, (settings.mesh.size, data.train.block_steps, 2), np.uint32)
    with model_errors(model):
        eval_block = data.compile_eval(model, {"params": state.params, "batch_stats": state.batch_stats})
    return Program(data, model, train_block, eval_block, gather_used, optimizer_start)


def _zeros_on_host(used: Any) -> np.ndarray:
    return np.zeros(used.shape, used.dtype)
