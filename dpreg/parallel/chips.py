"""TPU slices: what their chips can do, and which shapes there are, as the documentation of Cloud TPU says (2026-11)."""

import dataclasses
import math

from dpreg.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
      memory: bytes of high-bandwidth memory; memory_rate: bytes/s from it.
      products: operations/s of bfloat16 products. Of float32 in full they are six times as dear.
      links: bytes/s over all links of a chip to its neighbours, one way.
      axes: of the torus; most_chips: of a slice.
    """

    memory: float
    memory_rate: float
    products: float
    links: float
    axes: int
    most_chips: int


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: "key specifications"; links as 1/2 of the bidirectional bandwidth.
CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, 275e12, 300e9, 3, 4096),
    "v5e": Chip(16e9, 819e9, 197e12, 200e9, 2, 256),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12, 600e9, 3, 6144),
    "v6e": Chip(32e9, 1638e9, 918e12, 400e9, 2, 256),
}
_SMALL = {2: ((2, 2), (2, 4)), 3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))}
HOP_SECONDS = 1e-6  # from chip to chip: a guess, as none is published


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of a kind in a torus.

    Attributes:
      name: as --topology has it.
      chip: the kind.
      shape: chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def _wraps(self) -> bool:
        """Whether the ends of axes are linked: of cubes of 4 chips a side and more, and of whole pods of two axes."""
        return all(size % 4 == 0 for size in self.shape) if self.chip.axes == 3 else min(self.shape) == 16

    @property
    def hops(self) -> int:
        """From chip to chip along the longest way that a sum takes: through each axis, or halfway round it."""
        return sum(size // 2 if self._wraps else size - 1 for size in self.shape)

    @property
    def links(self) -> float:
        """Bytes/s of a chip to its neighbours, one way, over the links that it has here: at an end of each axis one."""
        used = sum(0 if size == 1 else 2 if self._wraps else 1 for size in self.shape)
        return self.chip.links * used / (2 * self.chip.axes)

    def seconds(self, kind: str, size: int) -> float:
        """Of an exchange that gives each chip so many bytes: they cross the links, of an all-reduce twice."""
        passes = 2 if kind == "all-reduce" else 1
        share = 1 - 1 / math.prod(self.shape)
        return passes * (size * share / self.links + self.hops * HOP_SECONDS)


def slice_named(name: str) -> Slice:
    """The slice KIND:SHAPE, such as v5p:8x8x8.

    The compiler takes shapes that do not exist, and aborts for some that it has no table of: so the shapes are here.

    Raises:
      InputError: when there is no such slice; names some.
    """
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise InputError(f"--topology={name}: use KIND:SHAPE, with a kind of {', '.join(CHIPS)}, such as v5p:8x8x8")
    chip = CHIPS[kind]
    parts = text.split("x")
    shape = tuple(int(part) for part in parts if part.isdigit())
    if len(shape) != len(parts) or not _exists(chip, shape):
        some = ", ".join("x".join(map(str, shape)) for shape in _shapes(chip))
        raise InputError(f"--topology={name}: there is no such slice of several chips; {kind} has {some}")
    return Slice(name, chip, shape)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if shape in _SMALL[chip.axes]:
        return True
    cubes = chip.axes == 3 and len(shape) == 3 and not any(size % 4 for size in shape)
    return (cubes and list(shape) == sorted(shape) and 0 < math.prod(shape) <= chip.most_chips) or (
        shape in _shapes(chip)
    )


def _shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The usual shapes: each has twice the chips of the one before it."""
    shapes = [*_SMALL[chip.axes], (4,) * chip.axes]
    while math.prod(shapes[-1]) * 2 <= chip.most_chips:
        grown = list(shapes[-1])
        grown[grown.count(grown[0]) - 1] *= 2  # the last of the shortest
        shapes.append(tuple(grown))
    return shapes
