"""The package that `pip install dpreg` installs: a wheel that works from an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from cluster import ROOT

FILES, FOLDERS = ("pyproject.toml", "README.md", "LICENSE"), ("dpreg", "configs")
# These are imported only where needed.
SLOW = {
    "flax.nnx",
    "scipy.linalg",
    "scipy.special",
    "scipy.stats",
    "tensorflow_datasets",
}


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds the sdist, and the wheel from it, from a clean copy of the sources."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(pathlib.Path(ROOT) / name, source)
    for name in FOLDERS:
        shutil.copytree(pathlib.Path(ROOT) / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "build", f"--outdir={dist}", str(source))
    return dist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Unpacks the wheel and returns its folder."""
    (wheel,) = built.glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_twine_accepts_the_sdist_and_the_wheel(built):
    files = sorted(map(str, built.iterdir()))
    assert [pathlib.Path(file).suffix for file in files] == [".whl", ".gz"]
    assert python("-m", "twine", "--no-color", "check", "--strict", *files).count("PASSED") == 2


def test_the_wheel_contains_all_modules_types_templates_and_presets(installed):
    names = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (pathlib.Path(ROOT) / "dpreg").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (pathlib.Path(ROOT) / "dpreg/outputs/html").iterdir()}
    presets = {f"dpreg/presets/{path.name}" for path in (pathlib.Path(ROOT) / "configs").glob("*.cfg")}
    assert templates
    assert modules | templates | presets | {"dpreg/py.typed"} <= names
    assert not any(name.startswith(("tests", "launch")) for name in names)
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "dpreg = dpreg.main:main" in points.read_text()


def test_a_preset_runs_from_an_empty_folder(installed, tmp_path):
    code = f"import sys; from dpreg.main import main; assert not {SLOW} & {{*sys.modules}}; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config_preset=cpu", "--max_epochs=1", "--workdir=w"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "--num_devices=8" in (tmp_path / "w" / "flags.cfg").read_text()
    assert "<h1>synthetic</h1>" in (tmp_path / "w" / "report.html").read_text()


def test_the_changelog_and_the_citation_have_the_current_version():
    import dpreg

    assert f"## {dpreg.__version__}" in (pathlib.Path(ROOT) / "CHANGELOG.md").read_text()
    assert f"version: {dpreg.__version__}" in (pathlib.Path(ROOT) / "CITATION.cff").read_text()
    project = tomllib.loads((pathlib.Path(ROOT) / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
