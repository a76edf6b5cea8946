"""Measures the cost of checkpoints during training: steps with a save against steps without one, in turns.

    python tests/benchmarks/saving.py [--pairs 15] [--seconds 5]

Each turn trains for a few seconds, with or without a save at its start. The median ratio of their steps is the cost of
saving at that interval; at a longer interval the cost is proportionally less.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import dpreg
from dpreg.distributed import devices
from dpreg.outputs.checkpoint import Checkpoints


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0)
    parsed = parser.parse_args()
    devices.start("cpu", 1)
    data = dpreg.SyntheticRegressionData([1.0] * 32, 0.0, num_train=100_000, num_val=0, batch_size=1024)
    trainer = dpreg.Trainer(10**6)
    trainer.prepare_data(data)
    trainer.prepare_model(dpreg.LinearRegressionScratch(32, 1e-4))

    def turn(saves):
        began, first = time.perf_counter(), trainer.step
        if saves:
            checkpoints.save(trainer)
        while time.perf_counter() - began < parsed.seconds:
            trainer.fit_epochs(20)
        return (trainer.step - first) / (time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder, Checkpoints(pathlib.Path(folder), {}, 0.0) as checkpoints:
        turn(True)
        ratios = []
        for _ in range(parsed.pairs):
            # Each goes first once, to cancel drift.
            ratios += [
                turn(True) / turn(False),
                1 / (turn(False) / turn(True)),
            ]
    ratio = statistics.median(ratios)
    spread = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(f"saving every {parsed.seconds:g} s: {ratio:.3f} of the steps without saving (+- {spread:.3f})")
    print(f"saving every 60 s, extrapolated: {1 - (1 - ratio) * parsed.seconds / 60:.4f}")


if __name__ == "__main__":
    main()
