"""Whether the parameters of a linear model are near the optimum of its loss."""

import jax
import jax.numpy as jnp
import numpy as np

from dpreg.config import Config
from dpreg.models.losses import Loss

_AT_REST = 0.1  # the largest ratio of the gradient to the sum of the absolute gradients of the rows
_SMALL = 5e-2  # or to that sum for the model that predicts 0
_ANGLED = ("absolute", "quantile")  # losses whose gradient jumps at an optimum, by that of as many rows as parameters


def is_near_optimum(
    loss: Loss,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
    parameters: tuple[np.ndarray, np.ndarray],
    l1: float = Config.l1,
    l2: float = Config.l2,
) -> bool:
    """Whether the gradients of the rows of a linear model cancel in each parameter. It does not depend on any unit.

    Args:
      rows: x [n, d], y [n, t] and weight [n], as the model sees them.
      parameters: w [d, p] and b [p].
      l1, l2: of the penalties l1 sum |w| + l2 / 2 sum w^2.
    """
    (x, y, weight), (w, b) = rows, parameters
    share = weight / weight.sum(dtype=np.float64)
    a = np.concatenate([np.ones((len(x), 1)), x], axis=1, dtype=np.float64)
    target = jnp.asarray(y, jnp.float32)

    def pulls(prediction: np.ndarray) -> np.ndarray:
        of_rows = jax.grad(lambda z: loss.rows(z, target).sum())(jnp.asarray(prediction, jnp.float32))
        weighted: np.ndarray = share[:, None] * np.asarray(of_rows, np.float64)
        return weighted

    at, at_zero = pulls(x @ w + b), pulls(np.zeros((len(x), len(b))))
    gradient, size, before = a.T @ at, np.abs(a).T @ np.abs(at), np.abs(a).T @ np.abs(at_zero)
    smooth = gradient[1:] + l2 * w
    gradient[1:] = np.where(w != 0, smooth + l1 * np.sign(w), np.sign(smooth) * np.maximum(np.abs(smooth) - l1, 0))
    size[1:] += l2 * np.abs(w) + l1
    jump = 2 * len(a.T) / len(x) if loss.name in _ANGLED else 0.0
    return bool((np.abs(gradient) <= np.maximum(max(_AT_REST, jump) * size, _SMALL * before)).all())
