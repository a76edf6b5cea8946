"""Prepares the optimizer of a model for the compiled step, or refuses it with the alternatives."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpreg.config import Config
from dpreg.errors import InputError
from dpreg.step.checks import reason_of
from dpreg.step.reduce import PyTree

_ACCUMULATE = (
    "it averages the gradients of batches whatever their weight, and leaves out the last; use accumulate_steps of the "
    "run, which does neither"
)
_OF_ROWS = "it needs the gradient of each row, and dpreg gives that of the mean loss; use another"
# Transformations of optax that a compiled step cannot use as they are documented, by the type of their state.
_REFUSED = {
    "MultiStepsState": _ACCUMULATE,
    "ApplyEvery": _ACCUMULATE,
    "LookaheadState": "it steps two sets of parameters, and a model has one; use another",
    "ScheduleFreeState": "it predicts with other parameters than it steps; use a schedule, such as cosine",
    "SAMState": "between its steps the parameters are none to predict with; use another",
    "DifferentiallyPrivateAggregateState": _OF_ROWS,
    "AccumulateAvgUpdatesState": _OF_ROWS,
}


def prepare_optimizer(
    model: Any, params: PyTree, gradient_clip_val: float = Config.gradient_clip_val
) -> optax.GradientTransformation:
    """The optimizer that the model configures, preceded by clipping of the global gradient norm.

    Typed random keys in its state are stored as their uint32 data, so that the state consists of plain arrays.

    Args:
      params: of the model.
      gradient_clip_val: the largest norm of the global gradient; 0 for no limit.

    Raises:
      InputError: for anything but an optax transformation, and for one that cannot be used as it is documented.
    """
    name = type(model).__name__
    made: Any = model.configure_optimizers()
    if isinstance(made, optax.MultiSteps):
        raise InputError(f"the optimizer of {name}: {_ACCUMULATE}")
    if not (callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))):
        raise InputError(
            f"{name}.configure_optimizers gives {type(made).__name__}; give one optax transformation, such as "
            "optax.adam(optax.cosine_decay_schedule(0.1, 1000))"
        )
    own = optimizer = optax.with_extra_args_support(made)
    if gradient_clip_val:
        optimizer = optax.chain(optax.clip_by_global_norm(gradient_clip_val), own)
    with _usable(name):
        state = optimizer.init(params)
        for node in jax.tree.leaves(state, is_leaf=lambda node: type(node).__name__ in _REFUSED):
            if (kind := type(node).__name__) in _REFUSED:
                raise InputError(f"the optimizer of {name} has a {kind}: {_REFUSED[kind]}")
            if isinstance(node, type):
                name_of_class = node.__name__
                raise InputError(
                    f"the optimizer of {name}: init returns the class {name_of_class}; return {name_of_class}()"
                )
        _require_two_results(name, own, params)
        optimizer = _with_key_data(optimizer, state)
        _require_a_fixed_state(name, optimizer, params)
    return optimizer


def _require_two_results(name: str, optimizer: optax.GradientTransformationExtraArgs, params: PyTree) -> None:
    """Raises InputError for an `update` that does not return (updates, state).

    The updates of a model with two parameters alone would be unpacked without an error.
    """
    given: list[Any] = []

    def update(params: PyTree) -> None:
        value = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
        given.append(optimizer.update(params, optimizer.init(params), params, value=value))

    jax.eval_shape(update, params)
    if not (isinstance(given[0], tuple) and len(given[0]) == 2):
        structures: Any = jax.tree.structure(given[0]), jax.tree.structure(params)
        what = "the updates alone" if structures[0] == structures[1] else type(given[0]).__name__
        raise InputError(f"the optimizer of {name}: update returns {what}; return updates, state")


@contextlib.contextmanager
def _usable(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if "value_fn" in reason or "obj_fn" in reason or "grad_fn" in reason:
            raise InputError(
                f"the optimizer of {name} evaluates the loss at other parameters ({reason}), and a step of dpreg "
                "does not; use one without a line search, such as optax.lbfgs(0.1, linesearch=None)"
            ) from error
        raise InputError(
            f"the optimizer of {name} cannot be used: {type(error).__name__}: {reason}; use an optax "
            "transformation of gradient, state, parameters and value (the mean loss)"
        ) from error


def _require_a_fixed_state(name: str, optimizer: optax.GradientTransformationExtraArgs, params: PyTree) -> None:
    """Raises InputError if a step changes the types of the parameters or the state, which a compiled loop forbids."""

    def step(params: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        value = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
        updates, state = optimizer.update(params, state, params, value=value)
        return optax.apply_updates(params, updates), state

    before = jax.eval_shape(lambda params: (params, optimizer.init(params)), params)
    after = jax.eval_shape(step, *before)
    same: bool = jax.tree.structure(before) == jax.tree.structure(after)  # type: ignore[operator]
    if not same:
        raise InputError(f"the optimizer of {name} changes the structure of its state in a step; keep it")
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise InputError(
                f"the optimizer of {name} changes {jax.tree_util.keystr(path[1:])} from {old.dtype}{list(old.shape)} "
                f"to {new.dtype}{list(new.shape)} in a step; keep its type"
            )


def _with_key_data(
    optimizer: optax.GradientTransformationExtraArgs, state: PyTree
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer with the uint32 data of typed random keys in its state.

    Args:
      state: its initial state.
    """

    def is_key(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))

    # Keys are found by their position, since in the state of a wrapped optimizer they are plain arrays.
    kinds = [jax.random.key_impl(leaf) if is_key(leaf) else None for leaf in jax.tree.leaves(state)]
    if not any(kinds):
        return optimizer

    def without_keys(state: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)

    def with_keys(state: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(state)
        wrapped = [
            leaf if kind is None else jax.random.wrap_key_data(leaf, impl=kind)
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        return jax.tree.unflatten(structure, wrapped)

    def init(params: optax.Params) -> optax.OptState:
        return without_keys(optimizer.init(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = optimizer.update(updates, with_keys(state), params, **extra)
        return updates, without_keys(state)

    return optax.GradientTransformationExtraArgs(init, update)
