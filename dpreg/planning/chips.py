"""The TPU slices and GPU systems that a run can be compiled for, and the data of their chips.

Sources: the documentation of Cloud TPU, and NVIDIA's data sheets and CUDA programming guide (2026-11).
"""

import dataclasses
import math

from dpreg.errors import InputError
from dpreg.spelling import spell


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU chip.

    Attributes:
      memory: bytes of high-bandwidth memory.
      memory_bandwidth: bytes/s of that memory.
      bfloat16_flops: FLOP/s of matrix products in bfloat16.
      link_bandwidth: bytes/s over all links of a chip to its neighbours, in one direction.
      largest: the shape of the largest slice, shorter axes first.
    """

    memory: float
    memory_bandwidth: float
    bfloat16_flops: float
    link_bandwidth: float
    largest: tuple[int, ...]

    @property
    def axes(self) -> int:
        """The number of axes of the torus."""
        return len(self.largest)

    @property
    def flops(self) -> dict[str, float]:
        """FLOP/s of matrix products by precision. One in full float32 takes six in bfloat16; there is no float64."""
        return {"bfloat16": self.bfloat16_flops, "float32": self.bfloat16_flops / 6}


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key specifications". Links have 1/2 of the bidirectional bandwidth.
CHIPS = {
    "v4": Chip(32 * 2**30, 1228e9, 275e12, 300e9, (16, 16, 16)),
    "v5e": Chip(16e9, 819e9, 197e12, 200e9, (16, 16)),
    "v5p": Chip(95 * 2**30, 2765e9, 459e12, 600e9, (16, 16, 24)),
    "v6e": Chip(32e9, 1638e9, 918e12, 400e9, (16, 16)),
}
_SMALL = {2: ((2, 2), (2, 4)), 3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))}
HOP_SECONDS = 1e-6  # latency from chip to chip; a guess, as none is published


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: chips of one kind in a torus.

    Attributes:
      name: its name as a topology, such as v5p:8x8x8.
      chip: the kind of its chips.
      shape: the number of chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def memory(self) -> float:
        """Bytes of memory of a chip."""
        return self.chip.memory

    def _wraps(self, size: int) -> bool:
        """Whether the ends of an axis are linked: in 3D if all sizes are multiples of 4, in 2D if the size is 16."""
        return all(size % 4 == 0 for size in self.shape) if self.chip.axes == 3 else size == 16

    @property
    def hops(self) -> int:
        """The number of links on the longest path of an all-reduce: through each axis, or halfway round it."""
        return sum(size // 2 if self._wraps(size) else size - 1 for size in self.shape)

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s of the slowest chip to its neighbours, in one direction.

        That is a chip in a corner, which has one link instead of two for each axis that does not wrap.
        """
        used = sum(0 if size == 1 else 2 if self._wraps(size) else 1 for size in self.shape)
        return self.chip.link_bandwidth * used / (2 * self.chip.axes)

    def seconds(self, kind: str, size: int) -> float:
        """The duration of a collective that gives each chip `size` bytes. An all-reduce sends them twice."""
        passes = 2 if kind == "all-reduce" else 1
        share = 1 - 1 / math.prod(self.shape)
        return passes * (size * share / self.link_bandwidth + self.hops * HOP_SECONDS)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
      name: its name in the driver.
      memory: bytes of memory.
      memory_bandwidth: bytes/s of that memory.
      flops: FLOP/s of matrix products by precision; only bfloat16 uses tensor cores.
      link_bandwidth: bytes/s over NVLink to the other GPUs of the host, in one direction.
      network_bandwidth: its share of the bytes/s from a host to other hosts, in one direction.
      capability: the compute capability, major and minor.
      cores: the number of multiprocessors.
      cache: bytes of the L2 cache.
      clock: the clock rate in GHz.
      shared: bytes of shared memory of a multiprocessor. A block can use all of it but 1 kB.
    """

    name: str
    memory: float
    memory_bandwidth: float
    flops: dict[str, float]
    link_bandwidth: float
    network_bandwidth: float
    capability: tuple[int, int]
    cores: int
    cache: int
    clock: float
    shared: int

    @property
    def target(self) -> str:
        """The text of XLA's GpuTargetConfigProto, which describes the GPU to the compiler if there is none."""
        common = {
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
        specific = {
            "core_count": self.cores,
            "clock_rate_ghz": self.clock,
            "l2_cache_size": self.cache,
            "device_memory_size": int(self.memory),
            "memory_bandwidth": int(self.memory_bandwidth),
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
        }
        versions = 'driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"'
        major, minor = self.capability
        numbers = " ".join(f"{key}: {value}" for key, value in (common | specific).items())
        return (
            f'gpu_device_info {{ {numbers} {versions} dnn_version: "9.10.0" name: "{self.name}" '
            f"cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.name}"'
        )


# nvidia.com: data sheets of the SXM modules, and of DGX and HGX systems for the network (InfiniBand, a port per GPU);
# clock, cores and cache from `deviceQuery`; shared memory by compute capability from the CUDA programming guide.
_A100 = {"bfloat16": 312e12, "float32": 19.5e12, "float64": 9.7e12}
_H100 = {"bfloat16": 989e12, "float32": 67e12, "float64": 34e12}
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 2039e9, _A100, 300e9, 25e9, (8, 0), 108, 40 << 20, 1.41, 164 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 3350e9, _H100, 450e9, 50e9, (9, 0), 132, 50 << 20, 1.98, 228 << 10),
    "h200": Gpu("NVIDIA H200", 141e9, 4800e9, _H100, 450e9, 50e9, (9, 0), 132, 50 << 20, 1.98, 228 << 10),
}
_GPUS_PER_HOST = (1, 2, 4, 8)
_MAX_HOSTS = 1280
_NETWORK_SECONDS = 5e-6  # latency from host to host; a guess, as `HOP_SECONDS`


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Hosts with GPUs of one kind.

    Attributes:
      name: its name as a topology, such as h100:4x8.
      chip: the kind of GPU.
      hosts: the number of hosts.
      gpus_per_host: the number of GPUs of each host.
    """

    name: str
    chip: Gpu
    hosts: int
    gpus_per_host: int

    @property
    def memory(self) -> float:
        """Bytes of a GPU that JAX allocates by default, without XLA_PYTHON_CLIENT_MEM_FRACTION."""
        return 0.75 * self.chip.memory

    def seconds(self, kind: str, size: int) -> float:
        """The duration of a collective that gives each GPU `size` bytes. An all-reduce sends them twice.

        The slowest link determines the speed: the network if there are several hosts, otherwise NVLink.
        """
        count = self.hosts * self.gpus_per_host
        if count == 1:
            return 0.0
        passes = 2 if kind == "all-reduce" else 1
        bandwidth, latency = self.chip.link_bandwidth, HOP_SECONDS
        if self.hosts > 1:
            bandwidth, latency = self.chip.network_bandwidth, _NETWORK_SECONDS
        return passes * (size * (1 - 1 / count) / bandwidth + latency * math.ceil(math.log2(count)))


def parse_topology(name: str) -> Slice | Hosts:
    """Parses the name of a TPU slice such as v5p:8x8x8, or of hosts with GPUs such as h100:4x8.

    Raises:
      InputError: when there is no such system; the message names some.
    """
    kind, _, text = name.partition(":")
    if kind in GPUS:
        hosts, _, gpus = text.rpartition("x")
        if not hosts and "x" not in text:
            hosts = "1"
        num_hosts, gpus_per_host = (int(number) if _is_number(number) else 0 for number in (hosts, gpus))
        if not 1 <= num_hosts <= _MAX_HOSTS or gpus_per_host not in _GPUS_PER_HOST:
            raise InputError(
                f"{spell('topology', name)}: use {kind}:HOSTSxGPUS, up to {_MAX_HOSTS:,} hosts of 1, 2, 4 or 8 GPUs "
                "each"
            )
        return Hosts(name, GPUS[kind], num_hosts, gpus_per_host)
    return _parse_slice(name)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _parse_slice(name: str) -> Slice:
    """Checks the shape here: the compiler accepts shapes that do not exist, and aborts the process for others."""
    kind, _, text = name.partition(":")
    if kind not in CHIPS:
        raise InputError(
            f"{spell('topology', name)}: use KIND:SHAPE, with a kind of {', '.join((*CHIPS, *GPUS))}, such as "
            "v5p:8x8x8 or h100:4x8"
        )
    chip = CHIPS[kind]
    sizes = text.split("x")
    shape = tuple(int(size) for size in sizes if _is_number(size))
    if len(shape) != len(sizes) or not _exists(chip, shape):
        usual = ", ".join("x".join(map(str, shape)) for shape in _list_shapes(chip))
        raise InputError(
            f"{spell('topology', name)}: there is no such slice of several chips; use one of {kind}: {usual}"
        )
    return Slice(name, chip, shape)


def _exists(chip: Chip, shape: tuple[int, ...]) -> bool:
    if shape in _SMALL[chip.axes]:
        return True
    if chip.axes == 2 or len(shape) != 3:
        return shape in _list_shapes(chip)
    # Larger slices consist of cubes of 4x4x4 chips.
    within = all(0 < size <= most and size % 4 == 0 for size, most in zip(shape, chip.largest, strict=True))
    return within and list(shape) == sorted(shape)


def _list_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The usual shapes; each has twice as many chips as the previous one."""
    shapes = [*_SMALL[chip.axes], (4,) * chip.axes]
    while math.prod(shapes[-1]) * 2 <= math.prod(chip.largest):
        grown = list(shapes[-1])
        grown[grown.count(grown[0]) - 1] *= 2  # the last of the shortest axes
        shapes.append(tuple(grown))
    return shapes
