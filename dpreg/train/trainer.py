"""The trainer: what a person holds."""

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
from dpreg.step.hooks import OF_DATA, OF_TRAINER, require_no_hooks
from dpreg.step.state import Model, TrainState
from dpreg.train.callback import Callback, FunctionCallback, Progress
from dpreg.train.loop import Loop
from dpreg.train.predictor import ROWS_IN_PARTS, Predictor
from dpreg.train.program import LaidOutData, Settings, compile_program, first_state, lay_out


class Trainer:
    """Trains a model on all devices, to the same result on any number of them (D2L section 3.2.3).

    After `fit`, `state` is the trained state; the other attributes say how the run went. Those that depend on rows or
    on a model raise InputError before there are any.

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
      callbacks: called while it trains, see `dpreg.Callback`; `add_callback` adds others.
      observers: deprecated: functions that are called with a `Progress` after every block, log point and epoch.

    Attributes:
      settings: these arguments, with the devices.
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
        self._callbacks = [*callbacks]
        if observers := [*observers]:
            warnings.warn("observers is deprecated; give callbacks, see dpreg.Callback", DeprecationWarning, 2)
            self._callbacks += map(FunctionCallback, observers)
        self._data: LaidOutData | None = None
        self._loop: Loop | None = None
        self._predictor: Predictor | None = None

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
        self.restore_best()

    @processes.together("laying out rows")
    def prepare_data(self, data: RegressionData) -> None:
        """Brings the rows to where the steps read them. A state that was trained on other rows is given up."""
        require_no_hooks(self, OF_TRAINER)
        require_no_hooks(data, OF_DATA)
        self._data = self._loop = None
        started = time.perf_counter()
        laid_out = lay_out(data, self.settings)
        jax.block_until_ready([dataset.data for dataset in (laid_out.train, laid_out.val) if dataset])
        self._data = laid_out
        self.seconds = dict.fromkeys(self.seconds, 0.0) | {"ingest": time.perf_counter() - started}

    @processes.together("compiling")
    def prepare_model(self, model: Model) -> None:
        """Initialises the state and compiles the steps, ahead of the first."""
        started = time.perf_counter()
        state = first_state(model, self._laid_out)
        self._data = data = self._laid_out.bound_calls(state)
        held = DonatedState(state, self.mesh)
        program = compile_program(model, data, held.current)
        self._predictor = None
        self._loop = Loop(program, held, self._callbacks, self.seconds)
        self.seconds["compile"] += time.perf_counter() - started

    def fit_epochs(self, number: int | None = None) -> None:
        """Trains to the end of so many epochs, or of all that are left and worth it, and validates after each.

        While it trains, `state` is ahead of the steps reported to callbacks, by the calls in flight. Without validation
        this holds at the end of an epoch as well, since the devices do not wait there.
        After a callback that raises, the state stays ahead; call `fit` again then, or assign another `state`.

        Ctrl-C lets the calls in flight end, about a second, and a validation: then KeyboardInterrupt is raised in all
        processes, the state is that of the last step that was reported, and `fit_epochs` goes on from it. A second
        Ctrl-C raises at once, and leaves the trainer as a callback that raises does.

        Args:
          number: the epoch under way is one.

        Raises:
          Diverged: when the loss is no longer finite.
          Preempted: when the run was asked to stop; its state is saved.
          AuditFailed: when an epoch did not use every row once.
          KeyboardInterrupt: after Ctrl-C.
        """
        alike = {"number of epochs": (str(number), ""), "step": (f"{self.step:,}", "")}
        processes.require_alike("fit_epochs", "give the same in all processes", lambda: alike)
        self.loop.run(number, self._sync)

    def fit_epoch(self) -> None:
        """Trains one epoch and validates (D2L section 3.4.4): `fit_epochs(1)`, or nothing where all are trained."""
        self.fit_epochs(1)

    def _sync(self) -> None:
        for callback in self._callbacks:
            callback.on_sync(self)

    def add_callback(self, callback: Callback) -> None:
        """Lets a callback receive the events from now on, after those that do already."""
        self._callbacks.append(callback)

    def restore_best(self) -> bool:
        """With `patience`, goes back to the parameters of the best epoch; whether that is not the last one."""
        return self.loop.restore_best()

    def set_linear_params(self, w: np.ndarray, b: np.ndarray, train_loss: float) -> None:
        """Takes copies of the parameters w [d, t] and b [t] of a linear model, validates, and reports an epoch."""
        leaves, structure = jax.tree.flatten(self.loop.state.shapes.params)
        given = [np.asarray(w if leaf.ndim > 1 else b, leaf.dtype) for leaf in leaves]
        self.loop.set_params(jax.tree.unflatten(structure, given), train_loss)

    def predict(self, x: Any) -> np.ndarray:
        """What the trained model predicts for rows: [n, t] float64, in original units.

        Args:
          x: [n, d]; after training on a table, the table's columns in original units, see `Predictor.predict`.
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
        """The pipeline of the rows held out."""
        return self._laid_out.val

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return self.loop.program.model

    @property
    def state(self) -> TrainState:
        """A copy of the TrainState, replicated over the devices: further training does not change it.

        A state that is assigned is copied as well: its step, parameters, optimizer state and batch statistics are
        taken, while the model and the optimizer stay the trainer's.

        Raises:
          InputError: where nothing is trained yet, or a second Ctrl-C ended a call of the steps.
        """
        return self.loop.state.copy()

    @state.setter
    def state(self, state: TrainState) -> None:
        self.loop.replace_state(state)

    @property
    def variables(self) -> dict[str, Any]:
        """A copy of what the model predicts with: "params" and "batch_stats"."""
        return self.loop.state.copy_variables()

    @property
    def step(self) -> int:
        """Steps that are done and reported."""
        return self.loop.step

    @property
    def done(self) -> bool:
        """Whether all epochs are trained, or no more are worth it."""
        return self.loop.done

    @property
    def train_loss(self) -> float:
        """The mean loss of the last epoch; NaN before its end."""
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
        """Bytes of what a step sums over devices: gradients, batch statistics and their rows, loss and weight.

        Ordered, those of each shard. What a BatchNorm over the batch exchanges in its layer is not among them.
        """
        shapes, settings = self.loop.state.shapes, self.settings
        leaves = jax.tree.leaves((shapes.params, shapes.batch_stats))
        sums = sum(leaf.size for leaf in leaves) + (3 if shapes.batch_stats else 2)
        shards = settings.num_shards if settings.reduction == "ordered" else 1
        return int(sums) * settings.dtype.itemsize * shards

    @property
    def _laid_out(self) -> LaidOutData:
        if self._data is None:
            raise InputError("the trainer has no rows yet; call fit, or prepare_data")
        return self._data

    @property
    def loop(self) -> Loop:
        """The run: what is trained, how far it is, and the program that computes it.

        Raises:
          InputError: before rows and a model are prepared.
        """
        if self._loop is None:
            raise InputError("there is no trained state; call fit first, or prepare_data and prepare_model")
        return self._loop
