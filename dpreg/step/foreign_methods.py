"""Methods of other training loops that dpreg does not call: a class that defines one is refused, not ignored."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from dpreg.errors import InputError

_STEP = "override loss (one value for each row) and configure_optimizers of the model"
_EVALUATION = "validation measures the loss of the model over data.val: override loss, or call trainer.evaluate"
_CALLBACKS = "give dpreg.Trainer(callbacks=[...]), see dpreg.Callback for the events of a run"
_ROWS = "give rows by a dpreg.Source, in dpreg.RegressionData(train, val, batch_size)"
_LOADERS = r"get_(data|tensor)loader|(train|val|test|predict)_dataloader"
_EVENTS = r"plot|on_(fit|train|validation|test|predict|epoch|batch|before|after|save|load)\w*|\w+_(epoch|step)_end"

# Names that a user's loss may call: refused only if no other method of the class reads them.
_PARTS_OF_LOSS = r"compute_loss|loss_fn|criterion|l1_penalty|l2_penalty|regulari[sz](er|ation)(_loss)?|weight_decay"

# Names from the training loops of D2L, Lightning and Keras, as regular expressions, with the equivalent in dpreg.
OF_MODEL = {
    r"(training|train)_step|optimizer_step|optimizer_zero_grad|configure_gradient_clipping|lr_scheduler_step": _STEP,
    r"(validation|val|eval|test|predict|prediction)_step": _EVALUATION,
    _PARTS_OF_LOSS: "override loss (one value for each row), or penalise weights in configure_optimizers",
    r"apply_init": "give each layer its initializer, such as kernel_init",
    r"prepare_batch": "change rows in __call__, or in a dpreg.Source",
    _EVENTS: _CALLBACKS,
    _LOADERS: _ROWS,
}
OF_TRAINER = {
    r"fit_epoch": "override loss (one value for each row), or train by dpreg.d2l.Trainer, which calls it",
    r"(training|train)_(step|epoch|batch|loop)|optimizer_(step|zero_grad)|backward|compute_loss": _STEP,
    r"clip_(gradients|grad_norm)": "give gradient_clip_val, or clip in configure_optimizers, by optax.clip or another",
    r"(validation|validate|val|eval|test|predict)_(step|epoch)": _EVALUATION,
    r"prepare_batch": "change rows in the __call__ of the model, or in a dpreg.Source; or use dpreg.d2l.Trainer",
    _EVENTS: _CALLBACKS,
    _LOADERS: _ROWS,
}
OF_DATA = {
    _LOADERS: _ROWS,
    r"prepare_batch|on_(before|after)_batch_transfer|transfer_batch_to_device|collate_fn": "change rows in a Source",
}


def refuse_foreign_methods(what: Any, patterns: dict[str, str], called: Collection[str] = ()) -> None:
    """Raises InputError if a class or object of the user, or an extended class of dpreg, has such a method.

    Args:
      patterns: one of `OF_MODEL`, `OF_TRAINER` and `OF_DATA`.
      called: names of methods that are called here, and so are allowed.
    """
    for owner, name in user_methods(what):
        for pattern, remedy in () if name in called else patterns.items():
            if re.fullmatch(pattern, name) and not (re.fullmatch(_PARTS_OF_LOSS, name) and is_read(name, what)):
                raise InputError(f"{owner}.{name}: dpreg does not call it; {remedy}")


def user_methods(what: Any) -> Iterator[tuple[str, str]]:
    """(class, name) of each method of an object or its classes that neither dpreg nor flax defines."""
    bases = [(base.__name__, vars(base)) for base in type(what).__mro__]
    for owner, members in [(type(what).__name__, getattr(what, "__dict__", {})), *bases]:
        for name, method in members.items():
            of_library = (getattr(method, "__module__", None) or "").split(".")[0] in ("dpreg", "flax")
            if not of_library and (callable(method) or isinstance(method, (staticmethod, classmethod))):
                yield owner, name


def is_read(name: str, what: Any) -> bool:
    """Whether a method of the object's classes reads the attribute `name`."""
    methods = (getattr(method, "__wrapped__", method) for base in type(what).__mro__ for method in vars(base).values())
    return any(name in code.co_names for method in methods if (code := getattr(method, "__code__", None)))
