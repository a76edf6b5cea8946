"""A door: `python -m dpreg.scaling` says what more devices buy a run: measured here, and extrapolated.

    python -m dpreg.scaling --flagfile=configs/cpu.cfg --num_train=1000000 --batch_size=8192 --workdir=runs/scaling

The run is trained on 1, 2, 4, ... devices, twice: with the batch it has ("strong"), and with as many times the batch
and the synthetic rows ("weak"). Simulated CPU devices share cores and would say nothing of speed, so on CPU each device
is a process that computes on one thread, up to the number of cores. The exchange between devices is timed alone, at
several sizes, and fitted by latency and bandwidth.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import lax
from jax.sharding import PartitionSpec
from rich.console import Console

from dpreg.config import Config
from dpreg.door import enter, leave
from dpreg.errors import InputError
from dpreg.observers.chart import chart, page
from dpreg.observers.metrics import to_json
from dpreg.observers.progress import ProgressDisplay
from dpreg.parallel import devices, processes
from dpreg.parallel.reduce import AXIS

KINDS = ("strong", "weak")  # the same batch for all devices, or for each
_SIZES = (24, 4096, 65_536, 1 << 20, 4 << 20)  # bytes exchanged
_REPEATS, _ROUNDS = 200, 5
_WORTH = 0.5  # efficiency below which devices no longer pay
_PATIENCE_SECONDS = 1800


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What one sum over all devices takes: latency + size / bandwidth.

    Attributes:
      devices: over how many.
      latency: seconds; bandwidth: bytes/s, infinite where no size was dearer.
      error: the largest difference of a measurement from that, as its share.
      seconds: measured, by size in bytes.
    """

    devices: int
    latency: float
    bandwidth: float
    error: float
    seconds: dict[int, float]

    @classmethod
    def fitted(cls, count: int, seconds: dict[int, float]) -> "Exchange":
        """By least squares of relative errors."""
        size, measured = np.array(list(seconds)), np.array(list(seconds.values()))
        design = np.stack([np.ones(len(size)), size], axis=1) / measured[:, None]
        latency, a_byte = np.maximum(np.linalg.lstsq(design, np.ones(len(size)))[0], 0.0)
        error = np.abs((latency + a_byte * size) / measured - 1).max()
        return cls(count, float(latency), float(1 / a_byte) if a_byte > 0 else float("inf"), float(error), seconds)

    def of(self, size: float, count: float) -> float:
        """Seconds of a sum of so many bytes over so many devices: its latency grows with the logarithm of `count`."""
        if count <= 1:
            return 0.0
        return self.latency * math.log2(count) / math.log2(self.devices) + size / self.bandwidth


def exchange_seconds(count: int) -> dict[int, float]:
    """Seconds of one sum over so many devices, by its size: the best of some rounds, in a loop of many."""
    mesh = devices.data_mesh(jax.device_count(), num_devices=count // jax.process_count())
    found = {}
    for size in _SIZES:

        def sums(x: jax.Array, times: jax.Array) -> jax.Array:
            return lax.fori_loop(0, times, lambda _, total: lax.pmean(total, AXIS) * 0.5, x)

        everywhere = PartitionSpec()
        mapped = jax.shard_map(
            sums, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=everywhere, check_vma=False
        )
        given = devices.replicated((np.ones(size // 4, np.float32), np.int32(_REPEATS)), mesh)
        compiled = jax.jit(mapped).lower(*given).compile()
        processes.exchange()
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*given))
            times.append((time.perf_counter() - began) / _REPEATS)
        found[size] = min(times)
    return found


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run on some devices.

    Attributes:
      devices: how many.
      kind: "strong" or "weak".
      rows_per_second, steps_per_second: in steady state.
      efficiency: rows per second as a share of as many times those of one device.
      exchange_share: of a step, what the exchange alone takes.
    """

    devices: int
    kind: str
    rows_per_second: float
    steps_per_second: float
    efficiency: float
    exchange_share: float


class Laboratory:
    """Runs a configuration on a number of devices: of this machine's accelerators, or of its cores.

    Args:
      config: of the run; told: what is told of what goes on.
    """

    def __init__(self, config: Config, told: Any):
        self._config, self._told = config, told
        self.on_cores = config.platform == "cpu"
        self.most = len(os.sched_getaffinity(0)) if self.on_cores else self._accelerators()

    def _accelerators(self) -> int:
        """Asked for in another process, which does not keep them."""
        program = "import jax, sys; print(jax.default_backend(), jax.local_device_count())"
        backend, count = self._python(["-c", program], 1, cores=False)[0].split()
        if backend == "cpu":
            self.on_cores = True
            return len(os.sched_getaffinity(0))
        return int(count)

    def train(self, count: int, times: int) -> dict[str, Any]:
        """The summary of a run on so many devices, with so many times the batch and the synthetic rows."""
        config = dataclasses.replace(
            self._config,
            mode="train",
            batch_size=self._config.batch_size * times,
            num_train=self._config.num_train * times,
            num_devices=1 if self.on_cores else count,
            platform="cpu" if self.on_cores else self._config.platform,
            optimality=False,
            workdir=None,
        )
        with tempfile.TemporaryDirectory() as folder:
            flagfile = pathlib.Path(folder) / "flags.cfg"
            flagfile.write_text(config.to_flagfile(), encoding="utf-8")
            arguments = ["-m", "dpreg.main", f"--flagfile={flagfile}", f"--workdir={folder}/run"]
            self._python(arguments, count if self.on_cores else 1, as_flags=True)
            summary: dict[str, Any] = json.loads((pathlib.Path(folder) / "run" / "summary.json").read_text())
        return summary

    def exchange(self, count: int) -> Exchange:
        """The sums over so many devices, alone."""
        program = "from dpreg.scaling import time_exchange; import sys; time_exchange(*map(int, sys.argv[1:]))"
        here = [str(count), str(int(self.on_cores))]
        told = self._python(["-c", program, *here], count if self.on_cores else 1)[0]
        return Exchange.fitted(
            count, {int(size): seconds for size, seconds in json.loads(told.splitlines()[-1]).items()}
        )

    def _python(self, arguments: list[str], count: int, as_flags: bool = False, cores: bool = True) -> list[str]:
        """What so many processes print, each with a thread of its own; an error is that of the first that failed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # XLA's threads for computing. Pinned to a core, a process would compute while it should exchange: 3 ms a sum.
        environment = os.environ | ({"NPROC": "1"} if cores and self.on_cores else {})
        running = []
        for number in range(count):
            who = [str(port), str(count), str(number)]
            if as_flags:
                names = ("coordinator_address=127.0.0.1:", "num_processes=", "process_id=")
                who = [f"--{name}{value}" for name, value in zip(names, who, strict=True)] if count > 1 else []
            command = [sys.executable, *arguments, *(who if cores else [])]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(command, env=environment, **pipes))
        try:
            said = [process.communicate(timeout=_PATIENCE_SECONDS) for process in running]
        finally:
            for process in running:
                process.kill()
        for process, (_, wrong) in zip(running, said, strict=True):
            if process.returncode:
                line = wrong.strip().splitlines()[-1:] or ["it ended"]
                raise InputError(f"a run on {count} devices: {line[0].removeprefix('dpreg: ')}")
        return [out for out, _ in said]


def time_exchange(count: int, on_cores: int, port: int, num_processes: int, process_id: int) -> None:
    """In each process of a `Laboratory`: the first prints what sums take."""
    if on_cores:
        several = (f"127.0.0.1:{port}", num_processes, process_id) if num_processes > 1 else (None, None, None)
        devices.start("cpu", 1, *several)
    else:
        devices.start()
    found = exchange_seconds(count)
    if jax.process_index() == 0:
        print(json.dumps(found))


def measure(config: Config, told: Any) -> tuple[list[Measured], list[Exchange], dict[str, Any]]:
    """Trains on 1, 2, 4, ... devices; gives what came of it, the exchanges, and an extrapolation."""
    laboratory = Laboratory(config, told)
    counts = [1 << power for power in range(16) if 1 << power <= min(laboratory.most, config.num_shards)]
    exchanges, runs = [], list[Measured]()
    size = 0
    for count in counts:
        told(f"timing sums over {count} devices" if count > 1 else "one device")
        exchange = laboratory.exchange(count) if count > 1 else None
        exchanges += [exchange] if exchange else []
        for kind, times in zip(KINDS, (1, count), strict=True) if count > 1 else ((KINDS[0], 1),):
            told(f"training on {count} devices, {kind}")
            summary = laboratory.train(count, times)
            size = size or 4 * (_parameters(summary) + 3)
            alone = runs[0].rows_per_second if runs else summary["rows_per_second"]
            share = exchange.of(size, count) * summary["steps_per_second"] if exchange else 0.0
            rate, steps = summary["rows_per_second"], summary["steps_per_second"]
            runs.append(Measured(count, kind, rate, steps, rate / count / alone, share))
    return runs, exchanges, extrapolated(runs, exchanges[-1] if exchanges else None, size)


def _parameters(summary: dict[str, Any]) -> int:
    found = summary.get("parameters", {"w": [], "b": []})
    return sum(np.size(list(part.values()) if isinstance(part, dict) else part) for part in found.values())


def extrapolated(runs: list[Measured], exchange: Exchange | None, size: int) -> dict[str, Any]:
    """The step of the same batch on more devices: its work shared, and the exchange on top.

    Returns:
      "work": seconds of a step's work on one device; "efficiency" by number of devices; "pays_up_to": the most devices,
      of powers of two, of which each does at least half of what one does alone.
    """
    if exchange is None:
        return {}
    work = 1 / runs[0].steps_per_second
    efficiency = {1 << p: work / (work + (1 << p) * exchange.of(size, 1 << p)) for p in range(17)}
    return {
        "work": work,
        "efficiency": efficiency,
        "pays_up_to": max(count for count, share in efficiency.items() if share >= _WORTH),
    }


def describe(runs: list[Measured], exchanges: list[Exchange], further: dict[str, Any], on_cores: bool) -> str:
    """In lines for a person."""
    lines = [f"{'devices':>8} {'':7} {'rows/s':>14} {'steps/s':>12} {'efficiency':>11} {'exchange':>9}"]
    for run in runs:
        share = f"{run.exchange_share:.1%}"
        lines.append(
            f"{run.devices:>8} {run.kind if run.devices > 1 else '':7} {run.rows_per_second:>14,.0f} "
            f"{run.steps_per_second:>12,.1f} {run.efficiency:>11.2f} {share:>9}"
        )
    for one in exchanges:
        rate = "" if math.isinf(one.bandwidth) else f" + size / {one.bandwidth / 1e9:.2f} GB/s"
        lines.append(
            f"a sum over {one.devices} devices: {one.latency * 1e6:,.1f} us{rate}, to {one.error:.0%} of all measured"
        )
    if further:
        lines.append(
            f"with this batch, and exchanges as here, devices pay up to {further['pays_up_to']:,}: beyond, each does "
            "less than half of what one does alone"
        )
    if on_cores:
        lines.append(
            "devices here are processes with a thread of the CPU each; simulated devices (--num_devices) share cores: "
            "they show that results agree, and what dpreg costs, not what devices gain"
        )
    return "\n".join(lines)


def _main(argv: list[str]) -> None:
    del argv
    try:
        config = Config.from_flags(flags.FLAGS)
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(ProgressDisplay(Console(stderr=True)))
            runs, exchanges, further = measure(config, progress.doing)
        print(describe(runs, exchanges, further, config.platform == "cpu"))
        if config.workdir:
            folder = pathlib.Path(config.workdir)
            folder.mkdir(parents=True, exist_ok=True)
            found = {
                "runs": [dataclasses.asdict(run) for run in runs],
                "exchanges": [dataclasses.asdict(one) for one in exchanges],
                "extrapolated": further,
            }
            (folder / "scaling.json").write_text(to_json(found, indent=2) + "\n", encoding="utf-8")
            rates = {
                kind: [(run.devices, run.rows_per_second) for run in runs if run.kind == kind or run.devices == 1]
                for kind in KINDS
            }
            body = f"<h1>Rows per second</h1>{chart(rates, 'devices', 'rows per second', doubling=True)}"
            if further:
                share = {"expected efficiency, same batch": sorted(further["efficiency"].items())}
                body += f"<h2>On more devices</h2>{chart(share, 'devices', 'efficiency', doubling=True)}"
            (folder / "scaling.html").write_text(page("scaling", body), encoding="utf-8")
            print(f"also in {folder}: scaling.json, scaling.html")
    except InputError as error:
        leave(error, error.exit_code)
    except OSError as error:
        leave(InputError(f"{error.filename}: {error.strerror}: free or change it"), InputError.exit_code)


def main() -> None:
    """The entry point."""
    enter(_main)


if __name__ == "__main__":
    main()
