"""Requirements on a model, checked by tracing it before anything is compiled."""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import flax.core
import jax
import numpy as np
from flax import linen as nn

from dpreg.errors import InputError, Preempted, ProcessLost
from dpreg.step.foreign_methods import OF_MODEL, refuse_foreign_methods
from dpreg.step.reduce import PyTree
from dpreg.tracing import make_key, pinned_settings

# The arguments of `__call__` that say whether the model trains, each with its value in training.
MODES = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}
_LIKE_A_MODE = re.compile(r"train|eval|test|infer|predict|determin|running|mode|phase|dropout|stochastic|sampl", re.I)
_STREAM = "dropout"  # the only random stream that models are given


def require_model(model: Any) -> None:
    """Raises InputError for anything but a flax module with a loss per row and an optimizer."""
    name = type(model).__name__
    if isinstance(model, type):
        raise InputError(f"model: {model.__name__} is a class; give an instance, {model.__name__}(...)")
    nnx = sys.modules.get("flax.nnx")  # slow to import; a model can only be an nnx module if it has been imported
    if nnx is not None and isinstance(model, nnx.Module):
        raise InputError(f"model: {name} is a module of flax.nnx; give one of flax.linen, derived from dpreg.Module")
    if not (hasattr(model, "init") and hasattr(model, "apply")):
        raise InputError(f"model: {name} is no flax module; give one, derived from dpreg.Module")
    missing = [method for method in ("loss", "configure_optimizers") if not callable(getattr(model, method, None))]
    if missing:
        raise InputError(
            f"model: {name} has no {' and no '.join(missing)}; derive it from dpreg.Module instead of flax.linen.Module"
        )
    refuse_foreign_methods(model, OF_MODEL, getattr(model, "called_methods", ()))
    if not callable(model):
        raise InputError(f"model: {name} has no __call__; define __call__(self, x), which predicts [rows, targets]")


def mode_arguments(model: Any, train: bool) -> dict[str, bool]:
    """The arguments of the model's `__call__` that select training or evaluation; empty where it has none of `MODES`.

    Raises:
      InputError: for other required arguments, and for arguments whose names resemble a mode.
    """
    kind = model.__class__
    modes = _modes_of(kind, kind.__call__, getattr(kind, "forward", None))
    return {name: value == train for name, value in modes.items()}


@functools.cache
def _modes_of(kind: type, call: Any, forward: Any) -> dict[str, bool]:
    """The modes among the arguments of a class's `__call__`, of its current `call`, and of its `forward`."""
    arguments = dict[str, inspect.Parameter]()
    calls = [vars(base).get("__call__") for base in kind.__mro__ if base is not nn.Module]
    # Where `__call__` takes **kwargs, the arguments of its base classes and of `forward` count as well.
    for call in [*calls, forward]:
        if call is None:
            continue
        own = inspect.signature(call).parameters
        given = [p for p in own.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        arguments = {p.name: p for p in given[2 if len(given) > 1 else 1 :]} | arguments
        if not any(p.kind == p.VAR_KEYWORD for p in own.values()):
            break
    known = f"use {', '.join([*MODES][:-1])} or {[*MODES][-1]}"
    for name, argument in arguments.items():
        if name in MODES and argument.kind != argument.POSITIONAL_ONLY:
            continue
        if argument.default is argument.empty:
            raise InputError(
                f"{kind.__name__}.__call__ needs {name!r}; dpreg passes the rows and the mode alone: {known} for the "
                "mode"
            )
        if _LIKE_A_MODE.search(name):
            raise InputError(
                f"{kind.__name__}.__call__ has an argument {name!r}, which dpreg does not pass; {known} for the mode, "
                "or another name for what is no mode"
            )
    return {name: value for name, value in MODES.items() if name in arguments}


def comes_with_dpreg(model: Any) -> bool:
    """Whether the code of a model belongs to dpreg rather than to the user."""
    return type(model).__module__.split(".")[0] == "dpreg"


@contextlib.contextmanager
def model_errors(model: Any) -> Iterator[None]:
    """Turns an error that is raised while a user's model is traced into an InputError of one line."""
    try:
        yield
    except (InputError, Preempted, ProcessLost, OSError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if comes_with_dpreg(model):
            raise
        remedy = "correct the model"
        if "float64" in str(error):
            remedy += ": in float64 a layer that keeps float32 needs param_dtype=x.dtype"
        raise InputError(
            f"{type(model).__name__} cannot be traced: {type(error).__name__}: {reason_of(error)}; {remedy}"
        ) from error


def reason_of(error: BaseException) -> str:
    """The message of an error in one line, without links to web pages."""
    return re.sub(r"(?: See)? *\(?https?://\S*", "", " ".join(str(error).split()))[:300].rstrip(" .")


class _Layer(NamedTuple):
    """A layer that differs in training: its path, its type, whether it trains, and the axis name of a BatchNorm."""

    path: str
    kind: type
    trains: bool
    axis_name: str | None = None


def _layers(model: Any, variables: Mapping[str, PyTree], num_inputs: int, train: bool) -> list[_Layer]:
    """The BatchNorms and Dropouts (including those of attention) that the model calls, in order.

    Raises:
      InputError: when the model cannot be traced, draws from another random stream than "dropout", or draws random
        numbers in evaluation.
    """
    found, streams = list[_Layer](), list[str]()
    has_rng = flax.core.Scope.has_rng

    def note(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module: Any = context.module
        path = "/".join(context.module.path)
        if is_batch_norm(context):
            trains = not uses_running_average(module, args, kwargs)
            found.append(_Layer(path, nn.BatchNorm, trains, module.axis_name))
            return args[0] if args else kwargs["x"]
        kinds: dict[Any, str] = {nn.Dropout: "rate", nn.MultiHeadDotProductAttention: "dropout_rate"}
        for kind, rate in kinds.items():
            if isinstance(module, kind) and context.method_name == "__call__" and getattr(module, rate) > 0:
                given = inspect.signature(kind.__call__).bind(module, *args, **kwargs).arguments.get("deterministic")
                off = nn.merge_param("deterministic", module.deterministic, given)
                found.append(_Layer(path, kind, not off))
        return next_call(*args, **kwargs)

    def asked(scope: flax.core.Scope, name: str) -> bool:
        if name not in ("params", _STREAM):
            streams.append(name)
        return bool(has_rng(scope, name))

    def applied(variables: PyTree, x: jax.Array, key: jax.Array) -> Any:
        more = {"mutable": ["batch_stats"], "rngs": {_STREAM: key}} if train else {}
        return model.apply(variables, x, **mode_arguments(model, train), **more)

    x = jax.ShapeDtypeStruct((2, num_inputs), jax.tree.leaves(variables)[0].dtype)
    name, pinned = type(model).__name__, pinned_settings(x.dtype == np.float64)
    try:
        with (
            model_errors(model),
            pinned,
            nn.intercept_methods(note),
            mock.patch.object(flax.core.Scope, "has_rng", asked),
        ):
            jax.eval_shape(lambda variables, x: applied(variables, x, make_key(0)), variables, x)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, flax.errors.InvalidRngError) and not train:
            raise InputError(
                f"{name} draws random numbers in evaluation, too ({reason_of(cause)}); draw them in "
                f"training alone: give __call__ an argument {' or '.join(MODES)}"
            ) from error
        if not streams:
            raise
    if streams:
        raise InputError(
            f"{name} draws random numbers from the stream {streams[0]!r}, and is given {_STREAM!r} alone; use "
            f"self.make_rng({_STREAM!r}), in training alone"
        )
    return found


def require_modes(model: Any, variables: Mapping[str, PyTree], num_inputs: int) -> None:
    """Raises InputError for a Dropout or a BatchNorm that behaves the same in training and in evaluation.

    A BatchNorm that always uses its running statistics is accepted in a model that takes the mode: it is frozen on
    purpose.
    """
    modes = mode_arguments(model, True)
    training = {layer.path: layer for layer in _layers(model, variables, num_inputs, True)}
    evaluating = {layer.path: layer for layer in _layers(model, variables, num_inputs, False)}
    for path in training | evaluating:
        layer = training.get(path) or evaluating[path]
        trains, after = (path in layers and layers[path].trains for layers in (training, evaluating))
        if trains and not after:
            continue
        if layer.kind is nn.BatchNorm and modes and not trains and not after:
            continue
        always = "on in evaluation, too" if after else "never on"
        raise InputError(
            f"{type(model).__name__}: the {layer.kind.__name__} {path!r} is {always}; let it depend on an argument of "
            f"__call__ that dpreg passes: {', '.join([*MODES][:-1])} or {[*MODES][-1]}"
        )


def normalises_over_batch(model: Any, state: Any, num_inputs: int) -> bool:
    """Whether a `nn.BatchNorm` of the model has an `axis_name`: in training it normalises over all rows of a batch.

    A BatchNorm without one normalises over the rows of a shard.
    """
    if not state.batch_stats:
        return False
    layers = _layers(model, {"params": state.params, "batch_stats": state.batch_stats}, num_inputs, True)
    return any(layer.trains and layer.axis_name is not None for layer in layers)


def is_batch_norm(context: Any) -> bool:
    """Whether an intercepted method is `BatchNorm.__call__`."""
    return isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__"


def uses_running_average(module: nn.BatchNorm, args: Any, kwargs: Any) -> bool:
    """Whether a call of a BatchNorm uses the running statistics."""
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(nn.merge_param("use_running_average", module.use_running_average, given))
