"""Turns errors of Orbax into one line: why a checkpoint could not be written or read."""

import contextlib
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any


def explain_failure(error: BaseException) -> str | None:
    """The reason for an error of the file system, such as "No space left on device"; None for another error.

    Orbax raises an OSError, or a ValueError with the text of TensorStore's status.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    status = re.match(r"(RESOURCE_EXHAUSTED|PERMISSION_DENIED|FAILED_PRECONDITION|NOT_FOUND|DATA_LOSS): ", str(error))
    return status[1].lower().replace("_", " ") if isinstance(error, ValueError) and status else None


def end_where_threads_wait(code: int) -> None:
    """Exits at once if threads of a failed write are alive: Python would wait ten minutes for them."""
    if any(type(thread).__module__.startswith("orbax") and not thread.daemon for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


@contextlib.contextmanager
def silence_orbax() -> Iterator[None]:
    """Keeps Orbax's threads from printing the tracebacks of failed writes, which are raised as well.

    After an exception it stays in effect until the process ends, as Python reports unfinished coroutines at exit.
    """
    loggers, previous_hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _is_from_orbax(unraisable):
            previous_hook(unraisable)

    for logger in loggers:
        logger.addFilter(_is_not_from_orbax)
    sys.unraisablehook = hook
    yield
    for logger in loggers:
        logger.removeFilter(_is_not_from_orbax)
    sys.unraisablehook = previous_hook


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return not (record.name == "asyncio" or "orbax" in record.pathname)


def _is_from_orbax(unraisable: Any) -> bool:
    if isinstance(unraisable.object, types.CoroutineType):
        return "orbax" in unraisable.object.cr_code.co_filename
    return str(unraisable.exc_value) == "Event loop is closed"  # raised by TensorStore's callback for a failed write
