"""Command lines and flagfiles: accepted values are those written, and repeat; others give one line and exit code 2."""

import contextlib
import csv
import dataclasses
import io

from absl import flags

from dpreg import cli
from dpreg.config import Config
from dpreg.config.flags import define_flags
from dpreg.errors import InputError
from dpreg.spelling import spell_as_flags

from .mutate import TOKENS, damage_bytes
from .refusal import check_line

FIELDS = [field for field in dataclasses.fields(Config) if field.metadata]
GOOD = {bool: ("true", "false", "1", "no"), int: ("8", "1", "16"), float: ("0.5", "1e-3", "2"), str: ("1", "a,b")}
TEXTS = ("", "0", "1", "-1", "8", "0.1", "1e999", "nan", "true", "no", "a", "a,b", '"a,b",c', '"', "x:y", "a:1", "1:2")
TEXTS += (
    "synthetic",
    "mlp",
    "exact",
    "float64",
    "ordered",
    "huber",
    "softmax",
    "log",
    "w",
    "é",
    "\x1b[2J",
    "a\nb",
    "\u2028",
)


def run(rng, folder):
    define()
    given = {field.name: draw_text(field, rng) for field in rng.choice(FIELDS, rng.integers(1, 4), replace=False)}
    arguments = [f"--{name}={text}" for name, text in given.items()]
    in_file = rng.random() < 0.3
    if in_file:
        content = "\n".join(arguments).encode(errors="surrogateescape")
        (folder / "f.cfg").write_bytes(damage_bytes(content, rng) if rng.random() < 0.6 else content)
        arguments = [f"--flagfile={folder / 'f.cfg'}"]
    elif rng.random() < 0.1:
        other = ("--", "-", "x", "--x", "--nolr", "--flagfile", "--config_preset=cpu", "--=1")[rng.integers(8)]
        # A preset is a flagfile: flags after it have precedence, and it has precedence over those before it.
        arguments.insert(0 if "preset" in other else len(arguments), other)
    config = parse(arguments)
    if config is None:
        return "refused"
    if not in_file:
        check_values(config, given)
    again = parse([f"--flagfile={write(folder / 'again.cfg', config.to_flagfile())}"])
    assert again is not None, f"the flagfile that it wrote is refused: {config.to_flagfile()!r}"
    assert again.shared() | {"resume": 0} == config.shared() | {"resume": 0}, (
        "the flagfile that it wrote describes another run"
    )
    return "correct"


def draw_text(field, rng):
    """Draws a text for a flag, usually a valid one."""
    choices, default, how = field.metadata["choices"], field.default, rng.random()
    if how < 0.6:
        good = choices or next((GOOD[kind] for kind in (bool, int, float) if type(default) is kind), GOOD[str])
        return str(rng.choice(good))
    if how < 0.9:
        return TEXTS[rng.integers(len(TEXTS))]
    return TOKENS[rng.integers(len(TOKENS))].decode(errors="surrogateescape")[:6000]


def define():
    if "lr" not in flags.FLAGS:
        define_flags(Config)
        flags.DEFINE_string("config_preset", None, "as cli.run_cli defines it")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["fuzz"])


def parse(arguments):
    """Returns the config, or None if the flags are refused in one line."""
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), spell_as_flags():
            cli._parse(str, False, ["dpreg", *arguments])
            return Config.from_flags(flags.FLAGS)
    except SystemExit as end:
        code = end.code
    except InputError as error:
        check_line(str(error), "--")
        return None
    assert code in (0, 2), f"exit code {code}: {printed.getvalue()}"
    if code == 2:
        *lines, last = printed.getvalue().removeprefix("dpreg: ").split("\n")
        assert (len(lines), last) == (1, ""), f"not one line: {printed.getvalue()!r}"
        check_line(lines[0])
    return None


def check_values(config, given):
    """Checks that each flag has the value of its text, by the rules of Python and of CSV."""
    for name, text in given.items():
        value = getattr(config, name)
        if isinstance(value, tuple):
            words = next(csv.reader([text], strict=True), []) if text else []
            wanted = tuple((float if name == "w" else int if name == "hidden" else str)(word.strip()) for word in words)
        elif isinstance(value, bool):
            wanted = text.lower() in ("true", "t", "1", "yes", "y")
        else:
            hexadecimal = type(value) is int and "x" in text.lower()
            wanted = value if value is None else int(text, 0) if hexadecimal else type(value)(text)
        assert value == wanted, f"--{name}={text!r} is taken for {value!r}"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path
