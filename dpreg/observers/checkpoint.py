"""The run on disk: saved by time while it trains, restored to go on, whole or not at all."""

import hashlib
import json
import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dpreg.errors import InputError
from dpreg.parallel.devices import Announcements, replicated
from dpreg.trainer import Trainer


class Checkpoints:
    """The checkpoints of a run: Orbax writes them, in the background and atomically.

    A checkpoint is the TrainState, the loss sums of the epoch it stands in, and what the run is. It does not
    depend on devices, processes or backend. A checksum of the content tells a damaged one.

    Args:
      folder: where they lie, one folder a step.
      identity: what decides the run's answer; a run is only continued by one of the same identity.
      every_seconds, every_steps: how often to save besides the end; 0 for never.
      keep: how many to keep, the newest.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        identity: Mapping[str, Any],
        every_seconds: float = 60.0,
        every_steps: int = 0,
        keep: int = 3,
    ):
        self.every_steps, self.preempted = every_steps, False
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._every_seconds, self._saved_at = every_seconds, time.monotonic()
        self._time_is_up, self._asked, self._due = Announcements(), 0, False
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()  # waits for what is being written

    def preempt(self, *signal: object) -> None:
        """Asks for a checkpoint as soon as steps in flight are done, and then to stop; a signal handler."""
        self.preempted = True

    def due(self) -> bool:
        """Whether it is time to save: the same in all processes, which have to ask equally often."""
        if jax.process_count() > 1:
            self._asked += 1
            # True at one call alone: what was heard holds until it is acted upon.
            self.preempted |= multihost_utils.reached_preemption_sync_point(self._asked)
        if not self._due and self._every_seconds and time.monotonic() - self._saved_at >= self._every_seconds:
            self._time_is_up.announce()
        self._due |= self._time_is_up.heard() or self.preempted
        return self._due

    def save(self, trainer: Trainer) -> None:
        """Starts to write the trainer's state, which has to be at rest: no step in flight."""
        content = _content(trainer)
        meta = {"identity": self._identity, "checksum": _checksum(content, self._identity)}
        if trainer.step not in self._manager.all_steps():
            self._manager.save(
                trainer.step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(content), meta=ocp.args.JsonSave(meta)),
                force=True,
            )
        self._saved_at, self._due = time.monotonic(), False

    def restore(self, trainer: Trainer) -> bool:
        """Gives the trainer the newest checkpoint that can be read; False where there is none.

        A damaged one is reported, deleted, and the one before it taken.

        Raises:
          InputError: when the checkpoint is of a run with another answer; names what differs.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _content(trainer))
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
                identity = meta["identity"]
            except Exception as error:  # Orbax raises many kinds for a damaged file
                self._discard(step, error)
                continue
            self._compare(identity)
            try:
                content = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
                ).state
                if _checksum(content, identity) != meta["checksum"]:
                    raise ValueError("its bytes are not those that were written")
            except Exception as error:
                self._discard(step, error)
                continue
            if step > trainer.train.num_steps:
                raise InputError(
                    f"the workdir's run is at step {step:,}, past the {trainer.train.num_steps:,} of these epochs; "
                    "give more --max_epochs, another --workdir, or --resume=never to start over"
                )
            train_state = trainer.state.replace(**content["train_state"])
            trainer.resume(train_state, np.asarray(content["epoch_sums"]))
            return True
        return False

    def clear(self) -> None:
        """Deletes all checkpoints."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def _compare(self, identity: Mapping[str, Any]) -> None:
        names = [name for name, value in self._identity.items() if identity.get(name) != value]
        if names:
            differences = ", ".join(f"{n} was {identity.get(n)} and is {self._identity[n]}" for n in names)
            raise InputError(
                f"the workdir holds another run: {differences}; "
                "take those values, another --workdir, or --resume=never to start over"
            )

    def _discard(self, step: int, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logging.warning("checkpoint %d is damaged and deleted: %s", step, reason[:200])
        self._manager.delete(step)  # else a later save of the same step would be skipped


def _content(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {
        "train_state": {
            "step": state.step,
            "params": state.params,
            "opt_state": state.opt_state,
            "batch_stats": state.batch_stats,
        },
        "epoch_sums": replicated(trainer.epoch_sums.astype(np.float32), trainer.mesh),
    }


def _checksum(content: Any, identity: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(content):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
