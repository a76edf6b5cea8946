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

from dpreg.errors import InputError
from dpreg.files import publish
from dpreg.spelling import spell

_WRITERS = {".csv": pyarrow.csv.CSVWriter, ".parquet": pyarrow.parquet.ParquetWriter}


class PredictionWriter:
    """A context manager that writes the row number, from 1, and the predictions of each row of a table.

    The file is renamed to its final name when it is complete, and replaces an existing one.

    Args:
      path: a file with the ending .csv or .parquet. None writes nothing.
      targets: the names of the predicted columns.

    Raises:
      InputError: when the file cannot be written.
    """

    def __init__(self, path: pathlib.Path | None, targets: Sequence[str]):
        self._path, self._rows = path, 0
        self._schema = pa.schema([("row", pa.int64()), *((f"predicted_{target}", pa.float64()) for target in targets)])

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
          prediction: [n, t] the predictions.
          valid: [n] bool; the other rows are written without a prediction.
        """
        numbers = np.arange(self._rows + 1, self._rows + 1 + len(prediction))
        self._rows += len(prediction)
        if self._path:
            columns = [pa.array(column, mask=~valid) for column in prediction.T]
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
