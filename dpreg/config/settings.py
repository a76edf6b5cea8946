"""Settings are dataclass fields with a help text, a rule, and whether they affect the result.

A rule checks one value: its type, its choices, its range. Rules between settings are in the classes of settings.
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

FILE = "FILE"  # among completions, stands for any file or folder
# Type of a setting -> the types of accepted values, and the message for others.
_ACCEPTED: dict[type, tuple[Any, str]] = {
    bool: ((bool, np.bool_), "use True or False"),
    int: (numbers.Integral, "use an integer"),
    float: (numbers.Real, "use a number"),
    str: (str, "use a string"),
}
_ELEMENT_NAMES = {int: "integers", float: "numbers", str: "names"}


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
    """Defines a setting, as a field of a dataclass.

    Args:
      default: the default; other code reads it as `Config.name`.
      help: a sentence or two, without the name.
      affects_result: whether the result depends on the setting.
      per_process: whether the processes of one run may have different values.
      choices: the allowed strings; any if empty.
      completions: the strings that a shell completes, while others are allowed as well; by default the choices.
      min, gt, lt: a number, and each number of a tuple, is at least `min`, above `gt` and below `lt`.
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
    if settings.__doc__:  # None under python -OO
        lines = "".join(f"\n  {field.name}: {field.metadata['help']}" for field in list_settings(settings))
        settings.__doc__ = f"{inspect.cleandoc(settings.__doc__)}\n\nAttributes:{lines}\n"
    return settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base class of all classes of settings. It converts each value to the type of its setting, and checks it.

    A subclass checks the rules between its settings in a `__post_init__` that calls this one first.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in list_settings(type(self))}
        for name, value in check_settings_of(type(self), **values).items():
            object.__setattr__(self, name, value)

    def _refuse(self, name: str, remedy: str) -> NoReturn:
        refuse(name, getattr(self, name), remedy)


def refuse(name: str, value: Any, remedy: str) -> NoReturn:
    """Raises InputError for the value of a setting; `remedy` says what is wrong and what to do."""
    raise InputError(f"{spell(name, value)}: {remedy}")


def check_settings_of(settings: type, **values: Any) -> dict[str, Any]:
    """Checks values of settings and converts them to plain Python values of the settings' types.

    Raises:
      InputError: for the first invalid value.
    """
    types = _get_types(settings)
    return {name: _check(name, _convert(name, types[name], value), settings) for name, value in values.items()}


@functools.cache
def _get_types(settings: type) -> dict[str, Any]:
    return get_type_hints(settings)


@functools.cache
def _get_metadata(settings: type) -> dict[str, Any]:
    return {field.name: field.metadata for field in list_settings(settings)}


def _convert(name: str, hint: Any, value: Any) -> Any:
    kind, *others = get_args(hint) or (hint,)
    if get_origin(hint) is tuple:
        elements = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(elements, (tuple, list)) or not all(_is_accepted(kind, element) for element in elements):
            refuse(name, value, f"use a tuple of {_ELEMENT_NAMES[kind]}")
        return tuple(_to_type(kind, element) for element in elements)
    if value is None and NoneType in others:
        return None
    if getattr(value, "ndim", None) == 0:  # a NumPy or JAX scalar
        value = value.item()
    if not _is_accepted(kind, value):
        refuse(name, value, _ACCEPTED[kind][1])
    return _to_type(kind, value)


def _is_accepted(kind: type, value: Any) -> bool:
    return isinstance(value, _ACCEPTED[kind][0]) and (kind is bool or not isinstance(value, bool))


def _to_type(kind: Any, value: Any) -> Any:
    try:
        return kind(value)
    except OverflowError:  # an integer beyond the range of float64
        return math.inf


def _check(name: str, value: Any, settings: type) -> Any:
    rule = _get_metadata(settings)[name]
    choices = rule["choices"]
    if choices and value is not None and value not in choices:
        refuse(name, value, f"use {', '.join(choices[:-1])} or {choices[-1]}")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)):
            continue
        if isinstance(number, float) and not math.isfinite(number):
            refuse(name, value, "use a finite number")
        if rule["min"] is not None and number < rule["min"]:
            refuse(name, value, f"use {rule['min']} or more")
        if rule["gt"] is not None and number <= rule["gt"]:
            refuse(name, value, f"use a value above {rule['gt']}")
        if rule["lt"] is not None and number >= rule["lt"]:
            refuse(name, value, f"use a value under {rule['lt']:,}")
    return value
