"""Builds the data, the model and the trainer of a run from a Config, for all entry points."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.config import Config
from dpreg.config.model import MODELS, SEPARABLE_LOSSES
from dpreg.data.pipeline import PRECISIONS
from dpreg.data.sampler import ORDER
from dpreg.data.sources import RegressionData
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.distributed import presence, processes
from dpreg.errors import InputError
from dpreg.models.linear import LinearRegressionScratch
from dpreg.models.losses import make_loss
from dpreg.models.mlp import MLP, LinearRegression
from dpreg.models.module import Module
from dpreg.models.optimizers import make_optimizer, make_schedule
from dpreg.spelling import spell
from dpreg.step.state import Model
from dpreg.tables.ingest import Progress, read_table
from dpreg.tables.table import Table, open_table
from dpreg.tables.tfds import open_tfds
from dpreg.train.trainer import Trainer

_INGEST_SECONDS = 24 * 3600.0  # for which the others wait for process 0; they log it now and then


def build_data(config: Config, progress: Progress = lambda what, rows: None) -> RegressionData:
    """The rows that the config names. Process 0 reads a table first; the others use its cache if they can see it.

    Args:
      progress: reports the reading of a table, see `dpreg.tables.ingest.read_table`.

    Raises:
      InputError: for a table that cannot be read, or that is not the same in all processes.
    """
    if config.dataset == "synthetic":
        return SyntheticRegressionData(
            config.w,
            config.b,
            config.noise,
            config.num_train,
            config.num_val,
            config.batch_size,
            config.seed,
            dtype_of(config),
        )

    @presence.at_work(f"reading {config.dataset}")
    def read() -> RegressionData:
        return read_table(
            config.dataset,
            config.columns(),
            batch_size=config.batch_size,
            validation_dataset=config.validation_dataset,
            data_dir=config.data_dir,
            cache_dir=config.cache_dir,
            dtype=dtype_of(config),
            progress=progress,
            seed=config.seed,
        )

    first = read() if jax.process_index() == 0 else None
    processes.allgather_text(patience=_INGEST_SECONDS)
    data = first or read()
    for process, fingerprint in enumerate(processes.allgather_text(data.fingerprint(), patience=_INGEST_SECONDS)):
        if fingerprint != data.fingerprint():
            raise InputError(
                f"{spell('dataset', config.dataset)}: process {process} reads other rows than process "
                f"{jax.process_index()}; give both the same files"
            )
    return data


def dtype_of(config: Config) -> np.dtype:
    """The dtype of the rows on the host."""
    return np.dtype(PRECISIONS[config.precision][1])


def open_dataset(config: Config) -> Table:
    """The table that the config names; for a TFDS dataset with a split to hold out, that split as well."""
    if not config.dataset.startswith("tfds:"):
        return open_table(config.dataset)
    train, held_out, *_ = open_tfds(config.dataset.removeprefix("tfds:"), config.data_dir)
    return held_out or train


def build_model(
    config: Config, num_inputs: int, num_targets: int, num_steps: int = 1, bias: tuple[float, ...] | None = None
) -> Model:
    """The model for rows with these numbers of columns, with its loss and the optimizer of a run of `num_steps` steps.

    Args:
      bias: where the biases of the outputs start, for the models of dpreg that have one; zeros by default.

    Raises:
      InputError: when a user's module cannot be imported or constructed.
    """
    own = objective_and_optimizer(config, num_steps)
    outputs, bias = own["objective"].outputs(num_targets), bias if config.intercept else None
    if config.model == "linear":
        return LinearRegressionScratch(num_inputs, config.lr, config.sigma, outputs, config.intercept, bias, **own)
    if config.model == "concise":
        return LinearRegression(outputs, config.lr, config.sigma, config.intercept, bias, **own)
    if config.model == "mlp":
        return MLP(
            config.hidden,
            outputs,
            config.lr,
            config.dropout,
            config.batch_norm,
            config.activation,
            config.sync_batch_norm,
            bias,
            **own,
        )
    module, _, name = config.model.partition(":")
    try:
        of_user = getattr(importlib.import_module(module), name)
        made: Model = of_user(**own) if issubclass(of_user, Module) else of_user()
        return made
    except Exception as error:
        raise InputError(
            f"{spell('model', config.model)}: {type(error).__name__}: {error}; correct that, or name another class"
        ) from error


def identity_of(config: Config, data: RegressionData) -> dict[str, Any]:
    """All settings and data that the result of a run depends on: a run is continued only with the same identity."""
    identity = config.identity() | {"data": data.fingerprint(), "order": ORDER}
    if config.solver == "exact" and config.loss in SEPARABLE_LOSSES:
        # Such a solution is not continued, and may get another penalty, with which no level is left out.
        identity |= dict.fromkeys(("l2", "base"), "as solved")
    if config.solver == "exact" and config.loss == "negative_binomial":
        identity["negative_binomial_alpha"] = "as solved"
    return identity


def learning_rates(config: Config, num_steps: int) -> Callable[[int], float] | None:
    """The learning rate by global step, from 0; None for a user's model, and for solvers that take no steps."""
    if config.model not in MODELS or config.solver != "sgd":
        return None
    schedule = make_schedule(config.lr_schedule, config.lr, num_steps, config.warmup_steps)
    return lambda step: float(schedule(step))


def objective_and_optimizer(config: Config, num_steps: int = 1) -> dict[str, Any]:
    """The fields `objective` and `optimizer` of a `dpreg.Module`, for a run of `num_steps` steps."""
    steady = config.lr_schedule == "constant" and not config.warmup_steps
    schedule = config.lr if steady else make_schedule(config.lr_schedule, config.lr, num_steps, config.warmup_steps)
    return {
        "objective": make_loss(
            config.loss,
            config.huber_delta,
            config.quantile,
            config.num_classes,
            config.tweedie_power,
            config.negative_binomial_alpha,
        ),
        "optimizer": make_optimizer(config.optimizer, schedule, config.l1, config.l2),
    }


def build_trainer(config: Config, mesh: Mesh | None = None, steps_per_block: int | None = None) -> Trainer:
    """The trainer on the config's devices, or on those of a mesh."""
    return Trainer(
        config.max_epochs,
        config.num_devices,
        config.gradient_clip_val,
        num_shards=config.num_shards,
        precision=config.precision,
        reduction=config.reduction,
        backend=config.backend,
        placement=config.placement,
        seed=config.seed,
        platform=config.platform,
        log_every_steps=config.log_every_steps,
        accumulate_steps=config.accumulate_steps,
        patience=config.patience,
        audit=config.audit,
        mesh=mesh,
        steps_per_block=steps_per_block,
    )
