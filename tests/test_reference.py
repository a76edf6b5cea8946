"""The API reference that pdoc renders from the docstrings: complete, and without warnings caused by dpreg."""

import inspect
import re
import subprocess
import sys

from cluster import ROOT
from flax import linen as nn

import dpreg


def is_ours(value):
    return getattr(value, "__module__", "").partition(".")[0] == "dpreg"


def members():
    """Yields (class, name, member) of all public classes, including members inherited from classes of dpreg."""
    for name in dpreg.__all__:
        public = getattr(dpreg, name)
        for cls in filter(is_ours, public.__mro__ if inspect.isclass(public) else ()):
            for member in {**inspect.get_annotations(cls), **vars(cls)}:
                # Flax adds these to every class.
                added_by_flax = issubclass(cls, nn.Module) and member in {
                    "parent",
                    "name",
                    "scope",
                }
                if not member.startswith("_") and not added_by_flax:
                    yield cls, member, vars(cls).get(member)


def test_all_public_names_are_documented():
    """Functions and properties have their own docstring; other attributes are described in that of their class."""
    lacking = [name for name in dpreg.__all__ if not getattr(dpreg, name).__doc__]
    for cls, name, what in members():
        if inspect.isroutine(what) or isinstance(what, (classmethod, staticmethod, property)) or hasattr(what, "func"):
            documented = inspect.getdoc(getattr(cls, name))
        else:
            docstrings = "\n".join(inspect.getdoc(base) or "" for base in cls.__mro__ if is_ours(base))
            documented = re.search(rf"\b{name}\b", docstrings)
        if not documented:
            lacking.append(f"{cls.__name__}.{name}")
    assert not lacking


def test_the_package_docstring_lists_each_public_name():
    for name in dpreg.__all__:
        assert f"`{name}`" in dpreg.__doc__


def test_all_public_names_have_a_short_example():
    """The examples run, as pytest collects the doctests of `dpreg/`."""
    for name in dpreg.__all__:
        (example,) = re.findall(r"(?:^ *(?:>>>|\.\.\.).*\n?)+", getattr(dpreg, name).__doc__, re.MULTILINE)[:1] or [""]
        assert 0 < len(example.splitlines()) < 9, name


def test_pdoc_renders_a_page_with_all_public_names(tmp_path):
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "dpreg", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Flax annotates a field of its TrainState with a name that only optax defines.
    flax_warning = "TrainState.*Import of ArrayTree failed"
    assert not [line for line in done.stderr.splitlines() if "Warn" in line and not re.search(flax_warning, line)]
    page = (tmp_path / "dpreg.html").read_text()
    wanted = {*dpreg.__all__, *(f"{cls.__name__}.{name}" for cls, name, _ in members())}
    assert wanted <= set(re.findall(r'id="([^"]+)"', page))
