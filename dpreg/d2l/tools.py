"""The utilities of D2L section 3.2.1: `add_to_class`, `HyperParameters` and `ProgressBoard`."""

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
    """A decorator that adds a function to a class as a method, also for existing objects (D2L section 3.2.1).

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
        # Flax wraps the methods of a class statement in the same way; otherwise `nn.compact` has no effect.
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
        """Saves each argument of the calling method as an attribute, and all of them as `hparams`.

        Args:
          ignore: the names of arguments that are not saved.
        """
        frame: Any = inspect.currentframe()
        caller = inspect.getargvalues(frame.f_back)
        names = [*caller.args[1:], *filter(None, (caller.varargs, caller.keywords))]  # without self
        self.hparams = {name: caller.locals[name] for name in names if name not in ignore}
        for name, value in self.hparams.items():
            setattr(self, name, value)


class ProgressBoard(HyperParameters):
    """Draws curves in a notebook while a model is trained (D2L section 3.2.1).

    Outside a notebook, and with `display=False`, it collects points and draws nothing.

    Args:
      xlabel, ylabel: the labels of the axes.
      xlim, ylim: the (lowest, highest) value of an axis; None for those of the points.
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
        """Deletes all points; the next point starts a new figure."""
        self.points = dict[str, list[tuple[float, float]]]()
        self._pending = dict[str, list[tuple[float, float]]]()
        self._handle: Any = None  # the display handle of the output in the notebook

    def draw(self, x: Any, y: Any, label: str, every_n: int = 1) -> None:
        """Adds the point (x, y), two scalars, to the curve `label`.

        Args:
          x: the position.
          y: the value.
          label: the label of the curve.
          every_n: the number of consecutive points that are averaged and drawn as one.
        """
        pending = self._pending.setdefault(label, [])
        pending.append((float(x), float(y)))
        if len(pending) < every_n:
            return
        mean_x, mean_y = np.mean(pending, axis=0)
        self.points.setdefault(label, []).append((float(mean_x), float(mean_y)))
        pending.clear()
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
        """The output in a notebook: an image, as the styles of an inline SVG would apply to the whole page."""
        last = ", ".join(f"{label} {points[-1][1]:.4g}" for label, points in self.points.items())
        width, height = (f"{inches * _PIXELS_PER_INCH:.0f}" for inches in self.figsize)
        data = base64.b64encode(self.svg().encode()).decode()
        image = render("image.html", width=width, height=height, label=last, data=data)
        return {"text/html": image, "text/plain": last}

    def _show(self) -> None:
        if not (self.display and _in_notebook()):
            return
        if self._handle is None:
            display: Any = importlib.import_module("IPython.display").display
            self._handle = display(self, display_id=True)
        else:
            self._handle.update(self)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None
