"""Defaults of a run on a table: the solver, the batch size and epochs, and the initial parameters."""

import functools
import json
import re

import forked
import numpy as np
import pytest
import scipy
import statsmodels.api as sm
from sklearn.linear_model import LogisticRegression, QuantileRegressor

import dpreg
from dpreg.config import Config
from dpreg.sklearn import DataParallelRegressor
from dpreg.train.defaults import constant_fit, read_rows


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Writes tables with features in very different units, large targets, few rows, outliers or separable classes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("tables")
    x = rng.normal(size=(900, 3)) * [1, 1e4, 1e-3] + [5, 2e5, 0]
    z = (x - [5, 2e5, 0]) / [1, 1e4, 1e-3] @ [1.0, -0.5, 0.3]
    targets = {
        "price": 250_000 + 40_000 * (z + rng.normal(size=900)),
        "visits": rng.poisson(np.exp(z / 2)),
        "cost": 1e4 * rng.gamma(2.0, np.exp(z / 2)),
        "yes": rng.random(900) < scipy.special.expit(2 * z),
        "kind": np.digitize(z + rng.logistic(size=900) / 3, [-0.5, 0.5]),
        "parted": z > 0,
    }
    for name, y in targets.items():
        np.savetxt(folder / f"{name}.csv", np.column_stack([x, y]), "%.17g", ",", header=f"a,b,c,{name}", comments="")
    return folder, x, targets


def fitted(folder, name, *flags):
    """Runs dpreg with its defaults and no held-out rows; returns (summary, flags, stderr)."""
    workdir = folder / re.sub(r"\W", "_", name + "".join(flags))
    table = f"--dataset={folder / name}.csv"
    outcome = forked.run(
        "-m",
        "dpreg.main",
        "--platform=cpu",
        "--validation_fraction=0",
        table,
        f"--target={name}",
        f"--workdir={workdir}",
        *flags,
    )
    assert outcome.returncode == 0, outcome.stderr
    lines = (workdir / "flags.cfg").read_text().split()
    return json.loads((workdir / "summary.json").read_text()), lines, outcome.stderr


solved = functools.cache(fitted)  # for tests that compare with the default run


def test_an_exact_solution_compiles_no_step_of_training(tables):
    folder, *_ = tables
    code = "from dpreg.train import program; program.compile_train_block = None; from dpreg.main import main; main()"
    flags = (f"--dataset={folder / 'price'}.csv", "--target=price", f"--workdir={folder / 'no_steps'}")
    for solver, code_of_exit in (("exact", 0), ("sgd", 1)):
        done = forked.run("-c", code, "--platform=cpu", *flags, f"--solver={solver}")
        assert done.returncode == code_of_exit, done.stderr
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


def parameters(summary):
    return np.array([summary["parameters"]["b"], *summary["parameters"]["w"].values()])


def test_the_default_run_finds_the_parameters_of_statsmodels(tables):
    folder, x, targets = tables
    a = sm.add_constant(x)
    for name, flags, theirs in (
        ("price", (), sm.OLS(targets["price"], a).fit().params),
        ("visits", ("--loss=poisson",), sm.GLM(targets["visits"], a, sm.families.Poisson()).fit(tol=1e-14).params),
        (
            "cost",
            ("--loss=gamma",),
            sm.GLM(targets["cost"], a, sm.families.Gamma(sm.families.links.Log())).fit(tol=1e-14).params,
        ),
        ("yes", ("--loss=logistic",), sm.GLM(targets["yes"] * 1.0, a, sm.families.Binomial()).fit(tol=1e-14).params),
    ):
        summary, lines, stderr = solved(folder, name, *flags)
        np.testing.assert_allclose(parameters(summary), theirs, rtol=2e-5)  # The rows are float32.
        assert "--solver=exact" in lines
        assert "solver exact: the least loss" in stderr
        assert "for steps of an optimizer use --solver=sgd" in stderr


def test_the_default_run_of_a_nonsmooth_loss_reaches_the_optimum(tables):
    folder, x, targets = tables
    summary, *_ = fitted(folder, "price", "--loss=quantile", "--quantile=0.8")
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    model = QuantileRegressor(quantile=0.8, alpha=0).fit(scaled, targets["price"])
    error = targets["price"] - model.predict(scaled)
    assert summary["train_loss"] == pytest.approx(np.maximum(0.8 * error, -0.2 * error).mean(), rel=1e-6)
    summary, *_ = fitted(folder, "kind", "--loss=softmax", "--num_classes=3")
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(scaled, targets["kind"])
    likely = model.predict_log_proba(scaled)[np.arange(900), targets["kind"]]
    assert summary["train_loss"] == pytest.approx(-likely.mean(), rel=1e-6)


def test_separable_classes_get_a_penalty_that_is_reported(tables):
    folder, x, targets = tables
    summary, lines, stderr = fitted(folder, "parted", "--loss=logistic")
    assert f"--l2={1 / 900!r}" in lines
    assert "no finite weights have the least loss" in stderr
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    model = LogisticRegression(C=1.0, tol=1e-10).fit(scaled, targets["parted"])
    w = model.coef_[0] / x.std(axis=0)
    np.testing.assert_allclose(parameters(summary)[1:], w, rtol=1e-4)
    asked = forked.run(
        "-m",
        "dpreg.main",
        *("--platform=cpu", f"--dataset={folder}/parted.csv", "--target=parted", "--loss=logistic", "--solver=exact"),
        f"--workdir={folder}/asked",
    )
    assert asked.returncode == 2
    assert "no optimum" in asked.stderr
    # Its flags.cfg repeats the run, even in its own folder, and so does the original command.
    (workdir,) = [path for path in folder.glob("parted*") if path.is_dir()]
    parameters_before = (workdir / "model" / "parameters.npz").read_bytes()
    again = forked.run("-m", "dpreg.main", f"--flagfile={workdir}/flags.cfg", f"--workdir={workdir}", "--platform=cpu")
    assert again.returncode == 0, again.stderr
    assert (workdir / "model" / "parameters.npz").read_bytes() == parameters_before
    fitted(folder, "parted", "--loss=logistic")
    assert (workdir / "model" / "parameters.npz").read_bytes() == parameters_before


def config_of(tables, name, **settings):
    return Config(
        dataset=str(tables[0] / f"{name}.csv"), target=(name,), cache_dir=str(tables[0] / "cache"),
        validation_fraction=0, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "solver", "why"),
    [
        ({"max_epochs": 3}, "sgd", "max_epochs=3 is one of steps"),  # the default, given explicitly
        ({"l1": 1.0}, "exact", "the least loss, by one pass over the rows"),
        ({"l1": 1.0, "loss": "huber"}, "sgd", "loss='huber' has no exact solution with l1=1.0"),
        ({"folds": 3}, "exact", "folds=3 chooses a penalty by one pass over the rows"),
        (
            {"loss": "huber", "intercept": False, "standardize": False},
            "sgd",
            "loss='huber' has no exact solution with intercept=False",
        ),
        ({"model": "mlp"}, "sgd", "model='mlp' has no exact solution"),
        ({"model": "mlp", "l1": 0.001}, "sgd", "model='mlp' has no exact solution"),
        ({"solver": "sgd", "max_epochs": 1}, "sgd", ""),
        ({"solver": "exact"}, "exact", ""),
    ],
)
def test_the_settings_choose_the_solver_for_a_reason(tables, settings, solver, why):
    config, _, found = read_rows(config_of(tables, "price", given=frozenset(settings), **settings))
    assert config.solver == solver
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_a_run_prints_why_it_has_its_solver(tables):
    _, lines, stderr = fitted(tables[0], "price", "--lr=0.1", "--max_epochs=1")
    assert "--solver=sgd" in lines
    assert "solver sgd: --lr=0.1 is one of steps; for the exact solution use --solver=exact" in stderr
    _, lines, stderr = fitted(tables[0], "price", "--solver=exact")
    assert "--solver=exact" in lines
    assert "solver " not in stderr


@pytest.mark.parametrize("rows", [1, 40, 900, 70_000])
@pytest.mark.parametrize("num_shards", [1, 3, 8, 300])
def test_default_batch_size_and_epochs_fit_the_number_of_rows(tables, rows, num_shards, monkeypatch):
    rng = np.random.default_rng(0)
    data = dpreg.RegressionData(dpreg.ArraySource(rng.normal(size=(rows, 2)), np.ones(rows)))
    monkeypatch.setattr("dpreg.train.defaults.build_data", lambda config, progress: data)
    for model in ("linear", "mlp"):
        config, *_ = read_rows(config_of(tables, "price", solver="sgd", num_shards=num_shards, model=model))
        assert config.batch_size % num_shards == 0
        assert config.batch_size < max(2048, 2 * num_shards)
        assert data.batch_size == config.batch_size
        steps = -(-rows // config.batch_size) * config.max_epochs
        assert steps >= (min(2 * rows, 4000) if model == "mlp" else 3000)
        assert config.max_epochs >= (10 if model == "mlp" else 3)
        assert config.warmup_steps < steps
        again, *_ = read_rows(config)  # The run repeated by its flags.cfg.
        assert again == config


def test_chosen_settings_do_not_depend_on_digits_that_differ_between_machines(tables):
    config, data, _ = read_rows(config_of(tables, "price", solver="sgd"))
    for value in (config.lr, config.l2, *constant_fit(config, data)):
        assert float(f"{value:.6g}") == value


@pytest.mark.parametrize("rows", [12, 120, 900])
def test_weight_decay_and_steps_of_a_network_follow_the_noise_and_the_number_of_rows(tables, rows, monkeypatch):
    _, x, targets = tables
    x, y, weight = x[:rows], np.column_stack([targets["price"], targets["cost"]])[:rows], np.arange(rows) % 3 + 1.0
    data = dpreg.RegressionData(dpreg.ArraySource((x - x.mean(axis=0)) / x.std(axis=0), y, weight=weight))
    monkeypatch.setattr("dpreg.train.defaults.build_data", lambda config, progress: data)
    config, *_ = read_rows(config_of(tables, "price", model="mlp"))
    explained = [sm.WLS(column, sm.add_constant(x), weights=weight).fit().rsquared_adj for column in y.T]
    noise, power = min(1 - np.mean(explained), 1), 1 if rows < 500 else 0.75
    assert config.l2 == pytest.approx(3.5 * max(noise, 0.2) * (500 / max(rows, 150)) ** power, rel=0.01)
    steps_of_epoch = -(-rows // 32)
    assert 0 <= config.max_epochs * steps_of_epoch - max(2 * rows / float(f"{noise:.3g}"), 200) < steps_of_epoch + 1
    config, *_ = read_rows(config_of(tables, "price", model="mlp", loss="logistic"))
    assert config.l2 == pytest.approx(3 * min(1, (500 / rows) ** 0.75), rel=0.01)
    assert 0 <= config.max_epochs * steps_of_epoch - 4000 < steps_of_epoch


def test_settings_given_by_the_user_are_kept(tables):
    given = {"batch_size": 48, "max_epochs": 2, "lr": 0.5, "optimizer": "momentum", "lr_schedule": "linear"}
    config, *_ = read_rows(config_of(tables, "price", model="mlp", target_transform="log", **given))
    assert {name: getattr(config, name) for name in given} == given
    assert (config.target_transform, config.l2) == ("log", 0.0)


@pytest.mark.parametrize(
    ("loss", "optimizer"),
    [("squared", "sgd"), ("squared", "adam"), ("huber", "sgd"), ("absolute", "momentum"), ("quantile", "adam")],
)
def test_sgd_with_default_settings_comes_near_the_optimum_of_a_linear_model(tables, loss, optimizer):
    """The target is of order 1e5, and the features range from 1e-3 to 1e4."""
    summary, *_ = fitted(tables[0], "price", "--solver=sgd", f"--loss={loss}", f"--optimizer={optimizer}")
    best, *_ = solved(tables[0], "price", *([] if loss == "squared" else [f"--loss={loss}"]))
    assert summary["train_loss"] < 1.03 * best["train_loss"]


@pytest.mark.parametrize("name", ["visits", "cost", "yes"])
def test_sgd_with_other_losses_comes_near_the_optimum(tables, name):
    loss = {"visits": "poisson", "cost": "gamma", "yes": "logistic"}[name]
    summary, *_ = fitted(tables[0], name, "--solver=sgd", f"--loss={loss}")
    best, *_ = solved(tables[0], name, f"--loss={loss}")
    assert summary["train_loss"] < 1.03 * best["train_loss"]


def test_a_network_explains_as_much_as_a_linear_model_in_any_unit_of_the_target(tables):
    folder, x, targets = tables
    share = sm.OLS(targets["price"], sm.add_constant(x)).fit().rsquared
    summary, lines, _ = fitted(folder, "price", "--model=mlp", "--max_epochs=60")
    assert "--target_transform=standardize" in lines
    assert 1 - 2 * summary["train_loss"] > share - 0.05  # The loss is in units of the target's standard deviation.


def test_the_bias_starts_at_the_best_constant_prediction(tables):
    for name, loss, expected in (
        ("price", "squared", np.mean),
        ("price", "absolute", np.median),
        ("price", "quantile", lambda y: np.quantile(y, 0.9)),
        ("visits", "poisson", lambda y: np.log(np.mean(y))),
        ("cost", "gamma", lambda y: np.log(np.mean(y))),
        ("yes", "logistic", lambda y: scipy.special.logit(np.mean(y))),
    ):
        config, data, _ = read_rows(config_of(tables, name, loss=loss, quantile=0.9))
        assert constant_fit(config, data) == pytest.approx([expected(tables[2][name])], rel=2e-3)
    config, data, _ = read_rows(config_of(tables, "kind", loss="softmax", num_classes=3))
    shares = np.bincount(tables[2]["kind"]) / 900
    np.testing.assert_allclose(constant_fit(config, data), np.log(shares), atol=0.01)
    assert constant_fit(Config(), dpreg.SyntheticRegressionData([2.0], 1.0)) is None


def test_an_exact_solution_that_does_not_fit_into_memory_is_refused(tables, monkeypatch):
    monkeypatch.setattr("dpreg.solvers.passes.host_bytes", lambda: 1000)
    with pytest.raises(
        dpreg.InputError, match=r"an exact solution for 2 features needs .* GB of memory, and this machine"
    ):
        DataParallelRegressor().fit(np.eye(2), [1.0, 2.0])
