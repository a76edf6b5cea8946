"""Writes the file of predictions, which is either complete or absent."""

import errno
import os
import pathlib
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dpreg.data.schema import Label
from dpreg.errors import InputError
from dpreg.files import publish
from dpreg.spelling import spell
from dpreg.tables.standalone import choose_labels, label_text

_WRITERS = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}


class PredictionWriter:
    """A context manager that writes the row number, from 1, and the predictions of each row of a table.

    For a target of labels, the prediction is the most probable label, and a column `probability_LABEL` for each label
    has its probability. No two columns have the same name, since no two labels have the same text.

    The file is renamed to its final name when it is complete, and replaces an existing one.

    Args:
      path: a file with the ending .csv or .parquet. None writes nothing.
      targets: the names of the predicted columns.
      labels: the labels of the only target, if it has some.
      others: the names of further columns of numbers.

    Raises:
      InputError: when the file cannot be written.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        targets: Sequence[str],
        labels: Sequence[Label] = (),
        others: Sequence[str] = (),
    ):
        self._path, self._rows, self._labels = path, 0, labels
        kind = {str: pa.string(), bool: pa.bool_()}.get(type(next(iter(labels), 0.0)), pa.float64())
        predicted = [(f"predicted_{target}", kind) for target in targets]
        numbers = [*(f"probability_{label_text(label)}" for label in labels), *others]
        self._schema = pa.schema([("row", pa.int64()), *predicted, *((name, pa.float64()) for name in numbers)])

    def __enter__(self) -> "PredictionWriter":
        if self._path:
            self._new = self._path.with_name(f".{self._path.name}.new-{os.getpid()}")
            try:
                self._writer = _WRITERS[self._path.suffix.lower()](self._new, self._schema)
            except OSError as error:
                self._new.unlink(missing_ok=True)
                raise self._make_error(error) from error
        return self

    def write(self, prediction: np.ndarray, valid: np.ndarray) -> None:
        """Writes the next rows.

        Args:
          prediction: [n, columns] the predictions, or for labels their probabilities [n, C]; then the other columns.
          valid: [n] bool; the other rows are written without a prediction.
        """
        numbers = np.arange(self._rows + 1, self._rows + 1 + len(prediction))
        self._rows += len(prediction)
        if self._path:
            values = [*prediction.T]
            if self._labels:
                values = [*choose_labels(prediction[:, : len(self._labels)], self._labels).T, *values]
            columns = [
                pa.array(column, field.type, mask=~valid)
                for column, field in zip(values, [*self._schema][1:], strict=True)
            ]
            try:
                self._writer.write_batch(pa.RecordBatch.from_arrays([pa.array(numbers), *columns], schema=self._schema))
            except OSError as error:
                raise self._make_error(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._path:
            return
        try:
            self._writer.close()
            if error is None:
                publish(self._new, self._path)
        except OSError as failed:
            if error is None:
                raise self._make_error(failed) from failed
        finally:
            self._new.unlink(missing_ok=True)

    def _make_error(self, error: OSError) -> InputError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
        return InputError(f"{spell('output', self._path)}: {reason}; name another file")
