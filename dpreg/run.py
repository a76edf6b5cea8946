"""One run: from its rows to the parameters and the outputs in its workdir."""

import atexit
import contextlib
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dpreg.config import Config
from dpreg.data.schema import Schema
from dpreg.data.sources import RegressionData
from dpreg.distributed import devices
from dpreg.distributed.sync_signal import SyncSignal
from dpreg.distributed.watchdog import Watchdog
from dpreg.doctor import agree
from dpreg.errors import Diverged, InputError, Preempted, quote_names
from dpreg.outputs.checkpoint import Checkpoints
from dpreg.outputs.export import ExactFit, save_model
from dpreg.outputs.fit_table import as_text
from dpreg.outputs.metrics import MetricsWriter, is_start, note_start, read_records, to_json
from dpreg.outputs.profile import Profiler
from dpreg.outputs.progress import ProgressDisplay
from dpreg.outputs.report import COMPARED_ROWS, Compared, write_report
from dpreg.outputs.smearing import smearing_factors
from dpreg.outputs.summary import (
    count_rows,
    describe_choice,
    describe_devices,
    describe_fit,
    describe_optimum,
    describe_path,
    summarize,
    target_names,
)
from dpreg.outputs.tensorboard import TensorBoardWriter, require_tensorboard
from dpreg.outputs.workdir import open_workdir, write_whole
from dpreg.solvers.elastic_net import fold_starts
from dpreg.solvers.solution import Solution
from dpreg.spelling import spell
from dpreg.step.digest import digest_prediction
from dpreg.tables.standalone import are_codes, label_text
from dpreg.terminal import show
from dpreg.train.build import build_model, build_trainer, identity_of, learning_rates
from dpreg.train.callback import Callback
from dpreg.train.defaults import constant_fit, read_rows
from dpreg.train.solve import solve
from dpreg.train.trainer import Trainer

_INTERRUPTED = 130  # exit code
_MOST_INPUTS_OF_OPTIMUM = 512  # the time of the pass grows with their square, that of a step with their number


def run(config: Config) -> None:
    """Trains as the config says and writes the outputs into its workdir.

    Of several processes, all train, evaluate and save; the first alone shows and reports.

    Raises:
      InputError: for what cannot be done; nothing is left behind then.
      Diverged: when the loss is no longer finite; the last good state is saved then.
      Preempted: when a signal asked the run to stop; its state is saved then.
    """
    agree(config)
    if config.tensorboard:
        require_tensorboard()
    sync_signal = _stop_signals()
    with open_workdir(config.workdir) as workdir, _to_go_on_in(None if config.workdir else workdir):
        _run_in(workdir, config, sync_signal)


def _run_in(workdir: pathlib.Path, config: Config, sync_signal: SyncSignal) -> None:
    first, is_chosen = jax.process_index() == 0, config.solver == "auto"
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.step_timeout))
        progress = stack.enter_context(ProgressDisplay(Console(stderr=True, quiet=not first)))
        config, data, reading, why_solver = _read(config, progress, sync_signal)
        agree(config)  # on what depends on the rows
        trainer = _prepared(config, data, progress)
        trainer.add_callback(_Heartbeat(watchdog))
        watchdog.begin()
        checkpoints = stack.enter_context(_checkpoints(config, workdir, trainer, data, sync_signal))
        for line in _describe_start(config, trainer, data, why_solver):
            progress.say(line)
        if first:
            _begin_records(workdir, config, trainer, stack, progress)
        if steps := config.profiled_steps():
            folder = workdir / "profile" if first else None
            trainer.add_callback(stack.enter_context(Profiler(folder, *steps, trainer.step)))
        config, solution = _trained(config, is_chosen, trainer, data, checkpoints, progress, sync_signal)
        compared, smearing = _compared(config, trainer, data), None
        if config.target_transform == "log":
            smearing = smearing_factors(config, trainer, data, trainer.loop.report_result)
    if first:
        summary = summarize(trainer, data, reading) | {"smearing": smearing}
        _write_outputs(workdir, config, trainer, data, summary, solution, compared)


def _describe_start(config: Config, trainer: Trainer, data: RegressionData, why_solver: str) -> Iterator[str]:
    """Yields the lines that are shown before the first step."""
    placement, why = trainer.train.resolved_placement, trainer.train.placement_reason
    rows = count_rows(data)
    held_out = f"{rows['held_out']:,}" if data.val else "none"
    yield (
        f"{rows['fitted']:,} rows, {held_out} held out, in {config.num_shards} shards on "
        f"{devices.describe(trainer.mesh.devices.flat)}: "
        f"placement {placement}{f' ({why})' if why else ''}, reduction {config.reduction}, backend {config.backend}"
    )
    reasons = {"missing": "since values are missing", "weight_0": "of weight 0"}
    if left_out := [f"{rows[name]:,} {reason}" for name, reason in reasons.items() if rows[name]]:
        yield f"rows left out: {', '.join(left_out)}"
    if why_solver:
        yield f"solver {config.solver}: {why_solver}{_other_solver(config)}"
    if data.schema and not are_codes(data.schema.labels):
        yield _describe_labels(config, data.schema)
    if config.target_transform == "log" and config.loss != "quantile":
        yield (
            f"{spell('target_transform', 'log')}: what is predicted is the median of the target; for its mean use "
            f"{spell('predict_mean')} with {spell('mode', 'predict', 'evaluate')}"
        )
    if (schema := data.schema) is not None:
        for name, constant in zip(schema.features, schema.constant, strict=True):
            if constant and name not in schema.products:  # of which many may be 0 in all rows
                yield f"column {name!r} has one value in the rows to fit, and is not used"
    if trainer.step:
        yield f"going on from step {trainer.step:,}"


def _describe_labels(config: Config, schema: Schema) -> str:
    name, texts = schema.targets[0].name, [*map(label_text, schema.labels)]
    if config.loss == "softmax":
        return f"target {name!r}: {len(texts):,} labels, {quote_names(texts)}"
    return f"target {name!r}: {texts[0]!r} is 0 and {texts[1]!r} is 1, whose probability the model predicts"


def _begin_records(
    workdir: pathlib.Path, config: Config, trainer: Trainer, stack: contextlib.ExitStack, progress: ProgressDisplay
) -> None:
    """Removes the outputs of an earlier run, and lets the trainer report to the files of this one."""
    for stale in ("summary.json", "report.html", "model/model.json"):
        (workdir / stale).unlink(missing_ok=True)
    write_whole(workdir / "flags.cfg", config.to_flagfile())
    kept = trainer.step if config.solver == "sgd" else -1  # an exact solution takes no step
    note_start(workdir / "starts.jsonl", trainer.step, trainer.mesh.size, jax.process_count())
    rates = learning_rates(config, trainer.train.num_steps)
    trainer.add_callback(progress)
    trainer.add_callback(stack.enter_context(MetricsWriter(workdir / "metrics.jsonl", kept, rates)))
    if config.tensorboard:
        writer = TensorBoardWriter(workdir, kept, config.identity(), rates)
        trainer.add_callback(stack.enter_context(writer))


def _write_outputs(
    workdir: pathlib.Path,
    config: Config,
    trainer: Trainer,
    data: RegressionData,
    summary: dict[str, Any],
    solution: Solution | None,
    compared: dict[str, Compared],
) -> None:
    """Writes the summary, the model and the report, and prints the results."""
    write_whole(workdir / "flags.cfg", config.to_flagfile())
    computation = digest_prediction(trainer.model, trainer.variables, data.num_inputs, data.num_targets)
    fit, path = (solution.fit, solution.path) if solution else (None, None)
    if path is not None:
        summary["path"] = describe_path(data, path)
    summaries = describe_fit(config, data, fit) if fit is not None and config.solver != "sgd" else []
    exact = ExactFit.of(fit, summaries) if fit is not None and summaries else None
    save_model(workdir / "model", config, trainer.variables, data, computation, summary["smearing"], exact)
    if fit is not None:
        summary["optimality"] = found = describe_optimum(trainer.state.params, data, fit)
        if "gap" in found:
            print(f"loss {found['loss']:.6g}, best possible {found['best']:.6g}{_above(found['gap'])}")
        if summaries:
            summary["fit"] = [each.to_json() for each in summaries]
            show("", *as_text(summaries))
    write_whole(workdir / "summary.json", to_json(summary, indent=2) + "\n")
    write_report(
        workdir / "report.html",
        config,
        summary,
        records=read_records(workdir / "metrics.jsonl").whole,
        starts=read_records(workdir / "starts.jsonl", is_start).whole,
        devices=describe_devices(trainer),
        compared=compared,
    )
    for name, error in summary.get("parameter_error", {}).items():
        print(f"error in estimating {name}: {np.array(error)}")
    show(f"outputs in {workdir}: summary.json, metrics.jsonl, report.html, flags.cfg, model, checkpoints")


class _Heartbeat(Callback):
    """Keeps the watchdog from ending a run that makes progress."""

    def __init__(self, watchdog: Watchdog):
        self._watchdog = watchdog

    def on_result(self) -> None:
        self._watchdog.progress()


def _trained(
    config: Config,
    is_chosen: bool,
    trainer: Trainer,
    data: RegressionData,
    checkpoints: Checkpoints,
    progress: ProgressDisplay,
    sync_signal: SyncSignal,
) -> tuple[Config, Solution | None]:
    """Trains or solves, and saves. Returns the config that was solved, and the exact solution if there is one."""
    if config.solver == "sgd":
        try:
            trainer.fit_epochs()
        except Diverged:
            checkpoints.save(trainer)
            raise
        checkpoints.save(trainer)
        if trainer.restore_best():
            epoch = trainer.loop.best.step // trainer.train.sampler.steps_per_epoch
            progress.say(f"the validation loss was least after epoch {epoch}: its parameters are kept")
        decoupled = config.optimizer == "adamw" and config.l2  # which is no penalty on the loss
        wide = data.num_inputs > _MOST_INPUTS_OF_OPTIMUM
        if not config.optimality or not config.is_least_squares() or decoupled or wide:
            return config, None
    progress.doing("solving")

    def alive() -> None:
        trainer.loop.report_result()
        _stop_where_asked(sync_signal, trainer.step or None)

    config, solution = solve(config, is_chosen, trainer, data, alive, progress.say)
    if solution.path is not None:
        progress.say(describe_choice(solution.path))
    if config.solver != "sgd":
        trainer.set_linear_params(solution.w, solution.b, solution.loss)
        if data.schema is not None and solution.infinite:
            data.schema = data.schema.without_counts(solution.infinite)  # the mean over levels stays finite
        checkpoints.save(trainer)
    return config, solution


def _compared(config: Config, trainer: Trainer, data: RegressionData) -> dict[str, Compared]:
    """Predictions and targets of some held-out rows, by the name of the target; empty for labels."""
    if config.loss == "softmax":
        return {}
    predicted, observed, weight = trainer.predictor().compared(data.val or data.train, COMPARED_ROWS)
    if predicted.shape != observed.shape:  # a loss of the user's own may take other predictions than targets
        return {}
    names = target_names(data)
    if data.schema and not are_codes(data.schema.labels):  # what is compared is the probability of the second label
        names = (f"{names[0]}={label_text(data.schema.labels[1])}",)
    return {name: Compared(predicted[:, t], observed[:, t], weight) for t, name in enumerate(names)}


def _above(gap: float | None) -> str:
    if gap is None:
        return ""
    if gap > 1e6:  # the best is 0 but for rounding
        return ""
    return f": {gap:.2%} above" if gap < 10 else f": {gap + 1:,.0f} times as much"


def _read(
    config: Config, progress: ProgressDisplay, sync_signal: SyncSignal
) -> tuple[Config, RegressionData, float, str]:
    """Reads the rows. Returns the complete config, the rows, the seconds it took, and the reason for the solver."""
    started = time.perf_counter()

    def report_rows(what: str, rows: int) -> None:
        _stop_where_asked(sync_signal)
        speed = rows / (time.perf_counter() - started)
        progress.doing(f"{what} {config.dataset}: {rows:,} rows, {speed:,.0f} rows/s")

    progress.doing(f"reading {config.dataset}")
    config, data, why = read_rows(config, report_rows)
    if config.folds:
        fold_starts(config.folds, len(data.train), data.num_targets)  # refuses wrong ones before anything is compiled
    reading = time.perf_counter() - started
    return config, data, reading, why


def _other_solver(config: Config) -> str:
    if config.folds:
        return ""
    if config.solver != "sgd":
        return f"; for steps of an optimizer use {spell('solver', 'sgd')}"
    return f"; for the exact solution use {spell('solver', 'exact')}" if config.has_exact_solution else ""


def _prepared(config: Config, data: RegressionData, progress: ProgressDisplay) -> Trainer:
    """Makes the trainer, places its rows and compiles its steps."""
    trainer = build_trainer(config)
    trainer.prepare_data(data)
    profiled, num_steps = config.profiled_steps(), trainer.train.num_steps
    if profiled and profiled[0] >= num_steps:
        raise InputError(
            f"{spell('profile', config.profile)}: the run has {num_steps:,} steps; name two of them, from 0"
        )
    progress.doing("compiling")
    bias = constant_fit(config, data) if config.solver == "sgd" else None
    model = build_model(config, data.num_inputs, data.num_targets, num_steps, bias)
    trainer.prepare_model(model, trains=config.solver == "sgd")
    return trainer


@contextlib.contextmanager
def _to_go_on_in(unnamed: pathlib.Path | None) -> Iterator[None]:
    """Adds the folder of the run to Preempted, if the command did not name one: it is needed to resume."""
    try:
        yield
    except Preempted as stopped:
        raise Preempted(stopped.step, None if unnamed is None else str(unnamed), stopped.interrupted) from stopped


def _stop_signals() -> SyncSignal:
    """Lets SIGTERM, SIGUSR1 (which mpirun forwards) and Ctrl-C ask all processes to save and stop.

    The handlers stay until the process ends, so that a signal during its end does no harm. A second Ctrl-C ends this
    process at once, with exit code 130.
    """
    sync_signal, interrupted = SyncSignal(), threading.Event()

    def interrupt(*_: object) -> None:
        if interrupted.is_set():
            os.write(sys.stderr.fileno(), b"dpreg: interrupted again: what was saved before is there\n")
            os._exit(_INTERRUPTED)
        interrupted.set()
        sync_signal.request("interrupt")

    handlers: dict[int, Callable[..., None]] = dict.fromkeys(
        (signal.SIGTERM, signal.SIGUSR1), lambda *_: sync_signal.request("stop")
    )
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell ignores it for commands in the background
        handlers[signal.SIGINT] = interrupt
    for number, handler in handlers.items():
        signal.signal(number, handler)
        atexit.register(signal.signal, number, signal.SIG_IGN)  # at exit, the interpreter removes other handlers
    return sync_signal


def _stop_where_asked(sync_signal: SyncSignal, step: int | None = None) -> None:
    """Raises Preempted if the only process was asked to stop. Several processes stop together, at their first step."""
    interrupted = sync_signal.pending("interrupt")
    if jax.process_count() == 1 and (interrupted or sync_signal.pending("stop")):
        raise Preempted(step, interrupted=interrupted)


@contextlib.contextmanager
def _checkpoints(
    config: Config,
    workdir: pathlib.Path,
    trainer: Trainer,
    data: RegressionData,
    sync_signal: SyncSignal,
) -> Iterator[Checkpoints]:
    """The checkpoints of the run. The trainer resumes from the newest one, as the setting `resume` says."""
    with Checkpoints(
        workdir / "checkpoints",
        identity_of(config, data),
        config.checkpoint_every_seconds,
        config.checkpoint_every_steps,
        config.keep,
        sync_signal,
    ) as checkpoints:
        if config.resume == "never":
            checkpoints.clear()
            if jax.process_index() == 0:
                (workdir / "starts.jsonl").unlink(missing_ok=True)
        elif not checkpoints.restore(trainer) and config.resume == "must":
            raise InputError(
                f"{spell('resume', 'must')}: {workdir} holds no checkpoint that can be read; "
                f"name another {spell('workdir')}, or use {spell('resume', 'auto')}"
            )
        trainer.add_callback(checkpoints)
        yield checkpoints
