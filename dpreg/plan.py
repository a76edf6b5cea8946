"""A door: `python -m dpreg.plan` says what the training steps would exchange, hold and cost; on a pod, too.

    python -m dpreg.plan --flagfile=configs/cpu.cfg
    python -m dpreg.plan --topology=v5p:2x2x2 --flagfile=configs/tpu.cfg
    python -m dpreg.plan --topology=h100:4x8 --flagfile=configs/gpu.cfg --num_shards=32

The train step of the run is compiled, as it would be, and not run; for a TPU slice by libtpu (`pip install -e
'.[plan]'`), without any TPU; for GPUs by JAX's plugin for CUDA (`.[plan-gpu]`), without any GPU or driver. Exit code 2
also where it does not fit into the memory.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpreg.build import build_data, build_model, build_trainer
from dpreg.config import Config
from dpreg.data.dataset import RESIDENT_FRACTION
from dpreg.door import enter
from dpreg.errors import InputError
from dpreg.observers.workdir import made
from dpreg.parallel import devices
from dpreg.parallel.chips import Hosts, Slice, system_named
from dpreg.parallel.program import Collective, Memory, collectives, cost, memory
from dpreg.parallel.reduce import AXIS
from dpreg.parallel.state import initial_state

# No device is looked for, and others may compile at the same time.
_COMPILER_ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_PASSES = {"float32": 6, "bfloat16": 1}  # of the units for products; float64 they have not


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step would be; validation and rows on their way are not counted.

    Attributes:
      topology: as asked for, or the devices of this machine.
      devices: how many; kind: of them.
      placement, precision, reduction: of the run.
      steps_per_call: that one compiled call takes at most.
      collectives: what devices exchange.
      memory: bytes on one device, of the train step alone; `capacity`: those that there are, where that is known.
      state_donated: whether the new state takes the place of the old one.
      operations, bytes_moved: of a step on one device, as the compiler counts them: of shards or parts of a batch that
        are taken one after the other (ordered, accumulated, and large batches on CPU) it counts one; 0 for GPUs.
      compile_seconds: of the program, or of finding it in the cache of compiled programs.
      seconds: of a step, predicted by published rates: "products", "memory", "exchange", "step"; those which the
        compiler has counted.
    """

    topology: str
    devices: int
    kind: str
    placement: str
    precision: str
    reduction: str
    steps_per_call: int
    collectives: list[Collective]
    memory: Memory
    capacity: float | None
    state_donated: bool
    operations: float
    bytes_moved: float
    compile_seconds: float
    seconds: dict[str, float]

    @property
    def fits(self) -> bool | None:
        """Whether a device has the memory, where that is known."""
        return None if self.capacity is None else self.memory.total <= self.capacity

    def describe(self) -> str:
        """In lines for a person."""
        held = self.memory
        lines = [
            f"{self.devices:,} devices: {self.topology} ({self.kind}); placement {self.placement}, {self.precision}, "
            f"reduction {self.reduction}, up to {self.steps_per_call:,} steps a call, compiled in "
            f"{self.compile_seconds:.1f} s"
        ]
        for one in self.collectives:
            when = "each step" if one.each_step else "once a call"
            lines.append(f"{one.kind} of {one.size:,} bytes over {one.devices:,} devices, {when} ({one.place})")
        if not self.collectives:
            lines.append("no exchange between devices")
        room = ""
        if self.capacity is not None:
            left = _bytes(abs(self.capacity - held.total))
            room = f"; fits, with {left} to spare" if self.fits else f"; DOES NOT FIT: {left} are missing"
            room += f" of {_bytes(self.capacity)}"
        lines.append(
            f"on a device {_bytes(held.total)}: rows and state {_bytes(held.arguments)}, temporaries "
            f"{_bytes(held.temporaries)}, program {_bytes(held.code)}{room}"
        )
        lines.append(f"the state is {'replaced in place' if self.state_donated else 'COPIED each call'}")
        counted = f"{self.operations:,.0f} operations, {_bytes(self.bytes_moved)} moved"
        lines.append(f"a step on a device: {counted if self.operations else 'its compiler counts no operations'}")
        if self.seconds:
            parts = ", ".join(f"{name} {seconds * 1e6:,.1f} us" for name, seconds in self.seconds.items())
            rest = ", rows from the host not counted" if self.placement == "host" else ""
            lines.append(f"predicted by published rates, all at their best{rest}: {parts}")
        return "\n".join(lines)


def plan(config: Config, topology: str | None = None) -> Plan:
    """Compiles the train step of a run for a TPU slice, for GPUs, or for the devices of this machine.

    Args:
      topology: KIND:SHAPE, such as v5p:8x8x8 or h100:4x8; None for this machine.

    Raises:
      InputError: when there is no such system, or the run does not go on it.
    """
    system = system_named(topology) if topology else None
    if system:
        described = _described(system)
        if len(described) > config.num_shards:
            raise InputError(
                f"--topology={topology}: it has {len(described):,} devices, each of which needs a shard of its own; "
                f"use --num_shards={len(described)} and a --batch_size that is a multiple of it"
            )
        mesh = Mesh(np.array(described), (AXIS,))
    else:
        mesh = devices.data_mesh(config.num_shards, config.platform, config.num_devices)
    data, config = build_data(config), dataclasses.replace(config, backend="jit")  # pmap's is the same program
    if system and config.placement == "auto":
        trainer = build_trainer(config, mesh=mesh)
        trainer.lay_out(data)
        fits = trainer.train.resident_bytes <= system.memory * RESIDENT_FRACTION
        config = dataclasses.replace(config, placement="device" if fits else "host")
    compiled, seconds, trainer = _compiled(config, mesh, data, None)
    # Of loops the compiler counts one turn: what lies outside grows with the steps of a call.
    (few, _, small), (more, _, large) = (_compiled(config, mesh, data, steps) for steps in (2, 4))
    apart = large.train.block_steps - small.train.block_steps
    operations, moved = (
        one - (other - one) / apart if apart else one for one, other in zip(cost(few), cost(more), strict=True)
    )
    held, exchanged = memory(compiled), collectives(compiled, mesh.size)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_abstract(trainer, data, config)))
    counted = config.accumulate_steps == 1 and (config.reduction == "pmean" or trainer.train.slots == 1)
    return Plan(
        topology=topology or devices.describe(mesh.devices.flat),
        devices=mesh.size,
        kind=mesh.devices.flat[0].device_kind,
        placement=trainer.train.resolved_placement,
        precision=config.precision,
        reduction=config.reduction,
        steps_per_call=trainer.train.block_steps,
        collectives=exchanged,
        memory=held,
        capacity=system.memory if system else _capacity(mesh),
        state_donated=held.donated >= state_bytes,
        operations=operations,
        bytes_moved=moved,
        compile_seconds=seconds,
        seconds=_predicted(system, config, operations if counted else None, moved, exchanged) if system else {},
    )


def _described(system: Slice | Hosts) -> list[Any]:
    """Its devices, for the compiler."""
    if isinstance(system, Slice):
        return list(topologies.get_topology_desc(platform="tpu", topology_name=system.name).devices)
    shape = f"1x{system.hosts}x{system.each}"
    return list(
        topologies.get_topology_desc(system.name, "cuda", target_config=system.chip.target, topology=shape).devices
    )


def _compiled(config: Config, mesh: Mesh, data: Any, steps_per_block: int | None) -> tuple[Any, float, Any]:
    trainer = build_trainer(config, mesh=mesh, steps_per_block=steps_per_block)
    trainer.lay_out(data)
    model = build_model(config, data.num_inputs, data.num_targets, trainer.train.num_steps)
    started = time.perf_counter()
    return trainer.compile_train(model, _abstract(trainer, data, config)), time.perf_counter() - started, trainer


def _abstract(trainer: Any, data: Any, config: Config) -> Any:
    """The state without its values."""
    model = build_model(config, data.num_inputs, data.num_targets, trainer.train.num_steps)
    row = data.train[np.zeros(1, np.int32)]["x"]
    first = functools.partial(
        initial_state, model, seed=0, dtype=trainer.dtype, gradient_clip_val=config.gradient_clip_val
    )
    everywhere = NamedSharding(trainer.mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), jax.eval_shape(first, row)
    )


def _capacity(mesh: Mesh) -> float | None:
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def _predicted(
    system: Slice | Hosts, config: Config, operations: float | None, moved: float, exchanged: list[Collective]
) -> dict[str, float]:
    """Products and memory overlap; the exchange comes after them. The exchange alone where operations are unknown."""
    exchange = sum(system.seconds(one.kind, one.size) for one in exchanged if one.each_step)
    if isinstance(system, Hosts) or operations is None or config.precision not in _PASSES:
        return {"exchange": exchange}
    products = operations * _PASSES[config.precision] / system.chip.products
    from_memory = moved / system.chip.memory_rate
    step = max(products, from_memory) + exchange
    return {"products": products, "memory": from_memory, "exchange": exchange, "step": step}


def _bytes(size: float) -> str:
    """Such as 7.4 MB."""
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _apart(config: Config, topology: str) -> Plan:
    """`plan` in a process of its own: the compiler for TPUs ends its process where it cannot do something."""
    gpus = isinstance(system_named(topology), Hosts)
    if not any(map(importlib.util.find_spec, _PLUGINS if gpus else ("libtpu",))):
        what, extra = ("JAX's plugin for CUDA", "plan-gpu") if gpus else ("libtpu, which compiles for TPUs", "plan")
        raise InputError(f"--topology={topology}: needs {what}; run pip install 'dpreg[{extra}]', or -e '.[{extra}]'")
    os.environ.update(_COMPILER_ALONE)
    with tempfile.NamedTemporaryFile("r") as said:
        context = multiprocessing.get_context("spawn")
        try:
            with concurrent.futures.ProcessPoolExecutor(1, context, _say_into, (said.name,)) as pool:
                return pool.submit(plan, config, topology).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            fatal = [line.strip() for line in said if re.match("F[0-9]|.*(Check failed|ABORT)", line)]
            reason = f": {fatal[0][:300]}" if fatal else ""
            raise InputError(
                f"--topology={topology}: the compiler cannot do it, and ended{reason}; use another"
            ) from error
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"--topology={topology}: does not compile for it: {reason}; use another") from error


def _say_into(file: str) -> None:
    """Lets all that the compiler says go into a file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), 2)


def _main(argv: list[str]) -> None:
    del argv
    config, topology = Config.from_flags(flags.FLAGS), flags.FLAGS["topology"].value
    for name, of_a_step in (("mode", "train"), ("solver", "sgd"), ("num_processes", None)):
        if (given := getattr(config, name)) != of_a_step:
            raise InputError(f"--{name}={given}: a plan is of a training step, in one process; leave it out")
    with made(pathlib.Path(config.workdir or ".")) as folder:
        if topology:
            found = _apart(config, topology)
        else:
            devices.start(config.platform, config.num_devices)
            found = plan(config)
    print(found.describe())
    if config.workdir:
        told = dataclasses.asdict(found) | {"fits": found.fits}
        (folder / "plan.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        print(f"also in {folder / 'plan.json'}")
    if found.fits is False:
        sys.exit(InputError.exit_code)


def main() -> None:
    """The entry point."""
    flags.DEFINE_string(
        "topology",
        None,
        "KIND:SHAPE of a TPU slice or of HOSTSxGPUS, such as v5p:8x8x8 or h100:4x8. Default: this machine.",
    )
    enter(_main)


if __name__ == "__main__":
    main()
