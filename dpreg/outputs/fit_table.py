"""The mode summary: the table of the exact fit of a finished run, as text, in Markdown or in LaTeX."""

import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

from dpreg.config import Config
from dpreg.config.model import GLM_LOSSES
from dpreg.errors import InputError
from dpreg.outputs.export import load_model
from dpreg.outputs.workdir import write_whole
from dpreg.solvers.inference import Coefficient, Summary
from dpreg.spelling import spell
from dpreg.terminal import printable, show

_LATEX = {
    **{character: f"\\{character}" for character in "{}$&#_%"},
    **{character: f"{{{character}}}" for character in "[]*"},  # which are arguments of a line break before them
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


def write_fit_table(config: Config) -> None:
    """Prints the table of the exact fit in the workdir, or writes it to `config.output`.

    Raises:
      InputError: for a workdir without a model, or a model without an exact fit.
    """
    folder = pathlib.Path(config.workdir or "") / "model"
    fit = load_model(folder).fit
    if fit is None:
        how = f"{spell('solver', 'exact')} and {spell('loss', 'squared', *GLM_LOSSES)}"
        raise InputError(f"{folder}: the model has no exact fit with a table of coefficients; train it with {how}")
    summaries = [each.with_level(config.interval or each.level) for each in fit.summaries]
    if not config.output:
        show(*as_text(summaries))
        return
    path = pathlib.Path(config.output)
    write_whole(path, "\n".join(FORMATS[path.suffix.lower()](summaries)) + "\n")
    show(f"table in {path}")


def as_text(summaries: Sequence[Summary]) -> list[str]:
    """The lines of the tables for a terminal. Targets are named if there are several, and if they are logarithms."""
    lines = []
    for each in summaries:
        lines += ["", *([f"{each.target}:"] if len(summaries) > 1 or each.target.startswith("log(") else [])]
        lines += [printable(line) for line in str(each).split("\n")]
    return lines[1:]


def as_markdown(summaries: Iterable[Summary]) -> list[str]:
    """The lines of a table for each target, with pipes, and what is known of the fit below it."""
    lines = []
    for each in summaries:
        head = [_escape_markdown(each.target), *_head(each)]
        lines += ["", f"| {' | '.join(head)} |", f"|:---|{'---:|' * len(_head(each))}"]
        rows = ([_escape_markdown(c.name), *_cells(c, str)] for c in each.shown)
        lines += [*(f"| {' | '.join(row)} |" for row in rows), "", "; ".join(each.facts)]
    return lines[1:]


def as_latex(summaries: Iterable[Summary]) -> list[str]:
    """The lines of a tabular for each target, which needs no package."""
    lines = []
    for each in summaries:
        head = [_escape_latex(text) for text in (each.target, *_head(each))]
        rows = [_latex_row([_escape_latex(c.name), *_cells(c, _latex_number)]) for c in each.shown]
        facts = [rf"\multicolumn{{{len(head)}}}{{l}}{{{_escape_latex(fact)}}} \\" for fact in each.facts]
        lines += ["", rf"\begin{{tabular}}{{l{'r' * len(_head(each))}}}", r"\hline", _latex_row(head), r"\hline"]
        lines += [*rows, r"\hline", *facts, r"\hline", r"\end{tabular}"]
    return lines[1:]


FORMATS: dict[str, Callable[[Sequence[Summary]], list[str]]] = {".txt": as_text, ".md": as_markdown, ".tex": as_latex}


def _head(summary: Summary) -> list[str]:
    return ["estimate", "std error", summary.test, "p", f"{100 * summary.level:g}% interval"]


def _cells(c: Coefficient, format_number: Callable[[str], str]) -> list[str]:
    """The cells of a coefficient besides its name."""
    estimate = format_number(f"{c.estimate:.6g}")
    if math.isnan(c.std_error):
        return [estimate, "", "", "", c.remark]
    numbers = (f"{c.std_error:.6g}", f"{c.statistic:.4g}", f"{c.p:.3g}")
    interval = " .. ".join(format_number(f"{end:.6g}") for end in (c.low, c.high))
    return [estimate, *map(format_number, numbers), interval]


def _latex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_number(text: str) -> str:
    """A number for LaTeX: with a minus sign, and a power of ten."""
    mantissa, _, exponent = text.replace("inf", r"\infty").partition("e")
    return f"${mantissa} \\times 10^{{{int(exponent)}}}$" if exponent else f"${mantissa}$"


def _escape_latex(name: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(name))


def _escape_markdown(name: str) -> str:
    """The name with a backslash before each character that may have a meaning in a line of Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#!])", r"\\\1", printable(name))
