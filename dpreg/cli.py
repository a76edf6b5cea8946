"""What every door does: parse flags, and end with one line where something is wrong."""

import atexit
import contextlib
import difflib
import functools
import gc
import importlib.metadata
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from absl import app, flags

from dpreg.completion import SHELLS, Flag, script
from dpreg.config import Config
from dpreg.config.flags import COMMON, define_flags
from dpreg.config.settings import FILE
from dpreg.errors import NO_ROOM, AuditFailed, Diverged, InputError, Preempted, ProcessLost
from dpreg.spelling import spell_as_flags
from dpreg.terminal import printable

_PRESET, _SHELL = "config_preset", "shell_completion"


def run_cli(main: Callable[[list[str]], None], of_runs: bool = False, installed: bool = False) -> NoReturn:
    """Parses flags and hands over to the door: those of a run and its own, or its own alone and the names of runs.

    Args:
      installed: whether it is the command `dpreg`, for which shells may complete flags.
    """
    atexit.register(gc.freeze)  # else the interpreter, as it exits, searches all objects for cycles: half a second
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as stderr: not all locales have all
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    about = sys.modules[main.__module__].__doc__
    main = functools.partial(_in_a_line, main)
    if of_runs:
        app.run(main, flags_parser=functools.partial(_parse, lambda: _help(about, {"Flags": own}), True))
    define_flags(Config)
    beside = define_flags.__module__
    names = ", ".join(_presets())
    flags.DEFINE_string(_PRESET, None, f"A flagfile that comes with dpreg: {names}. Default: none.", module_name=beside)
    if installed:
        about_shell = f'Print a script that completes flags: eval "$(dpreg --{_SHELL}=bash)". Default: none.'
        flags.DEFINE_enum(_SHELL, None, SHELLS, about_shell, module_name=beside)
    groups = {"This command": own, **COMMON, "Flags": (_PRESET, *((_SHELL,) if installed else ()))}
    app.run(main, flags_parser=functools.partial(_parse, lambda: _help(about, groups), False))


def _in_a_line(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs `main`; what is no fault of the code ends with one line that names flags, and with its exit code."""
    try:
        with spell_as_flags():
            main(argv)
    except (InputError, Diverged, AuditFailed, Preempted, ProcessLost) as error:
        _leave(error, error.exit_code)
    except KeyboardInterrupt:
        _leave(InterruptedError("interrupted"), 130)
    except OSError as error:
        _leave_for(error)


def _leave(error: Exception, code: int) -> NoReturn:
    """Ends with one line on stderr."""
    print("dpreg:", printable(str(error).strip()), file=sys.stderr, flush=True)
    sys.exit(code)


def _leave_for(error: OSError) -> NoReturn:
    """Ends with one line on a file that could not be read or written; another fault is raised again."""
    if error.errno in NO_ROOM:
        _leave(InputError(f"a file could not be written: {error.strerror}; make room, and start again"), 2)
    if error.filename is None:
        raise error
    _leave(InputError(f"{error.filename}: {error.strerror}; repair it, or name another"), InputError.exit_code)


def _parse(help: Callable[[], str], of_runs: bool, argv: list[str]) -> list[str]:
    """Bad flags are one line and exit code 2, where absl has a page and 1; --help is a page, where absl has many."""
    if {"--help", "-help", "-h"} & set(argv):
        print(help())
        sys.exit(0)
    if "--version" in argv:
        print(f"dpreg {importlib.metadata.version('dpreg')}")
        sys.exit(0)
    if {"--helpfull", "-helpfull"} & set(argv):
        app.usage(writeto_stdout=True)
        sys.exit(0)
    try:
        # absl would compare an unknown name with all others, in a time that is the square of its length.
        rest = flags.FLAGS([_with_preset(argument) for argument in argv], known_only=True)
        for argument in rest[1:]:
            if argument.startswith("-"):
                raise flags.UnrecognizedFlagError(argument.lstrip("-").partition("=")[0], argument)
        if not of_runs and flags.FLAGS[_PRESET].value is not None:  # absl takes it in other places, and other forms
            raise InputError(f"--{_PRESET}: write --{_PRESET}=NAME, on the command line")
        if len(rest) > 1 and not of_runs:
            raise InputError(f"{rest[1]}: is not a flag; give flags as --name=value")
        if _SHELL in flags.FLAGS and (shell := flags.FLAGS[_SHELL].value):
            print(script(shell, _others()))
            sys.exit(0)
        return rest
    except (flags.Error, InputError, UnicodeDecodeError) as error:
        message = _message_of(error)
        _leave(InputError(f"{_flagfile_with(message.partition(': ')[0], argv)}{message}"), InputError.exit_code)


def _flagfile_with(given: str, arguments: Sequence[str]) -> str:
    """`FILE: ` for the flagfile with a flag, or a flag of that value, if no argument is it; files may name files."""
    texts = {"": arguments}
    for file, lines in (waiting := [*texts.items()]):
        for flag, _, value in (line.strip().lstrip("-").partition("=") for line in lines):
            if given.lstrip("-") in (flag, f"{flag}={value}"):
                return f"{file}: " if file else ""
            if flag == "flagfile" and value not in texts:
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    texts[value] = pathlib.Path(value).expanduser().read_text(encoding="utf-8").splitlines()
                    waiting.append((value, texts[value]))
    return ""


def _message_of(error: Exception) -> str:
    """What is wrong with a flag, and what to do, in the words of dpreg where absl has its own."""
    said, cause = str(error), error.__context__
    match error:
        case flags.UnrecognizedFlagError():
            return f"--{error.flagname}: there is no such flag; {_instead_of(error.flagname)}see --help"
        case flags.CantOpenFlagFileError() if isinstance(cause, OSError):
            return f"--flagfile={cause.filename}: {cause.strerror}; name a file with a flag in each line"
        case flags.IllegalFlagValueError() if cause is not None:
            given = said.removeprefix("flag ").removesuffix(f": {cause}")
            parser = flags.FLAGS[given.lstrip("-").partition("=")[0]].parser
            names = getattr(parser, "enum_values", ("true", "false"))
            return f"{given}: use {parser.syntactic_help or ' or '.join(names)}"
        case UnicodeDecodeError():
            return f"--flagfile: is not text ({said}); name a file with a flag in each line"
        case flags.Error() if said.startswith("Missing value for flag "):
            return f"{said.rpartition(' ')[2]}: has no value; give flags as --name=value"
    return said


def _instead_of(name: str) -> str:
    """The flag whose description has the same words, spelled most like it, or whose description begins with it."""
    name = name.replace("-", "_").lower()
    words = name.replace("_", " ")
    places = {flag: str(flags.FLAGS[flag].help).lower().find(words) for flag in flags.FLAGS}
    named = sorted((flag for flag in places if places[flag] >= 0), key=lambda flag: (places[flag], flag))
    like = [
        *(named if " " in words else ()),
        *difflib.get_close_matches(name, [flag for flag in flags.FLAGS if len(flag) > 1], 1),
        *(flag for flag in named if not places[flag]),
    ]
    return f"use --{like[0]}, or " if like else ""


def _others() -> list[Flag]:
    """The flags that are no field of `Config`."""
    return [
        Flag(_PRESET, "A flagfile of dpreg's own", tuple(_presets())),
        Flag("flagfile", "A file of flags, one a line", (FILE,)),
        Flag(_SHELL, "Print a script such as this", SHELLS),
        Flag("help", "The flags that most runs need"),
        Flag("helpfull", "All flags"),
        Flag("version", "Which dpreg this is"),
    ]


def _help(about: str | None, groups: Mapping[str, Sequence[str]]) -> str:
    """What the door is about, and flags in groups, with their defaults."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [about.strip()] if about else []
    for group, names in groups.items():
        lines += ["", group] if names else []
        for name in names:
            flag = flags.FLAGS[name]
            default = f" [{flag.default_as_str}]" if flag.default not in (None, []) else ""
            text = f"  --{name:<24} {flag.help}{default.replace(chr(39), '')}"
            lines.append(textwrap.fill(text, width, subsequent_indent=" " * 29))
    ends = "In [ ] stands what holds without the flag. --flagfile=FILE takes flags from a file. --helpfull lists all."
    return "\n".join([*lines, "", textwrap.fill(ends, width)])


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
        *others, last = _presets()
        raise InputError(f"--{_PRESET}={preset}: there is none; use {', '.join(others)} or {last}")
    return f"--flagfile={_presets()[preset]}"
