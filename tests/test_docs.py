"""Every fenced block of the README and the guide runs, page by page in order."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from cluster import ROOT

PAGES = [pathlib.Path(ROOT) / "README.md", *sorted((pathlib.Path(ROOT) / "docs").glob("*.md"))]
ELSEWHERE = ("-m pip install", "-m dpreg.scaling")  # `.ci/run` and test_scaling.py run these.


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def diamonds(path):
    """Provides the table of the README's example, or one with the same columns if it is not available."""
    real = pathlib.Path(ROOT).parent / "shared" / "data" / "diamonds.parquet"
    if real.exists():
        path.symlink_to(real)
        return
    rng = np.random.default_rng(0)
    columns = {name: rng.uniform(1, 9, 2000) for name in ("carat", "x", "y", "z")}
    columns |= {name: rng.choice(["a", "b", "c"], 2000) for name in ("cut", "color", "clarity")}
    columns["price"] = columns["carat"] * 1000 + columns["x"] + rng.normal(size=2000)
    pyarrow.parquet.write_table(pa.table(columns), path)


def run(command, folder):
    """Runs a command in an empty folder, with dpreg importable as if it were installed."""
    for name in ("launch", "configs", "tests"):
        (folder / name).symlink_to(pathlib.Path(ROOT) / name)
    diamonds(folder / "diamonds.parquet")
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_run(page, tmp_path):
    snippets = blocks(page, "python")
    if not snippets:
        pytest.skip("has none")
    assert run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", "\n".join(snippets)], tmp_path)


def marked(page):
    """Returns the page as a parameter, marked `faults` if its processes mostly wait for each other."""
    marks = [pytest.mark.faults] if page.stem in ("4-processes", "5-faults") else []
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_the_commands_of_a_page_run(page, tmp_path):
    commands = [block for block in blocks(page, "sh") if not any(part in block for part in ELSEWHERE)]
    if not commands:
        pytest.skip("has none")
    run(["bash", "-eu", "-c", "\n".join(commands)], tmp_path)


def test_the_first_command_of_the_readme_trains(tmp_path):
    first = blocks(PAGES[0], "sh")[0].split("&&")[-1]
    command = [sys.executable, *shlex.split(first)[1:]]
    assert "error in estimating w" in run([*command, f"--workdir={tmp_path / 'w'}"], tmp_path)


def test_the_notebook_has_the_content_of_the_first_page_and_runs():
    notebook = nbformat.read(PAGES[1].with_suffix(".ipynb"), as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code == [block.strip() for block in blocks(PAGES[1], "python")]
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text == re.sub(r"^```python\n.*?^```\n\n?", "", PAGES[1].read_text(), flags=re.DOTALL | re.MULTILINE).strip()
    ran = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    outputs = [output for cell in ran.cells for output in cell.get("outputs", [])]
    assert any("devices: 8" in output.get("text", "") for output in outputs)
    (curve,) = [output.data for output in outputs if "data" in output]
    assert "data:image/svg+xml" in curve["text/html"]
    assert curve["text/plain"].startswith("train_loss")


def test_links_point_to_existing_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
        for name in re.findall(r"`((?:dpreg|tests|launch|configs)/[\w/.-]+)`", page.read_text()):
            assert (pathlib.Path(ROOT) / name).exists(), f"{page.name}: {name}"
