"""Optimizers by name, with penalties and learning-rate schedules."""

import jax
import jax.numpy as jnp
import optax

from dpreg.config import Config
from dpreg.models.sgd import SGD

_MOMENTUM = 0.9


def make_schedule(name: str, lr: float, num_steps: int, warmup_steps: int = Config.warmup_steps) -> optax.Schedule:
    """The learning rate of each global step: a linear warm-up from 0 to `lr`, followed by the named schedule.

    Args:
      name: "constant"; "linear" or "cosine", to 0 at the end of the run; or "inverse_sqrt", lr sqrt(s / step) with s
        the end of the warm-up (Vaswani et al. 2017).
      lr: the learning rate after the warm-up.
      num_steps: the number of global steps of the run.
      warmup_steps: the number of global steps of the warm-up; 0 for none.
    """
    rest, start = max(1, num_steps - warmup_steps), float(max(1, warmup_steps))
    after: optax.Schedule = {
        "constant": optax.constant_schedule(lr),
        "linear": optax.linear_schedule(lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(lr, rest),
        "inverse_sqrt": lambda count: lr * jnp.sqrt(start / (start + jnp.asarray(count, jnp.float32))),
    }[name]
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), after], [warmup_steps])


def make_optimizer(
    name: str, schedule: optax.Schedule | float, l1: float = Config.l1, l2: float = Config.l2
) -> optax.GradientTransformation:
    """The optimizer of a name in `Config.optimizer`; "momentum" uses 0.9, and "lbfgs" a memory of 10 steps.

    Args:
      name: such as "adam".
      schedule: the learning rate, constant or a function of the global step.
      l1: the factor of the penalty l1 sum |w| on the mean loss, by a proximal step of the learning rate (Duchi and
        Singer 2009), so that weights become exactly 0; only for "sgd", whose steps are proportional to the gradient.
      l2: the factor of the penalty l2 / 2 sum w^2 on the mean loss, added to the gradient (D2L section 3.7); decoupled
        for "adamw". Neither penalty applies to biases: only matrices are penalised.
    """
    if name == "sgd" and not callable(schedule):
        inner = SGD(schedule)
    elif name == "lbfgs":
        # Parameters as one vector: products of matrices would be compiled differently for one and several devices.
        inner = optax.flatten(optax.chain(optax.scale_by_lbfgs(), optax.scale_by_learning_rate(schedule)))
    elif name == "adamw":
        inner = optax.adamw(schedule, weight_decay=l2, mask=_matrices)
    else:
        inner = {
            "sgd": lambda: optax.sgd(schedule),
            "momentum": lambda: optax.sgd(schedule, momentum=_MOMENTUM),
            "adam": lambda: optax.adam(schedule),
        }[name]()
    parts = [inner]
    if l2 and name != "adamw":
        parts.insert(0, optax.add_decayed_weights(l2, mask=_matrices))
    if l1:
        parts.append(optax.masked(_soft_threshold(schedule, l1), _matrices))
    return optax.chain(*parts) if len(parts) > 1 else inner


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _soft_threshold(schedule: optax.Schedule | float, l1: float) -> optax.GradientTransformation:
    """The proximal step of l1 sum |w| after an update."""

    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: optax.ScaleByScheduleState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        threshold = l1 * (schedule(state.count) if callable(schedule) else schedule)

        def shrunk(step: jax.Array, param: jax.Array) -> jax.Array:
            moved = param + step
            return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0) - param

        return jax.tree.map(shrunk, updates, params), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(init, update)
