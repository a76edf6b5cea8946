"""The devices of a run: processes joined and devices chosen before JAX starts, then a mesh of them."""

import itertools
import os
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service's key-value store and barriers have no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.errors import InputError, ProcessLost
from dpreg.parallel.reduce import AXIS

_CONFIGS = {"cpu": "configs/cpu.cfg", "gpu": "configs/gpu.cfg", "tpu": "configs/tpu.cfg"}

_HEARTBEAT_SECONDS = 10  # a process silent for as long is lost, and all others end
_JOIN_SECONDS = 120  # for processes to find each other
_MEET_SECONDS = 1800  # for all to have read their rows and compiled
# More than 1 where a launcher has started several processes; JAX finds out the rest by itself.
_CLUSTER_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def start(
    platform: str | None = None,
    num_devices: int | None = None,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Prepares JAX, before anything else uses it: platform, simulated devices, compilation cache, processes.

    With `coordinator_address`, or where Slurm or Open MPI have started several processes, this one joins
    the others by JAX's coordination service.

    Args:
      platform: "cpu", "gpu" or "tpu"; None leaves the choice to JAX.
      num_devices: on CPU, this many host devices are made in this process.
      coordinator_address: HOST:PORT at which process 0 serves; "auto" leaves it to JAX to ask the cluster
        (also Kubernetes and TPU pods).
      num_processes: how many there are; process_id: which this is, from 0.

    Raises:
      InputError: when JAX has already started with fewer devices, or another process has taken this one's place.
      ProcessLost: when the others cannot be reached.
    """
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if num_devices is not None and num_devices > 0:
        try:
            # Asked for on every platform, as JAX may yet turn out to have no other than the CPU.
            jax.config.update("jax_num_cpu_devices", num_devices)
        except RuntimeError as error:
            if len(jax.local_devices()) < num_devices:
                raise InputError(
                    f"--num_devices={num_devices}: JAX has already started, with {_there()}; "
                    "call devices.start before any other use of JAX"
                ) from error
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if not home.startswith("~"):  # where there is no home, there is no cache
            jax.config.update("jax_compilation_cache_dir", os.path.join(home, "dpreg", "xla"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Products of float32 as such, also where a chip would round their factors first.
    jax.config.update("jax_default_matmul_precision", "highest")

    timeouts: dict[str, Any] = {
        "initialization_timeout": _JOIN_SECONDS,
        "heartbeat_timeout_seconds": _HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": _HEARTBEAT_SECONDS,
    }
    if coordinator_address is not None and process_id is not None:
        host, _, port = coordinator_address.rpartition(":")
        if process_id == 0:
            _check_free(host, int(port))
        else:
            _wait_for(host, int(port), process_id)
        local = host in ("localhost", "127.0.0.1", "[::1]")
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            # The service has no authentication: what runs on this machine alone stays on its loopback.
            coordinator_bind_address=coordinator_address if local else None,
            **timeouts,
        )
    elif coordinator_address == "auto" or _in_cluster():
        jax.distributed.initialize(**timeouts)
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(f"JAX finds no device with JAX_PLATFORMS={asked}: unset it, or use --platform=cpu") from error


def _in_cluster() -> bool:
    sizes = (os.environ.get(name, "") for name in _CLUSTER_SIZES)
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _check_free(host: str, port: int) -> None:
    """Process 0 has to find its port free: the runtime would abort, or take over a run that is there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            pass
    except OSError:
        return
    raise InputError(
        f"--coordinator_address={host}:{port}: another run, or another process 0 of this one, serves there; "
        "use another port, and a --process_id of its own for each process"
    )


def _wait_for(host: str, port: int, process_id: int) -> None:
    """Waits until process 0 can be reached: the runtime's own time-out aborts the process."""
    deadline, told = time.monotonic() + _JOIN_SECONDS, time.monotonic()
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=2):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"dpreg: process {process_id} waits for process 0 at {host}:{port}: {reason}", file=sys.stderr)
        time.sleep(0.1)
    raise ProcessLost(
        f"process {process_id} found no process 0 at {host}:{port} in {_JOIN_SECONDS} s ({reason}): check that it "
        "runs, that this is an address of its host, and that no firewall keeps the port"
    )


_ERROR = "!"
_exchanges = itertools.count()


def _service() -> Any:
    """The client of the coordination service."""
    return distributed.global_state.client


def exchange(text: str = "", error: str | None = None) -> list[str]:
    """Tells all processes a text and returns those of all, in the order of their ids; a meeting of all, too.

    Over the coordination service, not the devices: it works before the first collective, and waits as long as
    a process may take to read its rows. All processes have to call it equally often.

    Args:
      error: says instead that this process cannot go on; then it ends for all, at whichever meeting they are.

    Raises:
      InputError: with the error of the first process that told one.
    """
    if jax.process_count() == 1:
        told = [f":{text}" if error is None else _ERROR + error]
    else:
        number, wait = next(_exchanges), _MEET_SECONDS * 1000
        mine = f":{text}" if error is None else _ERROR + error
        _service().key_value_set(f"dpreg/exchange/{number}/{jax.process_index()}", mine)
        everyone = range(jax.process_count())
        told = [_service().blocking_key_value_get(f"dpreg/exchange/{number}/{i}", wait) for i in everyone]
    for process, answer in enumerate(told):
        if answer.startswith(_ERROR):
            where = f"process {process}: " if jax.process_count() > 1 else ""
            raise AgreedError(where + answer.removeprefix(_ERROR))
    return [answer.removeprefix(":") for answer in told]


class AgreedError(InputError):
    """An InputError that all processes know of and raise."""


class Announcements:
    """What process 0 announces and all processes act upon at the same call of `heard`."""

    # Processes are held together by their collectives to within the calls in flight; this is well beyond.
    _LEAD = 32

    def __init__(self) -> None:
        self._calls, self._number, self._announced = 0, 0, False

    def announce(self) -> None:
        """Lets `heard` be true in all processes, some calls from now. Repeated before that, it does nothing."""
        if jax.process_index() == 0 and not self._announced:
            self._announced = True
            if jax.process_count() > 1:
                at = str(self._calls + self._LEAD)
                _service().key_value_set(f"dpreg/announced/{self._number}", at)

    def heard(self) -> bool:
        """Whether to act now. All processes have to call it equally often, between the same steps."""
        self._calls += 1
        if jax.process_count() == 1:
            heard = self._announced
        else:
            at = _service().key_value_try_get_bytes
            try:
                heard = self._calls >= int(at(f"dpreg/announced/{self._number}"))
            except jax.errors.JaxRuntimeError:  # not announced
                heard = False
        if heard:
            self._number, self._announced = self._number + 1, False
        return heard


def data_mesh(num_shards: int, platform: str | None = None, num_devices: int | None = None) -> Mesh:
    """A mesh of the devices that carry the run's shards, those of all processes, with the single axis "data".

    Args:
      num_shards: logical shards of the run; a device without one would have nothing to do.
      platform: as for `start`; None takes JAX's default.
      num_devices: how many of each process; None takes all there are, but not more than `num_shards`.

    Raises:
      InputError: when the platform or that many devices are not there, or there are fewer shards than devices.
    """
    try:
        local = jax.local_devices(backend=platform)
    except RuntimeError as error:
        config = _CONFIGS[jax.default_backend()]
        raise InputError(
            f"--platform={platform}: there is none; this machine has {_there()}: use --flagfile={config}"
        ) from error
    processes = jax.process_count()
    wanted = min(len(local), max(num_shards // processes, 1)) if num_devices is None else num_devices
    if wanted * processes > num_shards:
        each = f" in each of {processes} processes" if processes > 1 else ""
        enough = num_shards // processes
        raise InputError(
            f"--num_devices={wanted}{each} with --num_shards={num_shards}: a device needs a shard of its own; use "
            + (f"--num_devices={enough} or " if enough else "")
            + f"--num_shards={wanted * processes}"
        )
    if not 1 <= wanted <= len(local):
        kind = local[0].platform
        raise InputError(
            f"--num_devices={wanted}: this machine has {_there()}; use --num_devices={len(local)} or fewer, "
            + ("or --platform=cpu to simulate them" if kind != "cpu" else f"or --flagfile={_CONFIGS['cpu']}")
        )
    chosen: list[Any] = []
    for process in range(processes):
        chosen += [d for d in jax.devices(local[0].platform) if d.process_index == process][:wanted]
    return Mesh(np.array(chosen), (AXIS,))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The same values on every device of every process; each process has to give the same."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree)


def describe(devices: Iterable[jax.Device]) -> str:
    """Such as "8 cpu devices"."""
    devices = list(devices)
    processes = len({d.process_index for d in devices})
    return f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}" + (
        f" of {processes} processes" if processes > 1 else ""
    )


def _there() -> str:
    return describe(jax.local_devices())
