"""Settings of the devices and processes of a run, and of how they compute it."""

import dataclasses

from dpreg.config.settings import Settings, refuse, setting
from dpreg.errors import InputError
from dpreg.spelling import spell

PLATFORMS = ("cpu", "gpu", "tpu")
PRECISIONS = ("float32", "bfloat16", "float64")
REDUCTIONS = ("pmean", "ordered")
BACKENDS = ("jit", "pmap")
PLACEMENTS = ("auto", "device", "host")


@dataclasses.dataclass(frozen=True)
class DeviceSettings(Settings):
    """The devices and processes of a run, and how they compute it."""

    platform: str | None = setting(None, "cpu, gpu or tpu. Default: the fastest one present.", choices=PLATFORMS)
    num_devices: int | None = setting(
        None, "Devices of this process; cpu simulates that many. Default: all, up to num_shards.", min=1
    )
    num_shards: int = setting(
        8, "Logical shards of each batch; at most that many devices can be used.", affects_result=True, min=1
    )
    reduction: str = setting(
        "pmean", "pmean; or ordered: the same bits on any number of devices.", affects_result=True, choices=REDUCTIONS
    )
    precision: str = setting(
        "float32",
        "float32; float64; or bfloat16 for features, and for products on chips where it is faster.",
        affects_result=True,
        choices=PRECISIONS,
    )
    backend: str = setting(
        "jit", "How steps are compiled: jit (shard_map) or pmap; the results are the same.", choices=BACKENDS
    )
    placement: str = setting(
        "auto",
        "Where rows are stored during training: device, host, or auto: on devices if they fit.",
        choices=PLACEMENTS,
    )
    coordinator_address: str | None = setting(
        None,
        "HOST:PORT at which process 0 listens, for several processes; auto reads it from the cluster. Default: a "
        "single process, or auto in a step of Slurm or Open MPI.",
        per_process=True,
    )
    num_processes: int | None = setting(
        None, "Number of processes of the run. Default: that of the cluster, or 1.", per_process=True, min=1
    )
    process_id: int | None = setting(
        None, "Number of this process, from 0. Default: that of the cluster, or 0.", per_process=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_devices is not None and self.num_devices > self.num_shards:
            fewer, more = spell("num_devices", self.num_shards), spell("num_shards", self.num_devices)
            self._refuse("num_devices", f"there must be at least one shard for each device; use {fewer} or {more}")
        check_processes(self.coordinator_address, self.num_processes, self.process_id)

    @property
    def threads(self) -> int | None:
        """The argument `threads` of `dpreg.start`: on CPU, "ordered" needs a thread for each shard."""
        return self.num_shards if self.reduction == "ordered" else None


def check_processes(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Checks the settings that describe one of several processes; a single process has none of the three.

    Raises:
      InputError: if some are missing, the address is not HOST:PORT, or the id is not below `num_processes`.
    """
    given = [value is not None for value in (address, num_processes, process_id)]
    if not any(given) or (address == "auto" and given == [True, False, False]):
        return
    if address is None or num_processes is None or process_id is None:
        *first, last = map(spell, ("coordinator_address", "num_processes", "process_id"))
        raise InputError(f"{', '.join(first)} and {last} go together; give all three")
    split_address(address)
    if not 0 <= process_id < num_processes:
        refuse("process_id", process_id, f"with {spell('num_processes', num_processes)} use 0 to {num_processes - 1}")


def split_address(address: str) -> tuple[str, int]:
    """Splits HOST:PORT into host and port, and removes the brackets of an IPv6 address.

    Raises:
      InputError: if the address does not have that form.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        refuse("coordinator_address", address, "give the host and the port of process 0, such as node1:29500")
    return host.strip("[]"), int(port)
