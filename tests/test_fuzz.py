"""Runs a fixed few inputs of tests/benchmarks/fuzz.py: each is read correctly or refused in one line, in time."""

import pathlib
import sys
import time

import pytest
from cluster import ROOT

sys.path.insert(0, str(pathlib.Path(ROOT) / "tests" / "benchmarks"))

import fuzz

COUNTS = {"tables": 150, "files": 25, "flags": 100, "models": 100, "histories": 60, "port": 6, "glms": 60}
SEED = 2026


@pytest.mark.parametrize("kind", COUNTS)
def test_malformed_inputs_are_read_correctly_or_refused_in_one_line_in_time(kind):
    ends = set()
    for number in range(COUNTS[kind]):
        began, computed = time.monotonic(), time.process_time()
        _, ended = fuzz.run(SEED, number, kind)
        computed, took = time.process_time() - computed, time.monotonic() - began
        # Limits CPU time, as the machine may be busy, and wall time only to end a hang.
        assert max(computed, took / 6) < fuzz.LIMIT_SECONDS, f"fuzz.run({SEED}, {number}, {kind!r})"
        ends.add(ended)
    assert {"correct", "refused"} <= ends | ({"refused"} if kind == "port" else set())
