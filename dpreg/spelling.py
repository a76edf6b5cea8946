"""Spells settings in messages: as arguments in Python, and as flags in a command.

Modules below the entry points name settings in messages only with `spell`. Messages are never rewritten later, so that
the names of files and columns cannot be mistaken for settings.
"""

import contextlib
import csv
import io
import pathlib
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_as_flags = False


@contextlib.contextmanager
def spell_as_flags() -> Iterator[None]:
    """A context in which `spell` writes flags, in all threads of this process. Commands run in it."""
    global _as_flags
    previous, _as_flags = _as_flags, True
    try:
        yield
    finally:
        _as_flags = previous


def spell(name: str, *values: Any) -> str:
    """Spells a setting as the caller writes it, optionally with its value, or with alternative values.

    >>> spell("lr"), spell("lr", -1.0), spell("loss", "huber", "absolute"), spell("intercept", False)
    ('lr', 'lr=-1.0', "loss='huber' or 'absolute'", 'intercept=False')
    >>> with spell_as_flags():
    ...     spell("lr"), spell("lr", -1.0), spell("loss", "huber", "absolute"), spell("intercept", False)
    ('--lr', '--lr=-1.0', '--loss=huber or absolute', '--nointercept')
    """
    if not _as_flags:
        return f"{name}={_either(map(_argument_text, values))}" if values else name
    if not values or values[0] is True:
        return f"--{name}"
    if values[0] is False:
        return f"--no{name}"
    return f"--{name}={_either(map(_quote_for_shell, map(flag_text, values)))}"


def _either(texts: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *others, last = texts
    return f"{', '.join(others)} or {last}" if others else last


def flag_text(value: Any) -> str:
    """Formats a value for a flagfile. Tuples are separated by commas; names with a comma are quoted.

    >>> flag_text((2.0, -3.4)), flag_text(("a", "b,c")), flag_text(True)
    ('2.0,-3.4', 'a,"b,c"', 'true')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, tuple):
        return str(value)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(value)
    return line.getvalue()


def _quote_for_shell(text: str) -> str:
    return shlex.quote(text) if text else text


def _argument_text(value: Any) -> str:
    if isinstance(value, np.generic):
        return repr(value.item())
    return repr(str(value) if isinstance(value, pathlib.PurePath) else value)
