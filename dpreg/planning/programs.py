"""What a compiled program says of itself: what it exchanges, holds and computes."""

import dataclasses
import math
import re
from typing import Any

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_BOTH = ("all-gather", "collective-permute")  # whose beginning gives (what goes in, what comes out)
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (\(?.*?\)?) ({_KINDS})(-start)?\((.*)$")
_ARRAY = re.compile(r"\b(pred|[sufbc]\w*?\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(body|to_apply|calls|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|calls)=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: such as "all-reduce".
      size: bytes that it gives each device.
      devices: how many take part.
      loops: around it: 0 once a call, 1 once a step, 2 once a part of a step's batch.
      place: where in the step it comes from.
    """

    kind: str
    size: int
    devices: int
    loops: int
    place: str

    @property
    def each_step(self) -> bool:
        """Whether it is in the loop over steps."""
        return self.loops > 0

    @property
    def wire_bytes(self) -> int:
        """That each device sends, at least: a sum goes round twice, what is gathered once, but for one's own share."""
        passes = 2 if self.kind == "all-reduce" else 1
        return math.ceil(passes * self.size * (1 - 1 / self.devices))


def collectives(compiled: Any, devices: int) -> list[Collective]:
    """All exchanges of a compiled program for so many devices, in the order of its text."""
    found = []
    text = compiled.as_text()
    loops = _loops_around(text)
    computation = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        if match := _COLLECTIVE.match(line):
            result, kind, start, rest = match.groups()
            arrays = _ARRAY.findall(result)
            if start and kind in _BOTH:
                arrays = arrays[1:2]
            groups = _GROUPS.search(rest)
            members = groups[1].count(",") + 1 if groups and groups[1] else int(groups[3]) if groups else devices
            place = re.search(r'op_name="([^"]*)"', rest)
            name = place[1].rpartition("while/body/")[2] if place else ""
            size = sum(_bytes(*array) for array in arrays)
            found.append(Collective(kind, size, members, loops.get(computation, 0), name))
    return found


def _loops_around(text: str) -> dict[str, int]:
    """Of each computation that is called, how many loops are around it."""
    calls: dict[str, list[tuple[str, int]]] = {}
    computation = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
            entry = computation if line.startswith("ENTRY") else entry
        calls.setdefault(computation, []).extend((name, how == "body") for how, name in _CALLED.findall(line))
        for names in _BRANCHES.findall(line):
            calls[computation].extend((name.strip(" %"), 0) for name in names.split(","))
    around = {entry: 0}
    waiting = [entry]
    for caller in waiting:
        for called, loop in calls.get(caller, ()):
            depth = around[caller] + loop
            if around.get(called, -1) < depth:
                around[called] = depth
                waiting.append(called)
    return around


def _bytes(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+", dtype)
    width = 1 if bits is None else max(1, int(bits[0]) // 8)
    return width * math.prod(int(size) for size in shape.split(",") if size)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: what a call is given: rows, state.
      results: what it gives, besides what takes the place of arguments.
      temporaries: while it runs; code: the program.
      donated: of the state, whose place its successor takes.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    donated: int

    @property
    def total(self) -> int:
        """All together."""
        return self.arguments + self.results + self.temporaries + self.code


def memory(compiled: Any) -> Memory:
    """What a compiled program holds on each device."""
    of = compiled.memory_analysis()
    return Memory(
        of.argument_size_in_bytes,
        of.output_size_in_bytes - of.alias_size_in_bytes,
        of.temp_size_in_bytes,
        of.generated_code_size_in_bytes,
        of.alias_size_in_bytes,
    )
