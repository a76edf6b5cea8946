"""What the columns of a table are to a model, learned once from the training rows and kept with the model."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from dpreg.data.terms import Term, encode, read_terms
from dpreg.errors import InputError

Label = str | int | bool  # of a target, as the table has it

OTHER = "other"
WEIGHT, GROUP, ROW, NUMBER = range(-4, 0)  # the last columns of rows as `dpreg.tables.columns.RawReader` reads them


@dataclasses.dataclass(frozen=True)
class Number:
    """A numeric column: the model sees (value - mean) / scale, of a missing value the mean.

    Attributes:
      name: of the column.
      mean, scale: 0 and 1 where it is not standardised.
      fill: what stands for a missing value; None where rows without a value are refused or dropped.
      days: whether the table has dates there, and the model days.
      constant: whether it has one value in all training rows, `mean`. They say nothing of what another value would
        change, so the model sees 0 for any value, and the column's weight is 0.
      log: whether the model sees logarithms, which `RawReader` takes.
    """

    name: str
    mean: float = 0.0
    scale: float = 1.0
    fill: float | None = None
    days: bool = False
    constant: bool = False
    log: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """The names of what the model sees."""
        return (f"log({self.name})" if self.log else self.name,)


@dataclasses.dataclass(frozen=True)
class Category:
    """A column of categories: the model sees 1 for the row's category and 0 for the others (one-hot).

    Attributes:
      name: of the column.
      values: the categories, the most frequent first. All other values, and missing ones, are the category "other".
      counts: for each category the weight of the training rows that have it; without weights, their number.
      others: the weight of the training rows of the category "other". If it is 0, nothing was learned about "other".
        For such a row the model then sees each category's share of the training rows instead of a 1: a linear model
        predicts the mean over the categories, weighted by these shares.
    """

    name: str
    values: tuple[str, ...]
    counts: tuple[float, ...]
    others: float = 0

    @property
    def features(self) -> tuple[str, ...]:
        """The names of what the model sees."""
        rest = OTHER
        while rest in self.values:  # a category of that name
            rest += "_"
        return tuple(f"{self.name}={value}" for value in (*self.values, rest))

    def encode(self, codes: np.ndarray, into: np.ndarray) -> None:
        """Writes what the model sees of codes [n] into zeros [n, features]."""
        known = (codes >= 0) & (codes < len(self.values))
        into[np.arange(len(codes)), np.where(known, codes, len(self.values)).astype(np.intp)] = 1
        if not self.others and not known.all():
            into[~known] = np.array([*self.counts, 0]) / sum(self.counts)


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a table as a model sees them.

    Attributes:
      inputs: the features' columns, in order.
      targets: the columns to predict; the model sees them as (value - mean) / scale, too.
      log_targets: whether the values of targets are logarithms of the table's. `RawReader` takes the logarithms, so
        the `raw` rows of `rows` hold them already; `prediction` returns to the units of the table.
      labels: the C labels of the only target; the model sees their positions, 0 to C - 1. Empty if the target has no
        labels.
      smearing: with logarithms, the factor of each target by which `prediction` becomes a mean; empty for medians.
      terms: those of a formula, which are scaled in place of the columns. Without a formula there are none: each input
        is a term.
    """

    inputs: tuple[Number | Category, ...]
    targets: tuple[Number, ...]
    log_targets: bool = False
    labels: tuple[Label, ...] = ()
    smearing: tuple[float, ...] = ()
    terms: tuple[Term, ...] = ()

    @functools.cached_property
    def features(self) -> tuple[str, ...]:
        """The names of the d features."""
        if not self.terms:
            return tuple(name for column in self.inputs for name in column.features)
        names, levels = list[str](), {column.name: column.features for column in self.inputs}
        for factors in (term.factors for term in self.terms):
            of_factors = (levels[factor.text] if factor.kind == "category" else factor.names() for factor in factors)
            names.extend(":".join(parts) for parts in itertools.product(*of_factors))
        return tuple(names)

    @functools.cached_property
    def products(self) -> frozenset[str]:
        """The names of those features that are products of several factors of a formula."""
        widths = [(len(term.factors), len(term.mean)) for term in self.terms]
        of_products = [factors > 1 for factors, width in widths for _ in range(width)]
        return frozenset(itertools.compress(self.features, of_products))

    @functools.cached_property
    def _numbers(self) -> "_Numbers":
        ends = itertools.accumulate(len(column.features) for column in self.inputs)
        numbers = [
            (i, end - 1, c) for i, (end, c) in enumerate(zip(ends, self.inputs, strict=True)) if isinstance(c, Number)
        ]
        columns = [column for *_, column in numbers]
        return _Numbers(
            [at for at, *_ in numbers],
            [at for _, at, _ in numbers],
            np.array([column.mean for column in columns]),
            np.array([column.scale for column in columns]),
            np.array([np.nan if column.fill is None else column.fill for column in columns]),
            np.array([column.constant for column in columns], bool),
        )

    def rows(self, raw: np.ndarray, dtype: DTypeLike = np.float32) -> dict[str, np.ndarray]:
        """What the model sees of rows of a table: {"x": [n, d], "y": [n, t], "weight": [n]} of a dtype.

        Args:
          raw: [n, inputs + targets + 4] float64 as `dpreg.tables.columns.RawReader` gives them; without the targets
            y is 0. A code is the position in a category's `values`; any other stands for "other".

        Raises:
          InputError: when a value is not finite once it is scaled.
        """
        inputs, targets = raw[:, : len(self.inputs)], raw[:, len(self.inputs) : WEIGHT]
        ends = list(itertools.accumulate(len(column.features) for column in self.inputs))
        x = np.zeros((len(raw), ends[-1]), np.float64 if self.terms else dtype)
        y = np.zeros((len(raw), len(self.targets)), dtype)
        with np.errstate(over="ignore"):
            numbers = self._numbers
            x[:, numbers.features] = numbers.scaled(inputs[:, numbers.inputs])
            for column, values, end in zip(self.inputs, inputs.T, ends, strict=True):
                if isinstance(column, Category):
                    column.encode(values, x[:, end - len(column.features) : end])
            if self.terms:
                encoded = zip(self.inputs, np.split(x, ends[:-1], axis=1), strict=True)
                x = encode(self.terms, {column.name: values for column, values in encoded}).astype(dtype)
            for at, values in enumerate(targets.T):
                y[:, at] = (values - self.targets[at].mean) / self.targets[at].scale
        for names, scaled in ((self.features, x), ([target.name for target in self.targets], y)):
            if not np.isfinite(scaled).all():
                row, at = np.argwhere(~np.isfinite(scaled))[0]
                raise InputError(
                    f"row {int(raw[row, ROW]) + 1:,}: {names[at]!r} is not finite once it is scaled; correct that value"
                )
        return {"x": x, "y": y, "weight": raw[:, WEIGHT].astype(dtype)}

    def prediction(self, y: np.ndarray) -> np.ndarray:
        """Predictions [n, t] of a model -> in the units of the table, float64."""
        scaled = y.astype(np.float64) * [t.scale for t in self.targets] + [t.mean for t in self.targets]
        with np.errstate(over="ignore"):
            unscaled = np.exp(scaled) if self.log_targets else scaled
            return unscaled * self.smearing if self.smearing else unscaled

    def parameters(self, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [d, t] and bias [t] of a linear model on scaled columns -> in original units, float64.

        Where the targets are logarithms, they predict those. Constant columns have the weight 0.
        """
        d = len(self.features)
        mean, scale = self.units
        w = np.where(self.constant[:, None], 0.0, np.asarray(w, np.float64) / scale[:d, None] * scale[d:])
        return w, np.asarray(b, np.float64) * scale[d:] + mean[d:] - mean[:d] @ w

    @functools.cached_property
    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, scale) of all features and targets, [d + t] float64: what the model sees times scale plus mean."""
        columns = [column for column in self.inputs for _ in column.features]
        numbers = [column if isinstance(column, Number) else Number(column.name) for column in columns]
        of_features = [(n.mean, n.scale) for n in numbers]
        if self.terms:
            of_features = [unit for term in self.terms for unit in zip(term.mean, term.scale, strict=True)]
        units = np.array([*of_features, *((target.mean, target.scale) for target in self.targets)]).reshape(-1, 2)
        return units[:, 0].copy(), units[:, 1].copy()

    @property
    def constant(self) -> np.ndarray:
        """Which features are of constant columns, [d] bool."""
        if self.terms:
            return np.array([constant for term in self.terms for constant in term.constant], bool)
        return np.array([isinstance(c, Number) and c.constant for c in self.inputs for _ in c.features], bool)

    def without_counts(self, features: Collection[int]) -> "Schema":
        """This schema with no rows counted for some levels: they have no share in what stands for an unknown level."""
        names, inputs = {self.features[at] for at in features}, list[Number | Category]()
        for column in self.inputs:
            if isinstance(column, Category):
                counted = zip(column.features, column.counts, strict=False)
                counts = tuple(0.0 if name in names else count for name, count in counted)
                column = dataclasses.replace(column, counts=counts)
            inputs.append(column)
        return dataclasses.replace(self, inputs=tuple(inputs))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "inputs": [{"kind": "number" if isinstance(c, Number) else "category", **vars(c)} for c in self.inputs],
            "targets": [{**vars(t)} for t in self.targets],
            "log_targets": self.log_targets,
            "labels": list(self.labels),
            "terms": [dataclasses.asdict(term) for term in self.terms],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Schema":
        """The schema that `to_json` gave."""

        def column(given: Mapping[str, Any]) -> Number | Category:
            if given["kind"] == "number":
                return Number(**{field.name: given[field.name] for field in dataclasses.fields(Number)})
            return Category(given["name"], tuple(given["values"]), tuple(given["counts"]), given["others"])

        inputs = tuple(map(column, values["inputs"]))
        targets = tuple(Number(**target) for target in values["targets"])
        return cls(inputs, targets, values["log_targets"], tuple(values["labels"]), terms=read_terms(values))


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The numeric columns of a schema together: scaled at once, since there may be many.

    Attributes:
      inputs, features: the positions of each among the inputs and among the features.
      mean, scale, fill: [c] float64; of those without `fill` NaN.
      constant: [c] bool.
    """

    inputs: list[int]
    features: list[int]
    mean: np.ndarray
    scale: np.ndarray
    fill: np.ndarray
    constant: np.ndarray

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """[n, c] as in the table -> as the model sees them."""
        filled = values if np.isnan(self.fill).all() else np.where(np.isnan(values), self.fill, values)
        found: np.ndarray = (filled - self.mean) / self.scale
        if self.constant.any():
            found[self.constant & ~np.isnan(found)] = 0
        return found
