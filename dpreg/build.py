"""From a Config to the parts of a run, for every door."""

from dpreg.config import Config
from dpreg.data.sources import RegressionData
from dpreg.data.synthetic import SyntheticRegressionData
from dpreg.data.tables import read_table
from dpreg.data.tfds import read_tfds
from dpreg.models.linear import LinearRegressionScratch
from dpreg.trainer import Observer, Trainer


def build_data(config: Config) -> RegressionData:
    """The rows that the config names."""
    if config.dataset == "synthetic":
        return SyntheticRegressionData(
            config.w, config.b, config.noise, config.num_train, config.num_val, config.batch_size, config.seed
        )
    if config.dataset.startswith("tfds:"):
        return read_tfds(
            config.dataset.removeprefix("tfds:"),
            config.target,
            config.features,
            data_dir=config.data_dir,
            batch_size=config.batch_size,
            validation_fraction=config.validation_fraction,
            standardize=bool(config.standardize),
        )
    return read_table(
        config.dataset,
        config.target,
        config.features,
        batch_size=config.batch_size,
        validation_fraction=config.validation_fraction,
        standardize=config.standardize is not False,
    )


def build_model(config: Config, data: RegressionData) -> LinearRegressionScratch:
    """The model for these rows."""
    return LinearRegressionScratch(data.num_inputs, config.lr, config.sigma, data.num_targets)


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
