"""What the rows to fit teach of their columns: moments and categories."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dpreg.data.columns import RawReader
from dpreg.data.schema import Category, Number, Schema
from dpreg.errors import InputError

_SMALLEST = 1e-150  # deviation that is told from 0: squares of smaller ones are no normal numbers

_MOST_LOST = 0.05  # of a deviation, by rounding


class Learned:
    """What the rows to fit teach of the columns that a reader reads."""

    def __init__(self, reader: RawReader):
        self._reader, self._columns = reader, reader.columns
        self._counts = {name: collections.Counter[int]() for name in self._columns.categorical}
        self._moments = Moments.none(len(self._columns.features) + len(self._columns.target))
        self.weight = self.largest_weight = 0.0  # of all rows, and of one

    def add(self, raw: np.ndarray) -> None:
        """Takes in rows as `RawReader.read` gives them."""
        self._moments.add(raw[:, :-2])
        weight = raw[:, -2].astype(self._reader.dtype)
        self.weight += float(weight.sum(dtype=np.float64))
        self.largest_weight = max(self.largest_weight, float(weight.max(initial=0)))
        for name in self._counts:
            values = raw[:, self._columns.features.index(name)]
            self._counts[name].update(dict(zip(*np.unique(values[~np.isnan(values)], return_counts=True), strict=True)))

    def schema(self, rows: int) -> tuple[Schema, list[np.ndarray | None]]:
        """What the columns are to a model; and for each input the positions of its codes among the categories."""
        columns, inputs, codes = self._columns, list[Number | Category](), list[np.ndarray | None]()
        scales = self._moments.scale(rows, columns.standardize is not False)
        for at, name in enumerate(columns.features):
            if name in self._counts:
                names = list(self._reader.codes[name])
                counted = {names[int(code)]: int(count) for code, count in self._counts[name].items()}
                values, counts = _vocabulary(counted, columns.max_categories)
                inputs.append(Category(name, values, counts, rows - sum(counts)))
                place = {value: position for position, value in enumerate(values)}
                codes.append(np.array([*(place.get(value, len(values)) for value in names), len(values)], np.float64))
            else:
                mean, scale = scales[at]
                if not self._moments.count[at]:
                    raise InputError(f"column {name!r} has no value in the rows to fit; leave it out with --exclude")
                fill = float(self._moments.mean[at]) if columns.missing == "mean" else None
                inputs.append(Number(name, mean, scale, fill, name in columns.dates))
                codes.append(None)
        scaled = columns.target_transform == "standardize"
        moments = self._moments.scale(rows, True)[len(columns.features) :]
        targets = [Number(t, *(m if scaled else (0.0, 1.0))) for t, m in zip(columns.target, moments, strict=True)]
        self._refuse_what_cannot_be_told(rows)
        schema = Schema(tuple(inputs), tuple(targets), log_targets=columns.target_transform == "log")
        for feature, count in collections.Counter(schema.features).items():
            if count > 1:
                raise InputError(f"two features would be called {feature!r}; rename a column or a category")
        return schema, codes

    def _refuse_what_cannot_be_told(self, rows: int) -> None:
        """Raises InputError for a column that is not scaled, and varies by hardly more than its dtype rounds."""
        columns, moments, dtype = self._columns, self._moments, self._reader.dtype
        largest = np.maximum(np.abs(moments.least), np.abs(moments.most))
        deviation = np.sqrt(moments.squares / max(rows, 1))
        for at, name in enumerate((*columns.features, *columns.target)):
            is_target = at >= len(columns.features)
            scaled = columns.target_transform == "standardize" if is_target else columns.standardize is not False
            if scaled or name in self._counts or not moments.least[at] < moments.most[at]:
                continue
            rounding = max(largest[at] * float(np.finfo(dtype).eps) / 2, float(np.finfo(dtype).tiny))
            if rounding > _MOST_LOST * deviation[at]:
                remedy = "--target_transform=standardize" if is_target else "--standardize (with an intercept)"
                remedy += "" if dtype == np.float64 else ", or --precision=float64"
                raise InputError(
                    f"column {name!r} varies by {deviation[at]:.3g} around {moments.mean[at]:.6g}, which {dtype} "
                    f"cannot tell; use {remedy}"
                )


def _vocabulary(counts: Mapping[str, int], most: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The categories that a model tells apart, and their counts: the most frequent, by name where equally so."""
    chosen = sorted(((count, value) for value, count in counts.items() if count), key=lambda item: (-item[0], item[1]))
    return tuple(value for _, value in chosen[:most]), tuple(count for count, _ in chosen[:most])


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
        # Around a first guess, so that nothing is lost where values are far from 0.
        shift = np.where(count > 0, values[there.argmax(axis=0), np.arange(values.shape[1])], 0.0)
        apart = values - shift
        least, most = np.fmin.reduce(apart), np.fmax.reduce(apart)
        missing = None if there.all() else ~there
        if missing is not None:
            apart[missing] = 0
        mean = apart.sum(axis=0) / np.maximum(count, 1)
        apart -= mean
        if missing is not None:
            apart[missing] = 0
        squares = np.einsum("ij,ij->j", apart, apart)
        total = np.maximum(self.count + count, 1)
        delta = shift + mean - self.mean
        self.squares = self.squares + squares + np.square(delta) * self.count * count / total
        self.mean = self.mean + delta * count / total
        self.count = self.count + count
        self.least = np.fmin(self.least, least + shift)
        self.most = np.fmax(self.most, most + shift)

    def scale(self, rows: int, standardize: bool) -> Sequence[tuple[float, float]]:
        """(mean, scale) of each column over that many rows, of which those without a value have the mean."""
        if not standardize:
            return [(0.0, 1.0)] * len(self.mean)
        deviation = np.sqrt(self.squares / max(rows, 1))
        return [
            (float(m), float(s) if low < high and s > _SMALLEST else 1.0)
            for m, s, low, high in zip(self.mean, deviation, self.least, self.most, strict=True)
        ]
