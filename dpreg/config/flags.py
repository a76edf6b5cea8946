"""Defines absl flags for the settings of a class, reads their values, and writes flagfiles."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from absl import flags

from dpreg.config.settings import list_settings
from dpreg.errors import InputError
from dpreg.spelling import flag_text, spell

# The flags that --help shows; --helpfull shows all.
COMMON = {
    "Rows": (
        *("dataset", "target", "features", "categorical", "weight_column", "missing", "validation_fraction"),
        *("num_train", "num_val", "batch_size", "seed"),
    ),
    "Model": ("model", "loss", "l2", "solver"),
    "Steps": ("optimizer", "lr", "lr_schedule", "max_epochs", "patience"),
    "Devices": ("platform", "num_devices", "num_shards", "reduction", "precision"),
    "Run": ("mode", "workdir", "output", "resume", "checkpoint_every_seconds"),
}
_DEFINE: dict[Any, Any] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    tuple: flags.DEFINE_list,
}
_NUMBERS = {float: "numbers", int: "whole numbers"}


def define_flags(settings: type) -> None:
    """Defines a flag for each setting of a class, with its default and its help."""
    types = get_type_hints(settings)
    for field in list_settings(settings):
        hint = types[field.name]
        types_of_hint = (get_origin(hint), hint, *get_args(hint))  # tuple[float, ...]: list flag; int | None: int flag
        default = list(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        _DEFINE[next(kind for kind in types_of_hint if kind in _DEFINE)](field.name, default, field.metadata["help"])


def parse_flags(settings: type, values: flags.FlagValues) -> dict[str, Any]:
    """The settings of a class, by name, from parsed flags.

    Raises:
      InputError: for a list of numbers with another word in it.
    """
    types, parsed = get_type_hints(settings), {}
    for field in list_settings(settings):
        name, value = field.name, values[field.name].value
        if isinstance(value, list):
            element_type = get_args(types[name])[0]
            try:
                value = tuple(map(element_type, value))
            except ValueError as error:
                numbers = _NUMBERS[element_type]
                raise InputError(f"{spell(name, tuple(value))}: give {numbers} separated by commas") from error
        parsed[name] = value
    return parsed


def write_flagfile(values: Mapping[str, Any]) -> str:
    """The text of a flagfile with these settings."""
    return "".join(f"--{name}={flag_text(value)}\n" for name, value in values.items())
