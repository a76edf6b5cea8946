"""The modes evaluate and predict: applies a trained model to the rows of a table, as a stream in their order."""

import collections
import contextlib
import functools
import json
import math
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
from dpreg.data.sources import Rows
from dpreg.distributed import devices, processes
from dpreg.distributed.watchdog import Watchdog
from dpreg.doctor import agree
from dpreg.errors import InputError, prefix_errors
from dpreg.outputs.export import ExportedModel, load_model
from dpreg.outputs.intervals import Intervals
from dpreg.outputs.predictions import PredictionWriter
from dpreg.outputs.progress import ProgressDisplay
from dpreg.spelling import spell
from dpreg.step.checks import mode_arguments
from dpreg.step.digest import differ, digest_prediction
from dpreg.step.state import Model
from dpreg.tables.raw import RawRows, columns_of
from dpreg.tables.table import Table
from dpreg.terminal import show
from dpreg.train.build import build_model, open_dataset
from dpreg.train.predictor import Predictor


def predict(config: Config) -> None:
    """Writes predictions for the rows of `config.dataset` to `config.output`; in the mode evaluate, prints metrics.

    All processes read the table, each device predicts its share of the rows, and process 0 writes.

    Raises:
      InputError: for wrong input; then there is no output.
    """
    with contextlib.ExitStack() as stack:
        agree(config)
        first = jax.process_index() == 0
        watchdog = stack.enter_context(Watchdog(config.step_timeout))
        progress = stack.enter_context(ProgressDisplay(Console(stderr=True, quiet=not first)))
        # Checked between chunks, as Python drops an exception that a handler raises inside a callback of gc.
        stop_requested = threading.Event()
        for number in (signal.SIGTERM, signal.SIGUSR1):  # mpirun forwards SIGUSR1
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: stop_requested.set()))
        exported = load_model(pathlib.Path(config.workdir or "") / "model")
        config, schema = config.use_model_settings(exported.flags), exported.schema
        if schema is None:
            where = spell("workdir", config.workdir)
            raise InputError(f"{where}: its model was not trained on a table; predict from Python")
        intervals = Intervals(exported, schema, config.interval) if config.interval else None
        exported = exported.with_means() if config.predict_mean else exported
        evaluating = config.mode == "evaluate"
        table, columns = open_dataset(config), columns_of(schema, config.columns(), evaluating)
        table.require(columns.used_columns)
        _require_same_files({"model": exported.digest, "table": [size for _, size, *_ in table.signature]})
        predictor = _build_predictor(config, exported, watchdog.progress)
        read = RawRows(table, columns, schema, predictor.dtype)
        chunks = _iterate_chunks(read, table.name, predictor.chunk_rows, progress, stop_requested)
        watchdog.begin()
        if evaluating:
            with prefix_errors(table.name):
                loss, metrics = predictor.evaluate(chunks)
            if first:
                scores = {"loss": loss if math.isfinite(loss) else None, **metrics}
                print(json.dumps({"dataset": table.name, "rows": read.used, **scores}))
        else:
            path = pathlib.Path(config.output or "")
            _refuse_input(path, config.dataset, table)
            names, others = [target.name for target in schema.targets], intervals.names if intervals else ()
            writer = PredictionWriter(path if first else None, names, predictor.labels, others)
            _write(writer, predictor, chunks, read, intervals)
            if first:
                show(_describe_predictions(config, schema, read))
        for name, rows in read.others.items():
            progress.say(f"column {name!r}: {rows:,} of {read.rows:,} rows have none of the model's categories")


def _describe_predictions(config: Config, schema: Schema, read: RawRows) -> str:
    """The line about what was written."""
    what, missing = "predictions", read.rows - read.used
    if schema.log_targets and config.loss != "quantile":
        what = "predicted means" if config.predict_mean else "predicted medians"
    without = f"; {missing:,} have none, since values are missing" if missing else ""
    return f"{what} of {read.rows:,} rows in {config.output}{without}"


def _build_predictor(config: Config, exported: ExportedModel, on_result: Callable[[], None]) -> Predictor:
    model = build_model(config, exported.num_inputs, exported.num_targets)
    _check_model(model, exported, config.workdir)
    return Predictor(
        model,
        exported.variables,
        exported.num_inputs,
        exported.num_targets,
        mesh=devices.data_mesh(config.num_shards, config.platform, config.num_devices),
        num_shards=config.num_shards,
        batch_size=config.batch_size,
        schema=exported.schema,
        precision=config.precision,
        reduction=config.reduction,
        backend=config.backend,
        on_result=on_result,
    )


def threads_of(config: Config) -> int | None:
    """`Config.threads` of the run that trained the model; None if there is no model, which `predict` reports."""
    try:
        return config.use_model_settings(load_model(pathlib.Path(config.workdir or "") / "model").flags).threads
    except InputError:
        return None


def _check_model(model: Model, exported: ExportedModel, workdir: str | None) -> None:
    """Raises InputError if the code of the model does not fit the saved parameters, or computes something else now."""

    def list_shapes(variables: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    row = jax.ShapeDtypeStruct((1, exported.num_inputs), np.float32)
    init = functools.partial(model.init, **mode_arguments(model, False))
    expected, saved = list_shapes(jax.eval_shape(init, jax.random.key(0), row)), list_shapes(exported.variables)
    for name in sorted({*expected, *saved}):
        if expected.get(name) != saved.get(name):
            raise InputError(
                f"{workdir}/model: the model cannot be used (parameter {name} has shape {saved.get(name)}, and its "
                f"code expects {expected.get(name)}); run the training command again"
            )
    computation = digest_prediction(model, exported.variables, exported.num_inputs, exported.num_targets)
    if differ(exported.computation, computation):
        raise InputError(
            f"{workdir}/model: the code of the model computes something else than when it was trained; restore that "
            f"code, or run the training again with {spell('resume', 'never')}"
        )


def _require_same_files(own: dict[str, Any]) -> None:
    """Raises InputError if another process has another model or table."""
    for process, text in enumerate(processes.allgather_text(json.dumps(own))):
        for name, theirs in json.loads(text).items():
            if theirs != own[name]:
                raise InputError(
                    f"process {process} sees another {name} than process {jax.process_index()}; "
                    "give both the same files"
                )


def _refuse_input(output: pathlib.Path, dataset: str, table: Table) -> None:
    """Raises InputError if the file of predictions is, or would become, a file of the table."""
    path = output.absolute()
    inside = pathlib.Path(dataset).is_dir() and path.parent.samefile(dataset) if path.parent.exists() else False
    of_table = path.exists() and any(path.samefile(file) for file, *_ in table.signature)
    if inside or of_table or path.match(os.path.abspath(dataset)):
        raise InputError(
            f"{spell('output', output)}: that is a file of {spell('dataset', dataset)}, or would be; name another file"
        )


def _append_intervals(
    chunks: Iterator[Rows], intervals: Intervals, ends: collections.deque[np.ndarray]
) -> Iterator[Rows]:
    """Yields the chunks, after the ends of the intervals of each are appended to `ends`."""
    for rows in chunks:
        ends.append(intervals(rows["x"]))
        yield rows


def _write(
    writer: PredictionWriter,
    predictor: Predictor,
    chunks: Iterator[Rows],
    read: RawRows,
    intervals: Intervals | None,
) -> None:
    """Writes all predictions, with their intervals if there are any.

    If writing fails in one of several processes, it still computes the remaining predictions before it raises the
    error, as the other processes need its devices.
    """
    failed: InputError | None = None
    ends = collections.deque[np.ndarray]()
    with writer:
        if intervals is not None:
            chunks = _append_intervals(chunks, intervals, ends)
        for prediction in predictor.probabilities(chunks) if predictor.labels else predictor.predictions(chunks):
            valid = read.valid.popleft()
            columns = np.concatenate([prediction, ends.popleft()], axis=1) if ends else prediction
            try:
                if failed is None:
                    writer.write(columns, valid)
            except InputError as error:
                failed = error
                if jax.process_count() == 1:
                    break
        if failed is not None:
            raise failed


def _iterate_chunks(
    read: RawRows, name: str, chunk_rows: int, progress: ProgressDisplay, stop_requested: threading.Event
) -> Iterator[Rows]:
    """The encoded rows of the table in chunks; shows the progress, and exits if that is requested."""
    started = time.perf_counter()
    for rows in read.chunks(chunk_rows):
        if stop_requested.is_set():
            sys.exit(143)  # exit by an exception, which closes files and deletes incomplete ones
        yield rows
        speed = read.rows / (time.perf_counter() - started)
        progress.doing(f"{name}: {read.rows:,} rows, {speed:,.0f} rows/s")
