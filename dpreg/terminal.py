"""Prints text safely: names from files, flags and other processes cannot move the cursor or fake another line."""

import re

_LONGEST_LINE = 1000  # characters


def printable(text: str) -> str:
    r"""The text as one printable line of at most 1,000 characters.

    Control characters, escape sequences, marks of text direction and unpaired surrogates are escaped as in Python.
    Line breaks become blanks. The middle of a longer text is left out.

    >>> printable("column '\x1b[2J\u202e'")
    "column '\\x1b[2J\\u202e'"
    """
    line = re.sub(r" *\r?\n *", " ", text)
    if not line.isprintable():
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE * 2 // 3]} ... {line[-_LONGEST_LINE // 4 :]}"
    return line


def show(*lines: str) -> None:
    """Prints lines on stdout, each `printable`."""
    print(*map(printable, lines), sep="\n", flush=True)
