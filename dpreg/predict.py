"""The modes evaluate and predict: a trained model on the rows of a table, in a stream and in their order."""

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
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console

from dpreg.config import Config
from dpreg.data.sources import Rows
from dpreg.distributed import devices, processes
from dpreg.distributed.watchdog import Watchdog
from dpreg.doctor import agree
from dpreg.errors import InputError, prefix_errors
from dpreg.outputs.export import Exported, load_model
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
    """Predicts the rows of `config.dataset` into `config.output`, or, to evaluate, prints how well it does.

    All processes read the table; each device predicts its share, and the first process writes.

    Raises:
      InputError: for what cannot be done; there is no output then.
    """
    with contextlib.ExitStack() as stack:
        agree(config)
        first = jax.process_index() == 0
        watchdog = stack.enter_context(Watchdog(config.step_timeout))
        progress = stack.enter_context(ProgressDisplay(Console(stderr=True, quiet=not first)))
        # Heard between chunks: what a handler raises is lost where it meets a callback of the garbage collector.
        asked = threading.Event()
        for number in (signal.SIGTERM, signal.SIGUSR1):  # which mpirun passes on
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: asked.set()))
        exported = load_model(pathlib.Path(config.workdir or "") / "model")
        config, schema = config.use_model_settings(exported.flags), exported.schema
        if schema is None:
            where = spell("workdir", config.workdir)
            raise InputError(f"{where}: its model was not trained on a table; predict from Python")
        evaluating = config.mode == "evaluate"
        table, columns = open_dataset(config), columns_of(schema, config.columns(), evaluating)
        table.require(columns.used_columns)
        _compare({"model": exported.digest, "table": [size for _, size, *_ in table.signature]})
        model = build_model(config, exported.num_inputs, exported.num_targets)
        _require_fit(model, exported, config.workdir)
        predictor = Predictor(
            model,
            exported.variables,
            exported.num_inputs,
            exported.num_targets,
            mesh=devices.data_mesh(config.num_shards, config.platform, config.num_devices),
            num_shards=config.num_shards,
            batch_size=config.batch_size,
            schema=schema,
            precision=config.precision,
            reduction=config.reduction,
            backend=config.backend,
            on_result=watchdog.progress,
        )
        read = RawRows(table, columns, schema, predictor.dtype)
        chunks = _chunks(read, table.name, predictor.chunk_rows, progress, asked)
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
            _write(PredictionWriter(path if first else None, [t.name for t in schema.targets]), predictor, chunks, read)
            if first:
                missing = read.rows - read.used
                without = f"; {missing:,} have none, since values are missing" if missing else ""
                show(f"predictions of {read.rows:,} rows in {path}{without}")
        for name, rows in read.others.items():
            progress.say(
                f"column {name!r}: {rows:,} of {read.rows:,} rows have a category that the model does not tell apart"
            )


def threads_of(config: Config) -> int | None:
    """Those that the model to predict with was trained with; where there is no model, `predict` will say so."""
    try:
        return config.use_model_settings(load_model(pathlib.Path(config.workdir or "") / "model").flags).threads
    except InputError:
        return None


def _require_fit(model: Model, exported: Exported, workdir: str | None) -> None:
    """Raises InputError where the parameters are not of the model's code, or it computes something else by now."""

    def shapes(variables: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(dict(variables))
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    row = jax.ShapeDtypeStruct((1, exported.num_inputs), np.float32)
    init = functools.partial(model.init, **mode_arguments(model, False))
    expected, found = shapes(jax.eval_shape(init, jax.random.key(0), row)), shapes(exported.variables)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{workdir}/model: the model cannot be used (parameter {name} has shape {found.get(name)}, and its "
                f"code asks for {expected.get(name)}); run the training command again"
            )
    now = digest_prediction(model, exported.variables, exported.num_inputs, exported.num_targets)
    if differ(exported.computation, now):
        raise InputError(
            f"{workdir}/model: the code of the model computes something else than when it was trained; restore that "
            f"code, or run the training again with {spell('resume', 'never')}"
        )


def _compare(own: dict[str, Any]) -> None:
    """Raises InputError where another process has another model or table."""
    for process, text in enumerate(processes.allgather_text(json.dumps(own))):
        for what, theirs in json.loads(text).items():
            if theirs != own[what]:
                raise InputError(
                    f"process {process} sees another {what} than process {jax.process_index()}; "
                    "give both the same files"
                )


def _refuse_input(output: pathlib.Path, dataset: str, table: Table) -> None:
    """Raises InputError where predictions would become rows of the table, or take their place."""
    path = output.absolute()
    inside = pathlib.Path(dataset).is_dir() and path.parent.samefile(dataset) if path.parent.exists() else False
    of_table = path.exists() and any(path.samefile(file) for file, *_ in table.signature)
    if inside or of_table or path.match(os.path.abspath(dataset)):
        raise InputError(
            f"{spell('output', output)}: that is a file of {spell('dataset', dataset)}, or would be; name another file"
        )


def _write(writer: PredictionWriter, predictor: Predictor, chunks: Iterator[Rows], read: RawRows) -> None:
    """Writes all predictions. What keeps one process from writing is told when no other waits for its devices."""
    failed: InputError | None = None
    with writer:
        for prediction in predictor.predictions(chunks):
            valid = read.valid.popleft()
            try:
                if failed is None:
                    writer.write(prediction, valid)
            except InputError as error:
                failed = error
                if jax.process_count() == 1:
                    break
        if failed is not None:
            raise failed


def _chunks(
    read: RawRows, name: str, most: int, progress: ProgressDisplay, asked_to_stop: threading.Event
) -> Iterator[Rows]:
    """The rows of the table as the model sees them; says how many were read, and stops where that is asked for."""
    started = time.perf_counter()
    for rows in read.chunks(most):
        if asked_to_stop.is_set():
            sys.exit(143)  # by way of what closes files and takes away what is not complete
        yield rows
        speed = read.rows / (time.perf_counter() - started)
        progress.doing(f"{name}: {read.rows:,} rows, {speed:,.0f} rows/s")
