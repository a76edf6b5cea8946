"""The exact solution of a run, with the penalty and the parameters of the loss that it needs."""

import dataclasses
from collections.abc import Callable

from dpreg.config import Config
from dpreg.config.model import SEPARABLE_LOSSES
from dpreg.data.pipeline import CastSource
from dpreg.data.sources import RegressionData
from dpreg.errors import NoOptimumError
from dpreg.solvers.solution import Solution
from dpreg.solvers.solver import Solver
from dpreg.spelling import spell
from dpreg.tables.levels import BaseLevels
from dpreg.train.build import build_model
from dpreg.train.trainer import Trainer


def solve(
    config: Config,
    is_chosen: bool,
    trainer: Trainer,
    data: RegressionData,
    heartbeat: Callable[[], None],
    say: Callable[[str], None],
) -> tuple[Config, Solution]:
    """The config that was solved, and its solution.

    An estimated alpha becomes one of the config, and of the trainer's model.

    Args:
      is_chosen: whether dpreg chose the exact solver. Then a model without an optimum, because its features separate
        classes, is solved with a penalty.
      trainer: whose devices are used.
      heartbeat: see `Solver`.
      say: called with lines about what was chosen.

    Raises:
      InputError: as `Solver.solve`.
    """
    groups = None if config.group_column is None else data.train.group  # type: ignore[attr-defined]
    source, levels = CastSource(data.train, config.precision), BaseLevels.named(data.schema, config.base)
    offset = None if config.offset_column is None else data.num_inputs - 1  # the last column
    solver = Solver(source, trainer.mesh, config.num_shards, heartbeat, offset, levels, groups)
    try:
        solution = solver.solve(config)
    except NoOptimumError:
        if not is_chosen or config.l1 or config.l2 or config.loss not in SEPARABLE_LOSSES:
            raise
        # As scikit-learn's classifiers have by default; all levels of a category keep a weight then.
        config = dataclasses.replace(config, l2=1 / len(data.train), base=())
        solution = solver.solve(config)
        say(
            "no finite weights have the least loss, as where features separate two classes: solved with "
            f"{spell('l2', config.l2)}, which is 1 / rows; give another {spell('l2')} to choose"
        )
    if solution.alpha is not None:
        config = dataclasses.replace(config, negative_binomial_alpha=solution.alpha)
        trainer.prepare_model(build_model(config, data.num_inputs, data.num_targets), trains=False)
        say(f"the most likely {spell('negative_binomial_alpha')} is {solution.alpha:.6g}")
    return config, solution
