"""The base levels of categories: the levels without a weight of their own, so that other weights are contrasts."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dpreg.data.schema import Category, Schema
from dpreg.errors import InputError, quote_names
from dpreg.spelling import spell
from dpreg.tables.standalone import normalize_category


@dataclasses.dataclass(frozen=True)
class BaseLevels:
    """One base level for each category of a schema (treatment contrasts; Venables and Ripley 2002, section 6.2).

    The features of a category add up to 1 in each row. With an intercept, or with another category, one of them is
    therefore a combination of other features.

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

    @functools.cached_property
    def features(self) -> tuple[int, ...]:
        """The features that are levels of a category."""
        widths = [(isinstance(column, Category), len(column.features)) for column in self.schema.inputs]
        return tuple(np.flatnonzero([level for level, width in widths for _ in range(width)]).tolist())

    def left_out(self, intercept: bool, infinite: Collection[int] = ()) -> tuple[int, ...]:
        """The features of the base levels: combinations of other features.

        Without an intercept, the first category keeps all its levels, as in R.

        Args:
          infinite: levels without a finite weight, with which no other level can be compared.

        Raises:
          InputError: when the user named one of these.
        """
        found, at, spans_constant = list[int](), 0, intercept
        for column in self.schema.inputs:
            if isinstance(column, Category):
                if spans_constant:
                    found.append(self._base(column, at, infinite))
                spans_constant = True
            at += len(column.features)
        return tuple(found)

    def _base(self, column: Category, at: int, infinite: Collection[int]) -> int:
        """The feature of the base level of a column, whose first feature is `at`."""
        features = range(at, at + len(column.features))
        if column.name not in self.chosen:
            return next(feature for feature in features if feature not in infinite)
        base = features[self.chosen[column.name]]
        if base in infinite:
            level = f"{column.name}:{_levels(column)[self.chosen[column.name]]}"
            raise InputError(
                f"{spell('base', (level,))}: all targets of its rows are alike, so no other level can be compared with "
                "it; name another level"
            )
        return base


def _find_level(schema: Schema, name: str) -> tuple[str, int]:
    """The column and the position of the level in a text "column:level"; either may have colons of its own."""
    categories = {column.name: column for column in schema.inputs if isinstance(column, Category)}
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
