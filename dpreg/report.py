"""`python -m dpreg.report W1 W2 ...` compares the runs in these workdirs: what they were, reached and cost.

With --output=FILE.html also on a page, with their curves one over the other; with FILE.svg, the curves alone.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags, logging
from rich.console import Console
from rich.table import Table

from dpreg.cli import run_cli
from dpreg.errors import InputError
from dpreg.outputs.metrics import Record, from_json, is_number, read_records
from dpreg.outputs.pages import shown
from dpreg.outputs.report import write_comparison
from dpreg.terminal import printable, show

_REACHED, _COST = ("epoch", "train_loss", "val_loss"), ("rows_per_second", "device_count", "process_count")
_DIGITS = 12  # of a digest: enough to distinguish runs


class Run(NamedTuple):
    """A finished run, as its workdir describes it."""

    summary: Mapping[str, Any]
    records: list[Record]
    flags: Mapping[str, str]


def read_run(workdir: pathlib.Path) -> Run:
    """What a run has left in its workdir. Damaged lines of its metrics.jsonl are left out, and a warning says so.

    Raises:
      InputError: when there is no finished run.
    """
    try:
        summary = _read_summary(workdir / "summary.json")
        flags = _read_flags(workdir / "flags.cfg")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{workdir}: holds no finished run; name the workdir of one") from error
    records, damaged = read_records(workdir / "metrics.jsonl")
    if damaged:
        lines = "1 damaged line is" if damaged == 1 else f"{damaged:,} damaged lines are"
        logging.warning("%s: %s left out", printable(str(workdir / "metrics.jsonl")), lines)
    return Run(summary, records, flags)


def _read_summary(file: pathlib.Path) -> dict[str, Any]:
    try:
        summary = from_json(_text_of(file))
        if not isinstance(summary, dict):
            raise ValueError("it is not an object")
        if missing := {*_REACHED, *_COST, "metrics", "params_sha256"} - {*summary}:
            raise ValueError(f"it has no {min(missing)!r}")
        if not isinstance(summary["metrics"], dict) or not isinstance(summary["params_sha256"], str):
            raise ValueError("its metrics or its digest are of another type")
        for name, value in {**{name: summary[name] for name in (*_REACHED, *_COST)}, **summary["metrics"]}.items():
            if value is not None and not is_number(value):
                raise ValueError(f"{name!r} is not a number")
    except ValueError as error:
        raise InputError(f"{file}: is not a summary of dpreg ({error}); name the workdir of a finished run") from error
    return summary


def _read_flags(file: pathlib.Path) -> dict[str, str]:
    try:
        lines = _text_of(file).splitlines()
    except ValueError as error:
        raise InputError(f"{file}: is not text ({error}); name the workdir of a finished run") from error
    pairs = (line[2:].partition("=") for line in lines if line.startswith("--"))
    return {name: value for name, _, value in pairs}


def _text_of(file: pathlib.Path) -> str:
    if file.exists() and not file.is_file():  # to read a pipe would wait for its writer
        raise ValueError("it is not a file")
    return file.read_text(encoding="utf-8")


def compare(runs: Mapping[str, Run]) -> dict[str, list[Any]]:
    """A row for each result, and for each flag that is not the same in all runs: its values, run by run."""
    metrics = dict.fromkeys(name for run in runs.values() for name in run.summary["metrics"])
    rows = {name: [run.summary[name] for run in runs.values()] for name in _REACHED}
    rows |= {name: [run.summary["metrics"].get(name) for run in runs.values()] for name in metrics}
    rows |= {name: [run.summary[name] for run in runs.values()] for name in _COST}
    rows["params_sha256"] = [run.summary["params_sha256"][:_DIGITS] for run in runs.values()]
    for flag in sorted({flag for run in runs.values() for flag in run.flags}):
        values = [run.flags.get(flag) for run in runs.values()]
        if len(set(values)) > 1:
            rows[f"--{flag}"] = values
    return rows


def table_of(runs: Mapping[str, Run], rows: Mapping[str, list[Any]]) -> Table:
    """What is compared, for a terminal."""
    table = Table("", *map(printable, runs), box=None)
    for name, values in rows.items():
        table.add_row(printable(name), *(printable(shown(value)) for value in values))
    return table


def _main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise InputError("there is no run to show; name the workdirs of some: python -m dpreg.report W1 W2")
    output = flags.FLAGS["output"].value
    if output and not output.endswith((".html", ".svg")):
        raise InputError(f"--output={output}: unknown kind; use FILE.html or FILE.svg")
    runs = {name: read_run(pathlib.Path(name)) for name in argv[1:]}
    if output and not all(run.records for run in runs.values()):
        raise InputError(f"--output={output}: a run has no curve, for its metrics.jsonl is empty; leave it out")
    rows = compare(runs)
    Console(markup=False, highlight=False).print(table_of(runs, rows))
    if len(runs) > 1:
        print("parameters: the same bits" if len(set(rows["params_sha256"])) == 1 else "parameters: other bits")
    if output:
        write_comparison(pathlib.Path(output), {name: run.records for name, run in runs.items()}, rows)
        show(f"also in {output}")


def main() -> None:
    """The entry point."""
    flags.DEFINE_string("output", None, "A page to write, FILE.html, or a picture, FILE.svg. Default: none.")
    run_cli(_main, takes_runs=True)


if __name__ == "__main__":
    main()
