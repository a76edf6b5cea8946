"""The devices of a run: prepares JAX and joins the processes, then makes a mesh of the devices."""

import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.typing import DTypeLike

from dpreg.config import check_settings
from dpreg.distributed import compilation_cache, presence, processes, watchdog
from dpreg.errors import InputError
from dpreg.spelling import spell

AXIS = "data"  # the axis of the mesh
# XLA compiles a loop as one function if it reads at most 1 kB. This replaces the limit; tuning.py chooses the loops.
_ALL_LOOPS = f"--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold={2**63 - 1}"

Item = TypeVar("Item")


def start(
    platform: str | None = None,
    num_devices: int | None = None,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    threads: int | None = None,
) -> None:
    """Prepares JAX, before anything else uses it: platform, simulated devices, compilation cache, processes.

    With `coordinator_address`, or if Slurm or Open MPI have started several processes, this process joins the others by
    JAX's coordination service.

    Args:
      platform: "cpu", "gpu" or "tpu"; None leaves the choice to JAX.
      num_devices: on CPU, the number of host devices to simulate in this process.
      coordinator_address: HOST:PORT at which process 0 serves; "auto" leaves it to JAX to ask the cluster
        (also Kubernetes and TPU pods).
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      threads: the number of threads of XLA on CPU, for all devices of this process together; None for one per core.
        The order of the sums in products depends on it: "ordered" has the same bits with as many threads as shards.

    Raises:
      InputError: when JAX has already started with fewer devices, or two processes have the same id.
      ProcessLost: when the others cannot be reached.

    >>> start("cpu", num_devices=8)
    >>> len(jax.local_devices())
    8
    """
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if threads is not None:
        os.environ["NPROC"] = str(threads)  # read by XLA
    if not in_xla_flags("xla_backend_extra_options"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ALL_LOOPS}".strip()
    check_settings(platform=platform, num_devices=num_devices)
    if num_devices is not None:
        try:
            # Set on every platform, since JAX may find no other devices than the CPU.
            jax.config.update("jax_num_cpu_devices", num_devices)
        except RuntimeError as error:
            if len(jax.local_devices()) < num_devices:
                raise InputError(
                    f"{spell('num_devices', num_devices)}: JAX has already started, with {_there()}; "
                    "call dpreg.start before any other use of JAX"
                ) from error
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not home.startswith("~"):  # without a home folder, there is no cache
            compilation_cache.use(os.path.join(home, "dpreg", "xla"))
    processes.join(coordinator_address, num_processes, process_id)
    _require_devices(platform)


def _require_devices(platform: str | None) -> None:
    """Starts JAX, and raises InputError where it finds no devices."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked, reason = os.environ.get("JAX_PLATFORMS", "cpu"), " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"JAX does not start: {reason[:300]}"
            if "cpu" in (platform, asked)
            else f"JAX_PLATFORMS={asked}: JAX finds no such device; unset it, or use {spell('platform', 'cpu')}"
        ) from error


def in_xla_flags(option: str) -> bool:
    """Whether XLA_FLAGS sets an option, which then takes precedence."""
    return option in os.environ.get("XLA_FLAGS", "")


def cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def have_several_cores(mesh: Mesh) -> bool:
    """Whether every process has more cores than devices. This is a barrier."""
    of_all = processes.allgather_text("several" if cores() > len(mesh.local_devices) else "one")
    return "one" not in of_all


def threads() -> int:
    """The number of threads of XLA on CPU for all devices of this process, at least one per device."""
    return max(int(os.environ.get("NPROC") or cores()), len(jax.local_devices(backend="cpu")))


@functools.cache
def makes_whole_loops() -> bool:
    """Whether `start` has enabled loops that are compiled as one function on CPU, whatever they read."""

    def loop(x: Array) -> Array:
        last: Array = lax.fori_loop(0, jnp.int32(x[0]), lambda _, y: y * x, x)
        return last

    where = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    lowered = jax.jit(loop).lower(jax.ShapeDtypeStruct((1 << 12,), jnp.float32, sharding=where))
    return "xla_cpu_small_call" in str(lowered.compile().as_text())


def keep_to_core(process: int, number: int) -> None:
    """Pins a process that has just been started to one core, numbered among the cores of this process."""
    if hasattr(os, "sched_setaffinity"):
        of_this = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process, {of_this[number % len(of_this)]})


def enable(dtype: np.dtype) -> None:
    """Enables a dtype in JAX: float64 is disabled in the whole process until this call."""
    if dtype == np.float64:
        jax.config.update("jax_enable_x64", True)


def data_mesh(num_shards: int, platform: str | None = None, num_devices: int | None = None) -> Mesh:
    """A mesh of the devices of all processes that hold the run's shards, with the single axis "data".

    Args:
      num_shards: the number of logical shards of the run; each device needs at least one.
      platform: as for `start`; None takes JAX's default.
      num_devices: the number of devices of each process; None takes all available ones, but not more than `num_shards`.

    Raises:
      InputError: when the platform or so many devices are not available, or there are fewer shards than devices.
    """
    check_settings(num_shards=num_shards, platform=platform, num_devices=num_devices)
    try:
        local = jax.local_devices(backend=platform)
    except RuntimeError as error:
        here = spell("platform", jax.default_backend())
        raise InputError(
            f"{spell('platform', platform)}: there is none; this machine has {_there()}; use {here}"
        ) from error
    count = jax.process_count()
    of_process = [[d for d in jax.devices(local[0].platform) if d.process_index == p] for p in range(count)]
    for process, there in enumerate(of_process):
        if num_devices is None and len(there) != len(local):
            raise InputError(
                f"process {process} has {len(there)} devices and process {jax.process_index()} has {len(local)}; give "
                f"{spell('num_devices', min(map(len, of_process)))}, which all have, or repair that host"
            )
    wanted = min(len(local), max(num_shards // count, 1)) if num_devices is None else num_devices
    if wanted * count > num_shards:
        each = f" in each of {count} processes" if count > 1 else ""
        fewer = f"{spell('num_devices', num_shards // count)} or " if num_shards >= count else ""
        raise InputError(
            f"{spell('num_devices', wanted)}{each} with {spell('num_shards', num_shards)}: there must be "
            f"at least one shard for each device; use {fewer}{spell('num_shards', wanted * count)}"
        )
    if wanted > len(local):
        is_cpu = local[0].platform == "cpu"
        how = f"dpreg.start('cpu', {wanted}) before any other use of JAX" if is_cpu else spell("platform", "cpu")
        raise InputError(
            f"{spell('num_devices', wanted)}: this machine has {_there()}; use {spell('num_devices', len(local))} or "
            f"fewer, or simulate them with {how}"
        )
    return Mesh(np.array([device for there in of_process for device in there[:wanted]]), (AXIS,))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """A copy of the values on every device of every process. All processes must give the same values.

    The copy shares no memory with the argument, so that either of them can be donated or changed.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated and leaf.sharding.device_set == sharding.device_set:
            shards = [jax.device_put(shard.data, shard.device, may_alias=False) for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)
        value = np.array(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree)


def compile_gather(mesh: Mesh, shape: tuple[int, ...], dtype: DTypeLike) -> Callable[[Array], Array]:
    """Compiles a function that replicates an array that is sharded over devices; it is dispatched as any other call."""
    if not mesh.is_multi_process:
        return lambda array: array
    along = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(AXIS)))
    gather = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return gather.lower(along).compile()


def fetch_in_order(calls: Iterable[tuple[Item, Any]], on_result: Callable[[], None]) -> Iterator[tuple[Item, Any]]:
    """Fetches results to the host in order, while a bounded number of later calls is in flight.

    Args:
      calls: (item, arrays that are being computed) of each call, which is dispatched when the iterator yields it.
      on_result: called whenever a result has arrived.
    """
    under_way: collections.deque[tuple[Item, Any]] = collections.deque()
    remaining, more = iter(calls), True
    while more or under_way:
        if more:
            presence.begin_call()
            with watchdog.watched():
                call = next(remaining, None)
            more = call is not None
            if call is not None:
                under_way.append(call)
        while len(under_way) > (processes.CALLS_IN_FLIGHT if more else 0):
            item, result = under_way.popleft()
            with watchdog.watched() as progress:
                result = jax.device_get(result)
                progress()
            on_result()
            yield item, result


def describe(devices: Iterable[jax.Device]) -> str:
    """Such as "8 cpu devices"."""
    devices = list(devices)
    processes_of = len({d.process_index for d in devices})
    return f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}" + (
        f" of {processes_of} processes" if processes_of > 1 else ""
    )


def _there() -> str:
    return describe(jax.local_devices())
