"""The devices of this process: chosen before JAX starts, then a mesh of them."""

import os
import pathlib
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from dpreg.errors import InputError
from dpreg.parallel.reduce import AXIS

_CONFIGS = {"cpu": "configs/cpu.cfg", "gpu": "configs/gpu.cfg", "tpu": "configs/tpu.cfg"}


def start(platform: str | None = None, num_devices: int | None = None) -> None:
    """Prepares JAX, before anything else uses it: the platform, simulated CPU devices, the compilation cache.

    Args:
      platform: "cpu", "gpu" or "tpu"; None leaves the choice to JAX.
      num_devices: on CPU, this many host devices are made.

    Raises:
      InputError: when JAX has already started with fewer devices.
    """
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if num_devices is not None and num_devices > 0:
        try:
            # Asked for on every platform, as JAX may yet turn out to have no other than the CPU.
            jax.config.update("jax_num_cpu_devices", num_devices)
        except RuntimeError as error:
            if len(jax.devices()) < num_devices:
                raise InputError(
                    f"--num_devices={num_devices}: JAX has already started, with {_there()}; "
                    "call devices.start before any other use of JAX"
                ) from error
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "dpreg" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def data_mesh(num_shards: int, platform: str | None = None, num_devices: int | None = None) -> Mesh:
    """A mesh of the devices that carry the run's shards, with the single axis "data".

    Args:
      num_shards: logical shards of the run; a device without one would have nothing to do.
      platform: as for `start`; None takes JAX's default.
      num_devices: how many; None takes all there are, but not more than `num_shards`.

    Raises:
      InputError: when the platform or that many devices are not there, or there are fewer shards than devices.
    """
    try:
        devices = jax.devices(platform)
    except RuntimeError as error:
        found = jax.default_backend()
        raise InputError(
            f"--platform={platform}: there is none; this machine has {_there()}: use --flagfile={_CONFIGS[found]}"
        ) from error
    wanted = min(len(devices), num_shards) if num_devices is None else num_devices
    if wanted > num_shards:
        raise InputError(
            f"--num_devices={wanted} with --num_shards={num_shards}: a device needs a shard of its own; "
            f"use --num_devices={num_shards} or --num_shards={wanted}"
        )
    if not 1 <= wanted <= len(devices):
        kind = devices[0].platform
        raise InputError(
            f"--num_devices={wanted}: this machine has {_there()}; use --num_devices={len(devices)} or fewer, "
            + ("or --platform=cpu to simulate them" if kind != "cpu" else f"or --flagfile={_CONFIGS['cpu']}")
        )
    return Mesh(np.array(devices[:wanted]), (AXIS,))


def describe(devices: Iterable[jax.Device]) -> str:
    """Such as "8 cpu devices"."""
    devices = list(devices)
    return f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"


def _there() -> str:
    return describe(jax.devices())
