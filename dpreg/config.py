"""What a run is: one frozen dataclass, filled from absl flags. No JAX, and nothing else reads flags."""

import csv
import dataclasses
import inspect
import io
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from absl import flags

from dpreg.errors import InputError, is_one_line

T = TypeVar("T")

SOLVERS = ("sgd", "exact", "irls")
MODES = ("train", "evaluate", "predict", "doctor")
OUTPUTS = (".csv", ".parquet")
LOSSES = ("squared", "huber", "absolute", "quantile", "logistic", "softmax", "poisson", "gamma")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "lbfgs")
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")
MODELS = ("linear", "concise", "mlp")
PRECISIONS = ("float32", "bfloat16", "float64")
REDUCTIONS = ("pmean", "ordered")
BACKENDS = ("jit", "pmap")
PLACEMENTS = ("auto", "device", "host")
ACTIVATIONS = ("relu", "tanh", "gelu", "sigmoid")
MISSING = ("error", "drop", "mean")
TRANSFORMS = ("none", "log", "standardize")
A_FILE = "FILE"  # among what a value may be: any file or folder


# What --help shows: the flags that most runs need. --helpfull shows all.
COMMON = {
    "Rows": (
        *("dataset", "target", "features", "categorical", "weight_column", "missing", "validation_fraction"),
        *("num_train", "num_val", "batch_size", "seed"),
    ),
    "Model": ("model", "loss", "l2", "solver"),
    "Steps": ("optimizer", "lr", "lr_schedule", "max_epochs", "patience"),
    "Devices": ("platform", "num_devices", "num_shards", "reduction", "precision"),
    "Run": ("mode", "workdir", "output", "resume", "checkpoint_every_seconds"),
}

# Of what decides the answer, that which --mode=evaluate and predict take from the flags where they are given.
_ASKED = ("dataset", "batch_size", "missing")


def _flag(
    default: Any,
    help: str,
    decides: bool = False,
    who: bool = False,
    of: tuple[str, ...] = (),
    such_as: tuple[str, ...] = (),
    least: int | None = None,
    above: int | None = None,
    under: int | None = None,
) -> Any:
    """A field and its flag, with the values that it may have.

    Args:
      decides: whether another value is another answer.
      who: whether it says who asks.
      of: the names that it may be; least, above, under: bounds of numbers, each of several.
      such_as: names that a shell offers, where others may hold as well, or are refused elsewhere.
    """
    bounds = {"of": of, "least": least, "above": above, "under": under}
    about = {"help": help, "decides": decides, "who": who, "such_as": such_as or of}
    return dataclasses.field(default=default, metadata=about | bounds)


def _told(flags: type[T]) -> type[T]:
    """Lists in its docstring what each field of a class of flags is: for help() and the reference."""
    fields = (field for field in dataclasses.fields(cast(Any, flags)) if field.metadata)
    told = "".join(f"\n  {field.name}: {field.metadata['help']}" for field in fields)
    if flags.__doc__:  # not under python -OO
        flags.__doc__ = f"{inspect.cleandoc(flags.__doc__)}\n\nAttributes:{told}\n"
    return flags


@_told
@dataclasses.dataclass(frozen=True)
class Columns:
    """What to take from a table, and how: each field is the flag of the same name.

    >>> Columns(target=("price",), features=("carat", "color"), categorical=("color",)).taken
    ('carat', 'color', 'price')
    """

    target: tuple[str, ...] = _flag(
        (),
        "Column to predict; several separated by commas. Default: as a TFDS dataset says.",
        decides=True,
    )
    features: tuple[str, ...] = _flag(
        (), "Columns to fit on, separated by commas. Default: all but the target.", decides=True
    )
    exclude: tuple[str, ...] = _flag(
        (), "Columns not to fit on, where --features names none; separated by commas. Default: none.", decides=True
    )
    weight_column: str | None = _flag(
        None, "Column of sample weights, 0 or more. Default: all rows weigh 1.", decides=True
    )
    categorical: tuple[str, ...] = _flag(
        (),
        "Features of categories: a column of 0 and 1 for each, and one for all others. Default: none.",
        decides=True,
    )
    dates: tuple[str, ...] = _flag(
        (),
        "Features that are dates or times, separated by commas: in days since the beginning of 1970. Default: none.",
        decides=True,
    )
    max_categories: int = _flag(
        64, "Categories of a column that are told apart: the most frequent; all others are one.", decides=True, least=1
    )
    missing: str = _flag(
        "error", "Values that are missing: error, drop the row, or the mean (of features).", decides=True, of=MISSING
    )
    standardize: bool | None = _flag(
        None,
        "Fit on numeric features of mean 0 and standard deviation 1; reported parameters are in original units. "
        "Default: tables only, with an intercept.",
        decides=True,
    )
    intercept: bool = _flag(True, "Whether a linear model has a bias.", decides=True)
    target_transform: str = _flag(
        "none",
        "What is done to the target before the fit: none; log, to its logarithm; or standardize, to mean 0 and "
        "standard deviation 1.",
        decides=True,
        of=TRANSFORMS,
    )
    validation_fraction: float = _flag(
        0.1,
        "Share of a table's rows held out, under 1; not with --validation_dataset or a TFDS split for it.",
        decides=True,
        least=0,
        under=1,
    )

    def __post_init__(self) -> None:
        for name in ("target", "features", "exclude", "categorical", "dates"):
            if isinstance(getattr(self, name), str):
                self._refuse(name, "give a tuple of names")
        for field in dataclasses.fields(self):
            if field.metadata:
                self._check_value(field.name, field.metadata)

    @property
    def taken(self) -> tuple[str, ...]:
        """The columns that are read: features, targets, weight."""
        return (*self.features, *self.target, *((self.weight_column,) if self.weight_column else ()))

    @property
    def standardizes(self) -> bool:
        """Whether numeric features are scaled; what is centred has an intercept."""
        return self.intercept and self.standardize is not False

    def _check_value(self, name: str, allowed: Mapping[str, Any]) -> None:
        """Refuses a value that the field does not have, whatever the others are."""
        value = getattr(self, name)
        of, least, above, under = (allowed[key] for key in ("of", "least", "above", "under"))
        if of and value is not None and value not in of:
            self._refuse(name, f"use {', '.join(of[:-1])} or {of[-1]}")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, (int, float)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                self._refuse(name, "use a finite number")
            if least is not None and number < least:
                self._refuse(name, f"use {least} or more")
            if above is not None and number <= above:
                self._refuse(name, f"use a value above {above}")
            if under is not None and number >= under:
                self._refuse(name, f"use a value under {under:,}")

    def _refuse(self, name: str, remedy: str) -> None:
        raise InputError(f"--{name}={_text(getattr(self, name))}: {remedy}")


@_told
@dataclasses.dataclass(frozen=True)
class Config(Columns):
    """A run, by its flags: each field is the flag of the same name. The defaults are those of D2L section 3.4.

    Raises:
      InputError: for a value that no run can have; names the flag.
    """

    mode: str = _flag(
        "train",
        "train; evaluate or predict: the workdir's model on the rows of --dataset; "
        "doctor: whether a run could start here, and what keeps it from it.",
        of=MODES,
    )
    dataset: str = _flag(
        "synthetic",
        "What to fit: synthetic, tfds:NAME, or a table (.csv, also .gz, .bz2 or .zst; .parquet, .npz, .npy): file, "
        "pattern or folder.",
        decides=True,
        such_as=("synthetic", A_FILE),
    )
    data_dir: str | None = _flag(
        None, "Folder where TFDS datasets are prepared. Default: TFDS's own, ~/tensorflow_datasets.", such_as=(A_FILE,)
    )
    validation_dataset: str | None = _flag(
        None,
        "A table whose rows are held out for validation. Default: --validation_fraction of the rows.",
        decides=True,
        such_as=(A_FILE,),
    )
    output: str | None = _flag(
        None, "Where --mode=predict writes: a .csv or .parquet file. Default: none.", who=True, such_as=(A_FILE,)
    )
    cache_dir: str | None = _flag(
        None, "Folder where tables lie once they are read. Default: ~/.cache/dpreg/tables.", such_as=(A_FILE,)
    )
    w: tuple[float, ...] = _flag((2.0, -3.4), "True weights of the synthetic rows, one a feature, separated by commas.")
    b: float = _flag(4.2, "True bias of the synthetic rows.")
    noise: float = _flag(0.01, "Standard deviation of the noise in the synthetic targets.", least=0)
    num_train: int = _flag(1000, "Synthetic rows to fit.", least=1)
    num_val: int = _flag(1000, "Synthetic rows held out for validation.", least=0)
    model: str = _flag(
        "linear",
        "linear (from scratch), concise, mlp; or PACKAGE.MODULE:CLASS, a flax module.",
        decides=True,
        such_as=MODELS,
    )
    hidden: tuple[int, ...] = _flag(
        (64, 64), "Units of each hidden layer of an mlp, separated by commas.", decides=True, least=1
    )
    dropout: float = _flag(
        0.0,
        "Share of an mlp's hidden values left out in training, 0 or more and below 1.",
        decides=True,
        least=0,
        under=1,
    )
    batch_norm: bool = _flag(
        False,
        "Normalise an mlp's hidden values by the mean and variance of the rows of a shard in each batch.",
        decides=True,
    )
    sync_batch_norm: bool = _flag(
        False,
        "With --batch_norm: by those of all rows of each batch; devices then meet in every layer. Not ordered.",
        decides=True,
    )
    activation: str = _flag(
        "relu", f"Activation of an mlp's hidden layers: {', '.join(ACTIVATIONS)}.", decides=True, of=ACTIVATIONS
    )
    solver: str = _flag(
        "sgd",
        "sgd, as --optimizer says; exact: least squares in one pass over the rows, in float64; "
        "irls: logistic or poisson in a few passes (Newton).",
        decides=True,
        of=SOLVERS,
    )
    optimality: bool = _flag(
        True,
        "Say how far a linear model is from the least squared loss there is: a pass over the training rows; not "
        "of more than 2048 features.",
    )
    loss: str = _flag("squared", f"{', '.join(LOSSES)}.", decides=True, of=LOSSES)
    huber_delta: float = _flag(
        1.0,
        "For --loss=huber: errors beyond it count in proportion, smaller ones by their square; in units of the target "
        "as it is fitted.",
        decides=True,
        above=0,
    )
    quantile: float = _flag(
        0.5, "Which quantile --loss=quantile fits, above 0 and below 1.", decides=True, above=0, under=1
    )
    num_classes: int = _flag(
        2, "How many labels --loss=softmax tells apart: 0 to num_classes - 1.", decides=True, least=2
    )
    optimizer: str = _flag(
        "sgd", f"{', '.join(OPTIMIZERS)}; all but sgd (from scratch) are optax's.", decides=True, of=OPTIMIZERS
    )
    lr_schedule: str = _flag(
        "constant",
        f"How the learning rate goes on after --warmup_steps: {', '.join(SCHEDULES)}.",
        decides=True,
        of=SCHEDULES,
    )
    warmup_steps: int = _flag(
        0, "Steps in which the learning rate rises from 0; 0 for none.", decides=True, least=0, under=2**31
    )
    l1: float = _flag(
        0.0,
        "Weight of a penalty on the loss, the sum of |w|, not of biases; with --optimizer=sgd.",
        decides=True,
        least=0,
    )
    l2: float = _flag(
        0.0,
        "Weight of a penalty on the loss, the sum of w^2 / 2, not of biases (weight decay).",
        decides=True,
        least=0,
    )
    lr: float = _flag(
        0.03,
        "Learning rate, per step of the global batch.",
        decides=True,
        above=0,
    )
    sigma: float | None = _flag(
        None,
        "Standard deviation of the initial weights, of --model=linear and concise. Default: 0.01 for synthetic rows; 0 "
        "for tables, so that no prediction depends on an initial weight that the rows say nothing about.",
        decides=True,
        least=0,
    )
    batch_size: int = _flag(
        32, "Rows of a global batch, over all devices: a multiple of num_shards.", decides=True, least=1
    )
    accumulate_steps: int = _flag(
        1, "Batches whose gradients are added up for one step, as if they were one.", decides=True, least=1
    )
    max_epochs: int = _flag(3, "How often every row is used.", least=1)
    patience: int = _flag(
        0,
        "Epochs without a lower validation loss that end a run, with the best parameters; 0: none.",
        decides=True,
        least=0,
    )
    gradient_clip_val: float = _flag(
        0.0, "Largest norm of a step's gradient, to which longer ones are cut; 0 for no limit.", decides=True, least=0
    )
    seed: int = _flag(
        0,
        "Decides synthetic rows, initial parameters, the order of rows and dropout.",
        decides=True,
        least=0,
        under=2**31,
    )
    num_shards: int = _flag(8, "Logical shards; as many devices can share it.", decides=True, least=1)
    precision: str = _flag(
        "float32",
        "float32; float64, from the table to the result; or bfloat16 for features, and products where a chip gains.",
        decides=True,
        of=PRECISIONS,
    )
    reduction: str = _flag(
        "pmean",
        "pmean; or ordered: the same bits on any number of devices.",
        decides=True,
        of=REDUCTIONS,
    )
    backend: str = _flag(
        "jit", "How steps are compiled: jit (shard_map) or pmap; the results are the same.", of=BACKENDS
    )
    placement: str = _flag(
        "auto", "Where rows wait for their step: device, host, or auto: on devices if they fit.", of=PLACEMENTS
    )
    log_every_steps: int = _flag(0, "Steps between lines of metrics.jsonl; 0 for eight lines an epoch.", least=0)
    platform: str | None = _flag(None, "cpu, gpu or tpu. Default: the best there is.", of=("cpu", "gpu", "tpu"))
    num_devices: int | None = _flag(
        None, "Devices of this process; on cpu, as many are simulated. Default: all, up to num_shards.", least=1
    )
    coordinator_address: str | None = _flag(
        None,
        "HOST:PORT where process 0 of several serves; auto asks the cluster. Default: a single process, or auto in "
        "a step of Slurm or Open MPI.",
        who=True,
    )
    num_processes: int | None = _flag(
        None, "How many processes run this together. Default: as the cluster says, or one.", who=True, least=1
    )
    process_id: int | None = _flag(
        None, "Which of the processes this is, from 0. Default: as the cluster says, or 0.", who=True
    )
    checkpoint_every_seconds: float = _flag(60.0, "Seconds between checkpoints; 0 for none by time.", least=0)
    checkpoint_every_steps: int = _flag(0, "Steps between checkpoints; 0 to save by time only.", least=0)
    keep: int = _flag(3, "How many checkpoints to keep, the newest.", least=1)
    audit: bool = _flag(True, "Check each epoch that every row was used exactly once, over all processes.")
    profile: str | None = _flag(
        None,
        "START:STOP: trace from the one step to the other into the workdir's profile/ (TensorBoard, Perfetto). "
        "Default: none.",
    )
    tensorboard: bool = _flag(
        False, "Write the scalars of metrics.jsonl, and the flags, into the workdir's tensorboard/ as event files."
    )
    step_timeout: float | None = _flag(
        None,
        "Seconds without results after which a run ends as hung; 0 for never. "
        "Default: 120, or 20 times the slowest of late (600 for the first).",
        least=0,
    )
    resume: str = _flag(
        "auto",
        "auto: go on from the workdir's newest checkpoint, if any; must: or fail; never: start over.",
        of=("auto", "never", "must"),
    )
    workdir: str | None = _flag(
        None, "Folder for the outputs. Default: a new one in runs/, named by the time.", who=True, such_as=(A_FILE,)
    )
    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)  # no flag: those that were named

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.shared().items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (not is_one_line(text) or text != text.rstrip()):
                    self._refuse(
                        name, "no flagfile holds a line break, a blank at the end or other than UTF-8; rename it"
                    )
        if self.model not in MODELS and self.model.count(":") != 1:
            self._refuse("model", f"use {', '.join(MODELS)} or PACKAGE.MODULE:CLASS")
        self._check_fit()
        self._check_machine()
        if self.mode in ("evaluate", "predict"):
            self._check_prediction()
        elif self.dataset != "synthetic" and not self.target and not self.dataset.startswith("tfds:"):
            raise InputError(f"--dataset={self.dataset}: say which column to predict, with --target=COLUMN")

    def _check_fit(self) -> None:
        """Refuses what does not fit together of rows, model, loss and solver."""
        if not self.intercept:
            if self.model not in ("linear", "concise"):
                self._refuse("intercept", "it is for --model=linear or concise; leave it out")
            for name, centred in (
                ("standardize", bool(self.standardize)),
                ("target_transform", self.target_transform == "standardize"),
            ):
                if centred:
                    self._refuse(name, "what is centred has an intercept; leave out that or --nointercept")
        if self.model == "mlp" and not self.hidden:
            self._refuse("hidden", "give one width at least, or use --model=linear")
        if self.sync_batch_norm and not (self.model == "mlp" and self.batch_norm):
            self._refuse("sync_batch_norm", "it is for --model=mlp --batch_norm; give both, or leave it out")
        if self.sync_batch_norm and self.reduction == "ordered":
            self._refuse(
                "sync_batch_norm", "it takes all shards at once, and --reduction=ordered one by one; leave one out"
            )
        if self.solver == "exact" and not self.is_least_squares():
            self._refuse("solver", "it is for --model=linear or concise, --loss=squared and no --l1; use --solver=sgd")
        if self.solver == "irls" and not (self._is_linear() and self.loss in ("logistic", "poisson")):
            self._refuse(
                "solver",
                "it is for --model=linear or concise, --loss=logistic or poisson and no --l1; use --solver=sgd",
            )
        if self.patience and self.solver != "sgd":
            self._refuse("patience", "it is for --solver=sgd; leave one out")
        if self.precision == "bfloat16" and self.dataset != "synthetic" and not self.standardizes:
            scaled = "--standardize, or " if self.intercept else ""
            self._refuse("precision", f"it keeps three digits of features; use {scaled}--precision=float32")
        if self.loss not in LOSSES[:4] and self.target_transform != "none":
            self._refuse("target_transform", f"--loss={self.loss} is defined for the target as it is; leave one out")
        if self.l1 and self.optimizer != "sgd":
            self._refuse("l1", "its optimum is reached with --optimizer=sgd alone; use that, or --l2")
        if self.dataset == "synthetic":
            self._check_synthetic()
        if not self.w:
            self._refuse("w", "give at least one weight, such as --w=2,-3.4")
        if self.num_train + self.num_val >= 2**31:
            raise InputError(
                f"--num_train={self.num_train} --num_val={self.num_val}: are too many rows; use fewer than {2**31:,}"
            )

    def _check_synthetic(self) -> None:
        """Refuses what is for tables."""
        if self.standardize:
            self._refuse("standardize", "synthetic rows are of mean 0 and deviation 1 already; leave it out")
        of_tables = ("target", "features", "exclude", "categorical", "dates", "weight_column", "validation_dataset")
        for name in of_tables:
            if getattr(self, name):
                self._refuse(name, "say of which table, with --dataset")
        if self.target_transform != "none":
            self._refuse("target_transform", "it is for tables; say which, with --dataset")

    def _check_machine(self) -> None:
        """Refuses devices, processes and folders that cannot be."""
        for name in ("workdir", "output", "cache_dir", "data_dir", "dataset", "validation_dataset"):
            if not is_one_line(getattr(self, name) or ""):
                self._refuse(name, "has characters that cannot be printed; rename it")
        for name in ("workdir", "output", "cache_dir"):
            if "://" in (getattr(self, name) or ""):
                self._refuse(name, "is no path of this machine; mount that storage, and name its folder")
        if self.profile is not None and not self.profiled_steps():
            self._refuse("profile", "give two steps, the earlier first, such as --profile=100:200")
        if self.num_devices is not None and self.num_devices > self.num_shards:
            self._refuse(
                "num_devices",
                f"a device needs a shard of its own; use --num_devices={self.num_shards} "
                f"or --num_shards={self.num_devices}",
            )
        several = (self.coordinator_address, self.num_processes, self.process_id)
        if any(value is not None for value in several):
            self._check_processes(*several)

    def _check_prediction(self) -> None:
        if not self.workdir:
            raise InputError(f"--mode={self.mode}: say which model, with the --workdir that it was trained with")
        if self.dataset == "synthetic":
            raise InputError(f"--mode={self.mode}: say which table, with --dataset")
        if self.validation_dataset is not None:
            self._refuse("validation_dataset", f"--mode={self.mode} takes all rows of --dataset; name it there")
        if self.mode == "predict" and (not self.output or not self.output.lower().endswith(OUTPUTS)):
            raise InputError(
                f"--mode=predict: give a file for the predictions, with --output=FILE{' or '.join(OUTPUTS)}"
            )

    def _check_processes(self, address: str | None, processes: int | None, process: int | None) -> None:
        if address == "auto" and processes is None and process is None:
            return
        if address is None or processes is None or process is None:
            raise InputError("--coordinator_address, --num_processes and --process_id go together; give all three")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            self._refuse("coordinator_address", "give the host and the port of process 0, such as node1:29500")
        if not 0 <= process < processes:
            self._refuse("process_id", f"with --num_processes={processes} use 0 to {processes - 1}")
        if not self.workdir:
            raise InputError("--workdir: several processes need a folder that all see; give --workdir=DIR")

    @classmethod
    def from_flags(cls, values: flags.FlagValues) -> "Config":
        """The config that parsed flags describe."""
        given: dict[str, Any] = {field.name: values[field.name].value for field in _flag_fields()}
        for name, value in given.items():
            if isinstance(value, list):
                given[name] = tuple(value)
        for name, kind, numbers in (("w", float, "numbers"), ("hidden", int, "whole numbers")):
            try:
                given[name] = tuple(map(kind, given[name]))
            except ValueError as error:
                raise InputError(f"--{name}={_text(given[name])}: give {numbers} separated by commas") from error
        return cls(**given, given=frozenset(name for name in given if values[name].present))

    def is_least_squares(self) -> bool:
        """Whether `dpreg.models.least_squares` knows the best parameters of such a model."""
        return self._is_linear() and self.loss == "squared"

    def _is_linear(self) -> bool:
        return self.model in ("linear", "concise") and not self.l1

    def columns(self) -> Columns:
        """What to take from a table."""
        return Columns(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Columns)})

    def profiled_steps(self) -> tuple[int, int] | None:
        """START and STOP of `profile`, where they are such."""
        start, _, stop = (self.profile or "").partition(":")
        if not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
            return None
        return int(start), int(stop)

    def identity(self) -> dict[str, Any]:
        """What decides the answer, besides the rows: a run may only be continued by one that is alike in it."""
        decisive = {f.name: getattr(self, f.name) for f in _flag_fields() if f.metadata["decides"]}
        if self.lr_schedule in ("linear", "cosine"):  # which end with the run
            decisive["max_epochs"] = self.max_epochs
        return decisive

    def of_model(self, flags: Mapping[str, Any]) -> "Config":
        """This config with what decides the answer as a model was trained, and rows and batches as asked for.

        Raises:
          InputError: for a flag that was given and is not that of the model.
        """
        trained: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in flags.items()}
        if ":" in trained["model"] and self.model != trained["model"]:
            raise InputError(
                f"--workdir={self.workdir}: its model is code of yours; allow it to be imported, with "
                f"--model={trained['model']}"
            )
        for field in _flag_fields():
            name, asked = field.name, getattr(self, field.name)
            if name not in trained or not (name in self.given or asked != field.default):
                continue
            if name in _ASKED:
                trained[name] = asked
            elif asked != trained[name]:
                self._refuse(name, f"the model was trained with {_text(trained[name])}; leave it out")
        return dataclasses.replace(self, **trained | {"validation_dataset": None})

    @property
    def threads(self) -> int | None:
        """That XLA is to compute with on CPU, as `dpreg.start` takes them: "ordered" needs as many as shards."""
        return self.num_shards if self.reduction == "ordered" else None

    def shared(self) -> dict[str, Any]:
        """What all processes of a run have to agree on."""
        return {f.name: getattr(self, f.name) for f in _flag_fields() if not f.metadata["who"]}

    def to_flagfile(self) -> str:
        """A flagfile that repeats the run. It leaves out who runs it, where the outputs go, and what to go on from."""
        defaults, shared = {field.name: field.default for field in _flag_fields()}, self.shared()
        given = {n: v for n, v in shared.items() if v is not None and n != "resume" and (v != () or defaults[n] != ())}
        return "".join(f"--{name}={_text(value)}\n" for name, value in given.items())


def _flag_fields() -> list[Any]:
    """The fields of `Config` that are flags."""
    return [field for field in dataclasses.fields(Config) if field.metadata]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, tuple):
        return str(value)
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(value)  # a name may hold a comma
    return line.getvalue()


def define_flags() -> None:
    """Defines a flag for each field of `Config`: the only place where a default stands is the field."""
    define: dict[Any, Any] = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        tuple: flags.DEFINE_list,
    }
    types = get_type_hints(Config)
    for field in _flag_fields():
        kind = types[field.name]
        choices = (get_origin(kind), kind, *get_args(kind))  # tuple[float, ...] is a list flag, int | None an int flag
        default = list(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        define[next(c for c in choices if c in define)](field.name, default, field.metadata["help"])
