"""`Config`, the settings of a run, and the rules between settings of different groups. It does not import JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from absl import flags

from dpreg.config.devices import DeviceSettings
from dpreg.config.flags import parse_flags, write_flagfile
from dpreg.config.inference import InferenceSettings
from dpreg.config.model import DISPERSED_LOSSES, GLM_LOSSES, L1_LOSSES, LABEL_LOSSES, LOCATED_LOSSES, ModelSettings
from dpreg.config.optimizer import OptimizerSettings
from dpreg.config.rows import Columns, RowSettings
from dpreg.config.run import RunSettings
from dpreg.config.settings import check_settings_of, document, list_settings
from dpreg.errors import InputError, is_one_line
from dpreg.spelling import spell

OUTPUTS = (".csv", ".parquet")
TABLES = (".txt", ".md", ".tex")  # endings of files of the mode summary

# Settings that affect the result, but that the caller may change for the modes evaluate and predict.
_CHANGEABLE = ("dataset", "batch_size", "missing")


@document
@dataclasses.dataclass(frozen=True)
class Config(RunSettings, DeviceSettings, OptimizerSettings, InferenceSettings, ModelSettings, RowSettings):
    """The settings of a run. Each is also the flag of the same name. The defaults are those of D2L section 3.4.

    Raises:
      InputError: for an invalid value; the message names the setting.
    """

    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)  # settings given as flags

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.shared().items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (not is_one_line(text) or text != text.rstrip()):
                    self._refuse(
                        name, "a flagfile cannot hold a line break, a trailing blank or invalid UTF-8; rename it"
                    )
        self._check_fit()
        self._check_modes()
        if self.num_processes is not None and not self.workdir:
            raise InputError(f"{spell('workdir')}: several processes need a folder that all of them see; name one")
        if self.mode in ("evaluate", "predict"):
            self._check_prediction()
        elif self.mode == "summary":
            self._check_summary()
        elif self.dataset != "synthetic" and not self.target and not self.dataset.startswith("tfds:"):
            self._refuse("dataset", f"name the column to predict, with {spell('target', ('COLUMN',))}")

    def _check_fit(self) -> None:
        """Refuses rows, a model, a loss and a solver that cannot be combined."""
        if not self.intercept:
            linear = spell("model", "linear", "concise")
            if not self.is_linear:
                self._refuse("intercept", f"it applies only to {linear}; leave it out")
            for name in ("standardize", "target_transform"):
                if getattr(self, name) in (True, "standardize"):
                    without = spell("intercept", False)
                    self._refuse(name, f"centred columns need an intercept; leave out this or {without}")
        if self.sync_batch_norm and self.reduction == "ordered":
            ordered = spell("reduction", "ordered")
            self._refuse(
                "sync_batch_norm", f"it needs all shards at once, and {ordered} computes them one by one; leave one out"
            )
        self._check_solver()
        self._check_inference()
        if self.precision == "bfloat16" and self.dataset != "synthetic" and not self.standardizes:
            scaled = f"{spell('standardize', True)}, or " if self.intercept else ""
            remedy = f"use {scaled}{spell('precision', 'float32')}"
            self._refuse("precision", f"it keeps only three digits of the features; {remedy}")
        loss = spell("loss", self.loss)
        if self.target_transform == "labels":
            if self.loss not in LABEL_LOSSES:
                losses = spell("loss", *LABEL_LOSSES)
                self._refuse("target_transform", f"{loss} is not defined for labels; use {losses}, or leave this out")
        elif self.loss not in LOCATED_LOSSES and self.target_transform != "none":
            self._refuse("target_transform", f"{loss} is defined for the target without a transform; leave one out")

    def _check_solver(self) -> None:
        """Refuses an exact solver, folds, or base levels, for a model, loss or penalty that they do not support."""
        linear, remedy = spell("model", "linear", "concise"), f"use {spell('solver', 'sgd')}"
        if self.solver == "exact" and not self.is_linear:
            self._refuse("solver", f"it applies only to {linear}; {remedy}")
        if self.solver == "exact" and not self.has_exact_solution:
            limited = spell("l1", self.l1) if self.l1 else spell("intercept", False)
            self._refuse("solver", f"with {limited} it applies only to {spell('loss', *L1_LOSSES)}; {remedy}")
        if self.solver == "irls" and not (self.is_linear and self.loss in GLM_LOSSES):
            self._refuse("solver", f"it applies only to {linear} with {spell('loss', *GLM_LOSSES)}; {remedy}")
        if self.folds and not self.is_least_squares():
            self._refuse("folds", f"it applies only to {linear} with {spell('loss', 'squared')}; leave it out")
        if self.base and (not self.has_exact_solution or self.l1 or self.l2 or self.folds or self.solver == "sgd"):
            self._refuse("base", "it applies only to exact solutions of linear models without a penalty; leave it out")

    def _check_inference(self) -> None:
        """Refuses a covariance and weights of a kind where no standard errors are computed."""
        if self.loss == "negative_binomial" and self.negative_binomial_alpha is None and self.solver == "sgd":
            self._refuse("loss", f"steps do not estimate alpha; give {spell('negative_binomial_alpha')}")
        for name in ("covariance", "weights"):
            if getattr(self, name) is None:
                continue
            if not self.has_exact_solution or self.loss not in L1_LOSSES or self.solver == "sgd":
                exact = f"{spell('solver', 'exact')} of {spell('loss', *L1_LOSSES)}"
                self._refuse(name, f"it applies only to the standard errors of {exact}; leave it out")
        if self.covariance not in (None, "classic") and self.is_penalized:
            penalty = next(name for name in ("folds", "l1", "l2") if getattr(self, name))
            unknown = f"standard errors are unknown with {spell(penalty, getattr(self, penalty))}"
            self._refuse("covariance", f"{unknown}; leave one out")
        if self.covariance == "cluster" and self.group_column is None:
            self._refuse("covariance", f"name the column of the clusters, with {spell('group_column')}")
        if self.offset_column is not None:
            self._check_offset()
        if self.covariance == "classic" and self.weights == "importance":
            weights = spell("weights", self.weights)
            self._refuse("covariance", f"it does not hold for {weights}; use {spell('covariance', 'HC1')}")

    def _check_modes(self) -> None:
        """Refuses settings of results in modes that have none of them."""
        for name, modes in (("interval", ("predict", "summary")), ("predict_mean", ("evaluate", "predict"))):
            if getattr(self, name) and self.mode not in modes:
                self._refuse(name, f"it applies only to {spell('mode', *modes)}; leave it out")

    def _check_summary(self) -> None:
        """Refuses settings with which the mode summary cannot run."""
        if not self.workdir:
            raise InputError(f"{spell('mode', self.mode)}: name the folder of the run, with {spell('workdir')}")
        if self.output and not self.output.lower().endswith(TABLES):
            files = spell("output", *(f"FILE{ending}" for ending in TABLES))
            self._refuse("output", f"name a file for the table, with {files}")

    def _check_offset(self) -> None:
        """Refuses an offset where it would not be a part of the linear predictor in the units of the table."""
        losses = ("squared", *GLM_LOSSES)
        if not self.has_exact_solution or self.loss not in losses or self.solver == "sgd":
            exact = f"{spell('solver', 'exact')} of {spell('loss', *losses)}"
            self._refuse("offset_column", f"it applies only to {exact}; leave it out")
        for name in ("formula", "folds"):
            if getattr(self, name):
                self._refuse("offset_column", f"it cannot be used with {spell(name)}; leave one out")
        if self.target_transform == "standardize":
            scaled = spell("target_transform", self.target_transform)
            self._refuse("offset_column", f"{scaled} would change its unit; leave one out")

    def _check_prediction(self) -> None:
        """Refuses settings with which the modes evaluate and predict cannot run."""
        mode = spell("mode", self.mode)
        if not self.workdir:
            raise InputError(f"{mode}: name the folder of the trained model, with {spell('workdir')}")
        if self.dataset == "synthetic":
            raise InputError(f"{mode}: name a table, with {spell('dataset')}")
        if self.validation_dataset is not None:
            self._refuse("validation_dataset", f"{mode} uses all rows of {spell('dataset')}; name the table there")
        if self.mode == "predict" and (not self.output or not self.output.lower().endswith(OUTPUTS)):
            files = spell("output", *(f"FILE{ending}" for ending in OUTPUTS))
            raise InputError(f"{mode}: name a file for the predictions, with {files}")

    @classmethod
    def from_flags(cls, values: flags.FlagValues) -> Self:
        """The config with the values of parsed flags."""
        given = parse_flags(cls, values)
        return cls(**given, given=frozenset(name for name in given if values[name].present))

    def is_given(self, name: str) -> bool:
        """Whether the caller chose the value of a setting.

        A flag counts also where its value is the default; in Python, such a value counts if `given` names its setting.
        """
        return name in self.given or getattr(self, name) != getattr(type(self), name)

    @property
    def has_exact_solution(self) -> bool:
        """Whether `dpreg.solvers` finds the least loss of such a model; for auto also where it is too wide."""
        return self.is_linear and ((self.intercept and not self.l1) or self.loss in L1_LOSSES)

    @property
    def is_penalized(self) -> bool:
        """Whether there is a penalty, given or chosen by folds."""
        return bool(self.l1 or self.l2 or self.folds)

    @property
    def kind_of_weights(self) -> str:
        """What the weights of rows are: "frequency", "precision" or "importance"."""
        return self.weights or ("precision" if self.loss in DISPERSED_LOSSES else "frequency")

    @property
    def covariance_type(self) -> str:
        """The covariance of the coefficients of an exact solution, for rows without groups."""
        if self.covariance is not None or self.is_penalized:
            return self.covariance or "classic"
        return "HC1" if self.weights == "importance" else "classic"

    def is_least_squares(self) -> bool:
        """Whether this is a linear least-squares problem, perhaps with penalties."""
        return self.is_linear and self.loss == "squared"

    def columns(self) -> Columns:
        """The columns to read from a table, and how to convert them."""
        return Columns(**{field.name: getattr(self, field.name) for field in list_settings(Columns)})

    def identity(self) -> dict[str, Any]:
        """The settings that affect the result. A run can only be resumed with equal ones."""
        values = {f.name: getattr(self, f.name) for f in list_settings(Config) if f.metadata["affects_result"]}
        if self.lr_schedule in ("linear", "cosine"):  # these schedules depend on the length of the run
            values["max_epochs"] = self.max_epochs
        return values

    def use_model_settings(self, flags: Mapping[str, Any]) -> Self:
        """This config with the settings that a model was trained with, except for the dataset and how it is read.

        Args:
          flags: the settings of the model that affect its result, see `identity`.

        Raises:
          InputError: for a setting that was given and differs from that of the model.
        """
        trained: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()
        }
        if ":" in trained["model"] and self.model != trained["model"]:
            allowed = spell("model", trained["model"])
            self._refuse("workdir", f"its model is your own class; allow its import, with {allowed}")
        for field in list_settings(Config):
            name, value = field.name, getattr(self, field.name)
            if name not in trained or not self.is_given(name):
                continue
            if name in _CHANGEABLE:
                trained[name] = value
            elif value not in (trained[name], "auto"):
                self._refuse(name, f"the model was trained with {spell(name, trained[name])}; leave it out")
        return dataclasses.replace(self, **trained | {"validation_dataset": None})

    def shared(self) -> dict[str, Any]:
        """The settings that must be equal in all processes of a run."""
        return {f.name: getattr(self, f.name) for f in list_settings(Config) if not f.metadata["per_process"]}

    def to_flagfile(self) -> str:
        """A flagfile that repeats the run, without the settings of single processes, the output paths, and `resume`."""
        defaults, shared = {field.name: field.default for field in list_settings(Config)}, self.shared()
        given = {n: v for n, v in shared.items() if v is not None and n != "resume" and (v != () or defaults[n] != ())}
        return write_flagfile(given)


def check_settings(**values: Any) -> None:
    """Checks the arguments of a function that are settings of a run, by the rules of `Config`.

    Args:
      values: settings by name.

    Raises:
      InputError: for the first invalid value.

    >>> check_settings(max_epochs=3, reduction="ordered")
    >>> check_settings(max_epochs=0)
    Traceback (most recent call last):
    dpreg.errors.InputError: max_epochs=0: use 1 or more
    """
    check_settings_of(Config, **values)
