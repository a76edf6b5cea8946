"""The training loop: dispatches blocks of steps to the compiled program, and calls the callbacks."""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dpreg.data.pipeline import Block
from dpreg.distributed import devices
from dpreg.distributed.interrupts import Interrupts, deferred
from dpreg.errors import AuditFailed, Diverged, InputError
from dpreg.spelling import spell
from dpreg.step.donated import DonatedState
from dpreg.step.layout import LOSS, NORM, WEIGHT, call_arguments
from dpreg.step.state import TrainState
from dpreg.train.audit import Audit
from dpreg.train.callback import Callback, Progress
from dpreg.train.predictor import metrics_of
from dpreg.train.program import Program

_LOG_POINTS = 8  # in an epoch if log_every_steps is 0; the last is its end


@dataclasses.dataclass(frozen=True)
class Best:
    """The epoch with the least validation loss so far, on the host.

    Attributes:
      val_loss: the least validation loss; infinite before the first epoch.
      step: the step at the end of that epoch.
      variables: {"params", "batch_stats"} as NumPy arrays.
    """

    val_loss: float
    step: int
    variables: Mapping[str, Any]


class Loop:
    """Trains a program's state, and calls the callbacks.

        while step < stop and patience is left:
            until the next sync point:        # `stop`, the end of an epoch with validation, or `callback.next_sync`
                dispatch a block of steps     # while earlier blocks are computed
                wait for the sums of the oldest block:         callback.on_result()
                at each log point in it:                       callback.on_log(progress)
                after it, and at the end of an epoch in it:    callback.on_steps(progress)
                at the end of an epoch: audit, validation:     callback.on_epoch(progress)
                if callback.requests_sync(): dispatch no more
            no step is in flight:                              callback.on_sync(trainer)

    Args:
      program: the rows and the compiled steps.
      state: the train state, which the loop replaces.
      callbacks: called in this order.
      seconds: the loop adds the seconds of "train" and "eval" to it.

    Attributes:
      program, state, callbacks: as given.
      step: the number of steps done and reported.
      steps_trained: how many of them this loop did, without those of a state that it has loaded.
      audit: counts the rows used in this epoch.
      best: with patience, the best epoch so far.
      epoch_sums: [steps of an epoch, 3], for each step of this epoch so far the weighted loss sum, the weight sum and
        the norm of the gradient: the columns LOSS, WEIGHT and NORM of `dpreg.step.layout`.
      train_loss, val_loss, metrics: the results of the last epoch.
    """

    def __init__(self, program: Program, state: DonatedState, callbacks: Sequence[Callback], seconds: dict[str, float]):
        self.program, self.state, self.callbacks, self._seconds = program, state, callbacks, seconds
        self._settings = program.data.settings
        self.audit = Audit(self._settings.audit)
        self.steps_trained, self._rows_per_second = 0, 0.0
        self.train_loss = math.nan
        self.val_loss: float | None = None
        self.metrics: dict[str, float] = {}
        self.step, self.epoch_sums, self.best = 0, np.zeros((program.steps_per_epoch, 3)), Best(math.inf, 0, {})
        self._training, self._all_reported = False, True  # whether `run` is active; whether all steps are reported
        self._in_flight: Any = None  # results of the latest compiled call
        self._digest: str | None = None
        self._go_to(0)

    @property
    def num_steps(self) -> int:
        """The number of steps of the run."""
        return int(self.program.data.train.num_steps)

    @property
    def done(self) -> bool:
        """Whether all epochs are trained, or `patience` has run out."""
        patience = self._settings.patience * self.program.steps_per_epoch
        return self.step >= self.num_steps or bool(patience and self.step - self.best.step >= patience)

    @property
    def computation(self) -> str | None:
        """A digest of what the model computes, see `dpreg.step.digest.digest_training`."""
        if self._digest is None:
            self._digest = self.program.digest(self.state.shapes)
        return self._digest

    def run(self, number: int | None, on_sync: Callable[[], None]) -> None:
        """Trains `number` epochs, or until `done`: see `Trainer.fit_epochs`.

        Args:
          number: the number of epochs, including one that is partly trained; None for all.
          on_sync: called at each sync point.
        """
        self.require_idle()
        if self.program.train_block is None:
            raise InputError("trains=False: the model is prepared without steps; prepare it with them to train it")
        if not self._all_reported:
            raise InputError("fit_epochs is running, or was ended between steps and reports; fit anew")
        stop, steps = self.num_steps, self.program.steps_per_epoch
        if number is not None:
            stop = min(stop, (self.step // steps + number) * steps)
        with deferred() as interrupts:
            while self.step < stop and not self.done:
                self._training, self._all_reported = True, False
                try:
                    self._train_to(self._next_sync(stop), interrupts)
                    self._all_reported = True
                except (Diverged, AuditFailed):  # raised in all processes; none may leave while calls are in flight
                    jax.block_until_ready(self._in_flight)
                    self._all_reported = True
                    raise
                finally:
                    self._training = False
                on_sync()
                self.report_result()
                if interrupts.pending:
                    raise KeyboardInterrupt

    def require_idle(self) -> None:
        """Raises InputError unless the state is that of `step`, the number of steps reported.

        It is ahead while steps are in flight, as in most callbacks, and after a callback that raised.
        """
        step = int(self.state.current.step)
        if step != self.step:
            raise InputError(
                f"the state is after step {step:,}, and callbacks do not know of all of it: steps are in flight, or "
                "were ended by Ctrl-C or a callback that raised; let fit_epochs return, or fit anew"
            )

    def report_result(self) -> None:
        """Calls `on_result` of every callback."""
        for callback in self.callbacks:
            callback.on_result()

    def _next_sync(self, stop: int) -> int:
        """The next scheduled sync point, at most `stop`."""
        asked = [callback.next_sync(self.step) for callback in self.callbacks]
        steps = self.program.steps_per_epoch
        validation = [self.step - self.step % steps + steps] if self.program.data.val else []
        return min([stop, *validation, *(step for step in asked if step is not None and step > self.step)])

    def _train_to(self, stop: int, interrupts: Interrupts) -> None:
        """Trains up to step `stop`, or until a sync point is requested, and reports the steps."""
        first, rows_per_step = self.step, len(self.program.data.train.source) / self.program.steps_per_epoch
        began, evaluated = time.perf_counter(), self._seconds["eval"]
        with contextlib.closing(self._dispatch(stop, interrupts)) as calls:
            for block, (sums, used) in devices.fetch_in_order(calls, self.report_result):
                finite = np.isfinite(sums[: block.num_steps, LOSS])
                good = block.num_steps if finite.all() else int(finite.argmin())
                speed = (block.first_step + good - first) / (time.perf_counter() - began)
                self._rows_per_second = speed * rows_per_step
                self._report(sums[:good], used[:, :good])
                if good < block.num_steps:
                    raise Diverged(self.step + 1)
        self._seconds["train"] += time.perf_counter() - began - (self._seconds["eval"] - evaluated)
        self.steps_trained += self.step - first

    def _dispatch(self, stop: int, interrupts: Interrupts) -> Generator[tuple[Block, Any]]:
        """Dispatches blocks up to step `stop`, or until a sync point is requested."""
        first, data = self.step, self.program.data
        for block in data.train.blocks(first, stop):
            if block.first_step > first:
                # Calls all of them, without short-circuiting: they may communicate between processes.
                requested = [interrupts.poll(), *(callback.requests_sync() for callback in self.callbacks)]
                if any(requested):
                    return
            arguments = call_arguments(data.train, block)
            with jax.profiler.StepTraceAnnotation("train", step_num=block.first_step):
                sums, used = self.state.advance(self.program.train_block, *arguments)
            self._in_flight = sums, self.program.gather_used(used)
            yield block._replace(data=None), self._in_flight

    def _report(self, sums: np.ndarray, used: np.ndarray) -> None:
        """Reports the next n steps, whose sums are [n, 3], and what they used [devices, n, 2]."""
        taken, steps = 0, self.program.steps_per_epoch
        while taken < len(sums):
            end = min(taken + steps - self.step % steps, len(sums))
            self._report_in_epoch(sums[taken:end], used[:, taken:end])
            taken = end

    def _report_in_epoch(self, sums: np.ndarray, used: np.ndarray) -> None:
        """Reports the next steps, all of one epoch."""
        steps, every = self.program.steps_per_epoch, self._log_every
        before = self.step % steps
        start, done = self.step - before, before + len(sums)
        if before == 0:
            self.epoch_sums = np.zeros((steps, 3))
            self.audit.begin()
        self.epoch_sums[before:done] = sums
        self.audit.add(used)
        # Without the end of the epoch, which `_end_epoch` reports after its validation.
        for point in range(before // every * every + every, min(done + 1, steps), every):
            norm = float(self.epoch_sums[point - 1, NORM])
            train_loss = mean_loss(self.epoch_sums[point - every : point])
            progress = self._progress(start + point, train_loss=train_loss, gradient_norm=norm)
            for callback in self.callbacks:
                callback.on_log(progress)
        progress = self._progress(start + done)
        for callback in self.callbacks:
            callback.on_steps(progress)
        self.step = start + done  # only now: if a callback has raised, the step is not that of the state
        if done == steps:
            self._end_epoch()

    def _end_epoch(self) -> None:
        """Audits the epoch that the last step has ended, validates, and reports it."""
        self.train_loss, due = mean_loss(self.epoch_sums), self.program.audit_total
        used = None if due is None else self.audit.check(self.step, due)
        self._validate_finitely()
        if self._settings.patience and self.val_loss is not None and self.val_loss < self.best.val_loss:
            self.best = Best(self.val_loss, self.step, jax.device_get(self.state.copy_variables()))
        unlogged = (len(self.epoch_sums) - 1) // self._log_every * self._log_every
        norm = float(self.epoch_sums[-1, NORM])
        self._report_epoch(mean_loss(self.epoch_sums[unlogged:]), gradient_norm=norm, audit=used)

    def _report_epoch(self, train_loss: float, **values: Any) -> None:
        progress = self._progress(
            self.step, train_loss=train_loss, val_loss=self.val_loss, metrics=self.metrics, **values
        )
        for callback in self.callbacks:
            callback.on_epoch(progress)

    def _progress(self, step: int, **values: Any) -> Progress:
        epoch, speed = step / self.program.steps_per_epoch, self._rows_per_second
        return Progress(step, self.num_steps, epoch, self._settings.max_epochs, rows_per_second=speed, **values)

    @property
    def _log_every(self) -> int:
        return self._settings.log_every_steps or -(-self.program.steps_per_epoch // _LOG_POINTS)

    def _validate_finitely(self) -> None:
        self.validate()
        if self.val_loss is not None and not math.isfinite(self.val_loss):
            raise Diverged(self.step, validation=True)

    def validate(self) -> None:
        """Sets `val_loss` and `metrics`: weighted means over all validation rows, independent of their batches."""
        data = self.program.data
        if data.val is None or self.program.eval_block is None:
            self.val_loss, self.metrics = None, {}
            return
        started = time.perf_counter()
        evaluated, unpacked = self.program.eval_block
        calls = ((block, evaluated(self.state.variables, *call_arguments(data.val, block))) for block in data.val)
        found = [unpacked(sums) for _, sums in devices.fetch_in_order(calls, self.report_result)]
        self.val_loss, self.metrics = metrics_of(self.program.model, data.schema, found)
        if self.train_loss == 0 and 0 < self.val_loss < float(np.finfo(np.float32).tiny):
            logging.warning(
                "the training loss and the norm of the gradient are 0 as %s, for the targets are tiny; use %s, or "
                "another unit",
                *(self._settings.dtype, spell("target_transform", "standardize")),
            )
        patience = self._settings.patience
        if patience and not any(sums.weight.sum() > 0 for sums in found):
            asked = spell("patience", patience)
            raise InputError(f"{asked}: no row held out has a weight to measure by; hold out others")
        self._seconds["eval"] += time.perf_counter() - started

    def restore_best(self) -> bool:
        """With `patience`, restores the parameters of the best epoch, and returns whether it is not the last one."""
        if not (self._settings.patience and 0 < self.best.step < self.step):
            return False
        self.state.replace(**self.best.variables)
        self.validate()
        return True

    def load_state(
        self, state: TrainState, epoch_sums: np.ndarray, rows_used: np.ndarray | None = None, best: Best | None = None
    ) -> None:
        """Continues from a saved state, with the sums of its epoch so far, the rows used in it, and the best epoch.

        Raises:
          Diverged: when the state is at the end of an epoch, and its validation loss is not finite.
        """
        self.state.take(state)
        self._go_to(int(state.step))
        self.best, self.epoch_sums = best or self.best, epoch_sums.astype(np.float64)
        self.audit.begin(rows_used)
        if self.step and self.step % self.program.steps_per_epoch == 0:
            self.train_loss = mean_loss(self.epoch_sums)
            self._validate_finitely()

    def replace_state(self, state: TrainState) -> None:
        """Continues from a copy of another state.

        Raises:
          InputError: if its step is neither the step of the loop nor the end of an epoch.
        """
        steps, step = self.program.steps_per_epoch, int(state.step)
        if self._training:
            self.require_idle()
        moves = step != self.step or not (self._all_reported or self._training)
        if moves and (step % steps or self._training):
            raise InputError(
                f"trainer.state: it is after step {step:,}, and the trainer goes on from step {self.step:,} or the end "
                f"of an epoch of {steps:,} steps; give state.replace(step=0) to begin with its parameters"
            )
        self.state.take(state)
        if moves:
            self._go_to(step)

    def set_params(self, params: Any, train_loss: float) -> None:
        """Assigns a copy of parameters that a solver has found, validates, and reports them as an epoch."""
        self.state.replace(params=params)
        self.train_loss = train_loss
        self.validate()
        self._report_epoch(train_loss)

    def _go_to(self, step: int) -> None:
        """Moves to the step of a state that was assigned, which is then the best; no row of its epoch counts as used.

        Within an epoch, `load_state` then sets the sums and the rows used so far.
        """
        self.step, self._all_reported = step, True
        self.epoch_sums = np.zeros((self.program.steps_per_epoch, 3))
        self.audit.begin()
        variables = jax.device_get(self.state.copy_variables()) if self._settings.patience else {}
        self.best = Best(math.inf, step, variables)


def mean_loss(sums: np.ndarray) -> float:
    """The mean loss per weight of steps, from their [steps, 3] sums; 0 if no row has a weight."""
    loss, weight = sums[:, LOSS : WEIGHT + 1].sum(axis=0)  # a view: indices would copy, and change the order of the sum
    return float(loss / weight) if weight > 0 else 0.0
