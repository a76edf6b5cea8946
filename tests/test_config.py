"""Settings: each default and each rule is stated once, and messages spell settings as the caller does."""

import ast
import dataclasses
import inspect
import pathlib
import re

import numpy as np
import pytest

import dpreg
from dpreg import cli
from dpreg.config import Columns, Config
from dpreg.config.devices import REDUCTIONS
from dpreg.data.sampler import Sampler
from dpreg.models.losses import make_loss
from dpreg.models.mlp import MLP, LinearRegression
from dpreg.spelling import spell, spell_as_flags
from dpreg.step.reduce import REDUCTION_BY_NAME

PACKAGE = pathlib.Path(dpreg.__file__).parent
NAMES = {field.name for field in dataclasses.fields(Config) if field.metadata}
# These modules start commands or define flags; no other module may mention flags.
KNOW_FLAGS = ("main", "plan", "scaling", "report", "cli", "completion", "spelling", "config.flags")


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name, ast.parse(path.read_text(), str(path))


def raised(function, *arguments, **named):
    with pytest.raises((dpreg.InputError, dpreg.Diverged)) as caught:
        function(*arguments, **named)
    return str(caught.value)


def test_the_default_of_each_setting_is_stated_only_in_config():
    """A signature or a field that has a setting's name takes its default from `Config`."""
    stated = []
    for module, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args]
                defaults = [*zip(arguments[::-1], node.args.defaults[::-1], strict=False)]
                defaults += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                stated += [(module, argument.arg, default) for argument, default in defaults]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                stated.append((module, node.target.id, node.value))
    literal = [
        (module, name)
        for module, name, default in stated
        if name in NAMES and default is not None and not any(isinstance(part, ast.Name) for part in ast.walk(default))
        if not (isinstance(default, ast.Constant) and default.value is None)
    ]
    assert {*literal} == {
        ("estimators.base", "l2"),  # The classifier has its own default.
        ("d2l.module", "sigma"),  # as the book prints it
        ("data.pipeline", "num_shards"),  # It holds until `shard` is called.
        # These are not settings, although they have the name of one.
        ("solvers.inference", "target"),
        ("solvers.irls", "target"),
        ("models.losses", "num_classes"),
        ("outputs.workdir", "keep"),
        ("step.digest", "optimizer"),
        ("step.state", "platform"),
    }
    assert inspect.signature(dpreg.Trainer).parameters["num_shards"].default == 8  # as help() shows it


def test_only_entry_points_read_flags():
    flags = re.compile(rf"--(no)?({'|'.join(sorted({*NAMES, 'topology', 'flagfile', 'config_preset'}))})\b|--$")
    found = [
        (module, node.lineno, node.value)
        for module, tree in modules()
        if module not in KNOW_FLAGS
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and flags.search(node.value)
    ]
    assert not found


def test_a_message_spells_settings_when_it_is_formatted_and_not_at_import():
    """A command switches `spell` to flags only after all imports."""
    for module, tree in modules():
        waiting = [*tree.body]
        while waiting:
            node = waiting.pop()
            if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
                assert not (isinstance(node, ast.Name) and node.id == "spell"), f"{module}:{node.lineno}"
                waiting += ast.iter_child_nodes(node)


ROWS = dpreg.ArraySource(np.ones((8, 1)), np.ones(8))


def train_with_patience():
    dpreg.Trainer(1, patience=2).fit(dpreg.LinearRegressionScratch(1, 0.1), dpreg.RegressionData(ROWS, None, 8))


def diverge():
    raise dpreg.Diverged(7)


@pytest.mark.parametrize(
    ("cause", "in_python", "in_a_command"),
    [
        (lambda: Config(lr=-1), "lr=-1.0: use a value above 0", "--lr=-1.0: use a value above 0"),
        (lambda: dpreg.Trainer(0), "max_epochs=0: use 1 or more", "--max_epochs=0: use 1 or more"),
        (
            lambda: Config(hidden=(8, 0)),
            "hidden=(8, 0): use 1 or more",
            "--hidden=8,0: use 1 or more",
        ),
        (
            lambda: Config(model="mlp", intercept=False),
            "intercept=False: it applies only to model='linear' or 'concise'; leave it out",
            "--nointercept: it applies only to --model=linear or concise; leave it out",
        ),
        (
            lambda: Sampler(100, 8, 30),
            "batch_size=30: it is not a multiple of num_shards=8; use batch_size=24 or 32, or another num_shards",
            "--batch_size=30: it is not a multiple of --num_shards=8; use --batch_size=24 or 32, or another "
            "--num_shards",
        ),
        (
            train_with_patience,
            "patience=2: there are no rows held out to measure by; hold some out",
            "--patience=2: there are no rows held out to measure by; hold some out",
        ),
        (
            lambda: make_loss("softmax", num_classes=3).outputs(2),
            "loss='softmax': it has one target of labels, and there are 2; name one",
            "--loss=softmax: it has one target of labels, and there are 2; name one",
        ),
        (
            lambda: Config(dataset="my lr=1, --lr.csv"),  # Names chosen by users are not rewritten.
            "dataset='my lr=1, --lr.csv': name the column to predict, with target=('COLUMN',)",
            "--dataset='my lr=1, --lr.csv': name the column to predict, with --target=COLUMN",
        ),
        (
            diverge,
            "the loss is not finite at step 7: the state before it is kept; try a smaller lr, or gradient_clip_val",
            "the loss is not finite at step 7: the state before it is kept; try a smaller --lr, or --gradient_clip_val",
        ),
    ],
)
def test_a_message_spells_settings_as_the_caller_does(cause, in_python, in_a_command, capsys):
    assert raised(cause) == in_python
    with pytest.raises(SystemExit):
        cli._run_main(lambda argv: cause(), [])
    assert capsys.readouterr().err == f"dpreg: {in_a_command}\n"
    assert raised(cause) == in_python  # The spelling is that of Python again after the command has ended.


def test_a_flag_in_a_message_can_be_pasted_into_a_shell():
    with spell_as_flags():
        assert spell("exclude", ("a,b", "c d")) == "--exclude='\"a,b\",c d'"
        assert spell("exclude", ("",)) == "--exclude='\"\"'"
        assert spell("num_devices", 0) == "--num_devices=0"


WRONG = {
    "max_epochs": (2.5, "3", True, None),
    "gradient_clip_val": (np.inf, "1", True, 10**400),
    "num_shards": (0, 8.0),
    "precision": ("float16", 32),
    "reduction": ("mean",),
    "backend": ("tf",),
    "placement": ("disk",),
    "seed": (-1, 2**31),
    "log_every_steps": (-1,),
    "accumulate_steps": (0,),
    "patience": (-1,),
    "audit": ("yes", 1),
    "num_devices": (0, 1.5),
    "platform": ("abacus",),
}


@pytest.mark.parametrize("name", WRONG)
def test_trainer_and_config_refuse_the_same_values_with_the_same_message(name):
    for value in WRONG[name]:
        message = raised(Config, **{name: value})
        assert message.startswith(f"{name}=")
        assert raised(dpreg.Trainer, **{"max_epochs": 1, name: value}) == message


@pytest.mark.parametrize(
    "wrong", [{"noise": -1}, {"num_train": 0}, {"num_val": -1}, {"batch_size": 0}, {"seed": 2**31}]
)
def test_synthetic_data_and_config_refuse_the_same_values_with_the_same_message(wrong):
    assert raised(dpreg.SyntheticRegressionData, w=[1.0], b=0.0, **wrong) == raised(Config, **wrong)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda lr: dpreg.LinearRegressionScratch(2, lr).configure_optimizers(), {"lr": -1}),
        (lambda **wrong: dpreg.LinearRegressionScratch(2, 0.1, **wrong), {"sigma": -1.0}),
        (LinearRegression, {"intercept": "no"}),
        (lambda **wrong: MLP((4,), **wrong), {"dropout": 1.5}),
        (MLP, {"hidden": (4, 0)}),
        (lambda **wrong: dpreg.RegressionData(ROWS, None, **wrong), {"batch_size": 0}),
        (lambda placement: dpreg.Dataset(ROWS).place(placement), {"placement": "disk"}),
        (lambda max_epochs: dpreg.Dataset(ROWS).repeat(max_epochs), {"max_epochs": 0}),
        (lambda num_devices: dpreg.start("cpu", num_devices), {"num_devices": 0}),
    ],
)
def test_models_and_data_check_values_by_the_rules_of_config(make, wrong):
    assert raised(make, **wrong) == raised(Config, **wrong)


def test_config_converts_values_to_the_type_of_their_setting():
    """NumPy numbers and lists become plain Python values, which are written and compared equally."""
    found = Config(lr=np.float32(0.5), b=1, num_shards=np.int64(4), hidden=[8, np.int32(2)], w=np.array([1, 2]))
    same = Config(lr=0.5, b=1.0, num_shards=4, hidden=(8, 2), w=(1.0, 2.0))
    assert (found, found.to_flagfile(), repr(found)) == (same, same.to_flagfile(), repr(same))
    assert raised(Columns, target="price") == "target='price': use a tuple of names"
    assert raised(Config, hidden=8) == "hidden=8: use a tuple of integers"
    assert raised(Config, hidden=(8, True)) == "hidden=(8, True): use a tuple of integers"
    assert raised(Config, w=(1, 10**400)) == "w=(1.0, inf): use a finite number"


def test_the_step_implements_each_reduction_that_can_be_chosen():
    assert tuple(REDUCTION_BY_NAME) == REDUCTIONS
