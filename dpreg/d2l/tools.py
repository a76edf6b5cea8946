"""The utilities of D2L section 3.2.1: methods added to a class, saved arguments, the live curve."""

import base64
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from flax.linen.module import wrap_method_once

from dpreg.errors import InputError
from dpreg.outputs import chart
from dpreg.outputs.pages import render

_SCALES = "linear", "log"
_PIXELS_PER_INCH = 96


def add_to_class(owner: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes a function a method of a class, also of its existing objects (D2L section 3.2.1).

    >>> class A:
    ...     b = 1
    >>> a = A()
    >>> @add_to_class(A)
    ... def double(self):
    ...     return 2 * self.b
    >>> a.double()
    2
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        # As a class statement of flax does with its methods: else `nn.compact` would have no effect.
        method = wrap_method_once(function) if issubclass(owner, nn.Module) else function
        setattr(owner, function.__name__, method)
        return function

    return add


class HyperParameters:
    """A base class that saves the arguments of a method as attributes (D2L section 3.2.1).

    >>> class B(HyperParameters):
    ...     def __init__(self, a, b, c):
    ...         self.save_hyperparameters(ignore=["c"])
    >>> b = B(a=1, b=2, c=3)
    >>> b.a, b.b, hasattr(b, "c"), b.hparams
    (1, 2, False, {'a': 1, 'b': 2})
    """

    def save_hyperparameters(self, ignore: Collection[str] = ()) -> None:
        """Sets an attribute for each argument of the method that calls this, and `hparams` to all of them.

        Args:
          ignore: names of arguments that are not saved.
        """
        frame: Any = inspect.currentframe()
        caller = inspect.getargvalues(frame.f_back)
        names = [*caller.args[1:], *filter(None, (caller.varargs, caller.keywords))]  # without self
        self.hparams = {name: caller.locals[name] for name in names if name not in ignore}
        for name, value in self.hparams.items():
            setattr(self, name, value)


class ProgressBoard(HyperParameters):
    """Curves that grow in a notebook while training goes on (D2L section 3.2.1).

    Outside a notebook, and with `display=False`, points are kept and nothing is drawn.

    Args:
      xlabel, ylabel: names of the axes.
      xlim, ylim: (lowest, highest) value of an axis; None for those of the points.
      xscale, yscale: "linear" or "log".
      figsize: width and height in inches.
      display: whether to draw in a notebook.

    Attributes:
      points: the drawn points (x, y) of each label.

    >>> board = ProgressBoard(xlabel="x")
    >>> for x in range(4):
    ...     board.draw(x, x**2, "square", every_n=2)
    >>> board.points
    {'square': [(0.5, 0.5), (2.5, 6.5)]}
    """

    def __init__(
        self,
        xlabel: str | None = None,
        ylabel: str | None = None,
        xlim: Sequence[float] | None = None,
        ylim: Sequence[float] | None = None,
        xscale: str = "linear",
        yscale: str = "linear",
        *,
        figsize: tuple[float, float] = (4.4, 2.8),
        display: bool = True,
    ):
        self.xlabel, self.ylabel, self.xlim, self.ylim = xlabel, ylabel, xlim, ylim
        self.xscale, self.yscale, self.figsize, self.display = xscale, yscale, figsize, display
        self.clear()

    def clear(self) -> None:
        """Forgets all points: what is drawn next is a new figure."""
        self.points = dict[str, list[tuple[float, float]]]()
        self._waiting = dict[str, list[tuple[float, float]]]()
        self._shown: Any = None  # the handle of the output in the notebook

    def draw(self, x: Any, y: Any, label: str, every_n: int = 1) -> None:
        """Adds the point (x, y), scalars, to the line of that label.

        Args:
          every_n: points whose means are drawn as one.
        """
        waiting = self._waiting.setdefault(label, [])
        waiting.append((float(x), float(y)))
        if len(waiting) < every_n:
            return
        across, up = np.mean(waiting, axis=0)
        self.points.setdefault(label, []).append((float(across), float(up)))
        waiting.clear()
        self._show()

    def svg(self) -> str:
        """The curves as an SVG image.

        Raises:
          InputError: for an `xscale` or a `yscale` that is neither "linear" nor "log".
        """
        for name in ("xscale", "yscale"):
            if getattr(self, name) not in _SCALES:
                raise InputError(f"ProgressBoard.{name}={getattr(self, name)!r}: use {' or '.join(_SCALES)}")
        logarithmic = self.xscale == "log", self.yscale == "log"
        return chart.live(self.points, self.xlabel or "", self.ylabel or "", (self.xlim, self.ylim), logarithmic)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """What a notebook shows: as an image, for the styles of an inline SVG would apply to the whole page."""
        last = ", ".join(f"{label} {points[-1][1]:.4g}" for label, points in self.points.items())
        width, height = (f"{inches * _PIXELS_PER_INCH:.0f}" for inches in self.figsize)
        data = base64.b64encode(self.svg().encode()).decode()
        image = render("image.html", width=width, height=height, label=last, data=data)
        return {"text/html": image, "text/plain": last}

    def _show(self) -> None:
        if not (self.display and _in_notebook()):
            return
        if self._shown is None:
            display: Any = importlib.import_module("IPython.display").display
            self._shown = display(self, display_id=True)
        else:
            self._shown.update(self)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
