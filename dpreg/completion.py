"""Scripts by which a shell completes the flags of the command `dpreg`, and their values.

In the start-up file of the shell:

    bash, 4 or newer        eval "$(dpreg --shell_completion=bash)"
    zsh, after compinit     eval "$(dpreg --shell_completion=zsh)"
    fish                    dpreg --shell_completion=fish | source

It takes as long as JAX takes to be imported; what it prints may as well be kept in a file.
"""

import re
import shlex
from collections.abc import Iterable
from typing import NamedTuple, get_args, get_type_hints

from dpreg.config import Config
from dpreg.config.settings import FILE, list_settings

SHELLS = ("bash", "zsh", "fish")


class Flag(NamedTuple):
    """What a shell is to know of a flag.

    Attributes:
      about: what it is, in a sentence.
      completions: words that its value may be, and `FILE` where it may be one; None for a flag without a value.
    """

    name: str
    about: str
    completions: tuple[str, ...] | None = None

    @property
    def words(self) -> str:
        """Those to offer."""
        return " ".join(word for word in self.completions or () if word != FILE)

    @property
    def file(self) -> bool:
        """Whether to offer files."""
        return FILE in (self.completions or ())


def script(shell: str, others: Iterable[Flag]) -> str:
    """The script for a shell, one of `SHELLS`: for the flags of a run, and others besides."""
    types = get_type_hints(Config)
    listed: list[Flag] = []
    for field in list_settings(Config):
        about = field.metadata["help"].partition(". ")[0].removesuffix(".")
        if bool in (types[field.name], *get_args(types[field.name])):
            listed += (Flag(field.name, about), Flag(f"no{field.name}", about))
        else:
            listed.append(Flag(field.name, about, field.metadata["completions"]))
    return "\n".join({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]([*listed, *others]))


def _bash(listed: list[Flag]) -> list[str]:
    """A function that leaves in COMPREPLY what fits to the words before the cursor, COMP_WORDS."""
    names = " ".join(f"--{flag.name}{'' if flag.completions is None else '='}" for flag in listed)
    values = [(f.name, f.words, "-f" if f.file else "") for f in listed if f.completions]
    return [
        "_dpreg() {",
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]}",
        "  local flag='' start='' words='' files=''",
        "  case $word in # which bash cuts at =, unless COMP_WORDBREAKS has none",
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


def _zsh(listed: list[Flag]) -> list[str]:
    """A function that hands all to `_arguments` of zsh's completion system."""
    specs = []
    for flag in listed:
        about = re.sub(r"([\\\[\]])", r"\\\1", flag.about)
        values = f"({flag.words})" if flag.words else " "
        if flag.file:
            values = f"{{ compadd -- {flag.words}; _files }}" if flag.words else "_files"
        with_value = "" if flag.completions is None else f":{flag.name}:{values}"
        specs.append(shlex.quote(f"--{flag.name}{'=-' if with_value else ''}[{about}]{with_value}"))
    return ["_dpreg() {", " \\\n    ".join(["  _arguments", *specs]), "}", "compdef _dpreg dpreg"]


def _fish(listed: list[Flag]) -> list[str]:
    """A call of `complete` for each flag."""
    lines = ["complete -c dpreg -f"]
    for flag in listed:
        about = re.sub(r"([\\'])", r"\\\1", flag.about)
        value = "" if flag.completions is None else f" {'-rF' if flag.file else '-x'} -a '{flag.words}'"
        lines.append(f"complete -c dpreg -l {flag.name}{value} -d '{about}'")
    return lines
