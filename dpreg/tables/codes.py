"""Codes of texts: those of categories, labels and groups."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpreg.errors import InputError
from dpreg.tables.standalone import normalize_category, to_text
from dpreg.tables.table import TableChunk
from dpreg.tables.values import TEXTS

_MOST = 1_000_000  # texts of a column, which are kept in memory with their counts


def encode_texts(
    chunk: TableChunk,
    name: str,
    column: pa.Array,
    codes: dict[str, int],
    fixed: bool = False,
    strip: bool = False,
    remedies: tuple[str, str] = ("", ""),
) -> np.ndarray:
    """The codes [n] of the values of a column; NaN for missing values, which are null, NaN or empty.

    Args:
      chunk: the batch that the column is from.
      name: of the column.
      codes: the code of each known text. The codes of new texts are added to it.
      fixed: whether no text is added; the code of a new one is -1.
      strip: whether to remove blanks around a text.
      remedies: for a column whose values are no texts, and for one that has too many texts.

    Raises:
      InputError: for such columns.
    """
    try:
        texts, indices = _distinct(column)
    except (pa.ArrowException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{chunk.where(0)}: column {name!r} holds no categories but {column.type}: {reason}; {remedies[0]}"
        ) from error
    found = np.full(len(texts) + 1, np.nan)
    for at, text in enumerate(texts):
        if text and (value := normalize_category(text.strip() if strip else text)):
            found[at] = codes.get(value, -1) if fixed else codes.setdefault(value, len(codes))
    if len(codes) > _MOST:
        raise InputError(f"{chunk.where(0)}: column {name!r} has more than {_MOST:,} categories by here; {remedies[1]}")
    of_rows: np.ndarray = found[indices]
    return of_rows


def _distinct(column: pa.Array) -> tuple[list[str | None], np.ndarray]:
    """The distinct values of a column as text, and for each row the position of its value; -1 if it is missing."""
    kind = column.type
    if pa.types.is_duration(kind):
        raise TypeError("its values are spelled differently by each program")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        column = column.cast(pa.string())
    encoded = pc.dictionary_encode(column)
    values, texts = encoded.dictionary, list[str | None]()
    if pa.types.is_floating(kind):
        texts = [None if np.isnan(value) else to_text(value) for value in values.to_numpy(zero_copy_only=False)]
    elif pa.types.is_decimal(kind):
        texts = [to_text(value) for value in values.to_pylist()]
    else:
        texts = values.cast(TEXTS).to_pylist()
    return texts, pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
