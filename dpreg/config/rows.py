"""Settings of the rows: the table, its columns, and synthetic rows."""

import dataclasses

from dpreg.config.formula import read_formula
from dpreg.config.settings import FILE, Settings, document, refuse, setting
from dpreg.errors import InputError, is_one_line
from dpreg.spelling import spell

MISSING = ("error", "drop", "mean")
TRANSFORMS = ("none", "log", "standardize", "labels")


@document
@dataclasses.dataclass(frozen=True)
class Columns(Settings):
    """The columns to read from a table, and how to convert them.

    >>> Columns(target=("price",), features=("carat", "color"), categorical=("color",)).used_columns
    ('carat', 'color', 'price')
    """

    target: tuple[str, ...] = setting(
        (),
        "Columns to predict, separated by commas. Default: the target of a TFDS dataset.",
        affects_result=True,
    )
    features: tuple[str, ...] = setting(
        (), "Columns to fit on, separated by commas. Default: all but the target.", affects_result=True
    )
    exclude: tuple[str, ...] = setting(
        (),
        "Columns that are no features, if features are not named; separated by commas. Default: none.",
        affects_result=True,
    )
    weight_column: str | None = setting(
        None, "Column of sample weights, 0 or more. Default: none.", affects_result=True
    )
    offset_column: str | None = setting(
        None,
        "Column that is added to the linear predictor, with a weight of 1, such as log(exposure), where exposure is a "
        "column; for exact solutions. Default: none.",
        affects_result=True,
    )
    group_column: str | None = setting(
        None,
        "Column of groups, such as customers: the rows of one are held out together, and exact solutions have standard "
        "errors for rows that are correlated within groups. Default: none.",
        affects_result=True,
    )
    categorical: tuple[str, ...] = setting(
        (),
        "Categorical features, one-hot encoded with one more column for other values. Default: none.",
        affects_result=True,
    )
    dates: tuple[str, ...] = setting(
        (),
        "Features that are dates or times, separated by commas; they become days since 1970-01-01. Default: none.",
        affects_result=True,
    )
    max_categories: int = setting(
        64,
        "Largest number of categories of a column; the most frequent ones are kept, and all others count as one.",
        affects_result=True,
        min=1,
    )
    missing: str = setting(
        "error",
        "Missing values: error; drop their rows; or replace them by the mean (features only).",
        affects_result=True,
        choices=MISSING,
    )
    standardize: bool | None = setting(
        None,
        "Scale numeric features to mean 0 and standard deviation 1 for the fit; reported parameters are in original "
        "units. Default: for tables, if there is an intercept.",
        affects_result=True,
    )
    intercept: bool = setting(True, "Whether a linear model has a bias.", affects_result=True)
    target_transform: str = setting(
        "none",
        "Transform of the target before the fit: none; log, its logarithm; standardize, to mean 0 and standard "
        "deviation 1; or labels, from text, true and false or whole numbers to 0, 1 and so on. Default: none; for "
        "tables, labels for the losses logistic and softmax, and standardize for an mlp whose loss is one of "
        "differences.",
        affects_result=True,
        choices=TRANSFORMS,
    )
    validation_fraction: float = setting(
        0.1,
        "Fraction of rows held out for validation if no other validation rows are given, below 1.",
        affects_result=True,
        min=0,
        lt=1,
    )
    formula: str | None = setting(
        None,
        "Formula of the features, such as 'price ~ carat * color + bs(depth, df=4) + log(x)', in place of features. "
        "Default: none.",
        affects_result=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.formula is None:
            return
        formula = read_formula(self.formula)
        if formula.target is not None:
            if self.target not in ((), (formula.target,)):
                self._refuse("formula", f"its target is not {spell('target', self.target)}; leave one out")
            object.__setattr__(self, "target", (formula.target,))
        if formula.log_target:
            if self.target_transform not in ("none", "log"):
                self._refuse("formula", f"it has {spell('target_transform', 'log')}; leave one out")
            object.__setattr__(self, "target_transform", "log")
        object.__setattr__(self, "intercept", self.intercept and formula.intercept)

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The names of the features, targets, and weight."""
        return (*self.features, *self.target, *((self.weight_column,) if self.weight_column else ()))

    @property
    def standardizes(self) -> bool:
        """Whether numeric features are standardized. Without an intercept they are not: centred columns need one."""
        return self.intercept and self.standardize is not False


@dataclasses.dataclass(frozen=True)
class RowSettings(Columns):
    """The rows to fit, their order, and the size of the batches."""

    dataset: str = setting(
        "synthetic",
        "Rows to fit: synthetic, tfds:NAME, or the file, pattern or folder of a table (.csv, also .gz, .bz2 or .zst; "
        ".parquet, .npz, .npy).",
        affects_result=True,
        completions=("synthetic", FILE),
    )
    data_dir: str | None = setting(
        None,
        "Folder of prepared TFDS datasets. Default: that of TFDS, ~/tensorflow_datasets.",
        completions=(FILE,),
    )
    validation_dataset: str | None = setting(
        None,
        "A table of validation rows. Default: a fraction of the dataset, see validation_fraction.",
        affects_result=True,
        completions=(FILE,),
    )
    cache_dir: str | None = setting(
        None, "Folder that caches converted tables. Default: ~/.cache/dpreg/tables.", completions=(FILE,)
    )
    w: tuple[float, ...] = setting(
        (2.0, -3.4), "True weights of the synthetic rows, one per feature, separated by commas."
    )
    b: float = setting(4.2, "True bias of the synthetic rows.")
    noise: float = setting(0.01, "Standard deviation of the noise in the synthetic targets.", min=0)
    num_train: int = setting(1000, "Synthetic rows to fit.", min=1)
    num_val: int = setting(1000, "Synthetic rows held out for validation.", min=0)
    batch_size: int = setting(
        32, "Rows of a global batch, over all devices; a multiple of num_shards.", affects_result=True, min=1
    )
    base: tuple[str, ...] = setting(
        (),
        "Base levels of categorical features, as column:level, separated by commas: exact solutions without a penalty "
        "give coefficients relative to them. Default: the most frequent level of each.",
        affects_result=True,
    )
    seed: int = setting(
        0,
        "Seed of synthetic rows, initial parameters, the order of rows, and dropout.",
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
            raise InputError(f"{both}: these are too many rows; use fewer than {2**31:,} in total")
        if self.dataset == "synthetic":
            self._check_synthetic()
        for name in ("dataset", "validation_dataset", "data_dir", "cache_dir"):
            check_path(name, getattr(self, name), is_local=name == "cache_dir")

    def _check_synthetic(self) -> None:
        """Refuses settings that apply only to tables."""
        if self.standardize:
            self._refuse("standardize", "synthetic rows have mean 0 and standard deviation 1 already; leave it out")
        of_columns = ("formula", "target", "features", "exclude", "categorical", "dates", "weight_column", "base")
        for name in (*of_columns, "offset_column", "group_column", "validation_dataset"):
            if getattr(self, name):
                self._refuse(name, f"it applies only to tables; name one with {spell('dataset')}, or leave it out")
        if self.target_transform != "none":
            remedy = f"name one with {spell('dataset')}, or leave it out"
            self._refuse("target_transform", f"it applies only to tables; {remedy}")


def check_path(name: str, path: str | None, is_local: bool) -> None:
    """Refuses a path with characters that cannot be printed, and with `is_local` the URL of other storage."""
    if not is_one_line(path or ""):
        refuse(name, path, "has characters that cannot be printed; rename it")
    if is_local and "://" in (path or ""):
        refuse(name, path, "is not a path of this machine; mount that storage, and use the path of its folder")
