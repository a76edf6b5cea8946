"""The base levels of categories: the levels without a weight of their own, so that other weights are contrasts."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from dpreg.data.schema import Category, Schema
from dpreg.errors import InputError, quote_names
from dpreg.spelling import spell
from dpreg.tables.standalone import normalize_category


@dataclasses.dataclass(frozen=True)
class BaseLevels:
    """One base level for each category of a schema (treatment contrasts; Venables and Ripley 2002, section 6.2).

    Attributes:
      schema: the schema.
      chosen: the positions of the base levels that the user named, by column. Others are the most frequent levels.
    """

    schema: Schema
    chosen: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def named(cls, schema: Schema | None, names: Sequence[str]) -> "BaseLevels | None":
        """The base levels of a table, from texts such as "color:E"; None without a schema.

        Raises:
          InputError: for an unknown column or level, and for a column that is named twice.
        """
        if schema is None:
            return None
        chosen = dict[str, int]()
        for name in names:
            column, position = _find_level(schema, name)
            if column in chosen:
                raise InputError(f"{spell('base', names)}: column {column!r} is named twice; name one level")
            chosen[column] = position
        return cls(schema, chosen)

    @property
    def features(self) -> tuple[int, ...]:
        """The features that are levels of a category."""
        return tuple(itertools.chain(*self._features_of.values()))

    @functools.cached_property
    def _features_of(self) -> dict[str, range]:
        """The features that are the levels of a category, by its column."""
        found, at = dict[str, range](), 0
        for factors in self._terms:
            width = math.prod(factor.width for factor in factors)
            if len(factors) == 1 and factors[0].is_category:
                found[factors[0].name] = range(at, at + width)
            at += width
        return found

    def left_out(self, intercept: bool, infinite: Collection[int] = ()) -> tuple[int, ...]:
        """The features of base levels that are combinations of other features.

        The levels of a category add up to 1 in each row. The product of a term with all levels of a category is
        therefore the term itself. Of the products of a term, those are left out of which the levels other than base
        levels belong to categories whose product, with the same numbers, an earlier term has. So a category loses its
        base level if there is an intercept or another category, and an interaction the base levels of those of its
        categories without which it is also in the model, as in R (Chambers and Hastie 1992, section 2.4.1).

        Args:
          infinite: levels without a finite weight, with which no other level can be compared.

        Raises:
          InputError: when the user named one of these.
        """
        bases = {column.name: self._base(column, infinite) for column in _categories(self.schema)}
        spanned = collections.defaultdict[frozenset[str], set[frozenset[str]]](set)  # by the numbers of a term
        spanned[frozenset()] = {frozenset()} if intercept else set()
        found, at = list[int](), 0
        for factors in self._terms:
            own = spanned[frozenset(factor.name for factor in factors if not factor.adds_up_to_1)]
            of_levels = [factor.name for factor in factors if factor.adds_up_to_1]
            for product in itertools.product(*(range(factor.width) for factor in factors)):
                beside_base = frozenset(
                    factor.name
                    for factor, level in zip(factors, product, strict=True)
                    if factor.adds_up_to_1 and level != bases.get(factor.name, 0)
                )
                if beside_base in own:
                    found.append(at)
                at += 1
            for size in range(1 + len(of_levels)):
                own.update(map(frozenset, itertools.combinations(of_levels, size)))
        return tuple(found)

    def _base(self, column: Category, infinite: Collection[int]) -> int:
        """The position of the base level of a column."""
        features = self._features_of.get(column.name, range(0))
        without = {feature - features.start for feature in infinite if feature in features}
        if column.name not in self.chosen:
            return next(position for position in range(len(column.features)) if position not in without)
        position = self.chosen[column.name]
        if position in without:
            level = f"{column.name}:{_levels(column)[position]}"
            raise InputError(
                f"{spell('base', (level,))}: all targets of its rows are alike, so no other level can be compared with "
                "it; name another level"
            )
        return position

    @functools.cached_property
    def _terms(self) -> list[tuple["_Factor", ...]]:
        widths = {column.name: len(column.features) for column in self.schema.inputs}
        if self.schema.terms:
            return [
                tuple(_Factor(f.text, f.width(widths), f.kind == "category", f.adds_up_to_1) for f in term.factors)
                for term in self.schema.terms
            ]
        categories = {column.name for column in _categories(self.schema)}
        return [(_Factor(name, width, *[name in categories] * 2),) for name, width in widths.items()]


class _Factor(NamedTuple):
    """A factor of a term, with the number of its columns."""

    name: str
    width: int
    is_category: bool
    adds_up_to_1: bool


def _categories(schema: Schema) -> list[Category]:
    return [column for column in schema.inputs if isinstance(column, Category)]


def _find_level(schema: Schema, name: str) -> tuple[str, int]:
    """The column and the position of the level in a text "column:level"; both may have colons."""
    categories = {column.name: column for column in _categories(schema)}
    splits = [(name[:at], name[at + 1 :]) for at, character in enumerate(name) if character == ":"]
    known = [(categories[column], normalize_category(level)) for column, level in splits if column in categories]
    if not known:
        remedy = f"use one of {quote_names(categories)}" if categories else f"name some in {spell('categorical')}"
        raise InputError(f"{spell('base', (name,))}: it does not begin with a categorical column and a colon; {remedy}")
    found = [(column.name, _levels(column).index(level)) for column, level in known if level in _levels(column)]
    if not found:
        column, level = known[0]
        raise InputError(
            f"{spell('base', (name,))}: column {column.name!r} has no level {level!r} in the rows to fit; use one of "
            f"{quote_names(_levels(column))}"
        )
    if len(found) > 1:
        columns = quote_names([column for column, _ in found])
        raise InputError(f"{spell('base', (name,))}: it may name a level of {columns}; rename one of these columns")
    return found[0]


def _levels(column: Category) -> list[str]:
    """The levels with rows, in their order; "other" stands for all that are not listed."""
    other = column.features[-1].removeprefix(f"{column.name}=")
    return [*column.values, *([other] if column.others else [])]
