"""The run on disk: saved by time while it trains, restored to go on, whole or not at all."""

import contextlib
import json
import logging
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dpreg.config import Config
from dpreg.distributed import processes
from dpreg.distributed.devices import replicated
from dpreg.distributed.sync_signal import SyncSignal
from dpreg.errors import InputError, Preempted
from dpreg.outputs.orbax_errors import quiet, reason_of
from dpreg.spelling import spell
from dpreg.step.digest import differ, digest_values
from dpreg.tables.standalone import sealed
from dpreg.terminal import printable
from dpreg.train.callback import Callback
from dpreg.train.loop import Best, Loop
from dpreg.train.trainer import Trainer


class UnwrittenError(InputError):
    """A checkpoint could not be written, perhaps in this process alone."""


class Checkpoints(Callback):
    """The checkpoints of a run: Orbax writes them, in the background and atomically.

    A checkpoint is the TrainState, the loss sums and the rows used of the epoch it stands in, and what the run
    is. It does not depend on devices, processes or backend. Checksums detect a damaged one.

    Args:
      folder: where they lie, one folder a step.
      identity: what decides the run's answer; a run is only continued by one of the same identity.
      every_seconds, every_steps: how often to save besides the end; 0 for never.
      keep: how many to keep, the newest.
      sync_signal: where "stop" or "interrupt" may be asked for; "save" is, when it is time.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        identity: Mapping[str, Any],
        every_seconds: float = Config.checkpoint_every_seconds,
        every_steps: int = Config.checkpoint_every_steps,
        keep: int = Config.keep,
        sync_signal: SyncSignal | None = None,
    ):
        self._every_steps, self._preempted = every_steps, ""
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._every_seconds, self._saved_at = every_seconds, time.monotonic()
        self._sync_signal, self._due = sync_signal or SyncSignal(), False
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder, self._saving = folder.absolute(), 0
        if self._folder.exists() and not self._folder.is_dir():  # Orbax would wait for its own threads for ever
            raise InputError(f"{folder}: is not a folder; move it away, or name another {spell('workdir')}")
        self._quiet = contextlib.ExitStack()
        with self._writing():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        self._quiet.enter_context(quiet())
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            with self._writing():
                self._manager.close()  # waits for what is being written
        except UnwrittenError:
            if kind is None:  # else the error that came first is the one to report
                raise
        else:
            if kind is None:
                self._quiet.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in an UnwrittenError why Orbax could not write, now or in the background since the last save."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = reason_of(error)
            if reason is None:
                raise
            if jax.process_index() == 0:
                for unfinished in self._folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            whole = max((int(path.name) for path in self._folder.glob("*") if path.name.isdigit()), default=None)
            raise UnwrittenError(
                f"{self._folder}: the checkpoint of step {self._saving:,} cannot be written ({reason}); "
                + ("none is whole" if whole is None else f"the newest whole one is of step {whole:,}")
                + ": make room or change the folder, and start again"
            ) from error

    def next_sync(self, step: int) -> int | None:
        """The next multiple of `every_steps`."""
        return step - step % self._every_steps + self._every_steps if self._every_steps else None

    def requests_sync(self) -> bool:
        """Whether it is time to save: the same in all processes, which have to ask equally often."""
        time_is_up = self._every_seconds and time.monotonic() - self._saved_at >= self._every_seconds
        if time_is_up and not self._due and jax.process_index() == 0:
            self._sync_signal.request("save")
        what = self._sync_signal.poll()
        # A request that was received stays until it is carried out.
        self._due = self._due or bool(what)
        if what in ("stop", "interrupt"):
            self._preempted = self._preempted or what
        return self._due

    def on_sync(self, trainer: Trainer) -> None:
        """Saves where that is due.

        Raises:
          Preempted: where the run was asked to stop; it is saved.
        """
        if self.requests_sync() or (self._every_steps and trainer.step % self._every_steps == 0):
            self.save(trainer)
        if self._preempted:
            raise Preempted(trainer.step, interrupted=self._preempted == "interrupt")

    def save(self, trainer: Trainer) -> None:
        """Starts to write the trainer's state.

        Raises:
          InputError: where it is ahead of what is reported, as it may be while a callback is called.
          UnwrittenError: where this checkpoint, or the one before, cannot be written.
        """
        trainer.loop.require_idle()
        content = _content(trainer.loop)
        meta = sealed(
            {
                "identity": self._identity,
                "computation": trainer.loop.computation,
                "leaves": _leaves(content),
                "content": digest_values(content),
            }
        )
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = trainer.step
            if trainer.step not in self._manager.all_steps():
                self._manager.save(
                    trainer.step,
                    args=ocp.args.Composite(state=ocp.args.StandardSave(content), meta=ocp.args.JsonSave(meta)),
                    force=True,
                )
        self._saved_at, self._due = time.monotonic(), False

    def restore(self, trainer: Trainer) -> bool:
        """Gives the trainer the newest checkpoint that can be read; False where there is none.

        A damaged one is reported, set aside, and the one before it taken.

        Raises:
          InputError: when the checkpoint is of a run with another answer, or of a model of the user's own whose code
            computes something else since; names what differs.
        """
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _content(trainer.loop))
        for step, meta in self._of_this_run():
            self._compare("model", meta["leaves"], _leaves(wanted))
            if differ(meta.get("computation"), trainer.loop.computation):
                raise InputError(
                    f"{self._folder}: the code of the model computes something else than in the run that is saved "
                    f"there; restore that code, {_another_run()}"
                )

            def is_whole(content: Any, checksum: str = meta["content"]) -> bool:
                return digest_values(content) == checksum

            content = self._read(step, "state", ocp.args.StandardRestore(wanted), is_whole)
            if content is None:
                continue
            if step > trainer.train.num_steps:
                raise InputError(
                    f"{self._folder}: the run is at step {step:,}, past the {trainer.train.num_steps:,} of these epochs"
                    f"; use a larger {spell('max_epochs')}, {_another_run()}"
                )
            train_state, used = trainer.state.replace(**content["train_state"]), np.asarray(content["rows_used"])
            best = _best(content["best"]) if "best" in content else None
            trainer.loop.load_state(train_state, np.asarray(content["epoch_sums"]), used if used.any() else None, best)
            return True
        return False

    def refuse_another_run(self) -> None:
        """As `restore` would, for the newest checkpoint, and restores nothing."""
        next(self._of_this_run(), None)

    def _of_this_run(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The steps of the checkpoints, the newest first, and what each says of itself."""
        # A step that process 0 sees is tried by all, and taken or discarded by all.
        for step in json.loads(
            processes.allgather_text(json.dumps(sorted(self._manager.all_steps(), reverse=True)))[0]
        ):
            meta = self._read(step, "meta", ocp.args.JsonRestore(), lambda meta: meta == sealed(meta))
            if meta is not None:
                self._compare("run", meta["identity"], self._identity)
                yield step, meta

    def _read(self, step: int, item: str, how: Any, is_whole: Callable[[Any], bool]) -> Any:
        """An item of a checkpoint; None, and the checkpoint set aside, where any process finds it damaged."""
        content, damage = None, ""
        try:
            content = self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
            if not is_whole(content):
                damage = "its bytes are not those that were written"
        except Exception as error:  # Orbax raises many kinds for a damaged file
            elsewhere = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            if elsewhere or isinstance(error, MemoryError) or re.search("PERMISSION_DENIED|EXHAUSTED", str(error)):
                raise
            damage = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        # Orbax lets all wait for each other: where one process alone fails, the others do not come.
        patience = 30.0 if damage else processes.MEET_SECONDS
        damages = [text for text in processes.allgather_text(damage, patience=patience) if text]
        if not damages:
            return content
        # Out of the way, else a later save of the same step would be skipped.
        aside = f"damaged-{step}-{time.time_ns()}"
        logging.warning("checkpoint %d is damaged, and set aside as %s: %s", step, aside, printable(damages[0]))
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder / aside)
        processes.allgather_text()
        self._manager.reload()
        return None

    def clear(self) -> None:
        """Deletes all checkpoints."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def _compare(self, what: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        names = [name for name in {**now, **was} if was.get(name) != now.get(name)]
        if names:
            differences = ", ".join(f"{n} was {was.get(n)} and is {now.get(n)}" for n in names)
            raise InputError(f"{self._folder}: holds another {what}: {differences}; use those values, {_another_run()}")


def _another_run() -> str:
    return f"name another {spell('workdir')}, or use {spell('resume', 'never')} to start over"


def _content(loop: Loop) -> dict[str, Any]:
    state, used, settings = loop.state.copy(), loop.audit.used, loop.program.data.settings
    best = {
        "val_loss": np.array([loop.best.val_loss]).view(np.uint32),  # JAX would make float32 of it
        "step": np.int32(loop.best.step),
        "variables": loop.best.variables,
    }
    return {
        "train_state": {
            "step": state.step,
            "params": state.params,
            "opt_state": state.opt_state,
            "batch_stats": state.batch_stats,
        },
        "epoch_sums": replicated(loop.epoch_sums.astype(settings.dtype), settings.mesh),
        "rows_used": replicated(np.zeros(2, np.uint32) if used is None else used, settings.mesh),
        **({"best": replicated(best, settings.mesh)} if settings.patience else {}),
    }


def _best(content: Mapping[str, Any]) -> Best:
    val_loss = np.asarray(content["val_loss"]).view(np.float64)[0]
    return Best(float(val_loss), int(content["step"]), jax.device_get(content["variables"]))


def _leaves(content: Any) -> dict[str, str]:
    """The kind of each leaf, such as {"['train_state']['params']['w']": "float32[2, 1]"}."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(content)
    }
