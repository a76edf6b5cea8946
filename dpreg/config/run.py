"""Settings of the mode of a run, its outputs, checkpoints and reports."""

import dataclasses

from dpreg.config.rows import check_path
from dpreg.config.settings import FILE, Settings, setting
from dpreg.spelling import spell

MODES = ("train", "evaluate", "predict", "summary", "doctor")
RESUME = ("auto", "never", "must")


@dataclasses.dataclass(frozen=True)
class RunSettings(Settings):
    """The mode of a run, and its outputs."""

    mode: str = setting(
        "train",
        "train; evaluate, predict: apply the workdir's model to the dataset; summary: print its exact fit; doctor: "
        "check whether a run can start here.",
        choices=MODES,
    )
    workdir: str | None = setting(
        None,
        "Folder for the outputs. Default: a new one in runs/, named after the time.",
        per_process=True,
        completions=(FILE,),
    )
    output: str | None = setting(
        None,
        "File of predictions, .csv or .parquet; of a summary, .txt, .md or .tex. Default: none.",
        per_process=True,
        completions=(FILE,),
    )
    interval: float | None = setting(
        None,
        "Level of intervals, such as 0.95. The mode predict adds those of the prediction and of a new observation; the "
        "mode summary prints those of the coefficients. Default: none; 0.95 for coefficients.",
        gt=0,
        lt=1,
    )
    predict_mean: bool = setting(
        False,
        "In the modes evaluate and predict, for a model trained with target_transform=log: predict the mean of the "
        "target, by Duan's smearing factor, instead of its median.",
    )
    resume: str = setting(
        "auto",
        "auto: resume from the newest checkpoint, if any; must: fail without one; never: start over.",
        choices=RESUME,
    )
    log_every_steps: int = setting(0, "Steps between lines of metrics.jsonl; 0 for eight lines per epoch.", min=0)
    checkpoint_every_seconds: float = setting(60.0, "Seconds between checkpoints; 0: not by time.", min=0)
    checkpoint_every_steps: int = setting(0, "Steps between checkpoints; 0: not by steps.", min=0)
    keep: int = setting(3, "Number of checkpoints to keep, the newest ones.", min=1)
    audit: bool = setting(True, "Check each epoch that every row was used exactly once, over all processes.")
    profile: str | None = setting(
        None,
        "START:STOP: write a trace of these steps into the workdir's profile/, for TensorBoard and Perfetto. "
        "Default: none.",
    )
    tensorboard: bool = setting(
        False, "Write the scalars of metrics.jsonl, and the settings, as event files into the workdir's tensorboard/."
    )
    step_timeout: float | None = setting(
        None,
        "Seconds without a result after which a run is considered hung and ends; 0 for never. "
        "Default: 120, or 20 times the slowest recent result (600 for the first).",
        min=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workdir", "output"):
            check_path(name, getattr(self, name), is_local=True)
        if self.profile is not None and not self.profiled_steps():
            self._refuse("profile", f"give two steps, the earlier first, such as {spell('profile', '100:200')}")

    def profiled_steps(self) -> tuple[int, int] | None:
        """START and STOP of `profile`; None unless they are steps, and START is the smaller one."""
        start, _, stop = (self.profile or "").partition(":")
        if not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
            return None
        return int(start), int(stop)
