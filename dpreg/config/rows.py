"""Settings of the rows: what to take from a table, which table, and synthetic rows."""

import dataclasses

from dpreg.config.settings import FILE, Settings, document, refuse, setting
from dpreg.errors import InputError, is_one_line
from dpreg.spelling import spell

MISSING = ("error", "drop", "mean")
TRANSFORMS = ("none", "log", "standardize")


@document
@dataclasses.dataclass(frozen=True)
class Columns(Settings):
    """What to take from a table, and how.

    >>> Columns(target=("price",), features=("carat", "color"), categorical=("color",)).used_columns
    ('carat', 'color', 'price')
    """

    target: tuple[str, ...] = setting(
        (),
        "Column to predict; several separated by commas. Default: as a TFDS dataset says.",
        affects_result=True,
    )
    features: tuple[str, ...] = setting(
        (), "Columns to fit on, separated by commas. Default: all but the target.", affects_result=True
    )
    exclude: tuple[str, ...] = setting(
        (),
        "Columns not to fit on, if features are not named; separated by commas. Default: none.",
        affects_result=True,
    )
    weight_column: str | None = setting(
        None, "Column of sample weights, 0 or more. Default: all rows weigh 1.", affects_result=True
    )
    categorical: tuple[str, ...] = setting(
        (),
        "Features that are categories: a column of 0 and 1 for each, and one for all others. Default: none.",
        affects_result=True,
    )
    dates: tuple[str, ...] = setting(
        (),
        "Features that are dates or times, separated by commas: in days since the beginning of 1970. Default: none.",
        affects_result=True,
    )
    max_categories: int = setting(
        64,
        "Most categories of a column: the most frequent ones; all others count as one.",
        affects_result=True,
        min=1,
    )
    missing: str = setting(
        "error",
        "What to do with missing values: error; drop their rows; or use the mean (features only).",
        affects_result=True,
        choices=MISSING,
    )
    standardize: bool | None = setting(
        None,
        "Fit on numeric features of mean 0 and standard deviation 1; reported parameters are in original units. "
        "Default: tables only, with an intercept.",
        affects_result=True,
    )
    intercept: bool = setting(True, "Whether a linear model has a bias.", affects_result=True)
    target_transform: str = setting(
        "none",
        "How the target is transformed before the fit: none; log, to its logarithm; or standardize, to mean 0 and "
        "standard deviation 1. Default: none; standardize for an mlp whose loss is one of differences.",
        affects_result=True,
        choices=TRANSFORMS,
    )
    validation_fraction: float = setting(
        0.1,
        "Share of a table's rows held out, under 1; not with validation_dataset or a TFDS split for it.",
        affects_result=True,
        min=0,
        lt=1,
    )

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The columns that are read: features, targets, weight."""
        return (*self.features, *self.target, *((self.weight_column,) if self.weight_column else ()))

    @property
    def standardizes(self) -> bool:
        """Whether numeric features are scaled; what is centred has an intercept."""
        return self.intercept and self.standardize is not False


@dataclasses.dataclass(frozen=True)
class RowSettings(Columns):
    """Which rows to fit, in what order and in batches of which size."""

    dataset: str = setting(
        "synthetic",
        "What to fit: synthetic, tfds:NAME, or a table (.csv, also .gz, .bz2 or .zst; .parquet, .npz, .npy): file, "
        "pattern or folder.",
        affects_result=True,
        completions=("synthetic", FILE),
    )
    data_dir: str | None = setting(
        None,
        "Folder where TFDS datasets are prepared. Default: TFDS's own, ~/tensorflow_datasets.",
        completions=(FILE,),
    )
    validation_dataset: str | None = setting(
        None,
        "A table whose rows are held out for validation. Default: a share of the rows, by validation_fraction.",
        affects_result=True,
        completions=(FILE,),
    )
    cache_dir: str | None = setting(
        None, "Folder for tables that were read once. Default: ~/.cache/dpreg/tables.", completions=(FILE,)
    )
    w: tuple[float, ...] = setting(
        (2.0, -3.4), "True weights of the synthetic rows, one a feature, separated by commas."
    )
    b: float = setting(4.2, "True bias of the synthetic rows.")
    noise: float = setting(0.01, "Standard deviation of the noise in the synthetic targets.", min=0)
    num_train: int = setting(1000, "Synthetic rows to fit.", min=1)
    num_val: int = setting(1000, "Synthetic rows held out for validation.", min=0)
    batch_size: int = setting(
        32, "Rows of a global batch, over all devices: a multiple of num_shards.", affects_result=True, min=1
    )
    seed: int = setting(
        0,
        "Decides synthetic rows, initial parameters, the order of rows and dropout.",
        affects_result=True,
        min=0,
        lt=2**31,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.w:
            self._refuse("w", f"give at least one weight, such as {spell('w', (2, -3.4))}")
        if self.num_train + self.num_val >= 2**31:
            both = f"{spell('num_train', self.num_train)} {spell('num_val', self.num_val)}"
            raise InputError(f"{both}: these are too many rows; use fewer than {2**31:,}")
        if self.dataset == "synthetic":
            self._check_synthetic()
        for name in ("dataset", "validation_dataset", "data_dir", "cache_dir"):
            check_path(name, getattr(self, name), is_local=name == "cache_dir")

    def _check_synthetic(self) -> None:
        """Refuses settings of tables."""
        if self.standardize:
            self._refuse("standardize", "synthetic rows have mean 0 and standard deviation 1 already; leave it out")
        for name in ("target", "features", "exclude", "categorical", "dates", "weight_column", "validation_dataset"):
            if getattr(self, name):
                self._refuse(name, f"it is for tables; name one with {spell('dataset')}, or leave it out")
        if self.target_transform != "none":
            self._refuse("target_transform", f"it is for tables; name one with {spell('dataset')}, or leave it out")


def check_path(name: str, path: str | None, is_local: bool) -> None:
    """Refuses a path that cannot be printed in one line, or is not of this machine where it has to be."""
    if not is_one_line(path or ""):
        refuse(name, path, "has characters that cannot be printed; rename it")
    if is_local and "://" in (path or ""):
        refuse(name, path, "is not a path of this machine; mount that storage, and use the path of its folder")
