"""Orbax's failures in one line: why a checkpoint could not be written or read."""

import contextlib
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any


def reason_of(error: BaseException) -> str | None:
    """Why the file system refused, such as "No space left on device"; None for another error.

    Orbax raises OSError, or ValueError with the text of TensorStore's status.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    status = re.match(r"(RESOURCE_EXHAUSTED|PERMISSION_DENIED|FAILED_PRECONDITION|NOT_FOUND|DATA_LOSS): ", str(error))
    return status[1].lower().replace("_", " ") if isinstance(error, ValueError) and status else None


def end_where_threads_wait(code: int) -> None:
    """Ends the process at once where threads of a failed write are left, which would keep it for ten minutes."""
    if any(type(thread).__module__.startswith("orbax") and not thread.daemon for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's threads from printing the tracebacks of failed writes, which are raised as well.

    After an exception until the process ends: Python reports unfinished coroutines when it shuts down.
    """
    loggers, before = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def note(unraisable: Any) -> None:
        if not _is_of_orbax(unraisable):
            before(unraisable)

    for logger in loggers:
        logger.addFilter(_is_worth_a_line)
    sys.unraisablehook = note
    yield
    for logger in loggers:
        logger.removeFilter(_is_worth_a_line)
    sys.unraisablehook = before


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return not (record.name == "asyncio" or "orbax" in record.pathname)


def _is_of_orbax(unraisable: Any) -> bool:
    if isinstance(unraisable.object, types.CoroutineType):
        return "orbax" in unraisable.object.cr_code.co_filename
    return str(unraisable.exc_value) == "Event loop is closed"  # of TensorStore, which calls back a write that failed
