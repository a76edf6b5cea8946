"""How messages spell settings: as arguments in Python, as flags where a command runs.

Below the entry points, messages name settings by `spell` alone. It writes at once what the caller reads: no message is
rewritten later, so that what users have named (files, columns) is never taken for a setting.
"""

import contextlib
import csv
import io
import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np

_as_flags = False


@contextlib.contextmanager
def spell_as_flags() -> Iterator[None]:
    """Makes `spell` write flags, in all threads of this process: for the commands, around all that they do."""
    global _as_flags
    before, _as_flags = _as_flags, True
    try:
        yield
    finally:
        _as_flags = before


def spell(name: str, *values: Any) -> str:
    """A setting as the caller writes it, with the values that it has or may have, if any.

    >>> spell("lr"), spell("lr", -1.0), spell("loss", "huber", "absolute"), spell("intercept", False)
    ('lr', 'lr=-1.0', "loss='huber' or 'absolute'", 'intercept=False')
    >>> with spell_as_flags():
    ...     spell("lr"), spell("lr", -1.0), spell("loss", "huber", "absolute"), spell("intercept", False)
    ('--lr', '--lr=-1.0', '--loss=huber or absolute', '--nointercept')
    """
    if not _as_flags:
        return f"{name}={' or '.join(map(_argument_text, values))}" if values else name
    if not values or values[0] is True:
        return f"--{name}"
    if values[0] is False:
        return f"--no{name}"
    return f"--{name}={' or '.join(map(_quoted, map(flag_text, values)))}"


def flag_text(value: Any) -> str:
    """A value as a flagfile has it behind the =: tuples by commas, with quotes around a name that holds a comma.

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


def _quoted(text: str) -> str:
    """As a shell takes it."""
    return shlex.quote(text) if text else text


def _argument_text(value: Any) -> str:
    if isinstance(value, np.generic):
        return repr(value.item())
    return repr(str(value) if isinstance(value, pathlib.PurePath) else value)
