"""TPU slices and GPU systems that can be compiled for: what their chips can do, and which there are.

As the documentation of Cloud TPU and NVIDIA's data sheets and programming guide say (2026-11).
"""

import dataclasses
import math

from dpreg.errors import InputError
from dpreg.spelling import spell


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
      memory: bytes of high-bandwidth memory; memory_rate: bytes/s from it.
      bfloat16_products: operations/s of products.
      links: bytes/s over all links of a chip to its neighbours, one way.
      largest: the shape of the largest slice, shorter axes first.
    """

    memory: float
    memory_rate: float
    bfloat16_products: float
    links: float
    largest: tuple[int, ...]

    @property
    def axes(self) -> int:
        """Of the torus."""
        return len(self.largest)

    @property
    def products(self) -> dict[str, float]:
        """Operations/s by precision: float32 in full takes six products of bfloat16, float64 there is not."""
        return {"bfloat16": self.bfloat16_products, "float32": self.bfloat16_products / 6}


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: "key specifications"; links as 1/2 of the bidirectional bandwidth.
CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, 275e12, 300e9, (16, 16, 16)),
    "v5e": Chip(16e9, 819e9, 197e12, 200e9, (16, 16)),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12, 600e9, (16, 16, 24)),
    "v6e": Chip(32e9, 1638e9, 918e12, 400e9, (16, 16)),
}
_SMALL = {2: ((2, 2), (2, 4)), 3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))}
HOP_SECONDS = 1e-6  # from chip to chip: a guess, as none is published


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of a kind in a torus.

    Attributes:
      name: as `topology` of a plan has it.
      chip: the kind.
      shape: chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def memory(self) -> float:
        """Bytes of a chip."""
        return self.chip.memory

    def _wraps(self, size: int) -> bool:
        """Whether the ends of an axis are linked: all in cubes of 4 chips a side and more, those of 16 in a plane."""
        return all(size % 4 == 0 for size in self.shape) if self.chip.axes == 3 else size == 16

    @property
    def hops(self) -> int:
        """From chip to chip along the longest way that a sum takes: through each axis, or halfway round it."""
        return sum(size // 2 if self._wraps(size) else size - 1 for size in self.shape)

    @property
    def links(self) -> float:
        """Bytes/s of a chip to its neighbours, one way, over the links that it has here: at an end of each axis one."""
        used = sum(0 if size == 1 else 2 if self._wraps(size) else 1 for size in self.shape)
        return self.chip.links * used / (2 * self.chip.axes)

    def seconds(self, kind: str, size: int) -> float:
        """Of an exchange that gives each chip so many bytes: they cross the links, of an all-reduce twice."""
        passes = 2 if kind == "all-reduce" else 1
        share = 1 - 1 / math.prod(self.shape)
        return passes * (size * share / self.links + self.hops * HOP_SECONDS)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      name: as its driver has it.
      memory: bytes; memory_rate: bytes/s from it.
      products: operations/s by precision: of tensor cores in bfloat16, else without them.
      links: bytes/s over NVLink to the others of a host, one way; network: its share of a host's way to other hosts.
      capability: major and minor; cores: multiprocessors; cache: bytes of the common one; clock: in GHz.
      shared: bytes that blocks share on a core; of which one may have all but 1 kB.
    """

    name: str
    memory: float
    memory_rate: float
    products: dict[str, float]
    links: float
    network: float
    capability: tuple[int, int]
    cores: int
    cache: int
    clock: float
    shared: int

    @property
    def target(self) -> str:
        """What the compiler wants to know of it, where there is none: a GpuTargetConfigProto of XLA's, as text."""
        of_all = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "threads_per_core_limit": 2048,
            "registers_per_core_limit": 65_536,
            "registers_per_block_limit": 65_536,
            "fpus_per_core": 128,
            "shared_memory_per_block": 48 << 10,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65_535,
            "block_dim_limit_z": 65_535,
        }
        of_kind = {
            "core_count": self.cores,
            "clock_rate_ghz": self.clock,
            "l2_cache_size": self.cache,
            "device_memory_size": int(self.memory),
            "memory_bandwidth": int(self.memory_rate),
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
        }
        versions = 'driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"'
        major, minor = self.capability
        numbers = " ".join(f"{key}: {value}" for key, value in (of_all | of_kind).items())
        return (
            f'gpu_device_info {{ {numbers} {versions} dnn_version: "9.10.0" name: "{self.name}" '
            f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"'
        )


# nvidia.com: data sheets of the SXM modules, of DGX and HGX systems for the network (InfiniBand, a port a GPU); clock,
# cores and cache as `deviceQuery` tells them; shared memory by compute capability from the CUDA programming guide.
_A100 = {"bfloat16": 312e12, "float32": 19.5e12, "float64": 9.7e12}
_H100 = {"bfloat16": 989e12, "float32": 67e12, "float64": 34e12}
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 2039e9, _A100, 300e9, 25e9, (8, 0), 108, 40 << 20, 1.41, 164 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 3350e9, _H100, 450e9, 50e9, (9, 0), 132, 50 << 20, 1.98, 228 << 10),
    "h200": Gpu("NVIDIA H200", 141e9, 4800e9, _H100, 450e9, 50e9, (9, 0), 132, 50 << 20, 1.98, 228 << 10),
}
_GPUS_OF_HOST = (1, 2, 4, 8)
_MOST_HOSTS = 1280  # compiled for
_NETWORK_SECONDS = 5e-6  # from host to host: a guess, as `HOP_SECONDS`


@dataclasses.dataclass(frozen=True)
class Hosts:
    """GPUs of a kind in hosts.

    Attributes:
      name: as `topology` of a plan has it.
      chip: the kind.
      hosts: how many; each: GPUs of each.
    """

    name: str
    chip: Gpu
    hosts: int
    each: int

    @property
    def memory(self) -> float:
        """Bytes of a GPU that JAX allocates, where XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise."""
        return 0.75 * self.chip.memory

    def seconds(self, kind: str, size: int) -> float:
        """Of an exchange that gives each GPU so many bytes: as fast as its slowest link, a sum twice."""
        count = self.hosts * self.each
        if count == 1:
            return 0.0
        passes = 2 if kind == "all-reduce" else 1
        rate, hop = (self.chip.network, _NETWORK_SECONDS) if self.hosts > 1 else (self.chip.links, HOP_SECONDS)
        return passes * (size * (1 - 1 / count) / rate + hop * math.ceil(math.log2(count)))


def parse_topology(name: str) -> Slice | Hosts:
    """What `topology` names: a TPU slice such as v5p:8x8x8, or HOSTSxGPUS such as h100:4x8.

    Raises:
      InputError: when there is no such system; names some.
    """
    kind, _, text = name.partition(":")
    if kind in GPUS:
        hosts, _, each = text.rpartition("x")
        if not hosts and "x" not in text:
            hosts = "1"
        numbers = [int(part) if _is_number(part) else 0 for part in (hosts, each)]
        if not 1 <= numbers[0] <= _MOST_HOSTS or numbers[1] not in _GPUS_OF_HOST:
            raise InputError(
                f"{spell('topology', name)}: use {kind}:HOSTSxGPUS, up to {_MOST_HOSTS:,} hosts of 1, 2, 4 or 8 GPUs "
                "each"
            )
        return Hosts(name, GPUS[kind], *numbers)
    return _slice_named(name)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _slice_named(name: str) -> Slice:
    """The compiler takes shapes that do not exist, and aborts for some that it has no table of: so they are here."""
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise InputError(
            f"{spell('topology', name)}: use KIND:SHAPE, with a kind of {', '.join((*CHIPS, *GPUS))}, such as "
            "v5p:8x8x8 or h100:4x8"
        )
    chip = CHIPS[kind]
    parts = text.split("x")
    shape = tuple(int(part) for part in parts if _is_number(part))
    if len(shape) != len(parts) or not _exists(chip, shape):
        some = ", ".join("x".join(map(str, shape)) for shape in _shapes(chip))
        raise InputError(
            f"{spell('topology', name)}: there is no such slice of several chips; use one of {kind}: {some}"
        )
    return Slice(name, chip, shape)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if shape in _SMALL[chip.axes]:
        return True
    if chip.axes == 2 or len(shape) != 3:
        return shape in _shapes(chip)
    # Of cubes of four chips a side.
    within = all(0 < size <= most and size % 4 == 0 for size, most in zip(shape, chip.largest, strict=True))
    return within and list(shape) == sorted(shape)


def _shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The usual shapes: each has twice the chips of the one before it."""
    shapes = [*_SMALL[chip.axes], (4,) * chip.axes]
    while math.prod(shapes[-1]) * 2 <= math.prod(chip.largest):
        grown = list(shapes[-1])
        grown[grown.count(grown[0]) - 1] *= 2  # the last of the shortest
        shapes.append(tuple(grown))
    return shapes
