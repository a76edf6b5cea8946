"""What `pip install dpreg` brings: a wheel that works from an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from cluster import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The unpacked wheel, built of what is in the repository and nothing else."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in ("dpreg", "configs", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (pathlib.Path(ROOT) / name).is_dir() else shutil.copy
        copy(pathlib.Path(ROOT) / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_every_module_the_types_and_the_presets(installed):
    there = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (pathlib.Path(ROOT) / "dpreg").rglob("*.py")}
    presets = {f"dpreg/presets/{path.name}" for path in (pathlib.Path(ROOT) / "configs").glob("*.cfg")}
    assert modules | presets | {"dpreg/py.typed"} <= there
    assert not any(name.startswith(("tests", "launch")) for name in there)
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "dpreg = dpreg.main:main" in points.read_text()


def test_a_run_by_a_preset_from_an_empty_folder(installed, tmp_path):
    def run(*flags):
        command = [sys.executable, "-c", "from dpreg.main import main; main()", *flags, "--workdir=w"]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    done = run("--config_preset=cpu", "--max_epochs=1")
    assert done.returncode == 0, done.stderr
    assert "--num_devices=8" in (tmp_path / "w" / "flags.cfg").read_text()
    wrong = run("--config_preset=cup")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "--config_preset=cup: there is none; use cpu, gpu or tpu" in wrong.stderr
    (tmp_path / "mine.cfg").write_text("--config_preset=cpu\n")
    for elsewhere in (("--config_preset", "cpu"), ("--flagfile=mine.cfg",)):
        wrong = run(*elsewhere)
        assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
        assert "write --config_preset=NAME, on the command line" in wrong.stderr


def test_the_version_stands_in_the_changelog_and_the_citation():
    import dpreg

    assert f"## {dpreg.__version__}" in (pathlib.Path(ROOT) / "CHANGELOG.md").read_text()
    assert f"version: {dpreg.__version__}" in (pathlib.Path(ROOT) / "CITATION.cff").read_text()
    project = tomllib.loads((pathlib.Path(ROOT) / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
