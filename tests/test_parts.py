"""Rows split between processes give the results of one process; all other arguments must be equal in all processes."""

import json

import numpy as np
import parts
import pytest
from cluster import ROOT, free_address, run_processes

import dpreg


@pytest.fixture(scope="module")
def found():
    """Returns the results of two processes with two devices each."""
    address = free_address()
    ended = run_processes(*((("tests/parts.py", address, str(process)), (), ROOT) for process in (0, 1)))
    results = []
    for code, lines, out, _ in ended:
        assert code == 0, "\n".join(lines)
        (line,) = (line for line in out.splitlines() if line.startswith("found "))
        results.append(json.loads(line.removeprefix("found ")))
    return results


@pytest.mark.parametrize("placement", ["device", "host"])
def test_rows_split_between_processes_give_the_bits_of_one_process_with_all_rows(found, placement):
    data = dpreg.RegressionData(parts.source(parts.ROWS, 1), parts.source(parts.HELD_OUT, 2), batch_size=16)
    expected = json.loads(json.dumps(parts.results(data, placement)[1]))
    for process in (0, 1):
        assert found[process][placement] == expected
        assert found[process]["rows"] == [parts.ROWS, parts.HELD_OUT]
    assert found[0]["fingerprint"] == found[1]["fingerprint"]


def test_each_process_receives_the_predictions_of_its_own_rows(found):
    own = [np.array(result["own predictions"]) for result in found]
    assert [len(rows) for rows in own] == [parts.CUTS[0], parts.ROWS - parts.CUTS[0]]
    for result in found:
        np.testing.assert_array_equal(np.concatenate(own), result["all predictions"])


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "unequal lengths": "fit: processes 0 and 1 have different training rows: 100 rows and 130 rows; give the same",
        "other values": "fit: processes 0 and 1 have different training rows: both 100 rows, with other values; give",
        "other rows held out": "fit: processes 0 and 1 have different validation rows: none and 9 rows",
        "epochs": "fit: processes 0 and 1 have different max_epochs: 1 and 2",
        "batch size": "fit: processes 0 and 1 have different batch_size: 32 and 64",
        "learning rate": "give all processes the same model, with the same settings of its loss and its optimizer",
        "predict": "predict: processes 0 and 1 have different rows: shape [50, 3] and shape [70, 3]",
        "predict values": "predict: processes 0 and 1 have different rows: both shape [50, 3], with other values",
        "optimizer state": "different parameters or optimizer states: both of the same shapes, with other values; draw",
        "assigned state": "different parameters or optimizer states: both of the same shapes, with other values; draw",
        "evaluate": "own part go through dpreg.RegressionData.from_parts(train=own_rows)",
        "calls": "process 0 calls predict and process 1 calls evaluate; let all processes call the same",
        "columns": "rows of process 0 have x of 3 float32, y of 1 float32, weight of 1 float32, and those of process 1",
        "no rows": "there are no training rows",
        "target": "the target in row 101 is 7 and has to be 0 or 1",
        "shuffled": "give from_parts a PermutedSource of each part",
    }.items(),
)
def test_arguments_that_differ_between_processes_are_refused_in_all_of_them(found, case, message):
    for result in found:
        assert message in result["refusals"][case]


def test_from_parts_in_one_process_has_the_rows_of_that_process():
    rows = parts.source(30, 0)
    data = dpreg.RegressionData.from_parts(rows, batch_size=8)
    assert (data.train, data.val, data.batch_size) == (rows, None, 8)
    with pytest.raises(dpreg.InputError, match="there are no training rows"):
        dpreg.RegressionData.from_parts(None)
