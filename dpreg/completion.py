"""Scripts with which a shell completes the flags of the command `dpreg`, and their values.

Put a line into the start-up file of the shell:

    bash, 4 or newer        eval "$(dpreg --shell_completion=bash)"
    zsh, after compinit     eval "$(dpreg --shell_completion=zsh)"
    fish                    dpreg --shell_completion=fish | source

The command imports JAX, which takes a while; it is faster to store its output in a file.
"""

import re
import shlex
from collections.abc import Iterable
from typing import NamedTuple, get_args, get_type_hints

from dpreg.config import Config
from dpreg.config.settings import FILE, list_settings

SHELLS = ("bash", "zsh", "fish")


class Flag(NamedTuple):
    """The description of a flag for a shell.

    Attributes:
      name: the name, without dashes.
      about: a short description.
      completions: words to complete its value with, and `FILE` for any file; None for a flag without a value.
    """

    name: str
    about: str
    completions: tuple[str, ...] | None = None

    @property
    def words(self) -> str:
        """The completions except for `FILE`, separated by blanks."""
        return " ".join(word for word in self.completions or () if word != FILE)

    @property
    def file(self) -> bool:
        """Whether to complete the names of files."""
        return FILE in (self.completions or ())


def make_script(shell: str, other_flags: Iterable[Flag]) -> str:
    """The completion script of a shell, one of `SHELLS`, for the flags of `Config` and other ones."""
    types = get_type_hints(Config)
    flags: list[Flag] = []
    for field in list_settings(Config):
        about = field.metadata["help"].partition(". ")[0].removesuffix(".")
        if bool in (types[field.name], *get_args(types[field.name])):
            flags += (Flag(field.name, about), Flag(f"no{field.name}", about))
        else:
            flags.append(Flag(field.name, about, field.metadata["completions"]))
    make = {"bash": _make_bash_script, "zsh": _make_zsh_script, "fish": _make_fish_script}[shell]
    return "\n".join(make([*flags, *other_flags]))


def _make_bash_script(flags: list[Flag]) -> list[str]:
    """A function that puts the completions of the word at the cursor, in COMP_WORDS, into COMPREPLY."""
    names = " ".join(f"--{flag.name}{'' if flag.completions is None else '='}" for flag in flags)
    values = [(f.name, f.words, "-f" if f.file else "") for f in flags if f.completions]
    return [
        "_dpreg() {",
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}",
        "  local flag='' start='' words='' files=''",
        "  case $word in # bash splits words at =, unless it is removed from COMP_WORDBREAKS",
        "    --*=*) flag=${word%%=*} start=${word%%=*}= word=${word#*=} ;;",
        "    =) flag=$before word='' ;;",
        "    *) [[ $before != = ]] || flag=${COMP_WORDS[COMP_CWORD - 2]} ;;",
        "  esac",
        "  case $flag in",
        f"    '') words='{names}' ;;",
        *(f"    --{name}) words='{words}' files={files} ;;" for name, words, files in values),
        "  esac",
        '  mapfile -t COMPREPLY < <(compgen -P "$start" -W "$words" $files -- "$word")',
        "  [[ -z $files ]] || compopt -o filenames",
        "  [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace",
        "}",
        "complete -F _dpreg dpreg",
    ]


def _make_zsh_script(flags: list[Flag]) -> list[str]:
    """A function that calls `_arguments` of zsh's completion system with all flags."""
    specs = []
    for flag in flags:
        about = re.sub(r"([\\\[\]])", r"\\\1", flag.about)
        values = f"({flag.words})" if flag.words else " "
        if flag.file:
            values = f"{{ compadd -- {flag.words}; _files }}" if flag.words else "_files"
        with_value = "" if flag.completions is None else f":{flag.name}:{values}"
        specs.append(shlex.quote(f"--{flag.name}{'=-' if with_value else ''}[{about}]{with_value}"))
    return ["_dpreg() {", " \\\n    ".join(["  _arguments", *specs]), "}", "compdef _dpreg dpreg"]


def _make_fish_script(flags: list[Flag]) -> list[str]:
    """A call of `complete` for each flag."""
    lines = ["complete -c dpreg -f"]
    for flag in flags:
        about = re.sub(r"([\\'])", r"\\\1", flag.about)
        value = "" if flag.completions is None else f" {'-rF' if flag.file else '-x'} -a '{flag.words}'"
        lines.append(f"complete -c dpreg -l {flag.name}{value} -d '{about}'")
    return lines
