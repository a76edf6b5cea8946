"""The state of a run on disk, written by Orbax."""

import pathlib

from dpreg.parallel.step import TrainState


def save_state(folder: pathlib.Path, state: TrainState) -> pathlib.Path:
    """Writes step, params, optimizer state and batch statistics to `folder/STEP`, whole or not at all.

    Reading it back needs Orbax alone: `StandardCheckpointer().restore(path)`.
    """
    import orbax.checkpoint as ocp  # takes a second to import: not before the first step

    path = folder.absolute() / str(int(state.step))
    content = {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "batch_stats": state.batch_stats,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, content, force=True)
    return path
