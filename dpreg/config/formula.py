"""Formulas such as "price ~ carat * color": their terms, as the package formulaic reads them."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dpreg.errors import InputError
from dpreg.spelling import spell

_LOG = re.compile(r"(?:np\.)?log\((.+)\)")


@dataclasses.dataclass(frozen=True)
class Part:
    """A factor of a term, as formulaic reads it.

    Attributes:
      kind: "lookup": the name of a column; "python": an expression; "literal": a number.
      text: it.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return {"lookup": f"`{self.text}`", "python": f"{{{self.text}}}"}.get(self.kind, self.text)


_ONE = (Part("literal", "1"),)


@dataclasses.dataclass(frozen=True)
class Formula:
    """A formula.

    Attributes:
      target: the column to the left of the tilde; None if there is none.
      log_target: whether the formula has the logarithm of that column.
      terms: the factors of each term, those with fewer factors first.
      intercept: whether there is one.
    """

    target: str | None
    log_target: bool
    terms: tuple[tuple[Part, ...], ...]
    intercept: bool

    def __str__(self) -> str:
        """The right side, in which a dot is written out."""
        terms = [":".join(map(str, term)) for term in self.terms]
        return " + ".join(["1" if self.intercept else "0", *terms])


def read_formula(text: str, columns: Sequence[str] = ()) -> Formula:
    """Reads a formula in the syntax of formulaic.

    Args:
      text: the formula.
      columns: those that a dot stands for.

    Raises:
      InputError: for a formula that cannot be read, and if formulaic is not installed.
    """
    try:
        import formulaic
    except ImportError as missing:
        raise InputError(
            f"{spell('formula')}: it needs formulaic 1.1 or newer; pip install 'dpreg[formula]'"
        ) from missing
    try:
        read: Any = formulaic.Formula(text, _context={"__formulaic_variables_available__": [*columns]})
        left, right = map(_terms, (read.lhs, read.rhs) if hasattr(read, "lhs") else ((), read))
    except (
        formulaic.errors.FormulaicError,
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"{spell('formula', text)}: it cannot be read ({reason}); correct it") from error
    terms = tuple(term for term in right if term != _ONE)
    for part in (part for term in terms for part in term):
        if part.kind == "literal":
            raise InputError(f"{spell('formula', text)}: {part.text!r} in a term is not supported; leave it out")
    target, log_target = _read_target(text, left)
    return Formula(target, log_target, terms, _ONE in right)


def _terms(side: Iterable[Any]) -> list[tuple[Part, ...]]:
    return [tuple(Part(factor.eval_method.value, factor.expr) for factor in term.factors) for term in side]


def _read_target(text: str, left: Sequence[tuple[Part, ...]]) -> tuple[str | None, bool]:
    if not left:
        return None, False
    if len(left) == 1 and len(left[0]) == 1:
        (part,) = left[0]
        if part.kind == "lookup":
            return part.text, False
        if part.kind == "python" and (log := _LOG.fullmatch(part.text)):
            name = log[1].removeprefix("`").removesuffix("`")
            if name.isidentifier() or log[1] == f"`{name}`":
                return name, True
    raise InputError(
        f"{spell('formula', text)}: to the left of the tilde, give one column or the logarithm of one; for several "
        f"targets give {spell('target')}, and a formula without a left side"
    )
