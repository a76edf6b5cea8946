"""The terms of a formula: products of categories, expressions and splines, evaluated for rows of a table.

It needs only NumPy: the folder of a model with a formula has a copy of this file, which its `predict.py` uses.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FUNCTIONS = {
    name: getattr(np, name) for name in ("log", "log2", "log10", "log1p", "exp", "expm1", "sqrt", "abs", "sin", "cos")
}
OPERATORS = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "**": np.power}
KINDS = ("category", "number", "bs", "cr")

# ("column", name), ("number", value), (function, expression), or (operator, expression, expression)
Expression = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor of a term: one or more columns of numbers for each row.

    Attributes:
      kind: "category": a column of 0 and 1 for each level; "number": the value of an expression; "bs" or "cr": the
        functions of a basis of splines, at the value of an expression.
      text: what it is called; for a category the name of its column.
      expression: the expression, see `evaluate`; for a category that of its column.
      knots: of splines, in ascending order, with the boundaries.
      degree: of the polynomials of "bs"; those of "cr" are cubic.
      first: whether the first function of a basis is used. If it is, the columns add up to 1 in each row.
    """

    kind: str
    text: str
    expression: Expression
    knots: tuple[float, ...] = ()
    degree: int = 3
    first: bool = True

    @property
    def adds_up_to_1(self) -> bool:
        """Whether its columns add up to 1 in each row."""
        return self.kind != "number" and self.first

    def width(self, widths: Mapping[str, int]) -> int:
        """The number of its columns; `widths` has those of encoded columns."""
        functions = {"bs": len(self.knots) + self.degree - 1, "cr": len(self.knots)}
        if self.kind in functions:
            return functions[self.kind] - (not self.first)
        return widths[self.text] if self.kind == "category" else 1

    def names(self) -> tuple[str, ...]:
        """The names of its columns, if it is no category."""
        if self.kind == "number":
            return (self.text,)
        return tuple(f"{self.text}[{at}]" for at in range(self.width({})))

    def values(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """[n, k] of encoded columns, which are [n, 1] for a number, and [n, levels] for a category."""
        if self.kind == "category":
            return columns[self.text]
        value = evaluate(self.expression, columns)
        if self.kind == "number":
            return value[:, None]
        knots = np.array(self.knots)
        basis = b_splines(value, knots, self.degree) if self.kind == "bs" else natural_splines(value, knots)
        return basis if self.first else basis[:, 1:]


@dataclasses.dataclass(frozen=True)
class Term:
    """A product of factors. The model sees (value - mean) / scale of each of its columns.

    Attributes:
      factors: the factors; there is a column for each choice of a column of each, that of the last one changing first.
      mean, scale: of each column; 0 and 1 where it is not standardised, and for products of categories.
      constant: for each column, whether it has one value in all training rows: the model sees 0 for any value.
    """

    factors: tuple[Factor, ...]
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    constant: tuple[bool, ...] = ()

    @property
    def text(self) -> str:
        """What it is called."""
        return ":".join(factor.text for factor in self.factors)

    def values(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """[n, k] float64, not scaled; see `Factor.values`."""
        with np.errstate(all="ignore"):
            product, *others = (factor.values(columns) for factor in self.factors)
            for values in others:
                product = (product[:, :, None] * values[:, None, :]).reshape(len(product), -1)
        return product


def encode(terms: Sequence[Term], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the model sees of rows, [n, d] float64; NaN or infinite where a value has no finite one."""
    scaled = list[np.ndarray]()
    for term in terms:
        values = (term.values(columns) - term.mean) / term.scale
        constant = np.array(term.constant, bool)
        values[:, constant] = np.where(np.isfinite(values[:, constant]), 0.0, values[:, constant])
        scaled.append(values)
    return np.concatenate(scaled, axis=1)


def evaluate(expression: Expression, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The value of an expression for each row, [n] float64."""
    head, *rest = expression
    if head == "column":
        return columns[rest[0]][:, 0]
    if head == "number":
        return np.full(len(next(iter(columns.values()))), rest[0])
    values = [evaluate(each, columns) for each in rest]
    with np.errstate(all="ignore"):
        return np.asarray((FUNCTIONS if len(values) == 1 else OPERATORS)[head](*values), np.float64)


def names_of(expression: Expression) -> Iterator[str]:
    """Yields the names of the columns in an expression."""
    head, *rest = expression
    if head == "column":
        yield rest[0]
    elif head != "number":
        for each in rest:
            yield from names_of(each)


def b_splines(x: np.ndarray, knots: np.ndarray, degree: int) -> np.ndarray:
    """The basis of B-splines at x [n], [n, knots + degree - 1], by the recursion of de Boor (1978, chapter X).

    Beyond the first and the last knot, the polynomials next to them are continued.
    """
    padded = np.concatenate([np.repeat(knots[0], degree), knots, np.repeat(knots[-1], degree)])
    starts = np.flatnonzero(padded[:-1] < padded[1:])
    interval = starts[np.clip(np.searchsorted(padded[starts], x, side="right") - 1, 0, len(starts) - 1)]
    nonzero = np.ones((1, len(x)))  # of the functions that are not 0 in the interval, of one degree after another
    for order in range(1, degree + 1):
        above = np.stack([padded[interval + k] for k in range(1, order + 1)])
        below = np.stack([padded[interval + k - order] for k in range(1, order + 1)])
        share = nonzero / (above - below)
        nonzero = np.zeros((order + 1, len(x)))
        nonzero[:-1] += (above - x) * share
        nonzero[1:] += (x - below) * share
    basis = np.zeros((len(x), len(knots) + degree - 1))
    basis[np.arange(len(x)), interval - degree + np.arange(degree + 1)[:, None]] = nonzero
    return basis


def natural_splines(x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """The basis of natural cubic splines at x [n], [n, knots], whose weights are the values of the spline at the knots.

    Beyond the first and the last knot, the splines are linear (Wood 2017, section 5.3.1).
    """
    step = np.diff(knots)
    curvature = np.zeros((len(knots), len(knots)))  # the second derivatives at the knots, by the values there
    if len(knots) > 2:
        slopes = (np.eye(len(knots))[1:] - np.eye(len(knots))[:-1]) / step[:, None]
        among = np.diag((step[:-1] + step[1:]) / 3) + np.diag(step[1:-1] / 6, 1) + np.diag(step[1:-1] / 6, -1)
        curvature[1:-1] = np.linalg.solve(among, slopes[1:] - slopes[:-1])
    inside = np.clip(x, knots[0], knots[-1])
    at = np.clip(np.searchsorted(knots, inside, side="right") - 1, 0, len(knots) - 2)
    size, after = step[at], (inside - knots[at])
    before = size - after
    identity = np.eye(len(knots))
    basis: np.ndarray = (
        (before / size)[:, None] * identity[at]
        + (after / size)[:, None] * identity[at + 1]
        + ((before**3 / size - size * before) / 6)[:, None] * curvature[at]
        + ((after**3 / size - size * after) / 6)[:, None] * curvature[at + 1]
    )
    first = (identity[1] - identity[0]) / step[0] - step[0] / 6 * curvature[1]
    last = (identity[-1] - identity[-2]) / step[-1] + step[-1] / 6 * curvature[-2]
    basis += np.minimum(x - knots[0], 0)[:, None] * first + np.maximum(x - knots[-1], 0)[:, None] * last
    return basis


def encode_rows(schema: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The result of `encode` for the terms of a schema in JSON; NaN where a column has a missing value, NaN.

    Raises:
      ValueError: for another value that is not finite, such as the logarithm of 0.
    """
    terms, missing = read_terms(schema), np.isnan(np.concatenate([*columns.values()], axis=1)).any(axis=1)
    for term in terms:
        bad = ~np.isfinite(term.values(columns)).all(axis=1) & ~missing
        if bad.any():
            raise ValueError(f"row {int(bad.argmax()) + 1}: {term.text} is not finite; correct that value")
    return encode(terms, columns)


def read_terms(schema: Mapping[str, Any]) -> tuple[Term, ...]:
    """The terms of a schema in JSON.

    Raises:
      ValueError, TypeError or KeyError: for what dpreg does not write.
    """
    levels = {c["name"]: len(c["values"]) + 1 for c in schema["inputs"] if c["kind"] != "number"}
    numbers, terms = {c["name"] for c in schema["inputs"]} - {*levels}, list[Term]()
    for each in schema["terms"]:
        factors = tuple(_read_factor(factor, numbers, levels) for factor in each["factors"])
        term = Term(factors, *(tuple(each[name]) for name in ("mean", "scale", "constant")))
        width = math.prod(factor.width(levels) for factor in factors)
        if not factors or {len(term.mean), len(term.scale), len(term.constant)} != {width}:
            raise ValueError(f"dpreg does not write such a term as {term.text!r}")
        if not all(map(_is_finite, (*term.mean, *term.scale))) or min(term.scale) <= 0:
            raise ValueError(f"dpreg does not write such units as those of {term.text!r}")
        if not all(isinstance(constant, bool) for constant in term.constant):
            raise ValueError(f"dpreg does not write such a term as {term.text!r}")
        terms.append(term)
    return tuple(terms)


def _read_factor(value: Mapping[str, Any], numbers: set[str], levels: Mapping[str, int]) -> Factor:
    factor = Factor(**{**value, "expression": _read_expression(value["expression"]), "knots": tuple(value["knots"])})
    names, increasing = {*names_of(factor.expression)}, zip(factor.knots, factor.knots[1:], strict=False)
    valid = factor.kind in KINDS and isinstance(factor.text, str) and type(factor.degree) is int and factor.degree >= 0
    valid = valid and isinstance(factor.first, bool) and all(map(_is_finite, factor.knots))
    if factor.kind == "category":
        valid = valid and names == {factor.text} and factor.text in levels
    else:
        valid = valid and bool(names) and names <= numbers
    if factor.kind in ("bs", "cr"):
        least = 2 if factor.kind == "cr" or factor.first or factor.degree else 3
        valid = valid and len(factor.knots) >= least and factor.knots[0] < factor.knots[-1]
        valid = valid and all(low < high or (low == high and factor.kind == "bs") for low, high in increasing)
    if not valid:
        raise ValueError(f"dpreg does not write such a factor as {factor.text!r}")
    return factor


def _read_expression(value: Any) -> Expression:
    head, *rest = value
    if head == "column" and len(rest) == 1 and isinstance(rest[0], str):
        return head, rest[0]
    if head == "number" and len(rest) == 1 and _is_finite(rest[0]):
        return head, float(rest[0])
    if (head in FUNCTIONS and len(rest) == 1) or (head in OPERATORS and len(rest) == 2):
        return head, *map(_read_expression, rest)
    raise ValueError(f"dpreg does not write such an expression as {head!r}")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
