"""The trainer, the object that users work with."""

import copy
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.config import Config, check_settings
from dpreg.data.pipeline import PRECISIONS, Dataset
from dpreg.data.sources import RegressionData, describe_rows
from dpreg.distributed import devices, processes
from dpreg.errors import InputError
from dpreg.step.donated import DonatedState
from dpreg.step.foreign_methods import OF_DATA, OF_TRAINER, refuse_foreign_methods
from dpreg.step.reduce import REDUCTION_BY_NAME
from dpreg.step.state import Model, TrainState
from dpreg.train.callback import Callback, FunctionCallback, Progress, require_known_events
from dpreg.train.loop import Loop
from dpreg.train.predictor import ROWS_IN_PARTS, Predictor
from dpreg.train.program import LaidOutData, Settings, compile_program, first_state, lay_out


class Trainer:
    """Trains a model on all devices, with the same result on any number of them (D2L section 3.2.3).

    After `fit`, `state` is the trained state, and the other attributes describe the run. Attributes that depend on rows
    or on a model raise InputError before these are given.

    Args:
      max_epochs: the number of times that every row is used.
      num_devices: the number of devices; None takes all available ones, but not more than `num_shards`.
      gradient_clip_val: the largest norm of the global gradient, to which larger ones are scaled; 0 for no limit.
      mesh: the devices, with the single axis "data", instead of those chosen by `num_devices` and `platform`.
      num_shards: the number of logical shards, L, on which the result depends (by rounding at least).
      precision: "float32"; "bfloat16" for features and, on chips that are faster with it, the factors of products,
        which are summed in float32; or "float64" for float64 rows, which enables `jax_enable_x64` in this process.
      reduction: "pmean", or "ordered" for the same bits on any number of devices.
      backend: "jit" (shard_map) or "pmap": the same results.
      placement: where rows are stored: "device", "host" or "auto".
      seed: the seed of the initial parameters, the order of rows and dropout.
      platform: "cpu", "gpu" or "tpu"; None takes JAX's default.
      log_every_steps: the number of steps between log points; 0 for an eighth of an epoch, rounded up.
      steps_per_block: the largest number of steps of one compiled call; None chooses it by the size of rows. Values
        below 2 count as 2. Calls have fewer steps where that divides an epoch evenly, and where the FLOPs of the model
        are so many that a call would delay signals and checkpoints. The result does not depend on it.
      accumulate_steps: the number of batches whose gradients are accumulated for one step. The step equals that of a
        batch this many times as large, with the memory for the activations of one. (BatchNorm and Dropout process the
        batches one by one.)
      patience: the number of consecutive epochs without a lower validation loss after which training ends, and the
        parameters of the best epoch are restored; 0 for no early end.
      audit: whether to check at the end of each epoch that its steps used every row exactly once.
      callbacks: called while the trainer trains, see `dpreg.Callback`; `add_callback` adds others.
      observers: deprecated: functions that are called with a `Progress` after every block, log point and epoch.

    Attributes:
      settings: these arguments, with the devices.
      seconds: the seconds spent in "ingest" (rows to the devices), "compile", "train" and "eval".

    Raises:
      InputError: for arguments out of range, and for a callback with a method `on_...` that is no event.

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
        callbacks: Iterable[Callback] = (),
        observers: Iterable[Callable[[Progress], None]] = (),
    ):
        settings: dict[str, Any] = {
            "max_epochs": max_epochs,
            "gradient_clip_val": gradient_clip_val,
            "precision": precision,
            "reduction": reduction,
            "backend": backend,
            "placement": placement,
            "seed": seed,
            "log_every_steps": log_every_steps,
            "accumulate_steps": accumulate_steps,
            "patience": patience,
            "audit": audit,
        }
        check_settings(**settings)
        devices.enable(np.dtype(PRECISIONS[precision][1]))
        mesh = mesh or devices.data_mesh(num_shards, platform, num_devices)
        self.settings = Settings(mesh, num_shards=num_shards, steps_per_block=steps_per_block, **settings)
        self.seconds = dict.fromkeys(("ingest", "compile", "train", "eval"), 0.0)
        self._callbacks = list[Callback]()
        for callback in callbacks:
            self.add_callback(callback)
        if observers := [*observers]:
            warnings.warn("observers is deprecated; give callbacks, see dpreg.Callback", DeprecationWarning, 2)
            self._callbacks += map(FunctionCallback, observers)
        self._data: LaidOutData | None = None
        self._loop: Loop | None = None
        self._predictor: Predictor | None = None

    def fit(self, model: Model, data: RegressionData) -> None:
        """Trains the model for `max_epochs`, with a validation after each.

        Args:
          model: a `dpreg.Module`, or any flax module that has its `loss` and `configure_optimizers`.
          data: the rows, or any object with `train`, `val` and `batch_size`.

        Raises:
          InputError: when the data cannot be split into the run's shards and batches, or the loss is not defined for a
            target.
          Diverged: when the loss is no longer finite; `state` is then the last finite one.
          KeyboardInterrupt: as `fit_epochs`, which then continues this fit.
        """
        self.prepare_data(data)
        self.prepare_model(model)
        self.fit_epochs()
        self.restore_best()

    @processes.together("laying out rows")
    def prepare_data(self, data: RegressionData) -> None:
        """Moves the rows to where the steps read them, and drops a state that was trained on other rows."""
        refuse_foreign_methods(self, OF_TRAINER)
        refuse_foreign_methods(data, OF_DATA)
        self._data = self._loop = None
        started = time.perf_counter()
        laid_out = lay_out(data, self.settings)
        jax.block_until_ready([dataset.data for dataset in (laid_out.train, laid_out.val) if dataset])
        self._data = laid_out
        self.seconds = dict.fromkeys(self.seconds, 0.0) | {"ingest": time.perf_counter() - started}

    @processes.together("compiling")
    def prepare_model(self, model: Model, trains: bool = True) -> None:
        """Initialises the state and compiles the steps, ahead of the first.

        Args:
          model: as for `fit`.
          trains: False for a linear model whose parameters are assigned by `set_linear_params`: it takes no step.
        """
        started = time.perf_counter()
        state = first_state(model, self._laid_out)
        self._data = data = self._laid_out.limit_steps(state)
        held = DonatedState(state, self.mesh)
        program = compile_program(model, data, held.current, trains)
        self._predictor = None
        self._loop = Loop(program, held, self._callbacks, self.seconds)
        self.seconds["compile"] += time.perf_counter() - started

    def fit_epochs(self, number: int | None = None) -> None:
        """Trains `number` epochs, or until `done`, with a validation after each.

        During training, `state` is ahead of the steps reported to callbacks by the calls in flight. Without validation
        this also holds at the end of an epoch, because the devices do not wait. If a callback raises, the state remains
        ahead; call `fit` again, or assign another `state`.

        After Ctrl-C, calls in flight (about a second) and a validation finish. Then KeyboardInterrupt is raised in all
        processes, the state is that of the last reported step, and `fit_epochs` continues from it. A second Ctrl-C
        raises at once; the trainer is then as after a callback that raised.

        Args:
          number: the number of epochs, including one that is partly trained; None for all.

        Raises:
          Diverged: when the loss is no longer finite.
          Preempted: when the run was asked to stop; its state is saved.
          AuditFailed: when an epoch did not use every row exactly once.
          KeyboardInterrupt: after Ctrl-C.
        """
        alike = {"number of epochs": (str(number), ""), "step": (f"{self.step:,}", "")}
        processes.require_alike("fit_epochs", "give the same in all processes", lambda: alike)
        self.loop.run(number, self._sync)

    def fit_epoch(self) -> None:
        """Trains one epoch and validates (D2L section 3.4.4): `fit_epochs(1)`, or nothing if all are trained."""
        self.fit_epochs(1)

    def _sync(self) -> None:
        for callback in self._callbacks:
            callback.on_sync(self)

    def add_callback(self, callback: Callback) -> None:
        """Adds a callback, which is called after those added before.

        Raises:
          InputError: when it has a method `on_...` that is no event of `dpreg.Callback`.
        """
        require_known_events(callback)
        self._callbacks.append(callback)

    def restore_best(self) -> bool:
        """With `patience`, restores the parameters of the best epoch, and returns whether it is not the last one."""
        return self.loop.restore_best()

    def set_linear_params(self, w: np.ndarray, b: np.ndarray, train_loss: float) -> None:
        """Assigns copies of w [d, t] and b [t] to a linear model, validates, and reports this as an epoch."""
        leaves, structure = jax.tree.flatten(self.loop.state.shapes.params)
        given = [np.asarray(w if leaf.ndim > 1 else b, leaf.dtype) for leaf in leaves]
        self.loop.set_params(jax.tree.unflatten(structure, given), train_loss)

    def predict(self, x: Any) -> np.ndarray:
        """The predictions of the trained model for rows: [n, t] float64, in original units; labels as they are there.

        Args:
          x: [n, d]; after training on a table, the table's columns in original units, see `Predictor.predict`.
        """
        return self.predictor().predict(x)

    def predict_proba(self, x: Any) -> np.ndarray:
        """The probabilities of the labels of a table, in the order of `data.schema.labels`: [n, C] float64.

        Args:
          x: as in `predict`.
        """
        return self.predictor().predict_proba(x)

    @processes.together()
    def evaluate(self, rows: Any) -> tuple[float, dict[str, float]]:
        """The mean loss and the metrics (in original units) of the trained model on rows.

        Args:
          rows: a `Source`; after training on a table also its columns, with the targets, see `Predictor.chunks`.
        """
        processes.require_alike("evaluate", ROWS_IN_PARTS, lambda: {"rows": describe_rows(rows)})
        predictor = self.predictor()
        return predictor.evaluate(predictor.chunks(rows))

    def predictor(self) -> Predictor:
        """A predictor with a copy of the current model, on the trainer's devices; it is compiled once."""
        variables, settings, data = self.variables, self.settings, self._laid_out
        if self._predictor is None:
            self._predictor = Predictor(
                self.model,
                variables,
                data.num_inputs,
                data.num_targets,
                mesh=self.mesh,
                num_shards=settings.num_shards,
                batch_size=data.train.global_batch // settings.accumulate_steps,
                schema=data.schema,
                columns=data.columns,
                precision=settings.precision,
                reduction=settings.reduction,
                backend=settings.backend,
                on_result=self.loop.report_result,
            )
        predictor = copy.copy(self._predictor)
        predictor.variables = variables
        return predictor

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.settings.mesh

    @property
    def train(self) -> Dataset:
        """The pipeline of the rows to fit."""
        return self._laid_out.train

    @property
    def val(self) -> Dataset | None:
        """The pipeline of the validation rows."""
        return self._laid_out.val

    @property
    def model(self) -> Model:
        """The model."""
        return self.loop.program.model

    @property
    def state(self) -> TrainState:
        """A copy of the train state, replicated over the devices, which further training does not change.

        Assigning a state copies its step, parameters, optimizer state and batch statistics; the model and the optimizer
        remain those of the trainer.

        Raises:
          InputError: before a model is given, and after a second Ctrl-C has interrupted a compiled call.
        """
        return self.loop.state.copy()

    @state.setter
    def state(self, state: TrainState) -> None:
        self.loop.replace_state(state)

    @property
    def variables(self) -> dict[str, Any]:
        """A copy of "params" and "batch_stats", with which the model predicts."""
        return self.loop.state.copy_variables()

    @property
    def step(self) -> int:
        """The number of steps done and reported."""
        return self.loop.step

    @property
    def done(self) -> bool:
        """Whether all epochs are trained, or `patience` has run out."""
        return self.loop.done

    @property
    def train_loss(self) -> float:
        """The mean loss of the last epoch; NaN before the end of the first."""
        return self.loop.train_loss

    @property
    def val_loss(self) -> float | None:
        """The mean loss on the validation rows after the last epoch; None without such rows."""
        return self.loop.val_loss

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics on the validation rows after the last epoch, in original units."""
        return self.loop.metrics

    @property
    def exchange_bytes(self) -> int:
        """The bytes that a step sums over devices: gradients, batch statistics with their row counts, loss and weight.

        Under `ordered` they are those of each shard. Exchanges within the layers of a BatchNorm over the batch are not
        included.
        """
        shapes, settings = self.loop.state.shapes, self.settings
        leaves = jax.tree.leaves((shapes.params, shapes.batch_stats))
        sums = sum(leaf.size for leaf in leaves) + (3 if shapes.batch_stats else 2)
        shards = settings.num_shards if REDUCTION_BY_NAME[settings.reduction].shard_by_shard else 1
        return int(sums) * settings.dtype.itemsize * shards

    @property
    def _laid_out(self) -> LaidOutData:
        if self._data is None:
            raise InputError("the trainer has no rows yet; call fit, or prepare_data")
        return self._data

    @property
    def loop(self) -> Loop:
        """The training loop, with the state and the progress of the run, and its program.

        Raises:
          InputError: before rows and a model are prepared.
        """
        if self._loop is None:
            raise InputError("there is no trained state; call fit first, or prepare_data and prepare_model")
        return self._loop
