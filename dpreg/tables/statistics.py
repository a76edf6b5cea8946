"""Moments, categories and labels of columns, learned from the rows."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dpreg.data.schema import WEIGHT, Category, Label, Number, Schema
from dpreg.data.terms import Term
from dpreg.errors import InputError, quote_names
from dpreg.spelling import spell
from dpreg.tables.columns import RawReader
from dpreg.tables.formula import TermStatistics
from dpreg.tables.labels import MAX_LABELS, code_labels, order_labels
from dpreg.tables.standalone import are_codes

SMALLEST = 1e-150  # the least deviation that counts as nonzero: squares of smaller ones are subnormal

_MOST_LOST = 0.05  # the largest relative error of a deviation by rounding
_NO_CODE = -1  # the code of missing values of a category


class ColumnStatistics:
    """The statistics of the columns that a reader reads, over the rows to fit; labels over the held-out rows, too."""

    def __init__(self, reader: RawReader):
        self._reader, self._columns = reader, reader.columns
        self._counts = {name: collections.defaultdict[int, float](float) for name in self._columns.categorical}
        self._moments = Moments.none(len(self._columns.features) + len(self._columns.target))
        self._terms = TermStatistics(self._columns)
        self.weight = self.largest_weight = 0.0  # the sum of the weights, and the largest one
        # By target, the codes of labels in the rows to fit and in the others.
        self._label_codes = {name: {"fitted": set[int](), "held out": set[int]()} for name in reader.labelled}
        self._labels: tuple[Label, ...] = ()
        self._numbers_of_codes = list[np.ndarray]()

    def add(self, raw: np.ndarray) -> None:
        """Adds rows to fit from `RawReader.read`."""
        self._add_labels(raw, "fitted")
        weight = _weights(raw, self._reader.dtype)
        self._moments.add(raw[:, :WEIGHT], weight)
        self._terms.add(raw, weight)
        self.weight += float(weight.sum())
        self.largest_weight = max(self.largest_weight, float(weight.max(initial=0)))
        for name, counts in self._counts.items():
            codes, places = np.unique(raw[:, self._columns.features.index(name)], return_inverse=True)
            for code, count in zip(codes, np.bincount(places, weight, len(codes)), strict=True):
                counts[_NO_CODE if np.isnan(code) else int(code)] += float(count)

    def add_held_out(self, raw: np.ndarray) -> None:
        """Adds rows from `RawReader.read` that are held out, of which only the labels count."""
        self._add_labels(raw, "held out")

    def _add_labels(self, raw: np.ndarray, rows: str) -> None:
        for at, name in enumerate(self._reader.labelled, len(self._columns.features)):
            codes = raw[~np.isnan(raw[:, at]), at].astype(np.intp)
            self._label_codes[name][rows] |= set(np.flatnonzero(np.bincount(codes)).tolist())

    def fix_labels(self) -> None:
        """Orders the labels of all rows so far; the reader refuses other labels from now on.

        Raises:
          InputError: for a single label, too many labels, labels in several targets, and a label without a row to fit.
        """
        for name, of_rows in self._label_codes.items():
            codes, texts = self._reader.codes[name], list(self._reader.codes[name])
            fitted, held_out = ({texts[code] for code in of_rows[rows]} for rows in ("fitted", "held out"))
            found = fitted | held_out
            self._labels = order_labels(found)
            known = code_labels(self._labels) if self._labels else {text: float(text) for text in found}
            for text in known:
                codes.setdefault(text, len(codes))
            self._numbers_of_codes.append(np.array([*(known.get(text, np.nan) for text in codes), np.nan]))
            self._reader.codes[name] = {text: codes[text] for text in known}
            self._reader.fixed.add(name)
            self._refuse_labels(name, found - fitted if fitted else set())
        if len(self._label_codes) > 1:
            self._labels = ()

    def _refuse_labels(self, name: str, without_rows: set[str]) -> None:
        """Raises InputError for labels of a target that cannot be fitted."""
        labels = [*code_labels(self._labels)]
        if len(labels) > MAX_LABELS:
            remedy = f"merge some, or use another {spell('loss')}"
            if are_codes(self._labels):
                remedy = f"use another {spell('loss')}, or {spell('target_transform', 'none')}"
            raise InputError(f"column {name!r} has {len(labels):,} labels, more than {MAX_LABELS:,}; {remedy}")
        if are_codes(self._labels):
            return
        if len(self._label_codes) > 1:
            raise InputError(
                f"column {name!r} has the labels {quote_names(labels)}, which only a single target may have; name one "
                f"in {spell('target')}"
            )
        if len(self._labels) == 1:
            raise InputError(f"column {name!r} has one label, {labels[0]!r}; give rows with others")
        if without_rows:
            raise InputError(
                f"column {name!r}: all rows with the label {min(without_rows)!r} are held out; use "
                f"{spell('validation_fraction', 0)}, or leave out these rows"
            )

    def schema(self) -> tuple[Schema, list[np.ndarray | None]]:
        """The schema of the columns, and for each input and target what the model reads for its codes.

        The last value of each is that of a missing value; None stands for a column that has no codes.
        """
        columns, inputs, codes = self._columns, list[Number | Category](), list[np.ndarray | None]()
        moments, constant = self._moments, self._moments.constant(columns.intercept)
        scales = moments.scale(self.weight, columns.standardizes)
        of_terms = columns.formula is not None  # which are scaled in place of the columns
        for at, name in enumerate(columns.features):
            if name in self._counts:
                names = list(self._reader.codes[name])
                counted = {names[code]: count for code, count in self._counts[name].items() if code != _NO_CODE}
                values, counts, rare = _vocabulary(counted, columns.max_categories)
                inputs.append(Category(name, values, counts, rare + self._counts[name].get(_NO_CODE, 0.0)))
                place = {value: position for position, value in enumerate(values)}
                codes.append(np.array([*(place.get(value, len(values)) for value in names), len(values)], np.float64))
            else:
                if not moments.weight[at]:
                    raise InputError(
                        f"column {name!r} has no value in the rows to fit; leave it out with "
                        f"{spell('exclude', (name,))}"
                    )
                mean, scale = (float(moments.mean[at]), 1.0) if constant[at] else scales[at]
                fill = float(moments.mean[at]) if columns.missing == "mean" else None
                if columns.offset_column is not None and at == len(columns.features) - 1:
                    inputs.append(Number(name, log=columns.offset_column != name))
                elif of_terms:
                    inputs.append(Number(name, fill=fill, days=name in columns.dates))
                else:
                    inputs.append(Number(name, mean, scale, fill, name in columns.dates, bool(constant[at])))
                codes.append(None)
        scaled = columns.target_transform == "standardize"
        of_targets = moments.scale(self.weight, True)[len(columns.features) :]
        targets = [Number(t, *(m if scaled else (0.0, 1.0))) for t, m in zip(columns.target, of_targets, strict=True)]
        known, codes_of = columns.standardizes or of_terms, self._reader.codes
        features = [None if known or name in codes_of else name for name in columns.features]
        unscaled = [*[None] * len(features), *(None if scaled or t in codes_of else t for t in columns.target)]
        of_rows = moments, self.weight, self._reader.dtype
        _refuse_what_cannot_be_told(features, *of_rows, _standardize())
        _refuse_what_cannot_be_told(unscaled, *of_rows, spell("target_transform", "standardize"))
        log_targets, terms = columns.target_transform == "log", self._terms.terms(inputs)
        schema = Schema(tuple(inputs), tuple(targets), log_targets, self._labels, terms=terms)
        for feature, count in collections.Counter(schema.features).items():
            if count > 1:
                raise InputError(f"two features would be called {feature!r}; rename a column or a category")
        return schema, [*codes, *self._numbers_of_codes]

    def scaled_terms(self, schema: Schema, parts: Iterable[np.ndarray]) -> Schema:
        """The schema with the moments of the columns of its terms, over rows [n, ...] in which codes are positions.

        Raises:
          InputError: for a term without a finite value, or whose values vary too little.
        """
        moments, columns, dtype = Moments.none(len(schema.features)), self._columns, self._reader.dtype
        for raw in parts:
            moments.add(schema.rows(raw, np.float64)["x"], _weights(raw, dtype))
        constant, scales = moments.constant(columns.intercept), moments.scale(self.weight, columns.standardizes)
        terms, at = list[Term](), 0
        for term in schema.terms:
            own = slice(at, at + len(term.mean))
            if any(factor.kind != "category" for factor in term.factors):
                is_constant = tuple(constant[own].tolist())
                units = [
                    (float(mean), 1.0) if same else unit
                    for mean, unit, same in zip(moments.mean[own], scales[own], is_constant, strict=True)
                ]
                mean, scale = zip(*units, strict=True)
                term = dataclasses.replace(term, mean=mean, scale=scale, constant=is_constant)
            terms.append(term)
            at = own.stop
        if not columns.standardizes:
            _refuse_what_cannot_be_told(schema.features, moments, self.weight, dtype, _standardize())
        return dataclasses.replace(schema, terms=tuple(terms))


def _standardize() -> str:
    return f"{spell('standardize', True)} (with an intercept)"


def _weights(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The weights of rows from `RawReader.read` as the steps have them, float64."""
    weights: np.ndarray = raw[:, WEIGHT].astype(dtype).astype(np.float64)
    return weights


def _refuse_what_cannot_be_told(
    names: Sequence[str | None], moments: "Moments", weight: float, dtype: np.dtype, remedy: str
) -> None:
    """Raises InputError for a column that varies by hardly more than its dtype rounds; None stands for one that may."""
    largest = np.maximum(np.abs(moments.least), np.abs(moments.most))
    deviation = np.sqrt(moments.squares / weight)
    for at, name in enumerate(names):
        if name is None or not moments.least[at] < moments.most[at]:
            continue
        rounding = max(largest[at] * float(np.finfo(dtype).eps) / 2, float(np.finfo(dtype).tiny))
        if rounding > _MOST_LOST * deviation[at]:
            remedy += "" if dtype == np.float64 else f", or {spell('precision', 'float64')}"
            raise InputError(
                f"column {name!r} varies by {deviation[at]:.3g} around {moments.mean[at]:.6g}, which {dtype} "
                f"cannot tell; use {remedy}"
            )


def _vocabulary(counts: Mapping[str, float], most: int) -> tuple[tuple[str, ...], tuple[float, ...], float]:
    """The most frequent categories, by name where equally so, the weight of each, and that of all others."""
    ranked = sorted(((count, value) for value, count in counts.items()), key=lambda item: (-item[0], item[1]))
    values, of_each = tuple(value for _, value in ranked[:most]), tuple(count for count, _ in ranked[:most])
    return values, of_each, sum(count for count, _ in ranked[most:])


@dataclasses.dataclass
class Moments:
    """Weights, means and sums of squares around them of columns, [c] float64, a batch at a time (Chan et al. 1983).

    Missing values (NaN) are left out.
    """

    weight: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @classmethod
    def none(cls, columns: int) -> "Moments":
        """Of no rows."""
        zero, inf = np.zeros(columns), np.full(columns, np.inf)
        return cls(zero, zero, zero, inf, -inf)

    def add(self, values: np.ndarray, weight: np.ndarray) -> None:
        """Takes in rows [n, c] with weights [n] above 0."""
        if not len(values):
            return
        valid = ~np.isnan(values)
        added = np.einsum("i,ij->j", weight, valid)
        # Around a first guess, so that nothing is lost where values are far from 0.
        shift = np.where(added > 0, values[valid.argmax(axis=0), np.arange(values.shape[1])], 0.0)
        apart = values - shift
        least, most = np.fmin.reduce(apart), np.fmax.reduce(apart)
        missing = None if valid.all() else ~valid
        if missing is not None:
            apart[missing] = 0
        mean = np.einsum("i,ij->j", weight, apart) / np.where(added > 0, added, 1)
        apart -= mean
        if missing is not None:
            apart[missing] = 0
        squares = np.einsum("ij,ij->j", apart, weight[:, None] * apart)
        total = self.weight + added
        share = added / np.where(total > 0, total, 1)
        delta = shift + mean - self.mean
        self.squares = self.squares + squares + np.square(delta) * self.weight * share
        self.mean = self.mean + delta * share
        self.weight = total
        self.least = np.fmin(self.least, least + shift)
        self.most = np.fmax(self.most, most + shift)

    def constant(self, intercept: bool) -> np.ndarray:
        """[c] bool: whether a column has one value, which the intercept represents; without an intercept only 0."""
        one_value: np.ndarray = ~(self.least < self.most)
        return one_value if intercept else one_value & (self.mean == 0)

    def scale(self, weight: float, standardize: bool) -> Sequence[tuple[float, float]]:
        """(mean, scale) of each column over rows of that weight, of which those without a value have the mean."""
        if not standardize:
            return [(0.0, 1.0)] * len(self.mean)
        deviation = np.sqrt(self.squares / weight)
        return [
            (float(m), float(s) if low < high and s > SMALLEST else 1.0)
            for m, s, low, high in zip(self.mean, deviation, self.least, self.most, strict=True)
        ]
