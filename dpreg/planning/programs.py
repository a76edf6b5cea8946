"""Finds the collectives and the memory use of a compiled program."""

import dataclasses
import math
import re
from typing import Any

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_WITH_INPUT = ("all-gather", "collective-permute")  # the `-start` operation of these returns (input, output)
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (\(?.*?\)?) ({_KINDS})(-start)?\((.*)$")
_ARRAY = re.compile(r"\b(pred|[sufbc]\w*?\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(body|to_apply|calls|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|calls)=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: its name in HLO, such as "all-reduce".
      size: the bytes of its result on each device.
      devices: the number of devices that take part.
      loops: the number of loops around it: 0 for once per call, 1 for once per step, 2 for each accumulated batch.
      place: the JAX operation that it comes from, without the outer loops.
    """

    kind: str
    size: int
    devices: int
    loops: int
    place: str

    @property
    def each_step(self) -> bool:
        """Whether it is inside the loop over steps."""
        return self.loops > 0

    @property
    def wire_bytes(self) -> int:
        """The fewest bytes that each device must send: (1 - 1 / devices) of the size, twice for an all-reduce."""
        passes = 2 if self.kind == "all-reduce" else 1
        return math.ceil(passes * self.size * (1 - 1 / self.devices))


def find_collectives(compiled: Any, devices: int) -> list[Collective]:
    """All collectives of a compiled program for `devices` devices, in the order of its HLO text."""
    found = []
    text = compiled.as_text()
    loops = _count_loops(text)
    computation = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation = head[1]
        if match := _COLLECTIVE.match(line):
            result, kind, start, operands = match.groups()
            arrays = _ARRAY.findall(result)
            if start and kind in _WITH_INPUT:
                arrays = arrays[1:2]
            groups = _GROUPS.search(operands)
            members = groups[1].count(",") + 1 if groups and groups[1] else int(groups[3]) if groups else devices
            place = re.search(r'op_name="([^"]*)"', operands)
            name = place[1].rpartition("while/body/")[2] if place else ""
            size = sum(_bytes(*array) for array in arrays)
            found.append(Collective(kind, size, members, loops.get(computation, 0), name))
    return found


def _count_loops(text: str) -> dict[str, int]:
    """The number of loops around each computation of a program, by its name."""
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
    """The memory use of a compiled program, in bytes on one device.

    Attributes:
      arguments: the arguments of a call: rows and state.
      results: the results that are not stored in the place of donated arguments.
      temporaries: the buffers that it needs while it runs.
      code: the program itself.
      donated: the donated arguments, in whose place results are stored.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    donated: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.arguments + self.results + self.temporaries + self.code


def measure_memory(compiled: Any) -> Memory:
    """The memory use of a compiled program, as XLA reports it."""
    analysis = compiled.memory_analysis()
    return Memory(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
        analysis.alias_size_in_bytes,
    )
