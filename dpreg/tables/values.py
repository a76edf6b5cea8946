"""Values that files write as text: numbers, booleans and dates, each by what it is, whatever stands beside it."""

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpreg.errors import InputError
from dpreg.spelling import spell

NUMBERS, DATES, TEXTS = pa.float64(), pa.timestamp("us"), pa.string()  # what a column is read as
TRUE, FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")

_MICROSECONDS_A_DAY = 86_400e6
_SHOWN = 60  # characters of a value in a message
_ZONE = r"[ T]\d\d.*(?:Z|[+-]\d\d(?::?\d\d)?)$"
_DATE = re.compile(r"\s*\d{4}-\d\d-\d\d(?:[ T].*)?")


class NotNumericError(InputError):
    """A column of numbers holds text, dates or other values.

    Attributes:
      column: the name of the column.
      problem: what it holds, and where.
      is_text: whether that is a text that is neither a number nor a date.
    """

    def __init__(self, problem: str, remedy: str, column: str, is_text: bool = False):
        super().__init__(f"{problem}; {remedy}")
        self.column, self.problem, self.is_text = column, problem, is_text


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is a kind of text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def not_numeric(name: str, column: pa.Array, where: Callable[[int], str]) -> InputError:
    """The error for a column whose type is not numeric; the arguments are those of `parse`."""
    kind, first = column.type, where(0)
    if pa.types.is_temporal(kind) and not pa.types.is_time(kind):
        remedy = f"use {spell('dates', (name,))} or {spell('exclude', (name,))}"
        return NotNumericError(f"{first}: column {name!r} is not numeric but {kind}", remedy, name)
    hint, category = f"choose columns with {spell('features')} or {spell('exclude')}", spell("categorical", (name,))
    if not is_text(kind):
        return NotNumericError(f"{first}: column {name!r} is not numeric but {kind}", hint, name)
    row = next((i for i, value in enumerate(column.to_pylist()) if value is not None and not is_number(value)), None)
    if row is None:
        problem = f"{first}: column {name!r} holds numbers written as text"
        return NotNumericError(problem, f"store numbers, or use {category}", name)
    value = column[row].as_py()
    if not value.strip():
        return _refuse_blanks(where(row), name, value)
    remedy = f"{hint}, or use {category}"
    problem = f"{where(row)}: column {name!r} has {value!r}, which is no number"
    return NotNumericError(problem, remedy, name, is_text=not _DATE.fullmatch(value))


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse(texts: pa.Array, kind: pa.DataType, name: str, where: Callable[[int], str]) -> pa.Array:
    """Text as values of `NUMBERS`, `DATES` or `TEXTS`; null where it is null.

    Numbers are bool where some are written as true and false and the others are 0 or 1. Dates are those of ISO 8601,
    in UTC where they have no zone.

    Args:
      name: of the column; where: the place of a row, from 0; both for messages.

    Raises:
      InputError: for the first value that is none of the kind.
    """
    if kind == NUMBERS:
        return _parse_numbers(texts, name, where)
    return _parse_dates(texts, name, where) if kind == DATES else texts


def refuse_mixture(name: str, flag: str, number: str) -> InputError:
    """The error for a column that has booleans in one place and other numbers in another."""
    return InputError(
        f"{number}: column {name!r} has a number besides 0 and 1, and true or false in {flag}; "
        f"write both as numbers, or use {spell('categorical', (name,))}"
    )


def _parse_numbers(texts: pa.Array, name: str, where: Callable[[int], str]) -> pa.Array:
    given, texts = texts, pc.utf8_trim_whitespace(texts)  # as Arrow does while it reads CSV
    true, false = (pc.is_in(texts, value_set=pa.array(words)) for words in (TRUE, FALSE))
    flags = pc.or_(true, false)
    rest = pc.if_else(flags, pa.scalar(None, pa.string()), texts)
    numbers = _cast(rest, NUMBERS)
    if numbers is None:
        row = _first_wrong(rest, NUMBERS)
        raise _wrong_number(where(row), name, given[row].as_py())
    if not pc.any(flags).as_py():
        return numbers
    others = pc.invert(pc.is_in(numbers, value_set=pa.array([0.0, 1.0, None])))
    if pc.any(others).as_py():
        raise refuse_mixture(name, where(flags.index(True).as_py()), where(others.index(True).as_py()))
    return pc.if_else(flags, true, pc.equal(numbers, 1.0))


def _wrong_number(where: str, name: str, value: str) -> InputError:
    if not value.strip():
        return _refuse_blanks(where, name, value)
    remedy = f"choose columns with {spell('features')} or {spell('exclude')}, or use {spell('categorical', (name,))}"
    is_date = _DATE.fullmatch(value)
    if is_date:
        remedy = f"use {spell('dates', (name,))} or {spell('exclude', (name,))}"
    problem = f"{where}: column {name!r} has {_shown(value)}, which is no number"
    return NotNumericError(problem, remedy, name, is_text=not is_date)


def _refuse_blanks(where: str, name: str, value: str) -> InputError:
    return InputError(
        f"{where}: column {name!r} has {_shown(value)}, which is no number; leave no blanks where a value is missing"
    )


def _parse_dates(texts: pa.Array, name: str, where: Callable[[int], str]) -> pa.Array:
    trimmed = pc.utf8_trim_whitespace(texts)
    dates = _cast(trimmed, DATES)
    if dates is not None:
        return dates
    trimmed = pc.replace_substring_regex(trimmed, r"(\.\d{6})\d+", r"\1")  # nanoseconds, cut to microseconds
    zoned, nothing = pc.fill_null(pc.match_substring_regex(trimmed, _ZONE), False), pa.scalar(None, TEXTS)
    local, in_zones = pc.if_else(zoned, nothing, trimmed), pc.if_else(zoned, trimmed, nothing)
    found, wrong = list[pa.Array](), list[int]()
    for some, kind in ((local, DATES), (in_zones, pa.timestamp("us", "UTC"))):
        dates = _cast(some, kind)
        if dates is None:
            wrong.append(_first_wrong(some, kind))
        else:
            found.append(dates.cast(pa.int64()))
    if wrong:
        raise InputError(
            f"{where(min(wrong))}: column {name!r} has {_shown(texts[min(wrong)].as_py())}, which is no date such as "
            f"2026-01-31; correct it, or take the column out of {spell('dates')}"
        )
    return pc.coalesce(*found).cast(DATES)


def _shown(value: str) -> str:
    return repr(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")


def _cast(texts: pa.Array, kind: pa.DataType) -> pa.Array | None:
    try:
        return texts.cast(kind)
    except pa.ArrowInvalid:
        return None


def _first_wrong(texts: pa.Array, kind: pa.DataType) -> int:
    """The first row that cannot be cast, of a column that cannot."""
    low, high = 0, len(texts)
    while high - low > 1:
        middle = (low + high) // 2
        if _cast(texts.slice(low, middle - low), kind) is None:
            high = middle
        else:
            low = middle
    return low


def days_of(name: str, column: pa.Array, where: Callable[[int], str]) -> np.ndarray:
    """A column of dates, times or durations as float64 [n]: days, since the beginning of 1970 (UTC).

    The arguments are those of `parse`.
    """
    if is_text(column.type):
        column = parse(column.cast(TEXTS), DATES, name, where)
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
    elif pa.types.is_duration(kind):
        column = column.cast(pa.duration("us"), safe=False).cast(pa.int64())
    elif not pa.types.is_null(kind):
        raise InputError(f"{where(0)}: column {name!r} holds no dates but {kind}; take it out of {spell('dates')}")
    days: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.float64) / _MICROSECONDS_A_DAY
    return days
