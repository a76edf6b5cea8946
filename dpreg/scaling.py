"""A door: `python -m dpreg.scaling` says what more devices buy a run: measured here, and extrapolated.

    python -m dpreg.scaling --flagfile=configs/cpu.cfg --num_train=1000000 --batch_size=8192 --workdir=runs/scaling

The run is trained on 1, 2, 4, ... devices, twice: with the batch it has ("strong"), and with as many times the batch
and the synthetic rows ("weak"). Simulated CPU devices share cores and would say nothing of speed, so on CPU each device
is a process on a core of its own. There are as many as cores or accelerators, and no more than `--num_shards`;
`--num_devices` is not asked. The exchange between devices is timed alone, at several sizes, and fitted by latency and
bandwidth.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import scipy
from absl import flags
from jax import lax
from jax.sharding import PartitionSpec
from rich.console import Console

from dpreg.cli import run_cli
from dpreg.config import Config
from dpreg.distributed import devices, processes
from dpreg.errors import InputError, ProcessLost
from dpreg.outputs.chart import chart, page
from dpreg.outputs.metrics import to_json
from dpreg.outputs.progress import ProgressDisplay
from dpreg.outputs.workdir import make_folder
from dpreg.spelling import spell
from dpreg.step.reduce import mean_over_devices
from dpreg.terminal import show

KINDS = ("strong", "weak")  # the same batch for all devices, or for each
_SIZES = (24, 4096, 65_536, 1 << 20, 4 << 20)  # bytes exchanged
_REPEATED_BYTES, _MOST_REPEATS, _ROUNDS = 32 << 20, 200, 5
_WORTH = 0.5  # efficiency below which devices no longer pay
_PATIENCE_SECONDS = 1800
_SHORT_SECONDS = 0.5  # of training, whose figures differ from run to run


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
        """By least squares of relative errors, neither of the two below 0."""
        size, measured = np.array(list(seconds)), np.array(list(seconds.values()))
        design = np.stack([np.ones(len(size)), size], axis=1) / measured[:, None]
        latency, a_byte = scipy.optimize.nnls(design, np.ones(len(size)))[0]
        error = np.abs((latency + a_byte * size) / measured - 1).max()
        dearer = a_byte * size.max() > 1e-9 * latency  # than rounding
        return cls(count, float(latency), float(1 / a_byte) if dearer else float("inf"), float(error), seconds)

    def of(self, size: float, count: float) -> float:
        """Seconds of a sum of so many bytes over so many devices.

        It is assumed that the latency grows with the logarithm of `count`, as in a tree, and that of n devices each
        moves a share 1 - 1 / n of the bytes, as in a ring. (Small sums between CPUs are sent to all, and move more.)
        """
        if count <= 1:
            return 0.0
        share = (1 - 1 / count) / (1 - 1 / self.devices)
        return self.latency * math.log2(count) / math.log2(self.devices) + share * size / self.bandwidth


def exchange_seconds(count: int) -> dict[int, float]:
    """Seconds of one sum over so many devices, by its size: the best of some rounds, in a loop of many."""
    mesh = devices.data_mesh(jax.device_count(), num_devices=count // jax.process_count())
    found = {}
    for size in _SIZES:
        repeats = min(_MOST_REPEATS, _REPEATED_BYTES // size)

        def sums(x: jax.Array, one: jax.Array, times: jax.Array) -> jax.Array:
            last: jax.Array = lax.fori_loop(0, times, lambda _, total: mean_over_devices(total, mesh) * one, x)
            return last

        everywhere = PartitionSpec()
        mapped = jax.shard_map(sums, mesh=mesh, in_specs=(everywhere,) * 3, out_specs=everywhere, check_vma=False)
        given = devices.replicated((np.ones(size // 4, np.float32), np.float32(1), np.int32(repeats)), mesh)
        compiled = jax.jit(mapped).lower(*given).compile()
        processes.allgather_text()
        times = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*given))
            times.append((time.perf_counter() - began) / repeats)
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
      seconds: that it trained.
    """

    devices: int
    kind: str
    rows_per_second: float
    steps_per_second: float
    efficiency: float
    exchange_share: float
    seconds: float


class Laboratory:
    """Runs a configuration on a number of devices: of this machine's accelerators, or of its cores.

    Args:
      config: of the run.
    """

    def __init__(self, config: Config):
        self._config = config
        self.on_cores = config.platform == "cpu"
        self.most = devices.cores() if self.on_cores else self._accelerators()

    def _accelerators(self) -> int:
        """Asked for in another process, which does not keep them."""
        program = "import jax, sys; print(jax.default_backend(), jax.local_device_count())"
        backend, count = self._python(["-c", program], 1, cores=False)[0].split()
        if backend == "cpu":
            if self._config.platform is not None:
                asked = spell("platform", self._config.platform)
                raise InputError(f"{asked}: there is none here; use {spell('platform', 'cpu')}")
            self.on_cores = True
            return devices.cores()
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
            profile=None,
            resume="never",
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
        program = "from dpreg.scaling import time_exchange; import sys; time_exchange(*sys.argv[1:])"
        here = [str(count), "cpu" if self.on_cores else self._config.platform or ""]
        output = self._python(["-c", program, *here], count if self.on_cores else 1)[0]
        return Exchange.fitted(
            count, {int(size): seconds for size, seconds in json.loads(output.splitlines()[-1]).items()}
        )

    def _python(self, arguments: list[str], count: int, as_flags: bool = False, cores: bool = True) -> list[str]:
        """What so many processes print, each on a core of its own; an error is that of the first that failed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running: list[subprocess.Popen[str]] = []
        with _killed(running):
            for number in range(count):
                who = [str(port), str(count), str(number)]
                if as_flags:
                    names = ("coordinator_address=127.0.0.1:", "num_processes=", "process_id=")
                    who = [f"--{name}{value}" for name, value in zip(names, who, strict=True)] if count > 1 else []
                command = [sys.executable, *arguments, *(who if cores else [])]
                pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                if cores and self.on_cores and not hasattr(os, "sched_setaffinity"):
                    pipes["env"] = os.environ | {"NPROC": "1"}  # a thread at least, where there are no cores to keep to
                running.append(subprocess.Popen(command, **pipes))
                if cores and self.on_cores:
                    devices.keep_to_core(running[-1].pid, number)
            try:
                # None is to wait for its words to be read; killed in here, as the pool waits for those who read.
                with concurrent.futures.ThreadPoolExecutor(count) as pool, _killed(running):
                    said = [*pool.map(lambda process: process.communicate(timeout=_PATIENCE_SECONDS), running)]
            except subprocess.TimeoutExpired as error:
                raise InputError(
                    f"a run on {count} device{'s' if count > 1 else ''} takes more than {_PATIENCE_SECONDS:,} s; "
                    "give fewer rows"
                ) from error
        ended = zip([process.returncode for process in running], said, strict=True)
        for code, (_, wrong) in sorted(ended, key=lambda of: of[0] == ProcessLost.exit_code):  # the others say why
            if code:
                line = wrong.strip().splitlines()[-1:] or ["it ended"]
                failed = InputError(
                    f"a run on {count} device{'s' if count > 1 else ''}: {line[0].removeprefix('dpreg: ')}"
                )
                failed.exit_code = max(code, 1)
                raise failed
        return [out for out, _ in said]


@contextlib.contextmanager
def _killed(running: list[subprocess.Popen[str]]) -> Iterator[None]:
    """No process outlives the block."""
    try:
        yield
    finally:
        for process in running:
            process.kill()


def time_exchange(count: str, platform: str, port: str, num_processes: str, process_id: str) -> None:
    """In each process of a `Laboratory`: the first prints what sums take."""
    several: tuple[Any, ...] = (f"127.0.0.1:{port}", int(num_processes), int(process_id))
    on_cores = platform == "cpu"
    devices.start(platform or None, 1 if on_cores else None, *(several if int(num_processes) > 1 else ()))
    found = exchange_seconds(int(count))
    if jax.process_index() == 0:
        print(json.dumps(found))


def measure(config: Config, report: Any) -> tuple[list[Measured], list[Exchange], dict[str, Any], bool]:
    """Trains on 1, 2, 4, ... devices; gives what came of it, the exchanges, an extrapolation, and whether on cores.

    Args:
      report: called with a description of each measurement.

    Raises:
      InputError: for what cannot be run, or is not run in steps with one sum each.
    """
    default = Config()
    for name in ("mode", "solver", "reduction", "num_processes", "sync_batch_norm"):
        if (given := getattr(config, name)) != getattr(default, name):
            raise InputError(
                f"{spell(name, given)}: scaling measures training steps with one exchange each; leave it out"
            )
    laboratory = Laboratory(config)
    counts = [1 << power for power in range(16) if 1 << power <= min(laboratory.most, config.num_shards)]
    exchanges, runs, size = [], list[Measured](), 0
    for count in counts:
        report(f"timing sums over {count} devices" if count > 1 else "one device")
        exchange = laboratory.exchange(count) if count > 1 else None
        exchanges += [exchange] if exchange else []
        for kind, times in zip(KINDS, (1, count), strict=True) if count > 1 else ((KINDS[0], 1),):
            report(f"training on {count} devices, {kind}")
            summary = laboratory.train(count, times)
            rate, steps, size = summary["rows_per_second"], summary["steps_per_second"], summary["exchange_bytes"]
            share = exchange.of(size, count) * steps if exchange else 0.0
            alone = runs[0].rows_per_second if runs else rate
            runs.append(Measured(count, kind, rate, steps, rate / count / alone, share, summary["seconds"]["train"]))
    return runs, exchanges, extrapolated(runs, exchanges, size, config.batch_size), laboratory.on_cores


def extrapolated(runs: list[Measured], exchanges: list[Exchange], size: int, batch_size: int) -> dict[str, Any]:
    """The step of the same batch on more devices: what is shared, what is not, and the exchange.

    Args:
      size: bytes that a step exchanges; batch_size: rows that it has, which more devices than that cannot share.

    Returns:
      "shared" and "fixed": seconds of a step that devices divide, and that each takes; "efficiency" by number of
      devices; "pays_up_to": the most, of powers of two, of which each does at least half of what one does alone.
    """
    if not exchanges:
        return {}
    strong = [run for run in runs if run.kind == KINDS[0]]
    exchange = exchanges[-1]
    rest = [1 / run.steps_per_second - exchange.of(size, run.devices) for run in strong]
    design = np.array([[1 / run.devices, 1.0] for run in strong])
    shared, fixed = map(float, scipy.optimize.nnls(design, np.maximum(rest, 0.0))[0])
    counts = [1 << power for power in range(17) if 1 << power <= batch_size]
    step = {count: shared / count + fixed + exchange.of(size, count) for count in counts}
    efficiency = {count: step[1] / (count * seconds) for count, seconds in step.items()}
    pays = max(count for count, share in efficiency.items() if share >= _WORTH)
    return {"shared": shared, "fixed": fixed, "efficiency": efficiency, "pays_up_to": pays}


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
            f"a sum over {one.devices} devices: {one.latency * 1e6:,.1f} us{rate}, to {one.error:.0%} of all measured, "
            "one after the other"
        )
    if (shortest := min(run.seconds for run in runs)) < _SHORT_SECONDS:
        lines.append(
            f"trained for {shortest:.2f} s only: figures differ from run to run; use a larger {spell('max_epochs')}"
        )
    if further:
        beyond = "beyond, each does less than half of what one does alone"
        if further["pays_up_to"] == max(further["efficiency"]):
            beyond = "as many as there are rows in it, or more than anybody has"
        lines.append(f"with this batch, and exchanges as here, devices pay up to {further['pays_up_to']:,}: {beyond}")
    if on_cores:
        lines.append(
            f"devices here are processes with a core each; simulated devices ({spell('num_devices')}) share cores: "
            "they show that results agree, and what dpreg costs, not what devices gain"
        )
    return "\n".join(lines)


def _main(argv: list[str]) -> None:
    del argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the runs it has started
    config = Config.from_flags(flags.FLAGS)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(make_folder(pathlib.Path(config.workdir or ".")))
        progress = stack.enter_context(ProgressDisplay(Console(stderr=True)))
        runs, exchanges, further, on_cores = measure(config, progress.doing)
    show(*describe(runs, exchanges, further, on_cores).split("\n"))
    if config.workdir:
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
        show(f"also in {folder}: scaling.json, scaling.html")


def main() -> None:
    """The entry point."""
    run_cli(_main)


if __name__ == "__main__":
    main()
