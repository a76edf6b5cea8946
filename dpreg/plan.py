"""`python -m dpreg.plan` reports what a training step exchanges between devices, its memory, and its operations.

    python -m dpreg.plan --flagfile=configs/cpu.cfg
    python -m dpreg.plan --topology=v5p:2x2x2 --flagfile=configs/tpu.cfg
    python -m dpreg.plan --topology=h100:4x8 --flagfile=configs/gpu.cfg --num_shards=32

It compiles the train step of the run, and does not run it. For a TPU slice it needs libtpu (`pip install -e
'.[plan]'`), but no TPU; for GPUs it needs JAX's plugin for CUDA (`.[plan-gpu]`), but no GPU or driver. The exit code is
2 for wrong input, and if the step does not fit into memory.
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
from dpreg.outputs.workdir import make_folder
from dpreg.planning.chips import Hosts, Slice, parse_topology
from dpreg.planning.programs import Collective, Memory, find_collectives, measure_memory
from dpreg.spelling import spell, spell_as_flags
from dpreg.step.compile import operations_of_step
from dpreg.step.state import Model, TrainState, initial_state
from dpreg.terminal import show
from dpreg.train.build import build_model, build_trainer
from dpreg.train.defaults import read_rows
from dpreg.train.program import LaidOutData, lay_out

# Environment to compile without devices: do not look for a TPU, and allow several processes to load libtpu.
_COMPILE_ONLY = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled train step.

    Attributes:
      topology: the name of the system, or the devices of this machine.
      devices: the number of devices.
      kind: the kind of the devices.
      num_shards, batch_size: those of the run; larger if the system has more devices than the run has shards.
      accumulate_steps: the number of batches of a step.
      placement, precision, reduction: those of the run.
      steps_per_call: the largest number of steps of one compiled call.
      collectives: the collectives of the program.
      memory: the memory of the train step on one device. With placement "host", rows in transfer are not counted.
      validation_bytes: the bytes of validation rows that stay on a device.
      capacity: the bytes of memory of a device, if known.
      state_donated: whether the new state replaces the old one in place.
      operations: the operations of a step on one device, as XLA counts them before optimisation.
      bytes_moved: the fewest bytes that a step moves on one device: it reads its rows once, and reads and writes the
        state.
      compile_seconds: the time to compile the program, or to find it in the compilation cache.
      seconds: the predicted duration of a step from published speeds: "products", "memory", "exchange", "step".
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
        """The bytes that the run needs on one device."""
        return self.memory.total + self.validation_bytes

    @property
    def fits(self) -> bool | None:
        """Whether a device has enough memory; None if unknown."""
        return None if self.capacity is None else self.held_bytes <= self.capacity

    def describe(self) -> str:
        """The plan as lines of text."""
        memory = self.memory
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
        verdict = ""
        if self.capacity is not None:
            difference, capacity = map(_format_bytes, (abs(self.capacity - self.held_bytes), self.capacity))
            verdict = f"; fits, {difference} of {capacity} are free"
            if not self.fits:
                verdict = f"; DOES NOT FIT: it needs {difference} more than {capacity}"
        lines.append(
            f"on a device {_format_bytes(self.held_bytes)}: rows and state {_format_bytes(memory.arguments)}, "
            f"validation rows {_format_bytes(self.validation_bytes)}, temporaries "
            f"{_format_bytes(memory.temporaries)}, program {_format_bytes(memory.code)}{verdict}"
        )
        lines.append(f"the state is {'replaced in place' if self.state_donated else 'COPIED in each call'}")
        lines.append(
            f"a step on a device: {self.operations:,.0f} operations; it moves at least "
            f"{_format_bytes(self.bytes_moved)} from and to memory"
        )
        if self.seconds:
            durations = ", ".join(f"{name} {seconds * 1e6:,.1f} us" for name, seconds in self.seconds.items())
            without = ", without the transfer of rows from the host" if self.placement == "host" else ""
            lines.append(f"predicted from published peak speeds{without}: {durations}")
        return "\n".join(lines)


def plan(config: Config, topology: str | None = None) -> Plan:
    """Compiles the train step of a run for a TPU slice, for GPUs, or for the devices of this machine.

    Args:
      config: the settings of the run.
      topology: KIND:SHAPE, such as v5p:8x8x8 or h100:4x8; None for this machine.

    Raises:
      InputError: when there is no such system, or the run cannot be computed on it.
    """
    system = parse_topology(topology) if topology else None
    # The plan is of a training step; pmap compiles the same program as jit.
    config, data, _ = read_rows(dataclasses.replace(config, solver="sgd", backend="jit"))
    mesh, config = _make_mesh(config, system)
    data.batch_size = config.batch_size
    laid_out = lay_out(data, build_trainer(config, mesh=mesh).settings)
    if system and config.placement == "auto":
        laid_out = _place_rows(laid_out, system.memory * RESIDENT_FRACTION)
    model = build_model(config, data.num_inputs, data.num_targets, laid_out.train.num_steps)
    state = _make_abstract_state(model, laid_out)
    laid_out = laid_out.limit_steps(state)
    train, val = laid_out.train, laid_out.val
    started = time.perf_counter()
    compiled = laid_out.compile_train(model, state)
    seconds = time.perf_counter() - started
    operations = _count_operations(model, state, laid_out)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    bytes_moved = train.slots * train.sampler.shard_batch * train.row_bytes + 2 * state_bytes
    memory, collectives = measure_memory(compiled), find_collectives(compiled, mesh.size)
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
        collectives=collectives,
        memory=memory,
        validation_bytes=val.resident_bytes if val and val.resolved_placement == "device" else 0,
        capacity=system.memory if system else _capacity(mesh),
        state_donated=memory.donated >= state_bytes,
        operations=operations,
        bytes_moved=bytes_moved,
        compile_seconds=seconds,
        seconds=_predict_seconds(system, config, operations, bytes_moved, collectives) if system else {},
    )


def _make_mesh(config: Config, system: Slice | Hosts | None) -> tuple[Mesh, Config]:
    """The mesh of a system, or of this machine; and the config, with at least one shard for each device of a system."""
    if system is None:
        return devices.data_mesh(config.num_shards, config.platform, config.num_devices), config
    mesh = Mesh(np.array(_list_devices(system)), (AXIS,))
    if mesh.size > config.num_shards:  # keep the number of rows per shard
        rows = Sampler(1, config.num_shards, config.batch_size).shard_batch
        config = dataclasses.replace(config, num_shards=mesh.size, batch_size=mesh.size * rows)
    return mesh, config


def _list_devices(system: Slice | Hosts) -> list[Any]:
    """The devices of a system, for the compiler."""
    if isinstance(system, Slice):
        return list(topologies.get_topology_desc(platform="tpu", topology_name=system.name).devices)
    shape = f"1x{system.hosts}x{system.gpus_per_host}"
    return list(
        topologies.get_topology_desc(system.name, "cuda", target_config=system.chip.target, topology=shape).devices
    )


def _place_rows(laid_out: LaidOutData, max_bytes: float) -> LaidOutData:
    """Places the training rows, and the validation rows, on devices if they have at most `max_bytes`."""

    def place(dataset: Dataset) -> Dataset:
        return dataset.place("device" if dataset.resident_bytes <= max_bytes else "host")

    return dataclasses.replace(laid_out, train=place(laid_out.train), val=laid_out.val and place(laid_out.val))


def _count_operations(model: Model, state: TrainState, laid_out: LaidOutData) -> float:
    """The operations of a step on one device."""
    train = laid_out.train
    batches = {
        name: jax.ShapeDtypeStruct((train.slots, train.sampler.shard_batch, *column.shape[1:]), laid_out.settings.dtype)
        for name, column in laid_out.first_row.items()
    }
    return operations_of_step(model, state, batches)


def _make_abstract_state(model: Model, laid_out: LaidOutData) -> TrainState:
    """The shapes, dtypes and sharding of the state."""
    settings, x = laid_out.settings, laid_out.first_row["x"]
    everywhere = NamedSharding(settings.mesh, PartitionSpec())
    state: TrainState = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(lambda x: initial_state(model, x, 0, settings.dtype, settings.gradient_clip_val), x),
    )
    return state


def _capacity(mesh: Mesh) -> float | None:
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def _predict_seconds(
    system: Slice | Hosts, config: Config, operations: float, bytes_moved: float, collectives: list[Collective]
) -> dict[str, float]:
    """Predicts the duration of a step by a roofline model: products and memory overlap, and the exchange follows.

    If the chip does not support the precision, it predicts only the exchange.
    """
    times = (0, 1, config.accumulate_steps)
    exchange = sum(times[min(one.loops, 2)] * system.seconds(one.kind, one.size) for one in collectives)
    if config.precision not in system.chip.flops:
        return {"exchange": exchange}
    products = operations / system.chip.flops[config.precision]
    memory = bytes_moved / system.chip.memory_bandwidth
    return {"products": products, "memory": memory, "exchange": exchange, "step": max(products, memory) + exchange}


def _format_bytes(size: float) -> str:
    """The size with a unit, such as 7.4 MB."""
    power = min(4, int(math.log(max(size, 1), 1000)))
    return f"{size / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _plan_in_subprocess(config: Config, topology: str) -> Plan:
    """Calls `plan` in another process, as the compiler for TPUs aborts its process when it fails."""
    gpus, where = isinstance(parse_topology(topology), Hosts), spell("topology", topology)
    if not any(map(importlib.util.find_spec, CUDA_PLUGINS if gpus else ("libtpu",))):
        package, extra = ("JAX's plugin for CUDA", "plan-gpu") if gpus else ("libtpu, which compiles for TPUs", "plan")
        raise InputError(f"{where}: needs {package}; run pip install 'dpreg[{extra}]', or -e '.[{extra}]'")
    os.environ.update(_COMPILE_ONLY)
    with tempfile.NamedTemporaryFile("r") as log:
        context = multiprocessing.get_context("spawn")
        try:
            with concurrent.futures.ProcessPoolExecutor(1, context, _redirect_stderr, (log.name,)) as pool:
                return pool.submit(_plan_for_command, config, topology).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            fatal = [line.strip() for line in log if re.match("F[0-9]|.*(Check failed|ABORT)", line)]
            reason = f": {fatal[0][:300]}" if fatal else ""
            raise InputError(f"{where}: the compiler aborted{reason}; use another topology") from error
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{where}: the step does not compile for it: {reason}; use another topology") from error


def _plan_for_command(config: Config, topology: str) -> Plan:
    with spell_as_flags():
        return plan(config, topology)


def _redirect_stderr(file: str) -> None:
    """Redirects stderr of this process, also that of the compiler, to a file."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), 2)


def _main(argv: list[str]) -> None:
    del argv
    config, topology = Config.from_flags(flags.FLAGS), flags.FLAGS["topology"].value
    if topology and config.num_devices is not None:
        chosen = f"{spell('topology', topology)} determines their number"
        raise InputError(f"{spell('num_devices', config.num_devices)}: {chosen}; leave it out")
    for name, allowed in (("mode", ("train",)), ("solver", ("auto", "sgd")), ("num_processes", (None,))):
        if (given := getattr(config, name)) not in allowed:
            raise InputError(f"{spell(name, given)}: only a training step of one process has a plan; leave it out")
    with make_folder(pathlib.Path(config.workdir or ".")) as folder:
        if topology:
            result = _plan_in_subprocess(config, topology)
        else:
            devices.start(config.platform, config.num_devices, threads=config.threads)
            result = plan(config)
    show(*result.describe().split("\n"))
    if config.workdir:
        collectives = [
            dataclasses.asdict(one) | {"each_step": one.each_step, "wire_bytes": one.wire_bytes}
            for one in result.collectives
        ]
        values = dataclasses.asdict(result) | {"collectives": collectives, "fits": result.fits}
        (folder / "plan.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        show(f"also in {folder / 'plan.json'}")
    if result.fits is False:
        sys.exit(InputError.exit_code)


def main() -> None:
    """The entry point."""
    flags.DEFINE_string(
        "topology",
        None,
        "KIND:SHAPE of a TPU slice, such as v5p:8x8x8, or KIND:HOSTSxGPUS, such as h100:4x8. Default: this machine.",
    )
    run_cli(_main)


if __name__ == "__main__":
    main()
