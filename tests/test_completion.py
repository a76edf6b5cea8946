"""Completion of flags and values, tested in real shells."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import forked
import pytest

from dpreg.completion import SHELLS
from dpreg.config import Config
from dpreg.config.devices import BACKENDS, PLACEMENTS, REDUCTIONS
from dpreg.config.model import LOSSES, MODELS
from dpreg.config.optimizer import SOLVERS
from dpreg.config.run import MODES

PRESETS = ("cpu", "gpu", "tpu")


def dpreg(*arguments):
    return forked.run("-m", "dpreg.main", *arguments)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Writes the completion script of each installed shell to a file."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in filter(shutil.which, SHELLS):
        printed = dpreg(f"--shell_completion={shell}")
        assert (printed.returncode, printed.stderr) == (0, "")
        (folder / shell).write_text(printed.stdout)
    return folder


@pytest.fixture
def files(tmp_path):
    (tmp_path / "table one.csv").touch()
    (tmp_path / "tables").mkdir()
    return tmp_path


def shell_output(shell, text, folder):
    """Runs a script in a shell and returns the lines of its stdout; stderr must be empty."""
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    bare = {"bash": ("--norc",), "zsh": ("-f",), "fish": ("--no-config",)}[shell]
    done = subprocess.run([shell, *bare, "-c", text], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


def bash(scripts, folder, *words):
    """Returns the candidates for the last word, and the options of `compopt`."""
    driver = f"""
        set -u
        compopt() {{ echo "option $2"; }}
        eval "$(cat {shlex.quote(str(scripts / "bash"))})"
        [[ $(complete -p dpreg) == 'complete -F _dpreg dpreg' ]] || exit 3
        COMP_WORDS=({shlex.join(("dpreg", *words))}) COMP_CWORD={len(words)}
        _dpreg
        [[ ${{#COMPREPLY[@]}} == 0 ]] || printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    lines = shell_output("bash", driver, folder)
    options = {line.removeprefix("option ") for line in lines if line.startswith("option ")}
    return [line for line in lines if not line.startswith("option ")], options


def test_bash_completes_every_flag(scripts, files):
    names, _ = bash(scripts, files, "")
    offered = {name.removeprefix("--") for name in names}
    for field in dataclasses.fields(Config):
        if field.metadata:
            both = {field.name, f"no{field.name}"}
            assert f"{field.name}=" in offered or both <= offered, field.name
    listed = dpreg("--helpfull").stdout  # It lists booleans as --[no]name.
    for name in offered - {"help", "helpfull", "version", "flagfile="}:
        bare = name.removesuffix("=").removeprefix("no") if f"--{name}:" not in listed else name
        assert f"--{name.removesuffix('=')}:" in listed or f"--[no]{bare}:" in listed, name
    assert {"config_preset=", "flagfile=", "shell_completion=", "help", "helpfull"} <= offered
    assert len(offered) == len(names)


@pytest.mark.parametrize(
    ("word", "candidates"),
    [
        ("--mode=", MODES),
        ("--mode=p", ("predict",)),
        ("--loss=", LOSSES),
        ("--solver=", SOLVERS),
        ("--model=", MODELS),
        ("--reduction=", REDUCTIONS),
        ("--backend=", BACKENDS),
        ("--placement=", PLACEMENTS),
        ("--config_preset=", PRESETS),
        ("--shell_completion=", SHELLS),
        ("--lr=", ()),
        ("--audit=", ()),
        ("--dataset=s", ("synthetic",)),
        ("--dataset=tab", ("table one.csv", "tables")),
        ("--flagfile=table ", ("table one.csv",)),
        ("--workdir=tabl", ("table one.csv", "tables")),
    ],
)
def test_bash_completes_values(word, candidates, scripts, files):
    flag, _, value = word.partition("=")
    cut = (flag, "=", *([value] if value else []))  # Bash splits words at "=" like this.
    found, options = bash(scripts, files, "--seed", "=", "3", *cut)
    assert sorted(found) == sorted(candidates)
    assert options == ({"filenames"} if flag in ("--dataset", "--flagfile", "--workdir") else set())
    whole, _ = bash(scripts, files, word)  # The same word if COMP_WORDBREAKS has no "=".
    assert sorted(whole) == sorted(f"{flag}={candidate}" for candidate in candidates)


def test_bash_appends_a_space_only_where_no_value_follows(scripts, files):
    assert bash(scripts, files, "--noaud") == (["--noaudit"], set())
    assert bash(scripts, files, "--num_sh") == (["--num_shards="], {"nospace"})
    assert bash(scripts, files, "--nothing") == ([], set())


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("--num_sh", "<--num_shards>"),
        ("--noaud", "<--noaudit>"),
        ("--mode=ev", "<--mode=evaluate>"),
        ("--config_preset=t", "<--config_preset=tpu>"),
        ("--dataset=syn", "<--dataset=synthetic>"),
        ("--workdir=tabl", "<--workdir=tables>"),
        ("--loss=", "softmax"),
    ],
)
def test_zsh_completes(typed, shown, scripts, files):
    """Types a line, a tab and a return in a terminal; the return removes a trailing "=" or "/"."""
    if not shutil.which("zsh"):
        pytest.skip("there is no zsh")
    (files / "table one.csv").unlink()
    setup = f'autoload -Uz compinit; compinit -D -u; source {scripts / "zsh"}; dpreg() {{ echo "<$*>" }}'
    done = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("terminal.py"), "zsh", "-f", "-i"],
        input=f"{setup}\ndpreg {typed}\t\nexit\n",
        cwd=files,
        env=os.environ | {"TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown in done.stdout


@pytest.mark.parametrize(
    ("typed", "candidates"),
    [
        ("--num_sh", ["--num_shards"]),
        ("--noaud", ["--noaudit"]),
        ("--mode=", [f"--mode={mode}" for mode in sorted(MODES)]),
        ("--config_preset=", [f"--config_preset={preset}" for preset in PRESETS]),
        ("--dataset=s", ["--dataset=synthetic"]),
        ("--workdir=tabl", ["--workdir=table one.csv", "--workdir=tables/"]),
        ("--lr=", []),
    ],
)
def test_fish_completes(typed, candidates, scripts, files):
    text = f"source {scripts / 'fish'}; complete -C {shlex.quote('dpreg ' + typed)}"
    found = [line.partition("\t")[0] for line in shell_output("fish", text, files)]
    assert sorted({name.removesuffix("=") if "=" not in typed else name for name in found}) == candidates


def test_an_unknown_shell_is_refused_in_one_line_without_a_script():
    done = dpreg("--shell_completion=tcsh")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dpreg: --shell_completion=tcsh: use bash or zsh or fish\n"
