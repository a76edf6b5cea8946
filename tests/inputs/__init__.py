"""Inputs as faults, strangers and odd programs make them, each with an independent check of what dpreg makes of it.

Each module has `run(rng, folder)`, which makes one input in an empty folder, hands it to dpreg, and gives the word for
how that ended: "correct", or "refused" where dpreg said no in one printable line. It raises an AssertionError for
anything else. The command is tests/benchmarks/fuzz.py; tests/test_fuzz.py runs a fixed few.
"""
