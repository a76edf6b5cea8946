"""Files of a run: damaged lines are skipped and counted, or the file is refused in one line."""

import io
import json
import logging
import pathlib
import sys

from rich.console import Console

from dpreg import report
from dpreg.errors import InputError
from dpreg.outputs.metrics import MetricsWriter, is_start, note_start, read_records
from dpreg.outputs.report import write_comparison
from dpreg.terminal import printable

from .mutate import damage_bytes, damage_json
from .refusal import check_line

LOG = [
    {"step": 4 * i, "epoch": i / 8, "train_loss": 2.0**-i, "rows_per_second": 1e5, "learning_rate": 0.1}
    | ({"val_loss": 2.0**-i, "rmse": 0.5, "audit": {"rows": 40, "tags": "00c0ffee"}} if i % 8 == 0 else {})
    for i in range(1, 17)
]
STARTS = [{"time": "2026-01-01T00:00:00+00:00", "step": s, "device_count": 8, "process_count": 1} for s in (0, 32)]
SUMMARY = {
    **{"step": 64, "epoch": 2.0, "train_loss": 0.1, "val_loss": 0.2, "metrics": {"rmse": 0.3, "r2": 0.9}},
    **{"rows_per_second": 1e5, "device_count": 8, "process_count": 1, "params_sha256": "ab" * 32},
}
FLAGS = "--lr=0.1\n--dataset=synthetic\n--w=2.0,-3.4\n"
FILES = ("metrics.jsonl", "starts.jsonl", "summary.json", "flags.cfg")


def run(rng, folder):
    workdir = folder / ("w", "w\x1b[2J", "w é", "w\u202e")[rng.integers(4)]
    workdir.mkdir()
    name = FILES[rng.integers(len(FILES))]
    for file, lines in (("metrics.jsonl", LOG), ("starts.jsonl", STARTS)):
        (workdir / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "summary.json").write_text(json.dumps(SUMMARY, indent=2) + "\n")
    (workdir / "flags.cfg").write_text(FLAGS)
    damage(workdir / name, rng)
    messages = []
    logger, handler = logging.getLogger(), _Messages(messages)
    logger.addHandler(handler)
    try:
        ended = compare(workdir, folder, rng)
        resume(workdir, int(rng.integers(0, 70)), messages)
    finally:
        logger.removeHandler(handler)
    for message in messages:
        check_line(message, "metrics.jsonl", "starts.jsonl")
    return ended


class _Messages(logging.Handler):
    def __init__(self, messages):
        super().__init__()
        self._messages = messages

    def emit(self, record):
        self._messages.append(record.getMessage())


def damage(file, rng):
    how = rng.random()
    if how < 0.05:
        file.unlink()
        file.mkdir()
    elif how < 0.5 or file.name == "flags.cfg":
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    elif file.name == "summary.json":
        file.write_text(json.dumps(damage_json(SUMMARY, rng)))
    else:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = damage_json(lines, rng)
        file.write_text("".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])))


def compare(workdir, folder, rng):
    """Does what `python -m dpreg.report` does."""
    try:
        runs = {str(workdir): report.read_run(workdir)}
    except InputError as error:
        check_line(str(error), printable(str(workdir)))
        return "refused"
    out = io.StringIO()
    rows = report.compare(runs)
    Console(file=out, markup=False, highlight=False, width=200).print(report.table_of(runs, rows))
    assert all(line.isprintable() for line in out.getvalue().split("\n")), out.getvalue()
    for kind in ("html", "svg"):
        page = folder / f"page.{kind}"
        write_comparison(page, {name: run.records for name, run in runs.items()}, rows)
        assert page.read_text(encoding="utf-8").replace("\n", "").isprintable()
    whole = whole_lines(workdir / "metrics.jsonl", {"step", "epoch", "train_loss"})
    assert runs[str(workdir)].records == whole, "the records differ"
    return "correct"


def resume(workdir: pathlib.Path, step: int, messages):
    """Resumes from a step, which keeps the complete lines up to it."""
    kept, starts = (
        whole_lines(workdir / "metrics.jsonl", {"step", "epoch", "train_loss"}),
        whole_lines(workdir / "starts.jsonl", {*STARTS[0]}),
    )
    del messages[:]
    MetricsWriter(workdir / "metrics.jsonl", step).__exit__()
    note_start(workdir / "starts.jsonl", step, 8, 1)
    assert read_records(workdir / "metrics.jsonl") == ([line for line in kept if line["step"] <= step], 0)
    found = read_records(workdir / "starts.jsonl", is_start)
    assert (found.whole[:-1], found.whole[-1]["step"], found.damaged) == (starts, step, 0)
    aside = [path.name for path in workdir.iterdir() if ".damaged-" in path.name]
    assert len(messages) == len(aside), (messages, aside)


def whole_lines(file, needed):
    """Returns the lines that are strict JSON and have the needed members with the right types."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_bytes().split(b"\n")[:-1]:
        try:
            value = json.loads(line.decode(), parse_constant=lambda name: 1 / 0)
        except (ValueError, RecursionError, ZeroDivisionError):
            continue
        if (
            isinstance(value, dict)
            and needed <= {*value}
            and all(fits(part, name) for name, part in value.items())
            and ("time" not in needed or needed == {*value})
        ):
            found.append(value)
    return found


def fits(value, name):
    if name in ("step", "device_count", "process_count"):
        return type(value) is int and 0 <= value < 2**63
    if name == "time":
        return isinstance(value, str)
    if name == "audit":
        return isinstance(value, dict) and fits(value.get("rows"), "step") and isinstance(value.get("tags"), str)
    number = type(value) in (int, float) and abs(value) <= sys.float_info.max
    return number or (value is None and name != "epoch")
