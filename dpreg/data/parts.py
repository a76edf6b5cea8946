"""Rows of which each process holds a part: the whole is the parts, in the order of the processes' ids."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.data.sampler import Sampler
from dpreg.distributed.presence import at_work
from dpreg.distributed.processes import AgreedError, allgather_text, exchange_for, sum_words
from dpreg.errors import InputError

if TYPE_CHECKING:
    from dpreg.data.sources import Rows, Source

_CHUNK_BYTES = 4 << 20  # of rows, sent from the processes that hold them at once
_Columns = dict[str, tuple[str, int]]  # of x, y and weight the dtype, and how many numbers a row has


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Consecutive rows that this process holds, from row `first` of the whole on."""

    first: int
    rows: Any  # a source, or the columns of rows that another process has sent

    def __len__(self) -> int:
        return len(self.rows["weight"] if isinstance(self.rows, dict) else self.rows)

    def __getitem__(self, indices: np.ndarray) -> "Rows":
        if isinstance(self.rows, dict):
            return {name: np.take(column, indices, axis=0) for name, column in self.rows.items()}
        found: Rows = self.rows[indices]
        return found


@dataclasses.dataclass(frozen=True)
class PartedRows:
    """A source of which each process holds a part. `RegressionData.from_parts` makes it.

    It gives the rows that this process holds: its own part, the first and the last row of the whole, and, once
    `with_shards_of` has sent them, those of its logical shards.

    Attributes:
      starts: [processes + 1] where the part of each process begins.
      columns: dtype and width of x, y and weight.
      segments: what this process holds.
      digest: the fingerprint, a function of the fingerprints of all parts.
    """

    starts: tuple[int, ...]
    columns: _Columns
    segments: tuple[_Segment, ...]
    digest: str

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def own(self) -> range:
        """The rows of this process's part, as they are counted in the whole."""
        return range(*self.starts[jax.process_index() : jax.process_index() + 2])

    def fingerprint(self) -> str:
        """The same in all processes, for the same parts."""
        return self.digest

    def __getitem__(self, indices: np.ndarray) -> "Rows":
        indices = np.asarray(indices)
        rows, missing = self._blank(len(indices)), np.ones(len(indices), bool)
        for segment in self.segments:
            at = indices - segment.first
            here = missing & (at >= 0) & (at < len(segment))
            if len(here) and here.all():
                return segment[at]
            if here.any():
                for name, column in segment[at[here]].items():
                    rows[name][here] = column
                missing &= ~here
        if missing.any():
            raise InputError(
                f"row {int(indices[missing.argmax()]) + 1:,} of rows in parts is held by another process; shuffle, cut "
                "or change each process's own rows, before from_parts puts them together"
            )
        return rows

    def _blank(self, number: int) -> "Rows":
        return {
            name: np.zeros((number, width) if name != "weight" else number, dtype)
            for name, (dtype, width) in self.columns.items()
        }

    def everywhere(self, indices: np.ndarray) -> "Rows":
        """Rows in all processes, whichever holds them. All processes have to ask for the same."""
        own = self.own
        here = (indices >= own.start) & (indices < own.stop)
        rows = self._blank(len(indices))
        if here.any():
            for name, column in self[indices[here]].items():
                rows[name][here] = column
        # As words, of which all but one process has zeros: sums of numbers would turn -0 into 0.
        flat = [column.reshape(-1).view(np.uint8) for column in rows.values()]
        sizes = [len(column) for column in flat]
        packed = np.concatenate([*flat, np.zeros(-sum(sizes) % 4, np.uint8)])
        summed = sum_words(packed.view(np.uint32)).view(np.uint8)
        parts = np.split(summed[: sum(sizes)], np.cumsum(sizes)[:-1])
        return {
            name: part.view(column.dtype).reshape(column.shape).copy()
            for (name, column), part in zip(rows.items(), parts, strict=True)
        }

    @at_work("exchanging rows")
    def with_shards_of(self, mesh: Mesh, num_shards: int) -> "PartedRows":
        """The same rows, with those of the shards of this process's devices. All processes have to call it alike.

        Only rows that lie with another process than the one whose devices carry them are sent, a few MB at a time.
        """
        allgather_text()  # before a collective, which waits for nobody long
        received, row_bytes = [], sum(np.dtype(dtype).itemsize * width for dtype, width in self.columns.values())
        at_once = max(1, _CHUNK_BYTES // row_bytes)
        for process, first, stop in self._misplaced(mesh, num_shards):
            for start in range(first, stop, at_once):
                rows = self.everywhere(np.arange(start, min(start + at_once, stop)))
                if process == jax.process_index():
                    received.append(_Segment(start, rows))
        return dataclasses.replace(self, segments=(*self.segments, *received))

    def _misplaced(self, mesh: Mesh, num_shards: int) -> list[tuple[int, int, int]]:
        """(process, first row, row after the last) of what the shards of a process need and others hold."""
        sampler, slots = Sampler(len(self), num_shards, num_shards, shuffle=False), -(-num_shards // mesh.size)
        found = []
        for device, of in enumerate(mesh.devices.flat):
            first, stop = (int(sampler.shard_start(shard)) for shard in (device * slots, (device + 1) * slots))
            own_first, own_stop = self.starts[of.process_index : of.process_index + 2]
            for lower, upper in ((first, min(stop, own_first)), (max(first, own_stop), stop)):
                if lower < upper:
                    found.append((of.process_index, lower, upper))
        return found


def put_together(own: "Source | None", what: str) -> "Source | None":
    """The whole of which each process gives a part; None where no process has rows.

    Args:
      own: the rows of this process, or None.
      what: which rows these are, for messages.

    Raises:
      AgreedError: in all processes, when the columns or dtypes of two parts differ.
    """
    if jax.process_count() == 1:
        return own if own is not None and len(own) else None
    mine: dict[str, Any] = {"rows": 0 if own is None else len(own)}
    if own is not None and mine["rows"]:
        row = own[np.zeros(1, np.int32)]
        columns = {name: (str(row[name].dtype), row[name].size) for name in ("x", "y", "weight")}
        mine |= {"columns": columns, "fingerprint": own.fingerprint()}
    parts = exchange_for(f"from_parts ({what} rows)", mine)
    filled = [process for process, part in enumerate(parts) if part["rows"]]
    if not filled:
        return None
    for process in filled:
        if parts[process]["columns"] != parts[filled[0]]["columns"]:
            raise AgreedError(
                f"from_parts: the {what} rows of process {filled[0]} have {_describe(parts[filled[0]])}, and those of "
                f"process {process} have {_describe(parts[process])}; give the same columns and dtypes in all processes"
            )
    columns = {name: (dtype, width) for name, (dtype, width) in parts[filled[0]]["columns"].items()}
    starts = (0, *(int(start) for start in np.cumsum([part["rows"] for part in parts])))
    digest = hashlib.sha256(json.dumps([[p["rows"], p.get("fingerprint")] for p in parts]).encode()).hexdigest()
    segments = (_Segment(starts[jax.process_index()], own),) if mine["rows"] else ()
    whole = PartedRows(starts, columns, segments, digest)
    ends = whole.everywhere(np.array([0, len(whole) - 1]))  # which tell shapes, and pad shards without rows
    held = [_Segment(at, {k: v[i : i + 1] for k, v in ends.items()}) for i, at in enumerate((0, len(whole) - 1))]
    return dataclasses.replace(whole, segments=(*segments, *held))


def _describe(part: dict[str, Any]) -> str:
    return ", ".join(f"{name} of {width} {dtype}" for name, (dtype, width) in part["columns"].items())


def hold_shards(source: Any, mesh: Mesh, num_shards: int) -> Any:
    """The source, able to give the rows of the shards of this process's devices, also where they are in parts."""
    if isinstance(source, PartedRows):
        return source.with_shards_of(mesh, num_shards)
    if dataclasses.is_dataclass(source) and hasattr(source, "source"):
        inner: Any = source.source
        held = hold_shards(inner, mesh, num_shards)
        return source if held is inner else dataclasses.replace(source, source=held)  # type: ignore[type-var]
    return source


def rows_everywhere(source: "Source", indices: np.ndarray) -> "Rows":
    """Rows of a source in all processes, also where they are in parts."""
    return source.everywhere(indices) if isinstance(source, PartedRows) else source[indices]
