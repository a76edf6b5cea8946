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
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|condition)=%?([\w.-]+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: such as "all-reduce".
      size: bytes that it gives each device.
      devices: how many take part.
      each_step: whether it is in the loop over steps; else once a call.
      place: where in the step it comes from.
    """

    kind: str
    size: int
    devices: int
    each_step: bool
    place: str

    @property
    def wire_bytes(self) -> int:
        """That each device sends, at least: a sum goes round twice, what is gathered once, but for one's own share."""
        passes = 2 if self.kind == "all-reduce" else 1
        return math.ceil(passes * self.size * (1 - 1 / self.devices))


def collectives(compiled: Any, devices: int) -> list[Collective]:
    """All exchanges of a compiled program for so many devices, in the order of its text."""
    found = []
    text = compiled.as_text()
    looped = _of_loops(text)
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
            found.append(Collective(kind, size, members, computation in looped, name))
    return found


def _of_loops(text: str) -> set[str]:
    """The computations that are a loop's body, or called from one."""
    calls: dict[str, set[str]] = {}
    within, computation = set[str](), ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
            calls[computation] = set()
        calls.setdefault(computation, set()).update(_CALLED.findall(line))
        within.update(_BODY.findall(line))
    further = within
    while further := {called for name in further for called in calls.get(name, ())} - within:
        within |= further
    return within


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
