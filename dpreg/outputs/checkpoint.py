"""Saves checkpoints of a run at intervals, and restores the newest one that is undamaged."""

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
from dpreg.outputs.orbax_errors import explain_failure, silence_orbax
from dpreg.spelling import spell
from dpreg.step.digest import differ, digest_values
from dpreg.tables.standalone import add_checksum
from dpreg.terminal import printable
from dpreg.train.callback import Callback
from dpreg.train.loop import Best, Loop
from dpreg.train.trainer import Trainer


class UnwrittenError(InputError):
    """A checkpoint could not be written, possibly only in this process."""


class Checkpoints(Callback):
    """Saves and restores the checkpoints of a run. Orbax writes them in the background and atomically.

    A checkpoint has the TrainState, the loss sums and used rows of the current epoch, the best parameters with early
    stopping, and the settings that affect the result. It does not depend on devices, processes or backend. Checksums
    detect damaged checkpoints.

    Args:
      folder: the folder of the checkpoints, in which each step has its own folder.
      identity: the settings that affect the result; a run can only be resumed with equal ones.
      every_seconds, every_steps: the intervals between checkpoints; 0 for none.
      keep: the number of checkpoints to keep, the newest ones.
      sync_signal: receives the requests "stop" and "interrupt"; checkpoints by time send the request "save".
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
        if self._folder.exists() and not self._folder.is_dir():  # Orbax would hang
            raise InputError(f"{folder}: is not a folder; move it away, or name another {spell('workdir')}")
        self._silence = contextlib.ExitStack()
        with self._writing():
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        self._silence.enter_context(silence_orbax())
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            with self._writing():
                self._manager.close()  # waits for the checkpoint that is being written
        except UnwrittenError:
            if kind is None:  # otherwise the first error is the one to report
                raise
        else:
            if kind is None:
                self._silence.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises UnwrittenError if Orbax cannot write now, or could not write in the background since the last save."""
        try:
            yield
        except (OSError, ValueError) as error:
            reason = explain_failure(error)
            if reason is None:
                raise
            if jax.process_index() == 0:
                for unfinished in self._folder.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            newest = max((int(path.name) for path in self._folder.glob("*") if path.name.isdigit()), default=None)
            raise UnwrittenError(
                f"{self._folder}: the checkpoint of step {self._saving:,} cannot be written ({reason}); "
                + ("there is no complete one" if newest is None else f"the newest complete one is of step {newest:,}")
                + ": free disk space or change the folder, and start again"
            ) from error

    def next_sync(self, step: int) -> int | None:
        """The next multiple of `every_steps` after a step."""
        return step - step % self._every_steps + self._every_steps if self._every_steps else None

    def requests_sync(self) -> bool:
        """Whether to save now. All processes get the same answer, and must call this equally often."""
        time_is_up = self._every_seconds and time.monotonic() - self._saved_at >= self._every_seconds
        if time_is_up and not self._due and jax.process_index() == 0:
            self._sync_signal.request("save")
        request = self._sync_signal.poll()
        # A request stays due until the state is saved.
        self._due = self._due or bool(request)
        if request in ("stop", "interrupt"):
            self._preempted = self._preempted or request
        return self._due

    def on_sync(self, trainer: Trainer) -> None:
        """Saves the state if a checkpoint is due.

        Raises:
          Preempted: after saving, if the run was asked to stop.
        """
        if self.requests_sync() or (self._every_steps and trainer.step % self._every_steps == 0):
            self.save(trainer)
        if self._preempted:
            raise Preempted(trainer.step, interrupted=self._preempted == "interrupt")

    def save(self, trainer: Trainer) -> None:
        """Starts to write the trainer's state, in the background.

        Raises:
          InputError: if further steps are computed already, as may be the case in a callback.
          UnwrittenError: if this checkpoint or the previous one cannot be written.
        """
        trainer.loop.require_idle()
        content = _get_content(trainer.loop)
        meta = add_checksum(
            {
                "identity": self._identity,
                "computation": trainer.loop.computation,
                "leaves": _describe_leaves(content),
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
        """Restores the newest undamaged checkpoint, and returns whether there is one.

        Damaged checkpoints are logged and renamed, and older ones are tried.

        Raises:
          InputError: when the checkpoint has other settings that affect the result, or the code of the user's model
            computes something else now; the message names the difference.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _get_content(trainer.loop))
        for step, meta in self._iterate_checkpoints():
            self._require_equal("model", meta["leaves"], _describe_leaves(target))
            if differ(meta.get("computation"), trainer.loop.computation):
                raise InputError(
                    f"{self._folder}: the code of the model computes something else than in the saved run; restore "
                    f"that code, {_suggest_another_run()}"
                )

            def is_whole(content: Any, checksum: str = meta["content"]) -> bool:
                return digest_values(content) == checksum

            content = self._read(step, "state", ocp.args.StandardRestore(target), is_whole)
            if content is None:
                continue
            if step > trainer.train.num_steps:
                raise InputError(
                    f"{self._folder}: the saved run is at step {step:,}, and these epochs end at step "
                    f"{trainer.train.num_steps:,}; use a larger {spell('max_epochs')}, {_suggest_another_run()}"
                )
            train_state, used = trainer.state.replace(**content["train_state"]), np.asarray(content["rows_used"])
            best = _to_best(content["best"]) if "best" in content else None
            trainer.loop.load_state(train_state, np.asarray(content["epoch_sums"]), used if used.any() else None, best)
            return True
        return False

    def refuse_another_run(self) -> None:
        """Raises InputError if the newest checkpoint has other settings that affect the result."""
        next(self._iterate_checkpoints(), None)

    def _iterate_checkpoints(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The steps and metadata of the checkpoints, newest first; raises InputError for those of another run."""
        # All processes try the steps that process 0 sees, and use or discard them together.
        for step in json.loads(
            processes.allgather_text(json.dumps(sorted(self._manager.all_steps(), reverse=True)))[0]
        ):
            meta = self._read(step, "meta", ocp.args.JsonRestore(), lambda meta: meta == add_checksum(meta))
            if meta is not None:
                self._require_equal("run", meta["identity"], self._identity)
                yield step, meta

    def _read(self, step: int, item: str, restore_args: Any, is_whole: Callable[[Any], bool]) -> Any:
        """Reads an item of a checkpoint. If any process finds it damaged, renames the checkpoint and returns None."""
        content, damage = None, ""
        try:
            content = self._manager.restore(step, args=ocp.args.Composite(**{item: restore_args}))[item]
            if not is_whole(content):
                damage = "its bytes are not those that were written"
        except Exception as error:  # Orbax raises many types of errors for a damaged file
            other_fault = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            if other_fault or isinstance(error, MemoryError) or re.search("PERMISSION_DENIED|EXHAUSTED", str(error)):
                raise
            damage = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        # Orbax has barriers inside `restore`: if only one process fails, the others hang there.
        patience = 30.0 if damage else processes.MEET_SECONDS
        damages = [text for text in processes.allgather_text(damage, patience=patience) if text]
        if not damages:
            return content
        # Rename it: Orbax would skip a later save of the same step.
        new_name = f"damaged-{step}-{time.time_ns()}"
        logging.warning("checkpoint %d is damaged, and renamed to %s: %s", step, new_name, printable(damages[0]))
        if jax.process_index() == 0:
            (self._folder / str(step)).rename(self._folder / new_name)
        processes.allgather_text()
        self._manager.reload()
        return None

    def clear(self) -> None:
        """Deletes all checkpoints."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def _require_equal(self, what: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
        names = [name for name in {**current, **saved} if saved.get(name) != current.get(name)]
        if names:
            differences = ", ".join(f"{n} was {saved.get(n)} and is {current.get(n)}" for n in names)
            remedy = f"use those values, {_suggest_another_run()}"
            raise InputError(f"{self._folder}: holds another {what}: {differences}; {remedy}")


def _suggest_another_run() -> str:
    return f"name another {spell('workdir')}, or use {spell('resume', 'never')} to start over"


def _get_content(loop: Loop) -> dict[str, Any]:
    """The arrays of a checkpoint."""
    state, used, settings = loop.state.copy(), loop.audit.used, loop.program.data.settings
    best = {
        "val_loss": np.array([loop.best.val_loss]).view(np.uint32),  # JAX would convert float64 to float32
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


def _to_best(content: Mapping[str, Any]) -> Best:
    val_loss = np.asarray(content["val_loss"]).view(np.float64)[0]
    return Best(float(val_loss), int(content["step"]), jax.device_get(content["variables"]))


def _describe_leaves(content: Any) -> dict[str, str]:
    """The dtype and shape of each leaf, such as {"['train_state']['params']['w']": "float32[2, 1]"}."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(content)
    }
