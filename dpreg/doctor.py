"""The mode doctor: whether a run could start here, and what keeps it from it; on all its processes, rows read once."""

import functools
import json
import pathlib
import platform
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dpreg.config import Config
from dpreg.config.devices import split_address
from dpreg.distributed import devices, processes
from dpreg.distributed.devices import AXIS
from dpreg.distributed.rendezvous import is_loopback
from dpreg.distributed.watchdog import Watchdog
from dpreg.errors import InputError
from dpreg.outputs.checkpoint import Checkpoints
from dpreg.outputs.summary import package_versions
from dpreg.outputs.tensorboard import require_tensorboard
from dpreg.outputs.workdir import open_workdir
from dpreg.spelling import spell
from dpreg.terminal import show
from dpreg.train.build import build_model, build_trainer, identity_of
from dpreg.train.defaults import read_rows
from dpreg.train.program import first_state, lay_out

_MAX_SKEW_SECONDS = 5.0
_REDUCED_BYTES = 1 << 20
_SUM_SECONDS = 60.0


def examine(config: Config) -> None:
    """Checks one thing after another, on all processes, and prints on the first what was found.

    Raises:
      InputError: when something was wrong; names the checks. What was found is printed by then.
    """
    wrong = list[str]()
    for name, check in _CHECKS:
        if _NEEDS.get(name, set()) & {*wrong}:
            continue  # it could not end, or processes would not do the same
        try:
            found, well = processes.on_all_processes(functools.partial(check, config)), True
        except InputError as error:
            found, well = str(error), False
            wrong.append(name)
        if jax.process_index() == 0:
            show(f"{'ok' if well else 'WRONG':<6}{name:<12}{found}")
    if wrong:
        raise InputError(f"{spell('mode', 'doctor')}: something is wrong with {', '.join(wrong)}; correct that first")


def _of_all(value: Any) -> list[Any]:
    """The values of all processes."""
    return [json.loads(text) for text in processes.allgather_text(json.dumps(value))]


def _versions(config: Config) -> str:
    del config
    everywhere = _of_all({"python": platform.python_version(), **package_versions()})
    for process, versions in enumerate(everywhere):
        for name, version in versions.items():
            if version != everywhere[0][name]:
                raise InputError(
                    f"{name} is {everywhere[0][name]} in process 0 and {version} in process {process}; "
                    "install the same everywhere"
                )
    return ", ".join(f"{name} {version}" for name, version in everywhere[0].items())


def _flags(config: Config) -> str:
    agree(config)
    return f"the same in {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"


def agree(config: Config) -> None:
    """Several processes have to be started alike.

    Raises:
      InputError: when a flag is not the same in all; names it.
    """
    own = json.loads(json.dumps(config.shared()))
    for process, theirs in enumerate(_of_all(own)):
        for name in own:
            if theirs[name] != own[name]:
                raise InputError(
                    f"{spell(name)} is {own[name]} in process {jax.process_index()} and {theirs[name]} in process "
                    f"{process}; start all processes with the same settings"
                )


def _devices(config: Config) -> str:
    mesh = devices.data_mesh(config.num_shards, config.platform, config.num_devices)
    counts = _of_all([len(mesh.local_devices), mesh.local_devices[0].device_kind])
    for process, count in enumerate(counts):
        if count != counts[0]:
            raise InputError(
                f"process 0 has {counts[0][0]} devices of kind {counts[0][1]}, process {process} {count[0]} of kind "
                f"{count[1]}; give all the same number with {spell('num_devices')}, or repair that host"
            )
    return f"{devices.describe(mesh.devices.flat)} ({counts[0][1]}) for {config.num_shards} shards"


def _network(config: Config) -> str:
    """Processes on several hosts reach each other by the addresses of their host names."""
    del config
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = ""
    hosts = _of_all([socket.gethostname(), own])
    address = processes.coordinator()
    if address is None:
        return "a single process"
    names = sorted({name for name, _ in hosts})
    if len(names) > 1:
        if is_loopback(split_address(address)[0]):
            where = spell("coordinator_address", address)
            raise InputError(f"{where}: only one machine reaches it; use an address of the network")
        for process, (name, resolved) in enumerate(hosts):
            if not resolved or is_loopback(resolved):
                raise InputError(
                    f"process {process}: its host {name} resolves its own name to {resolved or 'nothing'}, which other "
                    "hosts cannot reach; put its address in that host's /etc/hosts"
                )
    return f"coordinator at {address}, reached by {len(hosts)} processes on {', '.join(names)}"


def _all_reduce(config: Config) -> str:
    """A sum over all devices whose value is known, and how long sums take."""
    mesh = devices.data_mesh(config.num_shards, config.platform, config.num_devices)
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def summed(length: int) -> tuple[np.ndarray, float]:
        def ranks(index: Any) -> np.ndarray:
            return np.full((1, length), index[0].start or 0, np.float32)

        values = jax.make_array_from_callback((mesh.size, length), sharding, ranks)
        body = jax.shard_map(
            lambda part: lax.psum(part, AXIS), mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec()
        )
        function = jax.jit(body).lower(values).compile()
        processes.allgather_text()
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            result = jax.block_until_ready(function(values))
            seconds.append(time.perf_counter() - started)
        return np.asarray(result.addressable_data(0)), statistics.median(seconds[1:])

    try:
        with Watchdog(config.step_timeout or _SUM_SECONDS) as watchdog:
            watchdog.begin()
            (small, latency), (large, seconds) = summed(1), summed(_REDUCED_BYTES // 4)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"the devices cannot add up: {' '.join(str(error).split())[:200]}; see that hosts reach each other"
        ) from error
    due = mesh.size * (mesh.size - 1) / 2
    for values in (small, large):
        if (values != due).any():
            found = values.flat[(values != due).argmax()]
            raise InputError(
                f"the sum over devices is {found:,} instead of {due:,}; use other devices, or repair these"
            )
    return f"right; {latency * 1e3:.2f} ms for 4 B, {seconds * 1e3:.2f} ms for 1 MiB"


def _workdir(config: Config) -> str:
    if config.tensorboard:
        require_tensorboard()
    with open_workdir(config.workdir, keep=False) as path:
        if config.resume == "must" and not any(path.glob("checkpoints/*")):
            raise InputError(
                f"{spell('resume', 'must')}: {path} holds no checkpoint; name another {spell('workdir')}, or use "
                f"{spell('resume', 'auto')}"
            )
        return f"{path} can be written" + (" and is seen by all" if jax.process_count() > 1 else "")


def _rows(config: Config) -> str:
    """The rows, cut into the run's batches, a model for them, and no checkpoint of another run."""
    started = time.perf_counter()
    try:
        config, data, _ = read_rows(config)
    except OSError as error:
        where = spell("dataset", config.dataset)
        raise InputError(f"{where}: {error.strerror or error}; repair it, or name another") from error
    seconds = time.perf_counter() - started
    laid_out = lay_out(data, build_trainer(config).settings)
    num_steps = laid_out.train.num_steps
    first_state(build_model(config, data.num_inputs, data.num_targets, num_steps), laid_out)
    if config.workdir and config.resume != "never" and (folder := pathlib.Path(config.workdir, "checkpoints")).exists():
        with Checkpoints(folder, identity_of(config, data)) as checkpoints:
            checkpoints.refuse_another_run()
    rows = f"{len(data.train):,} rows of {data.num_inputs} features, read in {seconds:.1f} s"
    return f"{rows}; {num_steps:,} steps"


def _clocks(config: Config) -> str:
    del config
    spreads = []
    for _ in range(3):
        processes.allgather_text()
        times = _of_all(time.time())
        spreads.append(max(times) - min(times))
    if (skew := min(spreads)) > _MAX_SKEW_SECONDS:
        raise InputError(f"clocks are {skew:.1f} s apart, so logs cannot be put in order; run a time service")
    return f"within {skew * 1e3:.0f} ms of each other"


_NEEDS = {"all-reduce": {"devices"}, "rows": {"devices", "flags", "workdir"}}  # what has to be right for a check
_CHECKS: tuple[tuple[str, Callable[[Config], str]], ...] = (
    ("versions", _versions),
    ("flags", _flags),
    ("network", _network),
    ("clocks", _clocks),
    ("workdir", _workdir),
    ("devices", _devices),
    ("all-reduce", _all_reduce),
    ("rows", _rows),
)
