"""Settings of a run: what it does, and what it writes, keeps and reports on the way."""

import dataclasses

from dpreg.config.rows import check_path
from dpreg.config.settings import FILE, Settings, setting
from dpreg.spelling import spell

MODES = ("train", "evaluate", "predict", "doctor")
RESUME = ("auto", "never", "must")


@dataclasses.dataclass(frozen=True)
class RunSettings(Settings):
    """What a run does, and what it writes."""

    mode: str = setting(
        "train",
        "train; evaluate or predict: the workdir's model on the rows of the dataset; "
        "doctor: whether a run could start here, and if not, why.",
        choices=MODES,
    )
    workdir: str | None = setting(
        None,
        "Folder for the outputs. Default: a new one in runs/, named by the time.",
        per_process=True,
        completions=(FILE,),
    )
    output: str | None = setting(
        None,
        "Where the mode predict writes: a .csv or .parquet file. Default: none.",
        per_process=True,
        completions=(FILE,),
    )
    resume: str = setting(
        "auto",
        "auto: resume from the newest checkpoint, if any; must: fail without one; never: start over.",
        choices=RESUME,
    )
    log_every_steps: int = setting(0, "Steps between lines of metrics.jsonl; 0 for eight lines an epoch.", min=0)
    checkpoint_every_seconds: float = setting(60.0, "Seconds between checkpoints; 0 for none by time.", min=0)
    checkpoint_every_steps: int = setting(0, "Steps between checkpoints; 0 to save by time only.", min=0)
    keep: int = setting(3, "How many checkpoints to keep, the newest.", min=1)
    audit: bool = setting(True, "Check each epoch that every row was used exactly once, over all processes.")
    profile: str | None = setting(
        None,
        "START:STOP: trace from the one step to the other into the workdir's profile/ (TensorBoard, Perfetto). "
        "Default: none.",
    )
    tensorboard: bool = setting(
        False, "Write the scalars of metrics.jsonl, and the settings, into the workdir's tensorboard/ as event files."
    )
    step_timeout: float | None = setting(
        None,
        "Seconds without results after which a run ends as hung; 0 for never. "
        "Default: 120, or 20 times the slowest of late (600 for the first).",
        min=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workdir", "output"):
            check_path(name, getattr(self, name), is_local=True)
        if self.profile is not None and not self.profiled_steps():
            self._refuse("profile", f"give two steps, the earlier first, such as {spell('profile', '100:200')}")

    def profiled_steps(self) -> tuple[int, int] | None:
        """START and STOP of `profile`, where they are such."""
        start, _, stop = (self.profile or "").partition(":")
        if not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
            return None
        return int(start), int(stop)
