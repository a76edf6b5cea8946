"""The errors that are not bugs of dpreg, with their exit codes."""

import contextlib
import errno
import unicodedata
from collections.abc import Collection, Iterator

from dpreg.spelling import spell
from dpreg.terminal import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the errno of a full disk, quota, or limit of the file size


class InputError(ValueError):
    """Wrong input. The message is one printable line that says what is wrong, where, and what to do.

    Attributes:
      exit_code: the exit code of a command that ends with it.

    >>> import dpreg
    >>> dpreg.ArraySource(x=[[1.0], [2.0]], y=[1.0])
    Traceback (most recent call last):
    dpreg.errors.InputError: x and y have 2 and 1 rows; they must have the same number
    """

    exit_code = 2

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class NoOptimumError(InputError):
    """A loss has no least value, or none that was found."""


@contextlib.contextmanager
def prefix_errors(prefix: str) -> Iterator[None]:
    """Adds a prefix to the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from error


def quote_names(names: Collection[str], limit: int = 12) -> str:
    """Quotes names for a message: the first `limit` ones, and the number of others.

    >>> quote_names(["a", "b", "c", "d"], 2)
    "'a', 'b' and 2 others"
    """
    text = ", ".join(repr(name) for name, _ in zip(names, range(limit), strict=False))
    return text if len(names) <= limit else f"{text} and {len(names) - limit:,} others"


def is_one_line(text: str) -> bool:
    r"""Whether text is one line of valid UTF-8, without control characters, line separators and surrogates.

    >>> is_one_line("Größe"), is_one_line("two\nlines")
    (True, False)
    """
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") for character in text)


class Diverged(ArithmeticError):  # noqa: N818 (named after the event, not the error)
    """The loss is not finite, in training at `step` or in validation after it.

    The trainer keeps the last finite state: the one before the step, or after it if only the validation failed.

    Attributes:
      exit_code: the exit code of a command that ends with it.
      step: the step with the loss, or before the validation, counted from 1.

    >>> error = Diverged(step=7)
    >>> error.step, error.exit_code
    (7, 3)
    """

    exit_code = 3

    def __init__(self, step: int, validation: bool = False):
        what = f"the loss is not finite at step {step:,}: the state before it is kept"
        if validation:
            what = f"the validation loss is not finite after step {step:,}: the state after it is kept"
        rows = "check the validation rows, or " if validation else ""
        super().__init__(f"{what}; {rows}try a smaller {spell('lr')}, or {spell('gradient_clip_val')}")
        self.step = step


class AuditFailed(RuntimeError):  # noqa: N818
    """An epoch did not use every row exactly once, because of a bug or a hardware fault."""

    exit_code = 1


class Preempted(Exception):  # noqa: N818
    """The run was stopped by a signal, after its state was saved or before the first step. It can be started again.

    Attributes:
      exit_code: 75 after SIGTERM, 130 after Ctrl-C (SIGINT).
      step: the step of the saved state; None before the first step.
      interrupted: whether it was stopped by Ctrl-C.
    """

    def __init__(self, step: int | None = None, unnamed: str | None = None, interrupted: bool = False):
        where = "before the first step" if step is None else f"at step {step:,}, which is saved"
        command = "the same command" if unnamed is None else f"the same command with {spell('workdir', unnamed)}"
        super().__init__(f"{'interrupted' if interrupted else 'stopped'} {where}: {command} resumes from there")
        self.step, self.interrupted, self.exit_code = step, interrupted, 130 if interrupted else 75


class ProcessLost(RuntimeError):  # noqa: N818
    """Another process of the run has ended or cannot be reached."""

    exit_code = 76
