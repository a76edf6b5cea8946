"""What can go wrong through no fault of the code, each with its exit code."""

import contextlib
import errno
import unicodedata
from collections.abc import Collection, Iterator

from dpreg.spelling import spell
from dpreg.terminal import printable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: a disk, a quota or a limit is full


class InputError(ValueError):
    """The caller asked for something that cannot be done. The message is one printable line: what, where, what to do.

    Attributes:
      exit_code: of a process that ends by it.

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
def prefix_errors(what: str) -> Iterator[None]:
    """Puts what it is about before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def listed(names: Collection[str], most: int = 12) -> str:
    """Names for a message, in quotes; of many the first ones and how many others there are.

    >>> listed(["a", "b", "c", "d"], 2)
    "'a', 'b' and 2 others"
    """
    text = ", ".join(repr(name) for name, _ in zip(names, range(most), strict=False))
    return text if len(names) <= most else f"{text} and {len(names) - most:,} others"


def is_one_line(text: str) -> bool:
    r"""Whether text can be written in UTF-8 and in one line: no control characters, separators of lines or surrogates.

    >>> is_one_line("Größe"), is_one_line("two\nlines")
    (True, False)
    """
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") for character in text)


class Diverged(ArithmeticError):  # noqa: N818 (what happened, not whose error)
    """The loss is no longer finite, in training at `step` or in validation after it.

    The trainer's state is the last good one: before the step, or after it where only validation failed.

    Attributes:
      exit_code: of a process that ends by it.
      step: the one, counted from 1, or the one before validation.

    >>> error = Diverged(step=7)
    >>> error.step, error.exit_code
    (7, 3)
    """

    exit_code = 3

    def __init__(self, step: int, validation: bool = False):
        what = f"the loss is not finite at step {step:,}: the state before it is kept"
        if validation:
            what = f"the validation loss is not finite after step {step:,}: the state after it is kept"
        rows = "look at the rows held out, or " if validation else ""
        super().__init__(f"{what}; {rows}try a smaller {spell('lr')}, or {spell('gradient_clip_val')}")
        self.step = step


class AuditFailed(RuntimeError):  # noqa: N818
    """An epoch did not use every row exactly once: a fault of the program or of the machine, not of the caller."""

    exit_code = 1


class Preempted(Exception):  # noqa: N818
    """The run was asked to stop, and its state is saved, or no step taken yet: start it again to go on.

    Attributes:
      exit_code: 75 after SIGTERM, 130 after Ctrl-C (SIGINT).
      step: the one that is saved; None before the first.
      interrupted: whether it was by Ctrl-C.
    """

    def __init__(self, step: int | None = None, unnamed: str | None = None, interrupted: bool = False):
        where = "before the first step" if step is None else f"at step {step:,}, which is saved"
        command = "the same command" if unnamed is None else f"the same command with {spell('workdir', unnamed)}"
        super().__init__(f"{'interrupted' if interrupted else 'stopped'} {where}: {command} goes on from there")
        self.step, self.interrupted, self.exit_code = step, interrupted, 130 if interrupted else 75


class ProcessLost(RuntimeError):  # noqa: N818
    """Another process of the run is gone or cannot be reached."""

    exit_code = 76
