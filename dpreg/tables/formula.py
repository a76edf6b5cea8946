"""Formulas of a table: the columns they use, and their terms with all that is learned from the rows."""

import ast
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dpreg.config import Columns
from dpreg.config.formula import Formula, Part, read_formula
from dpreg.data.schema import ROW, Category, Number
from dpreg.data.terms import FUNCTIONS, OPERATORS, Expression, Factor, Term, evaluate, names_of
from dpreg.errors import InputError
from dpreg.spelling import spell
from dpreg.tables.values import is_number

_BINARY = dict(zip((ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow), OPERATORS, strict=True))
_SPLINES = {"bs": ("df", "knots", "degree", "include_intercept"), "cr": ("df", "knots"), "ns": ("df", "knots")}
_QUOTED = re.compile(r"`([^`]*)`")
_NO_COLUMN = ("\n",)  # the name of no column
_COMPACTED = 1 << 20  # values of a spline's argument, after which those that are equal are put together


class _UnsupportedError(Exception):
    """A part of a formula that is not supported."""


@dataclasses.dataclass(frozen=True)
class Template:
    """A factor before anything is learned.

    Attributes:
      factor: the factor; of a spline without learned knots.
      inner: the number of inner knots to learn; None where there are none, or they are given.
      distinct: whether they are quantiles of the distinct values instead of those of all rows.
    """

    factor: Factor
    inner: int | None = None
    distinct: bool = False

    @property
    def learns(self) -> bool:
        """Whether it is a spline, the boundaries of which are the least and the largest value."""
        return self.factor.kind in ("bs", "cr")


def resolve_formula(columns: Columns, all_features: Callable[[], Sequence[str]]) -> Columns:
    """The columns with the features and the categories of their formula, whose dots are written out.

    Args:
      all_features: returns those that a dot stands for.

    Raises:
      InputError: for a formula that is not supported.
    """
    text = columns.formula or ""
    formula = read_formula(text)
    if read_formula(text, _NO_COLUMN) != formula:  # there is a dot
        formula = read_formula(text, all_features())
    templates = list(itertools.chain(*templates_of(formula, columns)))
    used = dict.fromkeys(name for each in templates for name in names_of(each.factor.expression))
    if not used:
        raise InputError(f"{spell('formula', columns.formula)}: there is no column to fit on; name one")
    categories = [t.factor.text for t in templates if t.factor.kind == "category"]
    both = {t.factor.text for t in templates if t.factor.kind == "number"}.intersection(categories)
    for name in sorted(both):
        raise InputError(f"{spell('formula')}: {name} is a category and a number; give the table two columns")
    full = dataclasses.replace(
        columns,
        formula=str(formula),
        features=tuple(used),
        categorical=tuple(dict.fromkeys([*columns.categorical, *categories])),
    )
    templates_of(formula, full)  # no category may be in an expression
    return full


def templates_of(formula: Formula, columns: Columns) -> list[tuple[Template, ...]]:
    """The factors of each term.

    Raises:
      InputError: for a term that is not supported.
    """
    terms = list[tuple[Template, ...]]()
    for term in formula.terms:
        try:
            terms.append(tuple(_template(part, columns) for part in term))
        except (_UnsupportedError, SyntaxError, RecursionError) as error:
            text = ":".join(part.text for part in term)
            raise InputError(f"{spell('formula')}: term {text}: {error or 'it is nested too deeply'}") from error
    return terms


def _template(part: Part, columns: Columns) -> Template:
    if part.kind == "lookup":
        kind = "category" if part.text in columns.categorical else "number"
        return Template(Factor(kind, part.text, ("column", part.text)))
    quoted = list[str]()

    def placeholder(found: re.Match[str]) -> str:
        quoted.append(found[1])
        return f"quoted_{len(quoted) - 1}_"

    node = ast.parse(_QUOTED.sub(placeholder, part.text), mode="eval").body
    names = {f"quoted_{at}_": name for at, name in enumerate(quoted)}
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if isinstance(node, ast.Call) and name == "C":
        return _category(node, names)
    if isinstance(node, ast.Call) and name in _SPLINES:
        template = _spline(name, node, names, part.text)
    else:
        template = Template(Factor("number", part.text, _expression(node, names)))
    if not (used := [*names_of(template.factor.expression)]):
        raise _UnsupportedError("there is no column in it; leave it out")
    for column in used:
        if column in columns.categorical:
            raise _UnsupportedError(f"{column} is a category, which has no value; use it as a separate factor")
    return template


def _category(call: ast.Call, names: dict[str, str]) -> Template:
    expression = _expression(call.args[0], names) if len(call.args) == 1 and not call.keywords else ()
    if expression[:1] != ("column",):
        remedy = spell("base", ("column:level",))
        raise _UnsupportedError(f"C takes the name of a column alone; name its base level by {remedy}")
    return Template(Factor("category", expression[1], expression))


def _spline(name: str, call: ast.Call, names: dict[str, str], text: str) -> Template:
    allowed = _SPLINES[name]
    if not call.args or len(call.args) > 1 + len(allowed):
        raise _UnsupportedError(f"{name} takes a column, {', '.join(allowed)}")
    given: dict[str, Any] = {}
    for key, node in [*zip(allowed, call.args[1:], strict=False), *((k.arg, k.value) for k in call.keywords)]:
        if key not in allowed or key in given:
            raise _UnsupportedError(f"{name} takes {', '.join(allowed)}, each once, and {key} is not supported")
        try:
            given[key] = ast.literal_eval(node)
        except ValueError as error:
            raise _UnsupportedError(f"{key} is not a number, a list of numbers, or True or False") from error
    degree, first = given.get("degree", 3), given.get("include_intercept", name == "cr")
    df, knots = given.get("df"), given.get("knots")
    if type(degree) is not int or not 0 <= degree <= 10 or not isinstance(first, bool):
        raise _UnsupportedError("degree is a whole number from 0 to 10, and include_intercept True or False")
    if (df is None) == (knots is None):
        raise _UnsupportedError("give either df, the number of columns, or knots")
    factor = Factor("bs" if name == "bs" else "cr", text, _expression(call.args[0], names), (), degree, first)
    if knots is not None:
        if not isinstance(knots, (list, tuple)) or not all(type(k) in (int, float) and math.isfinite(k) for k in knots):
            raise _UnsupportedError("knots are a list of finite numbers")
        if name == "bs" and not (knots or degree or first):
            raise _UnsupportedError("with a degree of 0 there is no column without knots; give one")
        return Template(dataclasses.replace(factor, knots=tuple(sorted(map(float, knots)))))
    least = (degree + first if name == "bs" else 1 + first) or 1
    if type(df) is not int or not least <= df <= 1000:
        raise _UnsupportedError(f"df is a whole number from {least} to 1000")
    inner = df - degree - first if name == "bs" else df - 1 - first
    return Template(factor, inner, distinct=name == "cr")


def _expression(node: ast.expr, names: dict[str, str]) -> Expression:
    if isinstance(node, ast.Name):
        return "column", names.get(node.id, node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return "number", _finite(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)], _expression(node.left, names), _expression(node.right, names)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _expression(node.operand, names)
        return ("-", ("number", 0.0), value) if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        name = ast.unparse(node.func).removeprefix("np.")
        if name == "Q" and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            return "column", node.args[0].value
        if name == "I":
            return _expression(node.args[0], names)
        if name in FUNCTIONS:
            return name, _expression(node.args[0], names)
    known = f"C, bs, cr, ns, I, Q, {', '.join(FUNCTIONS)}, {' '.join(OPERATORS)}"
    raise _UnsupportedError(f"{ast.unparse(node)} is not supported; use {known}")


def _finite(value: float) -> float:
    if abs(value) > 1e150:
        raise _UnsupportedError(f"{value:g} is too large")
    return float(value)


def refuse_numbers(table: str, codes: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> None:
    """Raises InputError for a category of these names that has a number among its texts; `codes` has the texts."""
    for name in names:
        numbers = [text for text in codes[name] if is_number(text)]
        if numbers:
            text = next(text for text in codes[name] if not is_number(text))
            raise InputError(
                f"{table}: column {name!r} has numbers such as {numbers[0]} and texts such as {text!r}; correct it, or "
                f"use {spell('categorical', (name,))}"
            )


class TermStatistics:
    """The knots of splines, learned from the rows to fit.

    Attributes:
      templates: of the factors of each term.
    """

    def __init__(self, columns: Columns):
        self._columns = columns
        self.templates = templates_of(read_formula(columns.formula), columns) if columns.formula else []
        self._values = {each.factor.text: _Values() for each in itertools.chain(*self.templates) if each.learns}

    def add(self, raw: np.ndarray, weight: np.ndarray) -> None:
        """Adds rows [n, ...] from `RawReader.read`, with weights [n].

        Raises:
          InputError: for an argument of a spline that is not finite.
        """
        if not self._values:
            return
        columns = {name: raw[:, at : at + 1] for at, name in enumerate(self._columns.features)}
        for factor in (each.factor for each in itertools.chain(*self.templates) if each.learns):
            values = evaluate(factor.expression, columns)
            missing = np.any([np.isnan(columns[name][:, 0]) for name in names_of(factor.expression)], axis=0)
            if (bad := ~missing & ~np.isfinite(values)).any():
                row = int(raw[bad.argmax(), ROW]) + 1
                raise InputError(f"row {row:,}: {factor.text!r} is of a value that is not finite; correct that value")
            self._values[factor.text].add(values[~missing], weight[~missing])

    def terms(self, inputs: Sequence[Number | Category]) -> tuple[Term, ...]:
        """The terms with their knots, whose columns are not scaled."""
        widths = {column.name: len(column.features) for column in inputs}
        found = list[Term]()
        for term in self.templates:
            factors = tuple(self._learned(each) for each in term)
            width = math.prod(factor.width(widths) for factor in factors)
            found.append(Term(factors, (0.0,) * width, (1.0,) * width, (False,) * width))
        return tuple(found)

    def _learned(self, template: Template) -> Factor:
        factor = template.factor
        if not template.learns:
            return factor
        values, counts = self._values[factor.text].counts()
        inner = factor.knots
        if template.inner:
            counts = np.ones(len(values)) if template.distinct else counts
            inner = tuple(_quantiles(values, counts, np.linspace(0, 1, template.inner + 2)[1:-1]).tolist())
        knots = (float(values[0]), *inner, float(values[-1])) if len(values) else ()
        order = list(itertools.pairwise(knots))
        if not (len(values) > 1 and all(low <= high for low, high in order)):
            raise InputError(
                f"{spell('formula')}: term {factor.text}: its values have no room for the knots; use fewer"
            )
        if factor.kind == "cr" and not all(low < high for low, high in order):
            raise InputError(f"{spell('formula')}: term {factor.text}: two of its knots are equal; use fewer")
        return dataclasses.replace(factor, knots=knots)


class _Values:
    """The distinct values of a column, and the weight of the rows of each: kept in memory, 16 bytes a value."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, values: np.ndarray, weight: np.ndarray) -> None:
        self._parts.append((values.copy(), weight.copy()))
        self._waiting += len(values)
        if self._waiting > max(_COMPACTED, 2 * len(self._parts[0][0])):
            self.counts()

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The values in ascending order, and their weights."""
        if not self._parts:
            return np.zeros(0), np.zeros(0)
        values, weight = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        distinct, places = np.unique(values, return_inverse=True)
        self._parts, self._waiting = [(distinct, np.bincount(places, weight, len(distinct)))], 0
        return self._parts[0]


def _quantiles(values: np.ndarray, weight: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Quantiles of values in ascending order, interpolated as R's type 7 (Hyndman and Fan 1996).

    A weight counts as a number of rows. If weights are not whole numbers, they are scaled to a mean of 1.
    """
    if (weight != np.floor(weight)).any():
        weight = weight * (len(weight) / weight.sum())
    ends = np.cumsum(weight)
    at = (ends[-1] - 1) * shares
    below = np.floor(at)
    low, high = (
        values[np.minimum(np.searchsorted(ends, p, side="right"), len(values) - 1)] for p in (below, below + 1)
    )
    found: np.ndarray = low + (at - below) * (high - low)
    return found
