"""What all commands share: they parse flags, and report errors in one line."""

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

from dpreg.completion import SHELLS, Flag, make_script
from dpreg.config import Config
from dpreg.config.flags import COMMON, define_flags
from dpreg.config.settings import FILE
from dpreg.errors import NO_ROOM, AuditFailed, Diverged, InputError, Preempted, ProcessLost
from dpreg.spelling import spell_as_flags
from dpreg.terminal import printable

_PRESET, _SHELL = "config_preset", "shell_completion"


def run_cli(main: Callable[[list[str]], None], takes_runs: bool = False, installed: bool = False) -> NoReturn:
    """Parses the command line and calls `main`; reports expected errors in one line.

    Args:
      main: the function of a command, from the module that defines the command's own flags.
      takes_runs: whether the command takes the workdirs of runs as arguments, instead of the flags of a run.
      installed: whether it is the command `dpreg`, which can also print a script for shell completion.
    """
    atexit.register(gc.freeze)  # otherwise the garbage collector takes half a second at exit
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as stderr, for all locales
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    about = sys.modules[main.__module__].__doc__
    main = functools.partial(_run_main, main)
    if takes_runs:
        app.run(main, flags_parser=functools.partial(_parse, lambda: _format_help(about, {"Flags": own}), True))
    define_flags(Config)
    module = define_flags.__module__
    names = ", ".join(_list_presets())
    flags.DEFINE_string(_PRESET, None, f"A flagfile that comes with dpreg: {names}. Default: none.", module_name=module)
    if installed:
        about_shell = f'Print a script that completes flags: eval "$(dpreg --{_SHELL}=bash)". Default: none.'
        flags.DEFINE_enum(_SHELL, None, SHELLS, about_shell, module_name=module)
    groups = {"This command": own, **COMMON, "Flags": (_PRESET, *((_SHELL,) if installed else ()))}
    app.run(main, flags_parser=functools.partial(_parse, lambda: _format_help(about, groups), False))


def _run_main(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls `main`, with settings spelled as flags in messages. Expected errors exit with one line and their code."""
    try:
        with spell_as_flags():
            main(argv)
    except (InputError, Diverged, AuditFailed, Preempted, ProcessLost) as error:
        _exit(error, error.exit_code)
    except KeyboardInterrupt:
        _exit(InterruptedError("interrupted"), 130)
    except OSError as error:
        _exit_for_os_error(error)


def _exit(error: Exception, code: int) -> NoReturn:
    """Prints one line on stderr, and exits."""
    print("dpreg:", printable(str(error).strip()), file=sys.stderr, flush=True)
    sys.exit(code)


def _exit_for_os_error(error: OSError) -> NoReturn:
    """Exits with one line for a file that cannot be read or written; raises other errors again."""
    if error.errno in NO_ROOM:
        _exit(InputError(f"a file could not be written: {error.strerror}; free disk space, and start again"), 2)
    if error.filename is None:
        raise error
    _exit(InputError(f"{error.filename}: {error.strerror}; repair it, or name another"), InputError.exit_code)


def _parse(help: Callable[[], str], takes_runs: bool, argv: list[str]) -> list[str]:
    """Parses flags, and returns the other arguments.

    Wrong flags exit with one line and code 2, while absl prints a page and exits with 1. --help prints the page `help`,
    while absl prints all flags of all modules.
    """
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
        # Without known_only, absl compares an unknown name with all flags, in a time quadratic in its length.
        unparsed = flags.FLAGS([_expand_preset(argument) for argument in argv], known_only=True)
        for argument in unparsed[1:]:
            if argument.startswith("-"):
                raise flags.UnrecognizedFlagError(argument.lstrip("-").partition("=")[0], argument)
        if not takes_runs and flags.FLAGS[_PRESET].value is not None:  # in a flagfile, or without "="
            raise InputError(f"--{_PRESET}: write --{_PRESET}=NAME, on the command line")
        if len(unparsed) > 1 and not takes_runs:
            raise InputError(f"{unparsed[1]}: is not a flag; give flags as --name=value")
        if _SHELL in flags.FLAGS and (shell := flags.FLAGS[_SHELL].value):
            print(make_script(shell, _list_other_flags()))
            sys.exit(0)
        return unparsed
    except (flags.Error, InputError, UnicodeDecodeError) as error:
        message = _format_error(error)
        _exit(InputError(f"{_find_flagfile(message.partition(': ')[0], argv)}{message}"), InputError.exit_code)


def _find_flagfile(given: str, arguments: Sequence[str]) -> str:
    """`FILE: ` if the flag `given`, with or without a value, is in that flagfile; empty if it is an argument.

    Flagfiles may name other flagfiles.
    """
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


def _format_error(error: Exception) -> str:
    """The message of an error in the flags; those of absl are rewritten to say what to do."""
    text, cause = str(error), error.__context__
    match error:
        case flags.UnrecognizedFlagError():
            return f"--{error.flagname}: there is no such flag; {_suggest_flag(error.flagname)}see --help"
        case flags.CantOpenFlagFileError() if isinstance(cause, OSError):
            return f"--flagfile={cause.filename}: {cause.strerror}; name a file with a flag in each line"
        case flags.IllegalFlagValueError() if cause is not None:
            given = text.removeprefix("flag ").removesuffix(f": {cause}")
            parser = flags.FLAGS[given.lstrip("-").partition("=")[0]].parser
            names = getattr(parser, "enum_values", ("true", "false"))
            return f"{given}: use {parser.syntactic_help or ' or '.join(names)}"
        case UnicodeDecodeError():
            return f"--flagfile: is not text ({text}); name a file with a flag in each line"
        case flags.Error() if text.startswith("Missing value for flag "):
            return f"{text.rpartition(' ')[2]}: has no value; give flags as --name=value"
    return text


def _suggest_flag(name: str) -> str:
    """Suggests a flag for an unknown name, as `use --FLAG, or `; empty if there is none.

    Several words, such as learning_rate, are first searched in the help texts. Then come the flag with the most similar
    name, and those whose help begins with the name.
    """
    name = name.replace("-", "_").lower()
    words = name.replace("_", " ")
    places = {flag: str(flags.FLAGS[flag].help).lower().find(words) for flag in flags.FLAGS}
    mentioning = sorted((flag for flag in places if places[flag] >= 0), key=lambda flag: (places[flag], flag))
    candidates = [
        *(mentioning if " " in words else ()),
        *difflib.get_close_matches(name, [flag for flag in flags.FLAGS if len(flag) > 1], 1),
        *(flag for flag in mentioning if not places[flag]),
    ]
    return f"use --{candidates[0]}, or " if candidates else ""


def _list_other_flags() -> list[Flag]:
    """The flags that are not fields of `Config`."""
    return [
        Flag(_PRESET, "A flagfile that comes with dpreg", tuple(_list_presets())),
        Flag("flagfile", "A file with a flag in each line", (FILE,)),
        Flag(_SHELL, "Print a script for shell completion", SHELLS),
        Flag("help", "Print the most common flags"),
        Flag("helpfull", "Print all flags"),
        Flag("version", "Print the version"),
    ]


def _format_help(about: str | None, groups: Mapping[str, Sequence[str]]) -> str:
    """The text of --help: the description of a command, and its flags in groups, with their defaults."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [about.strip()] if about else []
    for group, names in groups.items():
        lines += ["", group] if names else []
        for name in names:
            flag = flags.FLAGS[name]
            default = f" [{flag.default_as_str}]" if flag.default not in (None, []) else ""
            text = f"  --{name:<24} {flag.help}{default.replace(chr(39), '')}"
            lines.append(textwrap.fill(text, width, subsequent_indent=" " * 29))
    note = "Defaults are in [ ]. --flagfile=FILE reads flags from a file. --helpfull lists all flags."
    return "\n".join([*lines, "", textwrap.fill(note, width)])


def _list_presets() -> dict[str, str]:
    """The flagfiles that come with dpreg, as a map from name to path."""
    here = pathlib.Path(__file__).parent
    folder = here / "presets" if (here / "presets").is_dir() else here.parent / "configs"  # in a wheel; in the sources
    return {file.stem: str(file) for file in sorted(folder.glob("*.cfg"))}


def _expand_preset(argument: str) -> str:
    """Replaces --config_preset=NAME by --flagfile with the path of that file."""
    name, equals, preset = argument.lstrip("-").partition("=")
    if not (argument.startswith("-") and name == _PRESET and equals):
        return argument
    if preset not in _list_presets():
        *others, last = _list_presets()
        raise InputError(f"--{_PRESET}={preset}: there is none; use {', '.join(others)} or {last}")
    return f"--flagfile={_list_presets()[preset]}"
