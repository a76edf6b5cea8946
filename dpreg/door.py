"""What every door does: parse flags, and end with one line where something is wrong."""

import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from dpreg.config import Config, define_flags
from dpreg.errors import InputError

_PRESET = "config_preset"


def enter(main: Callable[[list[str]], None]) -> NoReturn:
    """Parses the flags of a run, and those that the door has defined, and hands over to it."""
    define_flags()
    names = ", ".join(_presets())
    flags.DEFINE_string(_PRESET, None, f"A flagfile of dpreg's own: {names}.", module_name=Config.__module__)
    for flag in flags.FLAGS.get_key_flags_for_module(Config.__module__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --help lists them
    app.run(main, flags_parser=_parse)


def leave(error: Exception, code: int) -> NoReturn:
    """Ends with one line on stderr."""
    print("dpreg:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    sys.exit(code)


def leave_for(error: OSError) -> NoReturn:
    """Ends with one line on a file that could not be read or written; another fault is raised again."""
    if error.filename is None:
        raise error
    leave(InputError(f"{error.filename}: {error.strerror}: free or change it"), InputError.exit_code)


def _parse(argv: list[str]) -> list[str]:
    """Bad flags are one line and exit code 2, where absl has a page and 1."""
    try:
        rest = flags.FLAGS([_with_preset(argument) for argument in argv])
        if len(rest) > 1:
            raise InputError(f"{rest[1]}: not a flag; flags are given as --name=value")
        return rest
    except (flags.Error, InputError, UnicodeDecodeError) as error:
        leave(error, InputError.exit_code)


def _presets() -> dict[str, str]:
    """The flagfiles that are installed with dpreg: name -> path."""
    here = pathlib.Path(__file__).parent
    folder = here / "presets" if (here / "presets").is_dir() else here.parent / "configs"  # of a wheel; of the sources
    return {file.stem: str(file) for file in sorted(folder.glob("*.cfg"))}


def _with_preset(argument: str) -> str:
    """--config_preset=NAME is --flagfile with the path of a file that is installed."""
    name, equals, preset = argument.lstrip("-").partition("=")
    if not (argument.startswith("-") and name == _PRESET and equals):
        return argument
    if preset not in _presets():
        raise InputError(f"--{_PRESET}={preset}: there is none; use one of {', '.join(_presets())}")
    return f"--flagfile={_presets()[preset]}"
