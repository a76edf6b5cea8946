"""Settings: fields of a dataclass that carry their help, their rule, and what they have to do with the result.

A rule concerns one value: its type, its choices, its range. Rules between settings stand in the groups.
"""

import dataclasses
import functools
import inspect
import math
import numbers
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from dpreg.errors import InputError
from dpreg.spelling import spell

T = TypeVar("T")

FILE = "FILE"  # among completions: any file or folder
# Type of a setting -> types of values that are accepted for it, and what to say of others.
_ACCEPTED: dict[type, tuple[Any, str]] = {
    bool: ((bool, np.bool_), "use True or False"),
    int: (numbers.Integral, "use an integer"),
    float: (numbers.Real, "use a number"),
    str: (str, "use a string"),
}
_OF_TUPLES = {int: "integers", float: "numbers", str: "names"}


def setting(
    default: Any,
    help: str,
    *,
    affects_result: bool = False,
    per_process: bool = False,
    choices: tuple[str, ...] = (),
    completions: tuple[str, ...] = (),
    min: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
) -> Any:
    """A field of a class of settings.

    Args:
      default: the only place where it stands; `Config.name` is it.
      help: a sentence or two, without the name.
      affects_result: whether another value gives another result.
      per_process: whether processes of one run may differ in it.
      choices: the strings that it may be.
      completions: strings that a shell offers where others are possible as well; by default the choices.
      min, gt, lt: a number, or each of several, is at least, above, below this.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "affects_result": affects_result,
            "per_process": per_process,
            "choices": choices,
            "completions": completions or choices,
            "min": min,
            "gt": gt,
            "lt": lt,
        },
    )


def list_settings(settings: type) -> list[dataclasses.Field[Any]]:
    """The fields of a class that are settings."""
    return [field for field in dataclasses.fields(settings) if field.metadata]


def document(settings: type[T]) -> type[T]:
    """Adds the help of its settings to the docstring of a class, for help() and the reference."""
    if settings.__doc__:  # none under python -OO
        lines = "".join(f"\n  {field.name}: {field.metadata['help']}" for field in list_settings(settings))
        settings.__doc__ = f"{inspect.cleandoc(settings.__doc__)}\n\nAttributes:{lines}\n"
    return settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base of all groups: converts each value to the type of its setting and checks it.

    A subclass has the rules between its settings in a `__post_init__` that calls this one first.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in list_settings(type(self))}
        for name, value in check_settings_of(type(self), **values).items():
            object.__setattr__(self, name, value)

    def _refuse(self, name: str, remedy: str) -> NoReturn:
        refuse(name, getattr(self, name), remedy)


def refuse(name: str, value: Any, remedy: str) -> NoReturn:
    """Raises InputError for the value of a setting."""
    raise InputError(f"{spell(name, value)}: {remedy}")


def check_settings_of(settings: type, **values: Any) -> dict[str, Any]:
    """The values as plain Python values of the types of their settings.

    Raises:
      InputError: for the first value that its setting cannot have.
    """
    types = _types_of(settings)
    return {name: _check(name, _convert(name, types[name], value), settings) for name, value in values.items()}


@functools.cache
def _types_of(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


@functools.cache
def _metadata_of(settings: type) -> dict[str, Any]:
    return {field.name: field.metadata for field in list_settings(settings)}


def _convert(name: str, hint: Any, value: Any) -> Any:
    kind, *others = get_args(hint) or (hint,)
    if get_origin(hint) is tuple:
        parts = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(parts, (tuple, list)) or not all(_is_of(kind, part) for part in parts):
            refuse(name, value, f"use a tuple of {_OF_TUPLES[kind]}")
        return tuple(_to_type(kind, part) for part in parts)
    if value is None and NoneType in others:
        return None
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or JAX
        value = value.item()
    if not _is_of(kind, value):
        refuse(name, value, _ACCEPTED[kind][1])
    return _to_type(kind, value)


def _is_of(kind: type, value: Any) -> bool:
    return isinstance(value, _ACCEPTED[kind][0]) and (kind is bool or not isinstance(value, bool))


def _to_type(kind: Any, value: Any) -> Any:
    try:
        return kind(value)
    except OverflowError:  # an integer that no float holds
        return math.inf


def _check(name: str, value: Any, settings: type) -> Any:
    rule = _metadata_of(settings)[name]
    choices, least, above, below = (rule[key] for key in ("choices", "min", "gt", "lt"))
    if choices and value is not None and value not in choices:
        refuse(name, value, f"use {', '.join(choices[:-1])} or {choices[-1]}")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            refuse(name, value, "use a finite number")
        if least is not None and number < least:
            refuse(name, value, f"use {least} or more")
        if above is not None and number <= above:
            refuse(name, value, f"use a value above {above}")
        if below is not None and number >= below:
            refuse(name, value, f"use a value under {below:,}")
    return value
