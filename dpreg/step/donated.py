"""The train state that compiled steps donate: users read and assign copies of it."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpreg.distributed import processes
from dpreg.distributed.devices import replicated
from dpreg.errors import InputError
from dpreg.step.digest import digest_values
from dpreg.step.reduce import PyTree
from dpreg.step.state import TrainState

_VALUES = ("step", "params", "opt_state", "batch_stats")


class DonatedState:
    """The train state of a run, replicated over its devices.

    Each call of the compiled steps donates the arrays of the state, which deletes them. Users therefore get copies, and
    values that they assign are copied. Another thread may request a copy while a call is dispatched. All processes must
    assign the same values.

    Args:
      state: the first state; mesh: the devices.

    Attributes:
      shapes: the state as `jax.ShapeDtypeStruct`s.

    Raises:
      InputError: in all processes, if their values differ.
    """

    def __init__(self, state: TrainState, mesh: Mesh):
        self.shapes: TrainState = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        self._mesh, self._lock = mesh, threading.Lock()
        self._state: TrainState | None = self._place(state)

    @property
    def current(self) -> TrainState:
        """The state itself, which is valid until the next call of `advance`.

        Raises:
          InputError: if a second Ctrl-C has interrupted a call, which has lost the state.
        """
        if self._state is None:
            raise InputError("the trained state was lost in a call that a second Ctrl-C ended; call fit again")
        return self._state

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"} of `current`."""
        return {"params": self.current.params, "batch_stats": self.current.batch_stats}

    def copy(self) -> TrainState:
        """A copy of the state, on the devices."""
        with self._lock, jax.ensure_compile_time_eval():  # works while a function is being traced, too
            state: TrainState = replicated(self.current, self._mesh)
        return state

    def copy_variables(self) -> dict[str, Any]:
        """A copy of `variables`, on the devices."""
        with self._lock, jax.ensure_compile_time_eval():
            variables: dict[str, Any] = replicated(self.variables, self._mesh)
        return variables

    def advance(self, train_block: Any, *arguments: Any) -> list[Any]:
        """Replaces the state by the first result of `train_block(state, *arguments)`, and returns the other results."""
        with self._lock:
            # If the call is interrupted, readers then get an error rather than deleted arrays.
            state, self._state = self.current, None
            results: list[Any]
            self._state, *results = train_block(state, *arguments)
        return results

    def replace(self, **values: PyTree) -> None:
        """Assigns copies of the given values to attributes of the state."""
        self._state = self.current.replace(**self._place(values))

    def take(self, state: TrainState) -> None:
        """Assigns a copy of another state.

        Raises:
          InputError: when its arrays do not fit this model and optimizer.
        """
        given = {name: getattr(state, name) for name in _VALUES} | {"step": jnp.asarray(state.step, jnp.int32)}
        if _kinds_of({name: getattr(self.shapes, name) for name in _VALUES}) != _kinds_of(given):
            raise InputError("trainer.state: its arrays are not those of this model and optimizer; give such a state")
        self._state = self.shapes.replace(**self._place(given))

    def _place(self, values: PyTree) -> Any:
        """A copy of the values on all devices."""
        processes.require_alike(
            "the state of the trainer",
            "draw or load them alike in all processes",
            lambda: {"parameters or optimizer states": ("of the same shapes", digest_values(values))},
        )
        return replicated(values, self._mesh)


def _kinds_of(tree: PyTree) -> tuple[Any, list[Any]]:
    kinds = [(np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), kinds
