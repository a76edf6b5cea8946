"""`python -m dpreg.scaling` measures the speed of a run on 1, 2, 4, ... devices, and extrapolates it to more.

    python -m dpreg.scaling --flagfile=configs/cpu.cfg --num_train=1000000 --batch_size=8192 --workdir=runs/scaling

On each number of devices the run is trained twice: with its batch ("strong" scaling), and with the batch and the
synthetic rows multiplied by the number of devices ("weak" scaling). Simulated CPU devices share cores, so their speed
says nothing; on CPU each device is therefore a process on its own core. The number of devices goes up to that of cores
or accelerators, and up to `--num_shards`; `--num_devices` is ignored. The exchange between devices is timed separately,
at several sizes, and fitted by a latency and a bandwidth.
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
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import scipy
from absl import flags
from rich.console import Console

from dpreg.cli import run_cli
from dpreg.config import Config
from dpreg.distributed import devices
from dpreg.errors import InputError, ProcessLost
from dpreg.outputs.chart import chart
from dpreg.outputs.metrics import to_json
from dpreg.outputs.pages import render
from dpreg.outputs.progress import ProgressDisplay
from dpreg.outputs.workdir import make_folder
from dpreg.planning.exchange import Exchange, measure_exchange
from dpreg.spelling import spell
from dpreg.terminal import printable, show

KINDS = ("strong", "weak")  # scaling with a fixed batch, or with a fixed batch per device
_MIN_EFFICIENCY = 0.5  # more devices do not pay below this
_TIMEOUT_SECONDS = 1800
_SHORT_SECONDS = 0.5  # the speed of a shorter training is not reproducible


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The speed of a run on a number of devices.

    Attributes:
      devices: the number of devices.
      kind: "strong" or "weak".
      rows_per_second, steps_per_second: the speed in steady state.
      efficiency: rows per second and device, relative to a single device.
      exchange_share: the exchange as a fraction of the duration of a step.
      seconds: the duration of the training.
    """

    devices: int
    kind: str
    rows_per_second: float
    steps_per_second: float
    efficiency: float
    exchange_share: float
    seconds: float


class Runner:
    """Runs a configuration on a number of devices: accelerators of this machine, or its cores.

    Args:
      config: the settings of the run.

    Attributes:
      on_cores: whether each device is a process on a CPU core.
      max_devices: the largest number of devices.
    """

    def __init__(self, config: Config):
        self._config = config
        self.on_cores = config.platform == "cpu"
        self.max_devices = devices.cores() if self.on_cores else self._count_accelerators()

    def _count_accelerators(self) -> int:
        """Counts them in another process, as JAX in this process would reserve their memory."""
        program = "import jax, sys; print(jax.default_backend(), jax.local_device_count())"
        backend, count = self._run_python(["-c", program], 1, on_devices=False)[0].split()
        if backend == "cpu":
            if self._config.platform is not None:
                platform = spell("platform", self._config.platform)
                raise InputError(f"{platform}: there is none on this machine; use {spell('platform', 'cpu')}")
            self.on_cores = True
            return devices.cores()
        return int(count)

    def train(self, count: int, times: int) -> dict[str, Any]:
        """The summary of a run on `count` devices, with the batch and the synthetic rows multiplied by `times`."""
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
            self._run_python(arguments, count if self.on_cores else 1, as_flags=True)
            summary: dict[str, Any] = json.loads((pathlib.Path(folder) / "run" / "summary.json").read_text())
        return summary

    def exchange(self, count: int) -> Exchange:
        """Times sums over `count` devices, and fits a model to the measurements."""
        program = "from dpreg.scaling import print_exchange; import sys; print_exchange(*sys.argv[1:])"
        arguments = [str(count), "cpu" if self.on_cores else self._config.platform or ""]
        output = self._run_python(["-c", program, *arguments], count if self.on_cores else 1)[0]
        seconds = json.loads(output.splitlines()[-1])
        return Exchange.fit(count, {int(size): measured for size, measured in seconds.items()})

    def _run_python(
        self, arguments: list[str], count: int, as_flags: bool = False, on_devices: bool = True
    ) -> list[str]:
        """Runs Python in `count` processes, and returns the text on stdout of each.

        Processes that end because they lost another one are started again once, after their messages were shown.

        Args:
          arguments: the arguments of Python.
          count: the number of processes.
          as_flags: whether to pass the port, the count, and the number of the process as flags of dpreg.main.
          on_devices: whether to pass these arguments at all, and if on CPU, to bind each process to its own core.

        Raises:
          InputError: with the message of the first process that failed, or after a timeout.
        """
        run = f"a run on {count} device{'s' if count > 1 else ''}"
        results = self._await_processes(run, arguments, count, as_flags, on_devices)
        if any(code == ProcessLost.exit_code for code, *_ in results):
            print(*(printable(line) for _, _, text in results for line in text.splitlines()), sep="\n", file=sys.stderr)
            print(f"{run} lost a process, as it says above; it is started again", file=sys.stderr, flush=True)
            results = self._await_processes(run, arguments, count, as_flags, on_devices)
        # Processes that lost another one come last: the message of that one has the cause.
        for code, _, stderr in sorted(results, key=lambda result: result[0] == ProcessLost.exit_code):
            if code:
                line = stderr.strip().splitlines()[-1:] or [f"it ended with exit code {code}"]
                failed = InputError(f"{run}: {line[0].removeprefix('dpreg: ')}")
                failed.exit_code = max(code, 1)
                raise failed
        return [stdout for _, stdout, _ in results]

    def _await_processes(
        self, run: str, arguments: list[str], count: int, as_flags: bool, on_devices: bool
    ) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each of the processes of `_run_python`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        running: list[subprocess.Popen[str]] = []
        with _kill_at_end(running):
            for number in range(count):
                process_args = [str(port), str(count), str(number)]
                if as_flags:
                    names = ("coordinator_address=127.0.0.1:", "num_processes=", "process_id=")
                    process_args = [f"--{name}{value}" for name, value in zip(names, process_args, strict=True)]
                    process_args = process_args if count > 1 else []
                command = [sys.executable, *arguments, *(process_args if on_devices else [])]
                options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                if on_devices and self.on_cores and not hasattr(os, "sched_setaffinity"):
                    options["env"] = os.environ | {"NPROC": "1"}  # without affinity, limit XLA to one thread
                running.append(subprocess.Popen(command, **options))
                if on_devices and self.on_cores:
                    devices.keep_to_core(running[-1].pid, number)
            try:
                # Read all pipes at once: a full one blocks its process. Kill before the pool joins its threads.
                with concurrent.futures.ThreadPoolExecutor(count) as pool, _kill_at_end(running):
                    outputs = [*pool.map(lambda process: process.communicate(timeout=_TIMEOUT_SECONDS), running)]
            except subprocess.TimeoutExpired as error:
                raise InputError(f"{run} takes more than {_TIMEOUT_SECONDS:,} s; use fewer rows") from error
        return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


@contextlib.contextmanager
def _kill_at_end(running: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Kills all processes that are still running at the end of the block."""
    try:
        yield
    finally:
        for process in running:
            process.kill()


def print_exchange(count: str, platform: str, port: str, num_processes: str, process_id: str) -> None:
    """Runs `measure_exchange` in a process of a `Runner`; process 0 prints the result as JSON."""
    cluster: tuple[Any, ...] = (f"127.0.0.1:{port}", int(num_processes), int(process_id))
    on_cores = platform == "cpu"
    devices.start(platform or None, 1 if on_cores else None, *(cluster if int(num_processes) > 1 else ()))
    seconds = measure_exchange(int(count))
    if jax.process_index() == 0:
        print(json.dumps(seconds))


def measure(config: Config, report: Any) -> tuple[list[Measurement], list[Exchange], dict[str, Any], bool]:
    """Trains on 1, 2, 4, ... devices.

    Args:
      config: the settings of the run.
      report: called with a description of each measurement.

    Returns:
      the speed of each run, the models of the exchange, the extrapolation, and whether devices were CPU cores.

    Raises:
      InputError: for settings with which a run cannot start, or does not train in steps with one sum each.
    """
    default = Config()
    for name in ("mode", "solver", "reduction", "num_processes", "sync_batch_norm"):
        if (given := getattr(config, name)) != getattr(default, name):
            raise InputError(
                f"{spell(name, given)}: scaling measures training steps with one exchange each; leave it out"
            )
    runner = Runner(config)
    counts = [1 << power for power in range(16) if 1 << power <= min(runner.max_devices, config.num_shards)]
    exchanges, runs, size = [], list[Measurement](), 0
    for count in counts:
        report(f"timing sums over {count} devices" if count > 1 else "one device")
        exchange = runner.exchange(count) if count > 1 else None
        exchanges += [exchange] if exchange else []
        for kind, times in zip(KINDS, (1, count), strict=True) if count > 1 else ((KINDS[0], 1),):
            report(f"training on {count} devices, {kind}")
            summary = runner.train(count, times)
            rows, steps, size = summary["rows_per_second"], summary["steps_per_second"], summary["exchange_bytes"]
            share = exchange.predict(size, count) * steps if exchange else 0.0
            single = runs[0].rows_per_second if runs else rows
            seconds = summary["seconds"]["train"]
            runs.append(Measurement(count, kind, rows, steps, rows / count / single, share, seconds))
    return runs, exchanges, extrapolate(runs, exchanges, size, config.batch_size), runner.on_cores


def extrapolate(runs: list[Measurement], exchanges: list[Exchange], size: int, batch_size: int) -> dict[str, Any]:
    """Predicts the speed of the same batch on more devices: seconds of a step = shared / devices + fixed + exchange.

    Args:
      runs: the measured runs; "shared" and "fixed" are fitted to the strong ones by non-negative least squares.
      exchanges: the models of the exchange; the last one is used.
      size: the bytes that a step sums over devices.
      batch_size: the rows of a step, and so the largest useful number of devices.

    Returns:
      "shared" and "fixed" in seconds; "efficiency" by number of devices; "pays_up_to", the largest power of two with
      an efficiency of at least 1/2. Empty if there is only one device.
    """
    if not exchanges:
        return {}
    strong = [run for run in runs if run.kind == KINDS[0]]
    exchange = exchanges[-1]
    without_exchange = [1 / run.steps_per_second - exchange.predict(size, run.devices) for run in strong]
    design = np.array([[1 / run.devices, 1.0] for run in strong])
    shared, fixed = map(float, scipy.optimize.nnls(design, np.maximum(without_exchange, 0.0))[0])
    counts = [1 << power for power in range(17) if 1 << power <= batch_size]
    step = {count: shared / count + fixed + exchange.predict(size, count) for count in counts}
    efficiency = {count: step[1] / (count * seconds) for count, seconds in step.items()}
    pays = max(count for count, share in efficiency.items() if share >= _MIN_EFFICIENCY)
    return {"shared": shared, "fixed": fixed, "efficiency": efficiency, "pays_up_to": pays}


def describe(runs: list[Measurement], exchanges: list[Exchange], extrapolation: dict[str, Any], on_cores: bool) -> str:
    """The result of `measure` as lines of text."""
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
            f"a sum over {one.devices} devices takes {one.latency * 1e6:,.1f} us{rate}, within {one.error:.0%} of the "
            "measurements"
        )
    if (shortest := min(run.seconds for run in runs)) < _SHORT_SECONDS:
        lines.append(
            f"a run trained for only {shortest:.2f} s: such figures vary from run to run; use a larger "
            f"{spell('max_epochs')}"
        )
    if extrapolation:
        pays, largest = extrapolation["pays_up_to"], max(extrapolation["efficiency"])
        reason = "the largest number considered" if pays == largest else "with more, the efficiency is below 0.5"
        lines.append(f"with this batch and this exchange, up to {pays:,} devices pay; {reason}")
    if on_cores:
        lines.append(
            f"each device is a process on its own core; simulated devices ({spell('num_devices')}) share cores: they "
            "show that results agree, and the overhead of dpreg, but not the speed of several devices"
        )
    return "\n".join(lines)


def _main(argv: list[str]) -> None:
    del argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit by an exception, which ends the started runs
    config = Config.from_flags(flags.FLAGS)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(make_folder(pathlib.Path(config.workdir or ".")))
        progress = stack.enter_context(ProgressDisplay(Console(stderr=True)))
        runs, exchanges, extrapolation, on_cores = measure(config, progress.doing)
    show(*describe(runs, exchanges, extrapolation, on_cores).split("\n"))
    if config.workdir:
        result = {
            "runs": [dataclasses.asdict(run) for run in runs],
            "exchanges": [dataclasses.asdict(one) for one in exchanges],
            "extrapolated": extrapolation,
        }
        (folder / "scaling.json").write_text(to_json(result, indent=2) + "\n", encoding="utf-8")
        rates = {
            kind: [(run.devices, run.rows_per_second) for run in runs if run.kind == kind or run.devices == 1]
            for kind in KINDS
        }
        efficiency = sorted(extrapolation["efficiency"].items()) if extrapolation else []
        page = render(
            "scaling.html",
            title="scaling",
            rates=chart(rates, "devices", "rows per second", doubling=True),
            efficiency=chart({"expected efficiency, same batch": efficiency}, "devices", "efficiency", doubling=True)
            if efficiency
            else "",
        )
        (folder / "scaling.html").write_text(page, encoding="utf-8")
        show(f"also in {folder}: scaling.json, scaling.html")


def main() -> None:
    """The entry point."""
    run_cli(_main)


if __name__ == "__main__":
    main()
