"""The mode doctor: checks on all processes whether a run can start, and prints what is wrong."""

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
    """Runs all checks on all processes, and prints the result of each on process 0.

    Raises:
      InputError: when a check failed; the message names the failed checks.
    """
    failed = list[str]()
    for name, check in _CHECKS:
        if _REQUIREMENTS.get(name, set()) & {*failed}:
            continue  # it could hang, or processes would diverge
        try:
            result, passed = processes.on_all_processes(functools.partial(check, config)), True
        except InputError as error:
            result, passed = str(error), False
            failed.append(name)
        if jax.process_index() == 0:
            show(f"{'ok' if passed else 'WRONG':<6}{name:<12}{result}")
    if failed:
        raise InputError(f"{spell('mode', 'doctor')}: something is wrong with {', '.join(failed)}; correct that first")


def _allgather(value: Any) -> list[Any]:
    """The JSON values of all processes."""
    return [json.loads(text) for text in processes.allgather_text(json.dumps(value))]


def _check_versions(config: Config) -> str:
    del config
    all_versions = _allgather({"python": platform.python_version(), **package_versions()})
    for process, versions in enumerate(all_versions):
        for name, version in versions.items():
            if version != all_versions[0][name]:
                raise InputError(
                    f"{name} is {all_versions[0][name]} in process 0 and {version} in process {process}; "
                    "install the same version everywhere"
                )
    return ", ".join(f"{name} {version}" for name, version in all_versions[0].items())


def _check_flags(config: Config) -> str:
    agree(config)
    return f"the same in {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}"


def agree(config: Config) -> None:
    """Checks that all processes were started with the same settings.

    Raises:
      InputError: when a setting differs between processes; the message names it.
    """
    own = json.loads(json.dumps(config.shared()))
    for process, theirs in enumerate(_allgather(own)):
        for name in own:
            if theirs[name] != own[name]:
                raise InputError(
                    f"{spell(name)} is {own[name]} in process {jax.process_index()} and {theirs[name]} in process "
                    f"{process}; start all processes with the same settings"
                )


def _check_devices(config: Config) -> str:
    mesh = devices.data_mesh(config.num_shards, config.platform, config.num_devices)
    all_devices = _allgather([len(mesh.local_devices), mesh.local_devices[0].device_kind])
    first_count, first_kind = all_devices[0]
    for process, (count, kind) in enumerate(all_devices):
        if (count, kind) != (first_count, first_kind):
            raise InputError(
                f"process 0 has {first_count} devices of kind {first_kind}, and process {process} has {count} of kind "
                f"{kind}; give all processes the same number with {spell('num_devices')}, or repair that host"
            )
    return f"{devices.describe(mesh.devices.flat)} ({first_kind}) for {config.num_shards} shards"


def _check_network(config: Config) -> str:
    """Checks that the name of each host resolves to an address that other hosts can reach, as Gloo uses that."""
    del config
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = ""
    hosts = _allgather([socket.gethostname(), own])
    address = processes.coordinator()
    if address is None:
        return "a single process"
    names = sorted({name for name, _ in hosts})
    if len(names) > 1:
        if is_loopback(split_address(address)[0]):
            where = spell("coordinator_address", address)
            raise InputError(f"{where}: only one machine can reach it; use an address of the network")
        for process, (name, resolved) in enumerate(hosts):
            if not resolved or is_loopback(resolved):
                raise InputError(
                    f"process {process}: its host {name} resolves its own name to {resolved or 'nothing'}, which other "
                    "hosts cannot reach; put its address in that host's /etc/hosts"
                )
    return f"coordinator at {address}, reached by {len(hosts)} processes on {', '.join(names)}"


def _check_all_reduce(config: Config) -> str:
    """Compares a sum over all devices with its known value, and measures the duration of sums."""
    mesh = devices.data_mesh(config.num_shards, config.platform, config.num_devices)
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def sum_ranks(length: int) -> tuple[np.ndarray, float]:
        """The sum over devices of arrays that hold the number of the device, and its seconds."""

        def make_shard(index: Any) -> np.ndarray:
            return np.full((1, length), index[0].start or 0, np.float32)

        values = jax.make_array_from_callback((mesh.size, length), sharding, make_shard)
        body = jax.shard_map(
            lambda shard: lax.psum(shard, AXIS), mesh=mesh, in_specs=PartitionSpec(AXIS), out_specs=PartitionSpec()
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
            (small, latency), (large, seconds) = sum_ranks(1), sum_ranks(_REDUCED_BYTES // 4)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the sum over devices failed: {reason}; check that hosts can reach each other") from error
    expected = mesh.size * (mesh.size - 1) / 2
    for values in (small, large):
        if (values != expected).any():
            actual = values.flat[(values != expected).argmax()]
            raise InputError(
                f"the sum over devices is {actual:,} instead of {expected:,}; use other devices, or repair these"
            )
    return f"correct; {latency * 1e3:.2f} ms for 4 B, {seconds * 1e3:.2f} ms for 1 MiB"


def _check_workdir(config: Config) -> str:
    if config.tensorboard:
        require_tensorboard()
    with open_workdir(config.workdir, keep=False) as path:
        if config.resume == "must" and not any(path.glob("checkpoints/*")):
            raise InputError(
                f"{spell('resume', 'must')}: {path} holds no checkpoint; name another {spell('workdir')}, or use "
                f"{spell('resume', 'auto')}"
            )
        return f"{path} can be written" + (" and is visible to all processes" if jax.process_count() > 1 else "")


def _check_rows(config: Config) -> str:
    """Checks that the rows can be read and batched, that the model fits, and that no other run has checkpoints here."""
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


def _check_clocks(config: Config) -> str:
    del config
    skews = []
    for _ in range(3):
        processes.allgather_text()  # synchronise, so that all processes read their clocks at about the same time
        times = _allgather(time.time())
        skews.append(max(times) - min(times))
    if (skew := min(skews)) > _MAX_SKEW_SECONDS:
        raise InputError(f"clocks are {skew:.1f} s apart, so logs cannot be ordered by time; run a time service")
    return f"within {skew * 1e3:.0f} ms of each other"


_REQUIREMENTS = {"all-reduce": {"devices"}, "rows": {"devices", "flags", "workdir"}}  # check -> those it depends on
_CHECKS: tuple[tuple[str, Callable[[Config], str]], ...] = (
    ("versions", _check_versions),
    ("flags", _check_flags),
    ("network", _check_network),
    ("clocks", _check_clocks),
    ("workdir", _check_workdir),
    ("devices", _check_devices),
    ("all-reduce", _check_all_reduce),
    ("rows", _check_rows),
)
