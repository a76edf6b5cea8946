"""Rows that are distributed over processes: the parts are concatenated in the order of the process ids."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.data.sampler import Sampler
from dpreg.distributed.presence import at_work
from dpreg.distributed.processes import AgreedError, allgather_for, allgather_text, sum_words
from dpreg.errors import InputError

if TYPE_CHECKING:
    from dpreg.data.sources import Rows, Source

_CHUNK_BYTES = 4 << 20  # rows that are sent between processes at a time
_Columns = dict[str, tuple[str, int]]  # dtype and width of x, y and weight


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Consecutive rows in this process, starting with row `first` of all rows."""

    first: int
    rows: Any  # a source, or columns that another process has sent

    def __len__(self) -> int:
        return len(self.rows["weight"] if isinstance(self.rows, dict) else self.rows)

    def __getitem__(self, indices: np.ndarray) -> "Rows":
        if isinstance(self.rows, dict):
            return {name: np.take(column, indices, axis=0) for name, column in self.rows.items()}
        found: Rows = self.rows[indices]
        return found


@dataclasses.dataclass(frozen=True)
class PartedRows:
    """A source that is distributed over processes, made by `RegressionData.from_parts`.

    A process can read the rows that it holds: its own part, the first and the last of all rows, and, after
    `with_shards_of` has sent them, the rows of its logical shards.

    Attributes:
      starts: [processes + 1], the first row of each process's part, and the number of rows.
      columns: dtype and width of x, y and weight.
      segments: the rows that this process holds.
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
        """The range of this process's part within all rows."""
        return range(*self.starts[jax.process_index() : jax.process_index() + 2])

    def fingerprint(self) -> str:
        """A fingerprint of all rows, the same in all processes."""
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
        """Rows in all processes, whichever of them holds the rows. All processes must call it with equal indices."""
        own = self.own
        here = (indices >= own.start) & (indices < own.stop)
        rows = self._blank(len(indices))
        if here.any():
            for name, column in self[indices[here]].items():
                rows[name][here] = column
        # Summed as integers, since all but one process contribute zeros: a sum of floats would turn -0 into 0.
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
        """The same rows, including those of the shards on this process's devices. All processes must call it.

        Only rows that are not yet in the process whose devices need them are sent, a few MB at a time.
        """
        allgather_text()  # barrier: the collective that follows would time out
        received, row_bytes = [], sum(np.dtype(dtype).itemsize * width for dtype, width in self.columns.values())
        at_once = max(1, _CHUNK_BYTES // row_bytes)
        for process, first, stop in self._misplaced(mesh, num_shards):
            for start in range(first, stop, at_once):
                rows = self.everywhere(np.arange(start, min(start + at_once, stop)))
                if process == jax.process_index():
                    received.append(_Segment(start, rows))
        return dataclasses.replace(self, segments=(*self.segments, *received))

    def _misplaced(self, mesh: Mesh, num_shards: int) -> list[tuple[int, int, int]]:
        """(process, first row, row after the last) of rows that a process needs for its shards and does not hold."""
        sampler, slots = Sampler(len(self), num_shards, num_shards, shuffle=False), -(-num_shards // mesh.size)
        found = []
        for number, device in enumerate(mesh.devices.flat):
            first, stop = (int(sampler.shard_start(shard)) for shard in (number * slots, (number + 1) * slots))
            own_first, own_stop = self.starts[device.process_index : device.process_index + 2]
            for lower, upper in ((first, min(stop, own_first)), (max(first, own_stop), stop)):
                if lower < upper:
                    found.append((device.process_index, lower, upper))
        return found


def put_together(own: "Source | None", what: str) -> "Source | None":
    """The rows of all processes as one source; None if no process has any.

    Args:
      own: the rows of this process, or None.
      what: a name of these rows, for messages.

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
    parts = allgather_for(f"from_parts ({what} rows)", mine)
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
    ends = whole.everywhere(np.array([0, len(whole) - 1]))  # give the shapes, and pad shards without rows
    held = [_Segment(at, {k: v[i : i + 1] for k, v in ends.items()}) for i, at in enumerate((0, len(whole) - 1))]
    return dataclasses.replace(whole, segments=(*segments, *held))


def _describe(part: dict[str, Any]) -> str:
    return ", ".join(f"{name} of {width} {dtype}" for name, (dtype, width) in part["columns"].items())


def hold_shards(source: Any, mesh: Mesh, num_shards: int) -> Any:
    """The source, from which the rows of the shards on this process's devices can be read, even from `PartedRows`."""
    if isinstance(source, PartedRows):
        return source.with_shards_of(mesh, num_shards)
    if dataclasses.is_dataclass(source) and hasattr(source, "source"):
        inner: Any = source.source
        held = hold_shards(inner, mesh, num_shards)
        return source if held is inner else dataclasses.replace(source, source=held)  # type: ignore[type-var]
    return source


def rows_everywhere(source: "Source", indices: np.ndarray) -> "Rows":
    """Rows of a source in all processes, even from `PartedRows`."""
    return source.everywhere(indices) if isinstance(source, PartedRows) else source[indices]
