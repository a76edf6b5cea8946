"""From a Config to the parts of a run, for every door."""

import jax

from dpreg.config import Config
from dpreg.data.ingest import Progress, read_table
from dpreg.data.sources import RegressionData
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.data.tables import Table, open_table
from dpreg.data.tfds import open_tfds
from dpreg.models.linear import LinearRegressionScratch
from dpreg.parallel import processes
from dpreg.trainer import Observer, Trainer

_INGEST_SECONDS = 24 * 3600.0  # that the others wait for process 0; they say so now and then


def build_data(config: Config, progress: Progress = lambda what, rows: None) -> RegressionData:
    """The rows that the config names; of a table, process 0 reads them, and the others where they see no cache of it.

    Args:
      progress: told what goes on with a table, see `dpreg.data.ingest.read_table`.
    """
    if config.dataset == "synthetic":
        return SyntheticRegressionData(
            config.w, config.b, config.noise, config.num_train, config.num_val, config.batch_size, config.seed
        )

    def read() -> RegressionData:
        return read_table(
            config.dataset,
            config.columns(),
            batch_size=config.batch_size,
            validation_dataset=config.validation_dataset,
            data_dir=config.data_dir,
            cache_dir=config.cache_dir,
            progress=progress,
        )

    first = read() if jax.process_index() == 0 else None
    processes.exchange(patience=_INGEST_SECONDS)
    return first or read()


def open_dataset(config: Config) -> Table:
    """The table that the config names; of a TFDS dataset the split to hold out, where there is one."""
    if not config.dataset.startswith("tfds:"):
        return open_table(config.dataset)
    train, held_out, *_ = open_tfds(config.dataset.removeprefix("tfds:"), config.data_dir)
    return held_out or train


def build_model(config: Config, num_inputs: int, num_targets: int) -> LinearRegressionScratch:
    """The model for rows of so many columns."""
    return LinearRegressionScratch(num_inputs, config.lr, config.sigma, num_targets)


def build_trainer(config: Config, observers: tuple[Observer, ...] = ()) -> Trainer:
    """The trainer on the config's devices."""
    return Trainer(
        config.max_epochs,
        config.num_devices,
        config.gradient_clip_val,
        num_shards=config.num_shards,
        reduction=config.reduction,
        backend=config.backend,
        placement=config.placement,
        seed=config.seed,
        platform=config.platform,
        log_every_steps=config.log_every_steps,
        audit=config.audit,
        observers=observers,
    )
