"""Uncorrelated features in place of those of the rows, for solvers that need well-conditioned problems."""

import dataclasses

import numpy as np

from dpreg.solvers.fit import Fit
from dpreg.solvers.tsqr import RFactor


@dataclasses.dataclass(frozen=True)
class Basis:
    """Features (x - mean)[:, kept] @ along, [n, k], in place of features x [n, d].

    Attributes:
      fit: the least squares of the rows.
      kept: [k] the columns of x that are used; all others are constant, or combinations of these.
      along: [k, k].
    """

    fit: Fit
    kept: np.ndarray
    along: np.ndarray

    @property
    def triangle(self) -> RFactor:
        """That of the rows."""
        return self.fit.triangle

    @property
    def size(self) -> int:
        """The number of features, k."""
        return len(self.kept)

    def features(self, x: np.ndarray) -> np.ndarray:
        """[n, d] -> [n, k] float64."""
        centred: np.ndarray = x[:, self.kept] - self.fit.means[self.kept]
        return centred if self.fit.l2 else centred @ self.along

    def theta(self, w: np.ndarray, b: float) -> np.ndarray:
        """The parameters [1 + k] for these features of w [d] and b."""
        return np.append(b + self.fit.means @ w, np.linalg.solve(self.along, w[self.kept]))

    def parameters(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """W [d, p] of the least norm, and b [p], of the parameters theta [1 + k, p] for these features."""
        w = np.zeros((self.triangle.num_inputs, theta.shape[1]))
        w[self.kept] = self.along @ theta[1:]
        w = w if self.fit.l2 else self.fit.shared(w)
        return w, theta[0] - self.fit.means @ w
