"""The main door: `python -m dpreg.main --flagfile=configs/cpu.cfg`. Parses, starts the devices, hands over."""

import contextlib
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from absl import app, flags, logging

from dpreg.build import build_data, build_model, build_trainer
from dpreg.config import Config, define_flags
from dpreg.errors import Diverged, InputError, Preempted
from dpreg.observers.checkpoint import Checkpoints
from dpreg.observers.metrics import MetricsWriter, read_metrics
from dpreg.observers.progress import ProgressDisplay
from dpreg.observers.report import write_report
from dpreg.observers.summary import summarize
from dpreg.parallel import devices


def run(config: Config) -> None:
    """Trains as the config says and writes the outputs into its workdir.

    Raises:
      InputError: for what cannot be done; nothing is left behind then.
      Diverged: when the loss is no longer finite; the last good state is saved then.
      Preempted: when a signal asked the run to stop; its state is saved then.
    """
    devices.start(config.platform, config.num_devices)
    with _workdir(config) as workdir, ProgressDisplay() as progress:
        trainer = build_trainer(config)
        started = time.perf_counter()
        progress.doing(f"reading {config.dataset}")
        data = build_data(config)
        trainer.seconds["ingest"] += time.perf_counter() - started
        trainer.prepare_data(data)
        progress.doing("compiling")
        trainer.prepare_model(build_model(config, data))
        identity = config.identity() | {"data": data.fingerprint()}
        with Checkpoints(
            workdir / "checkpoints",
            identity,
            config.checkpoint_every_seconds,
            config.checkpoint_every_steps,
            config.keep,
        ) as checkpoints:
            if config.resume == "never":
                checkpoints.clear()
            elif not checkpoints.restore(trainer) and config.resume == "must":
                raise InputError(f"--resume=must: {workdir} holds no checkpoint that can be read")
            progress.say(
                f"{len(data.train):,} rows in {config.num_shards} shards "
                f"on {devices.describe(trainer.mesh.devices.flat)}: "
                f"placement {trainer.train.resolved_placement}, reduction {config.reduction}, backend {config.backend}"
            )
            if trainer.step:
                progress.say(f"going on from step {trainer.step:,}")
            for stale in ("summary.json", "report.html"):
                (workdir / stale).unlink(missing_ok=True)
            (workdir / "flags.cfg").write_text(config.to_flagfile(), encoding="utf-8")
            with MetricsWriter(workdir / "metrics.jsonl", trainer.step) as metrics, _preemption(checkpoints):
                trainer.observers, trainer.checkpoints = (progress, metrics), checkpoints
                try:
                    while trainer.step < trainer.train.num_steps:
                        trainer.fit_epoch()
                except Diverged:
                    checkpoints.save(trainer)
                    raise
                checkpoints.save(trainer)
        summary = summarize(trainer, data)
        (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_report(workdir / "report.html", config, summary, read_metrics(workdir / "metrics.jsonl"))

    for name, error in summary.get("parameter_error", {}).items():
        print(f"error in estimating {name}: {np.array(error)}")
    print(f"outputs in {workdir}: summary.json, metrics.jsonl, report.html, flags.cfg, checkpoints")


@contextlib.contextmanager
def _preemption(checkpoints: Checkpoints) -> Iterator[None]:
    """Meanwhile SIGTERM, by which clusters take a machine back, asks for a checkpoint."""
    before = signal.signal(signal.SIGTERM, checkpoints.preempt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _workdir(config: Config) -> Iterator[pathlib.Path]:
    """The folder of the outputs, checked before anything costly; gone again if nothing came of the run."""
    path = pathlib.Path(config.workdir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"--workdir={path}: cannot be written: {error.strerror}; name another folder") from error
    try:
        yield path
    except InputError:
        if created:
            shutil.rmtree(created[-1])
        raise


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags. Bad ones are one line and exit code 2, where absl has a page and 1."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(f"{rest[1]}: not a flag; flags are given as --name=value")
        return rest
    except (flags.Error, InputError) as error:
        _leave(error, InputError.exit_code)


def _main(argv: list[str]) -> None:
    del argv  # all flags
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        run(Config.from_flags(flags.FLAGS))
    except (InputError, Diverged, Preempted) as error:
        _leave(error, error.exit_code)


def _leave(error: Exception, code: int) -> NoReturn:
    print("dpreg:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """The entry point."""
    define_flags()
    flags.adopt_module_key_flags(sys.modules[Config.__module__])  # so that --help lists them
    app.run(_main, flags_parser=_parse)


if __name__ == "__main__":
    main()
