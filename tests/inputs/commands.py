"""Whole commands on damaged inputs: exit code 0, or 2 with one line. Each starts Python, which takes seconds."""

import os
import pathlib
import shutil
import subprocess
import sys

from . import flags
from .mutate import damage_bytes
from .refusal import check_line

ROOT = pathlib.Path(__file__).parent.parent.parent
ROWS = "a,kind,y\n" + "".join(f"{i * i % 17},{'uv'[i % 2]},{i % 7 + 0.5}\n" for i in range(80))
TRAINING = (
    *("--platform=cpu", "--num_devices=2", "--dataset=t.csv", "--target=y", "--categorical=kind", "--workdir=w"),
    *("--lr=0.03", "--max_epochs=3"),
)


def run(rng, folder):
    (folder / "t.csv").write_text(ROWS)
    train = (sys.executable, "-W", "ignore", "-m", "dpreg.main", *TRAINING, "--cache_dir=cache")
    how = rng.integers(5)
    if how == 0:
        (folder / "t.csv").write_bytes(damage_bytes(ROWS.encode(), rng))
        return ended(train, folder)
    if how == 1:
        odd = flags.FIELDS[rng.integers(len(flags.FIELDS))]
        text = flags.draw_text(odd, rng).replace("\0", "")[:500]
        known = ("platform", "num_devices", "coordinator_address", "num_processes", "process_id")
        return ended((*train, f"--{odd.name}={text}") if odd.name not in known else train, folder)
    assert ended(train, folder) == "correct"
    if how == 2:
        file = folder / "w" / ("metrics.jsonl", "starts.jsonl", "flags.cfg", "summary.json")[rng.integers(4)]
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
        assert ended((*train, "--max_epochs=4"), folder) == "correct"
        return ended((sys.executable, "-m", "dpreg.report", "w", "--output=p.html"), folder)
    file = folder / "w" / "model" / ("model.json", "parameters.npz")[rng.integers(2)]
    before = file.read_bytes()
    file.write_bytes(damage_bytes(before, rng))
    shutil.copy(folder / "t.csv", folder / "new.csv")
    if how == 3:
        end = ended((sys.executable, str(folder / "w" / "model" / "predict.py"), "new.csv"), folder, "predict.py: ")
    else:
        end = ended(
            (*train[:5], "--mode=predict", "--platform=cpu", "--workdir=w", "--dataset=new.csv", "--output=p.csv"),
            folder,
        )
    assert end == "refused" or file.read_bytes() == before, "a damaged model predicts"
    return end


def ended(command, folder, begins="dpreg: "):
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    if done.returncode == 0:
        return "correct"
    assert done.returncode in (2, 3), (done.returncode, done.stderr[-500:])
    line = done.stderr.splitlines()[-1]
    assert line.startswith(begins), line
    check_line(line)
    return "refused"
