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

from dpreg.cli import run_cli
from dpreg.config import Config
from dpreg.data.pipeline import RESIDENT_FRACTION, Dataset
from dpreg.data.sampler import Sampler
from dpreg.distributed import devices
from dpreg.distributed.devices import AXIS
from dpreg.errors import InputError
from dpreg.outputs.workdir import made
from dpreg.planning.chips import Hosts, Slice, parse_topology
from dpreg.planning.programs import Collective, Memory, collectives, memory
from dpreg.spelling import spell, spell_as_flags
from dpreg.step.compile import operations_of_step
from dpreg.step.state import Model, TrainState, initial_state
from dpreg.terminal import show
from dpreg.train.build import build_data, build_model, build_trainer
from dpreg.train.program import LaidOutData, lay_out

# No device is looked for, and others may compile at the same time.
_COMPILER_ALONE = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a train step would be.

    Attributes:
      topology: as asked for, or the devices of this machine.
      devices: how many; kind: of them.
      num_shards, batch_size: of the run; those asked for, where each device has a shard by them.
      accumulate_steps: of the run: parts of a step.
      placement, precision, reduction: of the run.
      steps_per_call: that one compiled call takes at most.
      collectives: what devices exchange.
      memory: bytes on one device, of the train step; validation_bytes: of rows held out that stay there, too.
        With placement "host", rows on their way are not counted. `capacity`: bytes that there are, where that is known.
      state_donated: whether the new state takes the place of the old one.
      operations: of a step on one device, as XLA counts them in the program that it is given.
      bytes_moved: by a step on one device at least: its rows are read once, the state is read and written.
      compile_seconds: of the program, or of finding it in the cache of compiled programs.
      seconds: of a step, predicted by published rates: "products", "memory", "exchange", "step".
    """

    topology: str
    devices: int
    kind: str
    num_shards: int
    batch_size: int
    accumulate_steps: int
    placement: str
    precision: str
    reduction: str
    steps_per_call: int
    collectives: list[Collective]
    memory: Memory
    validation_bytes: int
    capacity: float | None
    state_donated: bool
    operations: float
    bytes_moved: float
    compile_seconds: float
    seconds: dict[str, float]

    @property
    def held_bytes(self) -> int:
        """Bytes on one device, all together."""
        return self.memory.total + self.validation_bytes

    @property
    def fits(self) -> bool | None:
        """Whether a device has the memory, where that is known."""
        return None if self.capacity is None else self.held_bytes <= self.capacity

    def describe(self) -> str:
        """In lines for a person."""
        held = self.memory
        lines = [
            f"{self.devices:,} devices: {self.topology} ({self.kind}); {spell('num_shards', self.num_shards)} "
            f"{spell('batch_size', self.batch_size)}, placement {self.placement}, {self.precision}, "
            f"reduction {self.reduction}, up to {self.steps_per_call:,} steps a call, compiled in "
            f"{self.compile_seconds:.1f} s"
        ]
        for one in self.collectives:
            when = ("once a call", "each step", f"{self.accumulate_steps} times a step")[min(one.loops, 2)]
            lines.append(
                f"{one.kind} of {one.size:,} bytes over {one.devices:,} devices, {when} ({one.place}); "
                f"a device sends {one.wire_bytes:,}"
            )
        if not self.collectives:
            lines.append("no exchange between devices")
        room = ""
        if self.capacity is not None:
            left = _bytes(abs(self.capacity - self.held_bytes))
            room = f"; fits, with {left} to spare" if self.fits else f"; DOES NOT FIT: {left} are missing"
            room += f" of {_bytes(self.capacity)}"
        lines.append(
            f"on a device {_bytes(self.held_bytes)}: rows and state {_bytes(held.arguments)}, rows held out "
            f"{_bytes(self.validation_bytes)}, temporaries {_bytes(held.temporaries)}, program "
            f"{_bytes(held.code)}{room}"
        )
        lines.append(f"the state is {'replaced in place' if self.state_donated else 'COPIED each call'}")
        lines.append(
            f"a step on a device: {self.operations:,.0f} operations; from memory and to it at least "
            f"{_bytes(self.bytes_moved)}"
        )
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
    system = parse_topology(topology) if topology else None
    if system:
        mesh = Mesh(np.array(_described(system)), (AXIS,))
        if mesh.size > config.num_shards:  # as many rows for each as there were
            rows = Sampler(1, config.num_shards, config.batch_size).shard_batch
            config = dataclasses.replace(config, num_shards=mesh.size, batch_size=mesh.size * rows)
    else:
        mesh = devices.data_mesh(config.num_shards, config.platform, config.num_devices)
    data, config = build_data(config), dataclasses.replace(config, backend="jit")  # pmap's is the same program
    laid_out = lay_out(data, build_trainer(config, mesh=mesh).settings)
    if system and config.placement == "auto":
        most = system.memory * RESIDENT_FRACTION

        def placed(dataset: Dataset) -> Dataset:
            return dataset.place("device" if dataset.resident_bytes <= most else "host")

        laid_out = dataclasses.replace(
            laid_out, train=placed(laid_out.train), val=laid_out.val and placed(laid_out.val)
        )
    model = build_model(config, data.num_inputs, data.num_targets, laid_out.train.num_steps)
    state = _abstract(model, laid_out)
    laid_out = laid_out.limit_steps(state)
    train, val = laid_out.train, laid_out.val
    started = time.perf_counter()
    compiled = laid_out.compile_train(model, state)
    seconds = time.perf_counter() - started

    batches = {
        name: jax.ShapeDtypeStruct((train.slots, train.sampler.shard_batch, *column.shape[1:]), laid_out.settings.dtype)
        for name, column in laid_out.first_row.items()
    }
    operations = operations_of_step(model, state, batches)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    moved = train.slots * train.sampler.shard_batch * train.row_bytes + 2 * state_bytes
    held, exchanged = memory(compiled), collectives(compiled, mesh.size)
    return Plan(
        topology=topology or devices.describe(mesh.devices.flat),
        devices=mesh.size,
        kind=mesh.devices.flat[0].device_kind,
        num_shards=config.num_shards,
        batch_size=config.batch_size,
        accumulate_steps=config.accumulate_steps,
        placement=train.resolved_placement,
        precision=config.precision,
        reduction=config.reduction,
        steps_per_call=train.block_steps,
        collectives=exchanged,
        memory=held,
        validation_bytes=val.resident_bytes if val and val.resolved_placement == "device" else 0,
        capacity=system.memory if system else _capacity(mesh),
        state_donated=held.donated >= state_bytes,
        operations=operations,
        bytes_moved=moved,
        compile_seconds=seconds,
        seconds=_predicted(system, config, operations, moved, exchanged) if system else {},
    )


def _described(system: Slice | Hosts) -> list[Any]:
    """Its devices, for the compiler."""
    if isinstance(system, Slice):
        return list(topologies.get_topology_desc(platform="tpu", topology_name=system.name).devices)
    shape = f"1x{system.hosts}x{system.each}"
    return list(
        topologies.get_topology_desc(system.name, "cuda", target_config=system.chip.target, topology=shape).devices
    )


def _abstract(model: Model, laid_out: LaidOutData) -> TrainState:
    """The state without its values."""
    settings, x = laid_out.settings, laid_out.first_row["x"]
    everywhere = NamedSharding(settings.mesh, PartitionSpec())
    state: TrainState = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(lambda x: initial_state(model, x, 0, settings.dtype, settings.gradient_clip_val), x),
    )
    return state


def _capacity(mesh: Mesh) -> float | None:
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def _predicted(
    system: Slice | Hosts, config: Config, operations: float, moved: float, exchanged: list[Collective]
) -> dict[str, float]:
    """Products and memory overlap; the exchange comes after them. Without a rate of products the exchange alone."""
    times = (0, 1, config.accumulate_steps)
    exchange = sum(times[min(one.loops, 2)] * system.seconds(one.kind, one.size) for one in exchanged)
    if config.precision not in system.chip.products:
        return {"exchange": exchange}
    products, from_memory = operations / system.chip.products[config.precision], moved / system.chip.memory_rate
    step = max(products, from_memory) + exchange
    return {"products": products, "memory": from_memory, "exchange": exchange, "step": step}


def _bytes(size: float) -> str:
    """Such as 7.4 MB."""
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _apart(config: Config, topology: str) -> Plan:
    """`plan` in a process of its own: the compiler for TPUs ends its process where it cannot do something."""
    gpus, where = isinstance(parse_topology(topology), Hosts), spell("topology", topology)
    if not any(map(importlib.util.find_spec, CUDA_PLUGINS if gpus else ("libtpu",))):
        what, extra = ("JAX's plugin for CUDA", "plan-gpu") if gpus else ("libtpu, which compiles for TPUs", "plan")
        raise InputError(f"{where}: needs {what}; run pip install 'dpreg[{extra}]', or -e '.[{extra}]'")
    os.environ.update(_COMPILER_ALONE)
    with tempfile.NamedTemporaryFile("r") as said:
        context = multiprocessing.get_context("spawn")
        try:
            with concurrent.futures.ProcessPoolExecutor(1, context, _say_into, (said.name,)) as pool:
                return pool.submit(_plan_for_command, config, topology).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            fatal = [line.strip() for line in said if re.match("F[0-9]|.*(Check failed|ABORT)", line)]
            reason = f": {fatal[0][:300]}" if fatal else ""
            raise InputError(f"{where}: the compiler cannot do it, and ended{reason}; use another") from error
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{where}: does not compile for it: {reason}; use another") from error


def _plan_for_command(config: Config, topology: str) -> Plan:
    with spell_as_flags():
        return plan(config, topology)


def _say_into(file: str) -> None:
    """Lets all that the compiler says go into a file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), 2)


def _main(argv: list[str]) -> None:
    del argv
    config, topology = Config.from_flags(flags.FLAGS), flags.FLAGS["topology"].value
    if topology and config.num_devices is not None:
        how_many = f"{spell('topology', topology)} says how many"
        raise InputError(f"{spell('num_devices', config.num_devices)}: {how_many}; leave it out")
    for name, of_a_step in (("mode", "train"), ("solver", "sgd"), ("num_processes", None)):
        if (given := getattr(config, name)) != of_a_step:
            raise InputError(f"{spell(name, given)}: a plan is of a training step, in one process; leave it out")
    with made(pathlib.Path(config.workdir or ".")) as folder:
        if topology:
            found = _apart(config, topology)
        else:
            devices.start(config.platform, config.num_devices, threads=config.threads)
            found = plan(config)
    show(*found.describe().split("\n"))
    if config.workdir:
        exchanged = [
            dataclasses.asdict(one) | {"each_step": one.each_step, "wire_bytes": one.wire_bytes}
            for one in found.collectives
        ]
        values = dataclasses.asdict(found) | {"collectives": exchanged, "fits": found.fits}
        (folder / "plan.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        show(f"also in {folder / 'plan.json'}")
    if found.fits is False:
        sys.exit(InputError.exit_code)


def main() -> None:
    """The entry point."""
    flags.DEFINE_string(
        "topology",
        None,
        "KIND:SHAPE of a TPU slice or of HOSTSxGPUS, such as v5p:8x8x8 or h100:4x8. Default: this machine.",
    )
    run_cli(_main)


if __name__ == "__main__":
    main()
