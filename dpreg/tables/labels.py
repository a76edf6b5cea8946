"""The labels of a target: how they are ordered, and the number that the model reads for each.

The order depends on the labels alone, not on the rows: numbers by value, false before true, text by code point.
"""

import re
from collections.abc import Collection, Sequence

from dpreg.data.schema import Label
from dpreg.tables.standalone import label_text

MAX_LABELS = 1000  # of a target: a table of predictions has a column for each
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,14})", re.ASCII)  # numbers that float64 represents exactly
_TRUTH = {"0": 0, "1": 1, "false": 0, "true": 1}


def order_labels(texts: Collection[str]) -> tuple[Label, ...]:
    """Orders the labels that have these texts; returns none for numbers with fractions, which are no labels.

    Labels are numbers, or false and true, if all of them are; otherwise they are text. The numbers 0 and 1 count as two
    labels even if only one of them is there.

    Args:
      texts: the distinct labels as `dpreg.tables.standalone.normalize_category` writes them.

    >>> order_labels(["yes", "no"]), order_labels(["10", "-1", "9"]), order_labels(["true", "false"])
    (('no', 'yes'), (-1, 9, 10), (False, True))
    >>> order_labels(["1", "0.3"]), order_labels(["1"])
    ((), (0, 1))
    """
    labels = {*texts}
    if labels <= {"false", "true"}:
        return tuple(text == "true" for text in sorted(labels))
    if labels <= {*_TRUTH}:
        return (0, 1)
    if all(map(_WHOLE.fullmatch, labels)):
        return tuple(sorted(map(int, labels)))
    if all(_WHOLE.fullmatch(text) or _is_fraction(text) for text in labels):
        return ()
    return tuple(sorted(labels))


def code_labels(labels: Sequence[Label]) -> dict[str, int]:
    """The number that the model reads for each text of a label. In place of 0 and 1, a table may have false and true.

    >>> code_labels((-1, 1)), code_labels((False, True))
    ({'-1': 0, '1': 1}, {'0': 0, '1': 1, 'false': 0, 'true': 1})
    """
    if tuple(labels) == (0, 1):  # False and True are equal to them
        return dict(_TRUTH)
    return {label_text(label): code for code, label in enumerate(labels)}


def _is_fraction(text: str) -> bool:
    try:
        return "_" not in text and float(text) % 1 > 0
    except ValueError:
        return False
