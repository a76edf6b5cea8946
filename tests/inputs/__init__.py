"""Malformed and unusual inputs, each with an independent check of how dpreg handles it.

Each module has `run(rng, folder)`, which makes one input in an empty folder, passes it to dpreg, and returns
"correct", or "refused" if dpreg refused the input in one printable line. It raises an AssertionError for
any other outcome. tests/benchmarks/fuzz.py runs many of them, tests/test_fuzz.py a fixed few.
"""
