"""Measures time per row and memory as the number of rows grows: `python tests/benchmarks/growth.py`.

JAX generates the synthetic rows when they are needed: one epoch of 100,000,000 rows, or as many epochs of fewer rows as
make 10,000,000. Each is a run from the shell. It prints nanoseconds per row in steady state and the largest resident
memory.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)
ROUNDS = 3


def run(num_rows: int) -> tuple[float, float]:
    """Returns (nanoseconds per row, MB) of a run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--num_train={num_rows} --max_epochs={max(1, 10_000_000 // num_rows)} --num_val=0 --batch_size=1024"
        more = f"--platform=cpu --placement=host --nooptimality --workdir={folder}/run"
        process = subprocess.Popen([sys.executable, "-m", "dpreg.main", *flags.split(), *more.split()])
        _, code, used = os.wait4(process.pid, 0)
        if code:
            sys.exit("the run failed")
        summary = json.loads((pathlib.Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    return 1e9 / summary["rows_per_second"], used.ru_maxrss / 1000


if __name__ == "__main__":
    found = {size: [run(size) for _ in range(ROUNDS)] for size in SIZES}
    for size, runs in found.items():
        times, memories = zip(*runs, strict=True)
        print(f"{size:>12,} rows: {sorted(times)[ROUNDS // 2]:6.0f} ns per row, {max(memories):6.0f} MB")
