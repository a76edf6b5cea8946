"""`python -m dpreg.report` compares runs."""

import json
import re
import shutil
import xml.etree.ElementTree

import forked
import numpy as np
import pytest
from cluster import ROOT

from dpreg.errors import InputError
from dpreg.outputs import chart
from dpreg.outputs.metrics import is_start, note_start, read_records
from dpreg.outputs.report import Compared, _parameters, calibration
from dpreg.report import read_run

NAMES = ("one", "two", "other")


def command(module, *arguments, cwd=ROOT):
    return forked.run("-m", f"dpreg.{module}", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains the same run on one and on two devices, and another run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, *flags in (("one", "--num_devices=1"), ("two", "--num_devices=2"), ("other", "--lr=0.1", "--patience=2")):
        done = command("main", "--platform=cpu", "--reduction=ordered", f"--workdir={folder / name}", *flags)
        assert done.returncode == 0, done.stderr
    return folder


def test_the_report_compares_results_bits_and_flags_of_runs(runs):
    done = command("report", *(str(runs / name) for name in NAMES), f"--output={runs / 'page.html'}")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if len(line.split()) > 1}
    summaries = [json.loads((runs / name / "summary.json").read_text()) for name in NAMES]
    assert rows["val_loss"] == [f"{summary['val_loss']:.6g}" for summary in summaries]
    assert rows["rmse"] == [f"{summary['metrics']['rmse']:.6g}" for summary in summaries]
    assert rows["device_count"] == ["1", "2", str(summaries[2]["device_count"])]
    assert rows["--lr"] == ["0.03", "0.03", "0.1"]
    assert "--seed" not in rows  # All runs have the same seed.
    assert rows["params_sha256"][0] == rows["params_sha256"][1] == summaries[0]["params_sha256"][:12]
    assert "parameters: other bits" in done.stdout
    page = (runs / "page.html").read_text()
    assert page.count("<polyline") == 3 * 3
    assert not re.search(r"(src|href)=|https?:|@import|url\(", page)
    command("report", *(str(runs / name) for name in NAMES), f"--output={runs / 'curves.svg'}")
    drawing = xml.etree.ElementTree.parse(runs / "curves.svg")
    assert len(drawing.findall(".//{*}polyline")) == 3
    same = command("report", str(runs / "one"), str(runs / "two"))
    assert "parameters: the same bits" in same.stdout


def test_a_record_truncated_by_a_crash_does_not_hide_the_others(tmp_path):
    history = tmp_path / "starts.jsonl"
    note_start(history, 0, 8, 1)
    with history.open("a") as file:
        file.write('{"time": "2026-')
    note_start(history, 32, 4, 2)
    assert [(start["step"], start["device_count"]) for start in read_records(history, is_start).whole] == [
        (0, 8),
        (32, 4),
    ]


def test_a_path_that_is_not_a_run_is_refused_in_one_line(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").write_text("{")
    for names, message in (
        ((), "name the workdirs of some"),
        ((str(tmp_path / "no"),), "holds no finished run"),
        ((str(tmp_path / "cut"),), "is not a summary of dpreg"),
        ((str(runs / "one"), "--output=no/page.html"), "no/page.html: No such file"),
        ((str(runs / "one"), "--outputs=page.html"), "use --output, or see --help"),
    ):
        done = command("report", *names)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert message in done.stderr


def test_control_characters_in_names_are_escaped_in_the_terminal_and_the_page(runs, tmp_path):
    hostile = tmp_path / "\x1b[2J\u202e<b>"
    shutil.copytree(runs / "one", hostile)
    summary = json.loads((hostile / "summary.json").read_text())
    summary["metrics"]["\x1b]0;title\x07\ud800"] = 1e308
    (hostile / "summary.json").write_text(json.dumps(summary))
    with (hostile / "flags.cfg").open("a") as file:
        file.write("--noaudit\n--seed=\x1b[31m7\n")
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write("{}\n" + json.dumps({"step": 97, "epoch": 4, "train_loss": 1e308, "val_loss": -1e308}) + "\n")
    done = command("report", str(runs / "one"), str(hostile), f"--output={tmp_path / 'page.html'}")
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl: 1 damaged line is left out" in done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
    page = (tmp_path / "page.html").read_text()
    assert page.replace("\n", "").isprintable()
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        (b"[]", "it is not an object"),
        (b"[" * 10**5, "nested too deeply"),
        (b"\xff", "can't decode"),
        ({"metrics": []}, "its metrics or its digest are of another type"),
        ({"params_sha256": 7}, "its metrics or its digest are of another type"),
        ({"train_loss": "\x1b[2J"}, "'train_loss' is not a number"),
        ({"metrics": {"rmse": [1]}}, "'rmse' is not a number"),
        ({"rows_per_second": 10**400}, "'rows_per_second' is not a number"),
    ],
)
def test_a_malformed_summary_is_refused(runs, tmp_path, summary, message):
    shutil.copytree(runs / "one", tmp_path / "w")
    file = tmp_path / "w" / "summary.json"
    file.write_bytes(
        summary if isinstance(summary, bytes) else json.dumps(json.loads(file.read_text()) | summary).encode()
    )
    with pytest.raises(InputError, match=message) as caught:
        read_run(tmp_path / "w")
    assert str(caught.value).isprintable()


def test_charts_escape_names_and_leave_out_values_that_are_not_finite():
    hostile = "<b>&\"'\x1b[2J\u202e\ud800"
    named = r"""<b>&"'\x1b[2J\u202e\ud800"""
    points = {hostile: [(0, 1.0), (1, float("nan")), (2, 3.0), (3, float("inf")), (float("inf"), 2.0)], "other": []}
    picture, live, within = (
        xml.etree.ElementTree.fromstring(drawing)
        for drawing in (
            chart.picture(points, hostile, hostile),
            chart.live(points, hostile, hostile),
            f"<div>{chart.chart(points, hostile, hostile)}</div>",
        )
    )
    for drawing in (picture, live, within):
        line, empty = drawing.findall(".//{*}polyline")
        assert (len(line.get("points").split()), empty.get("points")) == (2, "")
        assert drawing.find(".//{*}b") is None
        assert named in [text.text for text in drawing.iter() if text.tag.endswith("text")]
    assert [part.text for part in picture.findall(".//{*}tspan")] == [named, "other"]
    assert picture.get("aria-label").startswith(named)
    assert "".join(within.find("div").itertext()).strip() == named  # The legend lists the lines that have points.


@pytest.mark.parametrize("values", [[1e299, -1e299], [5e-324, 1e299], [1e308], [5e-324]])
def test_a_chart_of_arbitrary_floats_is_valid(values):
    points = list(enumerate(values))
    for drawing in (
        chart.picture({"run": points}, "epoch", "loss"),
        chart.chart({"run": points}, "epoch", "loss", even=True),
        chart.scatter([(value, value) for value in values], "predicted", "residual", "residuals", "zero"),
    ):
        assert "inf" not in drawing
        assert "nan" not in drawing


@pytest.mark.parametrize("limits", [None, (0, 1), (-1, 1), (1e-3, 1)])
def test_a_logarithmic_axis_leaves_out_values_without_a_logarithm(limits):
    points = {"loss": [(0, 0.0), (1, 5e-324), (2, -1.0), (3, 0.01), (4, 1.0)]}
    drawing = chart.live(points, "x", limits=(None, limits), logarithmic=(False, True))
    (line,) = xml.etree.ElementTree.fromstring(drawing).findall(".//{*}polyline")
    heights = [float(place.split(",")[1]) for place in line.get("points").split()]
    low, high = chart._SMALL[1] - chart._BOTTOM, chart._MARGIN
    bottom = -3 if limits == (1e-3, 1) else -2
    np.testing.assert_allclose(heights, [low + (high - low) * (1 + 2 / bottom), high], atol=0.1)


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [4.6e18], [-1e300], [1e18, 1e18 + 4096], [-3.0, 1e-9, 7e5]])
def test_an_axis_covers_its_values_and_its_ticks_do_not_overlap(values):
    axis = chart._even(values)
    assert all(0 <= axis.share(value) <= 1 for value in values)
    assert len({f"{tick:.12g}" for tick in axis.ticks}) == len(axis.ticks) >= 2


@pytest.mark.parametrize("value", [0.03, -4.6e18, 1e-12])
def test_the_axis_of_a_constant_has_its_order_of_magnitude(value):
    axis = chart._even([value, value])
    np.testing.assert_allclose([axis.low, axis.high], sorted((0.5 * value, 1.5 * value)))
    assert axis.ticks[0] <= value <= axis.ticks[-1]


def test_the_intercept_is_distinct_from_a_feature_named_intercept():
    for names, intercept in ((("b", "w"), "(intercept)"), (("(intercept)", "(intercept)_"), "(intercept)__")):
        shown = _parameters({"w": dict(zip(names, (1.5, 2.5), strict=True)), "b": 3.5})
        assert shown == [(names[0], 1.5), (names[1], 2.5), (intercept, 3.5)]


def test_calibration_counts_a_row_of_weight_2_as_two_rows():
    rng = np.random.default_rng(0)
    predicted, observed, weight = rng.normal(size=200), rng.normal(size=200), rng.integers(1, 4, 200).astype(float)
    found = np.array(calibration(Compared(predicted, observed, weight)))
    assert found.shape == (10, 2)
    order = np.argsort(predicted)
    middle = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()
    for group in range(10):
        rows = order[(middle >= group / 10) & (middle < (group + 1) / 10)]
        expected = [np.repeat(column[rows], weight[rows].astype(int)).mean() for column in (predicted, observed)]
        np.testing.assert_allclose(found[group], expected, rtol=1e-12)
