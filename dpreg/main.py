"""`python -m dpreg.main --flagfile=configs/cpu.cfg` trains on all devices, or predicts."""

import functools
import os
import sys
import traceback
from collections.abc import Callable

import jax
from absl import flags, logging

from dpreg.cli import run_cli
from dpreg.config import Config
from dpreg.distributed import devices, presence, processes
from dpreg.doctor import examine
from dpreg.errors import NO_ROOM, AuditFailed, Diverged, InputError, Preempted, ProcessLost
from dpreg.outputs.checkpoint import UnwrittenError
from dpreg.outputs.fit_table import write_fit_table
from dpreg.outputs.orbax_errors import end_where_threads_wait
from dpreg.predict import predict, threads_of
from dpreg.run import run
from dpreg.tables.cache import DamagedCacheError


def _main(argv: list[str]) -> None:
    del argv  # all flags
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    config = Config.from_flags(flags.FLAGS)
    if config.mode == "summary":  # which needs no device
        write_fit_table(config)
        return
    devices.start(
        config.platform,
        config.num_devices,
        config.coordinator_address,
        config.num_processes,
        config.process_id,
        threads_of(config) if config.mode in ("evaluate", "predict") else config.threads,
    )
    door = {"train": run, "doctor": examine}.get(config.mode, predict)
    if jax.process_count() == 1:
        door(config)
    else:
        _among_others(functools.partial(door, config))


def _among_others(work: Callable[[], None]) -> None:
    """Runs `work` in one of several processes. They end together and alike, and none waits for a lost one."""
    work = functools.partial(_lost_by_files, work)
    try:
        try:
            with presence.at_work("at work"):
                processes.on_all_processes(work)
        except (Diverged, AuditFailed, Preempted):  # as in all others
            processes.allgather_text()
            raise
    except (InputError, Diverged, AuditFailed, Preempted):
        raise
    except BaseException as error:
        if isinstance(error, SystemExit):  # a prediction that was asked to stop; no process waits for it
            sys.stdout.flush()
            os._exit(int(error.code or 0))
        of_a_file = isinstance(error, OSError) and error.filename is not None
        if not (of_a_file or isinstance(error, (ProcessLost, KeyboardInterrupt))):
            traceback.print_exc()
        processes.end_as_lost(error)


def _lost_by_files(work: Callable[[], None]) -> None:
    """Ends this process as lost if a file fails: the others may be within a step, where they exchange no errors."""
    try:
        work()
    except DamagedCacheError as error:
        processes.end_as_lost(error)  # a restart reads the table anew
    except UnwrittenError as error:
        processes.end_as_lost(error, InputError.exit_code)  # a restart would fail, too
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        reason = InputError(f"a file could not be written: {error.strerror}; make room")
        processes.end_as_lost(reason, InputError.exit_code)


def main() -> None:
    """The entry point."""
    try:
        run_cli(_main, installed=True)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            end_where_threads_wait(end.code)
        raise


if __name__ == "__main__":
    main()
