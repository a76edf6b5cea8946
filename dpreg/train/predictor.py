"""Prediction and evaluation by a trained model on all devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh

from dpreg.config import Columns, Config
from dpreg.config.model import LABEL_LOSSES
from dpreg.data.parts import rows_everywhere
from dpreg.data.pipeline import BLOCK_STEPS_AMONG_PROCESSES, PRECISIONS, Dataset
from dpreg.data.schema import Label, Schema
from dpreg.data.sources import ArraySource, Rows, Source, describe_rows, unmasked
from dpreg.distributed import devices, presence, processes
from dpreg.errors import InputError
from dpreg.models.losses import SQUARED, loss_of
from dpreg.models.metrics import EvalSums, eval_sums, metrics
from dpreg.models.module import Module
from dpreg.spelling import spell
from dpreg.step.checks import model_errors
from dpreg.step.compile import compile_eval_block
from dpreg.step.layout import batch_layout, call_arguments
from dpreg.step.reduce import REDUCTION_BY_NAME
from dpreg.step.state import Model
from dpreg.tables.raw import RawRows, columns_of, encoded_schema, open_columns, open_source
from dpreg.tables.standalone import choose_labels, predicted_labels, to_probabilities

_CHUNK_BYTES = 16 << 20  # rows of one compiled call
_CHUNK_STEPS = BLOCK_STEPS_AMONG_PROCESSES  # a chunk is one block, among processes, too
_OfChunks = Callable[[Iterable[Rows]], Iterator[np.ndarray]]  # results of each chunk, in the order of its rows

ROWS_IN_PARTS = (
    "give the same to all processes; rows of which each process has its own part go through "
    "dpreg.RegressionData.from_parts(train=own_rows)"
)


def bind_eval_sums(model: Model, schema: Schema | None) -> Callable[[Any, Any, Any], EvalSums]:
    """The function from the predictions of a batch to the sums that evaluation needs."""
    smearing = schema.smearing if schema is not None else ()
    return functools.partial(eval_sums, model, schema is not None and schema.log_targets, smearing=smearing)


def metrics_of(model: Model, schema: Schema | None, found: Sequence[EvalSums]) -> tuple[float, dict[str, float]]:
    """The mean loss, and the metrics that fit the loss in original units, from the `EvalSums` of blocks."""
    scale = 1.0 if schema is None else np.array([target.scale for target in schema.targets])
    own_loss = not isinstance(model, Module) or type(model).loss is not Module.loss
    of_squares = not own_loss and loss_of(model) == SQUARED and not (schema is not None and schema.log_targets)
    return metrics(found, scale, loss_of(model).metrics, of_squares)


class Predictor:
    """Predicts rows in chunks of one size by one compiled program, sharded over the devices.

    As in training, predictions do not depend on the number of devices: up to rounding, or to the last bit with the
    reduction "ordered".

    Args:
      model: as for `Trainer.fit`.
      variables: {"params", "batch_stats"} of the trained model; the attribute may be replaced.
      num_inputs, num_targets: the numbers of columns of x and y.
      mesh: the devices.
      num_shards: the number of logical shards, L.
      batch_size: the number of rows of a global batch.
      schema: the schema of the table that the model was trained on, if any.
      columns: the columns that were read from that table.
      precision, reduction, backend: as for `Trainer`.
      on_result: called whenever results have arrived from the devices.
    """

    def __init__(
        self,
        model: Model,
        variables: Mapping[str, Any],
        num_inputs: int,
        num_targets: int,
        *,
        mesh: Mesh,
        num_shards: int = Config.num_shards,
        batch_size: int = Config.batch_size,
        schema: Schema | None = None,
        columns: Columns | None = None,
        precision: str = Config.precision,
        reduction: str = Config.reduction,
        backend: str = Config.backend,
        on_result: Callable[[], None] = lambda: None,
    ):
        self.schema, self.columns, self.num_inputs, self.num_targets = schema, columns, num_inputs, num_targets
        self.dtype = np.dtype(PRECISIONS[precision][1])
        devices.enable(self.dtype)
        self._model, self.variables = model, devices.replicated(variables, mesh)
        self._mesh, self._num_shards, self._batch_size = mesh, num_shards, batch_size
        self._reduction, self._backend, self._on_result = REDUCTION_BY_NAME[reduction], backend, on_result
        self._precision, self._loss = precision, loss_of(model)
        mean = self._loss.mean
        self._mean: Callable[..., Any] = lambda variables, prediction, batch: mean(prediction)
        self._linear: Callable[..., Any] = lambda variables, prediction, batch: prediction
        self._eval_sums = bind_eval_sums(model, schema)
        self._compiled = dict[Callable[..., Any], tuple[Callable[..., Array], Callable[[np.ndarray], Any]]]()
        row_bytes = self.dtype.itemsize * (num_inputs + num_targets + self._loss.num_classes + 1)
        self._steps = max(2, min(_CHUNK_STEPS, _CHUNK_BYTES // (row_bytes * batch_size)))

    @property
    def chunk_rows(self) -> int:
        """The number of rows of a chunk; the last one may have fewer."""
        return self._steps * self._batch_size

    @processes.together()
    def predict(self, x: Any) -> np.ndarray:
        """The predictions for rows: [n, t] float64, in original units.

        For labels of a table they are [n, 1] and the most probable label: float64 for numbers, and objects otherwise
        (text or bool, and None instead of NaN). For the numbers 0 and 1 they are the probability of 1.

        Args:
          x: the features [n, d] in the units of training. For a model that was trained on a table, the columns of such
            a table in their original units: by name (a mapping, a pandas DataFrame, an Arrow table), or as an array
            [n, columns] in the table's order. The prediction of a row with a missing value is NaN, unless the model was
            trained with missing="mean".

        Raises:
          InputError: for rows of another shape, missing columns, and values that are not finite numbers.
        """
        if self.labels:
            return choose_labels(self._predict(x, self.probabilities), self.labels)
        return self._predict(x, self.predictions)

    @processes.together()
    def predict_proba(self, x: Any) -> np.ndarray:
        """The probabilities of the labels, in the order of `schema.labels`: [n, C] float64.

        Args:
          x: as in `predict`. A row with a missing value gets NaN, as there.

        Raises:
          InputError: as in `predict`, and for a model that was not trained on a table with labels.
        """
        if not self._schema_labels:
            remedy = f"use predict, or train on a table with {spell('target_transform', 'labels')}"
            raise InputError(f"the model has no labels; {remedy}")
        return self._predict(x, self.probabilities)

    def _predict(self, x: Any, of_chunks: _OfChunks) -> np.ndarray:
        """The results [n, ...] of `predictions` or `probabilities` for rows x, as in `predict`."""
        processes.require_alike("predict", ROWS_IN_PARTS, lambda: {"rows": describe_rows(x)})
        if hasattr(x, "fingerprint"):
            return self._predict_source(x, of_chunks)
        if self.schema is None:
            return self._predict_encoded(self._array(x), of_chunks)
        columns = self._columns_of(self.schema)
        rows = RawRows(open_columns(x, columns), columns, self.schema, self.dtype)
        return np.concatenate(list(self._predict_raw(rows, of_chunks)))

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels that are predicted; none if predictions are numbers, such as the probability of 1 for 0 and 1."""
        return predicted_labels(self._schema_labels, self._loss.name)

    @property
    def _schema_labels(self) -> tuple[Label, ...]:
        return self.schema.labels if self.schema is not None and self._loss.name in LABEL_LOSSES else ()

    def _columns_of(self, schema: Schema) -> Columns:
        """The columns to read from a table to predict its rows; rows with missing values get no prediction."""
        columns = columns_of(schema, self.columns, targets=False)
        return dataclasses.replace(columns, missing="drop") if columns.missing == "error" else columns

    def _predict_raw(self, rows: RawRows, of_chunks: _OfChunks) -> Iterator[np.ndarray]:
        """The predictions of each chunk of a table; NaN for a row with missing values."""
        for predicted in of_chunks(rows.chunks(self.chunk_rows)):
            predicted[~rows.valid.popleft()] = np.nan
            yield predicted

    def _predict_encoded(self, x: np.ndarray, of_chunks: _OfChunks) -> np.ndarray:
        rows = ArraySource(x, np.zeros((len(x), self.num_targets)), dtype=self.dtype)
        return np.concatenate(list(of_chunks(self.chunks(rows, encoded=True))))

    def _array(self, x: Any) -> np.ndarray:
        """The features [n, d] for a model that was not trained on a table."""
        if isinstance(x, Mapping):
            raise InputError(f"x is a {type(x).__name__}, and the model was trained on no table; give an array of rows")
        try:
            array = np.asarray(unmasked("x", x), self.dtype)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"x is not an array of numbers: {error}; give rows of {self.num_inputs:,} numbers"
            ) from error
        if array.ndim != 2 or array.shape[1] != self.num_inputs or not len(array):
            raise InputError(f"x has shape {list(array.shape)}; give one row or more of {self.num_inputs:,} columns")
        return array

    def _predict_source(self, source: Source, of_chunks: _OfChunks) -> np.ndarray:
        """The predictions for the rows of a source; with `from_parts`, for this process's rows."""
        own: range = getattr(source, "own", range(len(source)))
        first, found = 0, []
        if self.schema is not None and encoded_schema(source) is None:  # includes rows of weight 0
            table, columns = open_source(source, self._columns_of(self.schema))
            predictions = self._predict_raw(RawRows(table, columns, self.schema, self.dtype), of_chunks)
        else:
            predictions = of_chunks(self.chunks(source))
        for predicted in predictions:
            found.append(predicted[max(own.start - first, 0) : max(own.stop - first, 0)])
            first += len(predicted)
        return np.concatenate(found)

    def compared(self, source: Source, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(predicted, observed, weight) of rows evenly spaced over a source: [n, t], [n, t] and [n] float64.

        Values are in original units. Rows of weight 0 are left out.

        Args:
          source: rows in the units of training.
          most: the largest number of rows.
        """
        rows = rows_everywhere(source, np.arange(0, len(source), -(-len(source) // most)))
        valid = rows["weight"] > 0
        predicted = self._predict_encoded(rows["x"], self.predictions)[valid]
        observed = rows["y"][valid].astype(np.float64)
        observed = observed if self.schema is None else self.schema.prediction(observed)
        return predicted, observed, rows["weight"][valid].astype(np.float64)

    def predictions(self, chunks: Iterable[Rows]) -> Iterator[np.ndarray]:
        """The predictions for each chunk in the order of its rows: [n, t] float64, in original units.

        Args:
          chunks: {"x": [n, d], "y": [n, t], "weight": [n]}, of at most `chunk_rows` rows; y is ignored.
        """
        for rows, found in self._evaluated(chunks, self._mean):
            prediction = self._in_order(rows, found)
            yield prediction.astype(np.float64) if self.schema is None else self.schema.prediction(prediction)

    def probabilities(self, chunks: Iterable[Rows]) -> Iterator[np.ndarray]:
        """The probabilities of the labels, as `predictions`: [n, C] float64."""
        for rows, found in self._evaluated(chunks, self._linear):
            yield to_probabilities(self._in_order(rows, found), self._loss.name)

    def _in_order(self, rows: int, found: np.ndarray) -> np.ndarray:
        """The results of a chunk [steps, shards, rows, p] as [n, p]: a shard has consecutive rows."""
        return np.moveaxis(found, 1, 0).reshape(self.chunk_rows, -1)[:rows]

    def evaluate(self, chunks: Iterable[Rows]) -> tuple[float, dict[str, float]]:
        """The mean loss and the metrics over the rows of all chunks, as `metrics_of`.

        Raises:
          InputError: when no row has a weight, and for a target that the loss is not defined for.
        """
        found = [sums for _, sums in self._evaluated(self._allowed(chunks), self._eval_sums)]
        if not any(sums.weight.sum() > 0 for sums in found):
            raise InputError(
                "there are no rows with a weight, and without missing values, to evaluate; name a table that has some"
            )
        return metrics_of(self._model, self.schema, found)

    def chunks(self, rows: Any, encoded: bool = False) -> Iterator[Rows]:
        """Rows with their targets, in the units of training, in chunks.

        Args:
          rows: a source. For a model that was trained on a table, also the columns of such a table as in `predict`,
            with the targets; and a source of x and y in the order and units of the table's columns. Rows that were read
            with the same schema, such as `data.val`, are recognised.
          encoded: whether a source is known to be in the units of training.

        Raises:
          InputError: for other types, missing columns, and rows that were encoded by the schema of another table.
        """
        is_source = hasattr(rows, "fingerprint") and hasattr(rows, "__getitem__")
        if self.schema is None and not is_source:
            raise InputError(
                f"{type(rows).__name__} is not a source of rows; give one, such as dpreg.ArraySource(x, y)"
            )
        if self.schema is None or encoded or (is_source and encoded_schema(rows) == self.schema):
            for first in range(0, len(rows), self.chunk_rows):
                yield rows_everywhere(rows, np.arange(first, min(first + self.chunk_rows, len(rows))))
            return
        columns = columns_of(self.schema, self.columns, targets=True)
        if not is_source:
            table = open_columns(rows, columns, "the rows")
        elif encoded_schema(rows) is None:
            table, columns = open_source(rows, columns)
        else:
            raise InputError(
                "the rows were scaled and coded by the columns of another table; give the table's columns, in a "
                "mapping or a data frame"
            )
        yield from RawRows(table, columns, self.schema, self.dtype).chunks(self.chunk_rows)

    def _allowed(self, chunks: Iterable[Rows]) -> Iterator[Rows]:
        """The chunks, after a check of their targets."""
        loss, before = loss_of(self._model), 0
        for chunk in chunks:
            if loss.domain:
                wrong = ~loss.allowed(chunk["y"]).all(axis=1) & (chunk["weight"] > 0)
                for at in np.flatnonzero(wrong)[:1]:
                    raise loss.refusal(before + int(at) + 1, chunk["y"][at], "give the row no weight")
            before += len(chunk["weight"])
            yield chunk

    def _evaluated(self, chunks: Iterable[Rows], evaluate: Callable[..., Any]) -> Iterator[tuple[int, Any]]:
        """(the number of rows, the results of a compiled evaluation) for each chunk."""

        def calls() -> Iterator[tuple[int, Array]]:
            for chunk in chunks:
                rows = len(chunk["weight"])
                dataset = self._dataset(chunk)
                (block,) = dataset
                arguments = call_arguments(dataset, block)
                if evaluate not in self._compiled:
                    with presence.at_work("compiling"), model_errors(self._model):
                        self._compiled[evaluate] = compile_eval_block(
                            self._model,
                            self.variables,
                            batch_layout(dataset),
                            self._mesh,
                            arguments,
                            evaluate,
                            self._reduction,
                            self._backend,
                        )
                    processes.allgather_text()  # barrier: compile times differ, and the first collective would time out
                yield rows, self._compiled[evaluate][0](self.variables, *arguments)

        return (
            (rows, self._compiled[evaluate][1](found))
            for rows, found in devices.fetch_in_order(calls(), self._on_result)
        )

    def _dataset(self, chunk: Rows) -> Dataset:
        """The rows, padded with rows of weight 0 to the size of a chunk."""
        if (width := chunk["x"].shape[1]) != self.num_inputs:
            raise InputError(
                f"the rows have {width:,} features, and the model was trained on {self.num_inputs:,}; give that number"
            )
        missing = self.chunk_rows - len(chunk["weight"])
        if missing:
            chunk = {k: np.pad(v, [(0, missing), *[(0, 0)] * (v.ndim - 1)]) for k, v in chunk.items()}
        rows = ArraySource(chunk["x"], chunk["y"], chunk["weight"], self.dtype)
        dataset = Dataset(rows).batch(self._batch_size).cast(self._precision)
        return dataset.shard(self._mesh, self._num_shards).place("host", self._steps)
