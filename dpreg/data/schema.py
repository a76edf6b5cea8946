"""What the columns of a table are to a model, learned once from the training rows and kept with the model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Number:
    """A numeric column: the model sees (value - mean) / scale, of a missing value the mean.

    Attributes:
      name: of the column.
      mean, scale: 0 and 1 where it is not standardised.
      fill: what stands for a missing value; None where rows without a value are refused or dropped.
    """

    name: str
    mean: float = 0.0
    scale: float = 1.0
    fill: float | None = None

    @property
    def features(self) -> tuple[str, ...]:
        """The names of what the model sees."""
        return (self.name,)


@dataclasses.dataclass(frozen=True)
class Category:
    """A column of categories: the model sees 1 for the row's category and 0 for the others (one-hot).

    Attributes:
      name: of the column.
      values: the categories, the most frequent first; all others are "other".
      counts: how many training rows have each.
    """

    name: str
    values: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """The names of what the model sees."""
        rest = OTHER
        while rest in self.values:  # a category of that name
            rest += "_"
        return tuple(f"{self.name}={value}" for value in (*self.values, rest))


@dataclasses.dataclass(frozen=True)
class Schema:
    """The columns of a table as a model sees them.

    Attributes:
      inputs: the features' columns, in order.
      targets: the columns to predict, which the model sees scaled, too, where they are.
    """

    inputs: tuple[Number | Category, ...]
    targets: tuple[Number, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the d features."""
        return tuple(name for column in self.inputs for name in column.features)

    def x(self, raw: np.ndarray) -> np.ndarray:
        """The features [n, d] float32 of raw inputs [n, inputs] float64: numbers as they are, categories as codes.

        A code is the position in `values`; any other stands for "other". Computed in float64; what float32 cannot
        hold is infinite.
        """
        x = np.zeros((len(raw), len(self.features)), np.float32)
        at = 0
        for column, values in zip(self.inputs, raw.T, strict=True):
            if isinstance(column, Number):
                with np.errstate(over="ignore"):
                    x[:, at] = _scaled(column, values)
            else:
                known = (values >= 0) & (values < len(column.values))
                x[np.arange(len(raw)), at + np.where(known, values, len(column.values)).astype(np.intp)] = 1
            at += len(column.features)
        return x

    def y(self, raw: np.ndarray) -> np.ndarray:
        """The targets [n, t] float32 of raw targets [n, t] float64."""
        y = np.stack([_scaled(c, v) for c, v in zip(self.targets, raw.T, strict=True)], axis=1)
        with np.errstate(over="ignore"):
            return y.astype(np.float32)

    def to_original_units(self, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights [d, t] and bias [t] of a linear model on scaled columns -> those on the original ones, float64."""
        mean, scale = (
            np.array([getattr(c, what) if isinstance(c, Number) else usual for c in self.inputs for _ in c.features])
            for what, usual in (("mean", 0.0), ("scale", 1.0))
        )
        target_mean, target_scale = (np.array([getattr(t, what) for t in self.targets]) for what in ("mean", "scale"))
        w = np.asarray(w, np.float64) / scale[:, None] * target_scale
        return w, np.asarray(b, np.float64) * target_scale + target_mean - mean @ w

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "inputs": [
                {"kind": "number" if isinstance(c, Number) else "category", **dataclasses.asdict(c)}
                for c in self.inputs
            ],
            "targets": [dataclasses.asdict(t) for t in self.targets],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Schema":
        """The schema that `to_json` gave."""

        def column(given: Mapping[str, Any]) -> Number | Category:
            if given["kind"] == "number":
                return Number(given["name"], given["mean"], given["scale"], given["fill"])
            return Category(given["name"], tuple(given["values"]), tuple(given["counts"]))

        return cls(tuple(map(column, values["inputs"])), tuple(Number(**t) for t in values["targets"]))


def _scaled(column: Number, values: np.ndarray) -> np.ndarray:
    if column.fill is not None:
        values = np.where(np.isnan(values), column.fill, values)
    return (values - column.mean) / column.scale


@dataclasses.dataclass
class Moments:
    """Counts, means and sums of squares around them of columns, [c] float64, a batch at a time (Chan et al. 1983).

    Missing values (NaN) are left out.
    """

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def none(cls, columns: int) -> "Moments":
        """Of no rows."""
        zero, inf = np.zeros(columns), np.full(columns, np.inf)
        return cls(zero, zero, zero, inf, -inf)

    def add(self, values: np.ndarray) -> None:
        """Takes in rows [n, c]."""
        if not len(values):
            return
        there = ~np.isnan(values)
        count = there.sum(axis=0).astype(np.float64)
        some = np.maximum(count, 1)
        # Around a first guess, so that nothing is lost where values are far from 0.
        shift = np.where(there.any(axis=0), values[there.argmax(axis=0), np.arange(values.shape[1])], 0.0)
        apart = np.where(there, values - shift, 0.0)
        mean = apart.sum(axis=0) / some
        squares = np.where(there, np.square(apart - mean), 0.0).sum(axis=0)
        total = np.maximum(self.count + count, 1)
        delta = shift + mean - self.mean
        self.squares = self.squares + squares + np.square(delta) * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = self.count + count
        self.least = np.fmin(self.least, np.where(there, values, np.inf).min(axis=0))
        self.most = np.fmax(self.most, np.where(there, values, -np.inf).max(axis=0))

    def scale(self, rows: int, standardize: bool) -> Sequence[tuple[float, float]]:
        """(mean, scale) of each column over that many rows, of which those without a value have the mean."""
        if not standardize:
            return [(0.0, 1.0)] * len(self.mean)
        deviation = np.sqrt(self.squares / max(rows, 1))
        return [
            (float(m), float(s) if low < high and s > 0 else 1.0)
            for m, s, low, high in zip(self.mean, deviation, self.least, self.most, strict=True)
        ]


def vocabulary(counts: Mapping[str, int], most: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The categories that a model tells apart, and their counts: the most frequent, by name where equally so."""
    chosen = sorted(((count, value) for value, count in counts.items() if count), key=lambda item: (-item[0], item[1]))
    return tuple(value for _, value in chosen[:most]), tuple(count for count, _ in chosen[:most])
