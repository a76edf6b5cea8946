"""The file of predictions: whole, or not there."""

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
    """Writes one row for each row of a table: its number there, from 1, and what is predicted for each target.

    A context manager: the file gets its name when all is written, and replaces one of that name.

    Args:
      path: .csv or .parquet. None: nothing is written.
      targets: the names of the predicted columns.

    Raises:
      InputError: when it cannot be written.
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
                raise self._wrong(error) from error
        return self

    def write(self, prediction: np.ndarray, valid: np.ndarray) -> None:
        """The next rows: [n, t], and which of them [n] have a prediction; the others get none."""
        number = np.arange(self._rows + 1, self._rows + 1 + len(prediction))
        self._rows += len(prediction)
        if self._path:
            columns = [pa.array(column, mask=~valid) for column in prediction.T]
            try:
                self._writer.write_batch(pa.RecordBatch.from_arrays([pa.array(number), *columns], schema=self._schema))
            except OSError as error:
                raise self._wrong(error) from error

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
                raise self._wrong(failed) from failed
        finally:
            self._new.unlink(missing_ok=True)

    def _wrong(self, error: OSError) -> InputError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
        return InputError(f"{spell('output', self._path)}: {reason}; name another file")
