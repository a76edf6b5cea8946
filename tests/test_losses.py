"""Each loss, penalty, optimizer and schedule reaches the optimum of other packages, on any number of devices."""

import json

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import statsmodels.api as sm
from scipy import special
from sklearn import linear_model

import dpreg
from dpreg.config import Config
from dpreg.config.model import LOSSES
from dpreg.models.losses import make_loss
from dpreg.models.metrics import eval_sums, metrics
from dpreg.models.optimizers import make_optimizer, make_schedule
from dpreg.train.build import build_model

ROWS = 2000


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32).astype(np.float64)


def targets(name, x):
    rng = np.random.default_rng(1)
    z = x @ [0.5, -0.3, 0.2, 0.0] + 0.4
    return {
        "logistic": lambda: (rng.random(ROWS) < special.expit(2 * z)).astype(float),
        "softmax": lambda: np.argmax(np.c_[2 * z, x[:, 0], -z] + rng.gumbel(size=(ROWS, 3)), axis=1).astype(float),
        "poisson": lambda: rng.poisson(np.exp(z)).astype(float),
        "gamma": lambda: np.exp(z) * rng.gamma(3, 1 / 3, ROWS),
    }.get(name, lambda: z + rng.standard_t(4, ROWS))()


def huber_optimum(x, y):
    """Returns the optimum of statsmodels, whose Huber loss scales the errors; the scale is estimated once."""

    def robust(t):
        return sm.RLM(y, sm.add_constant(x), sm.robust.norms.HuberT(t)).fit(update_scale=False, maxiter=500, tol=1e-12)

    found = robust(0.5 / robust(1.0).scale).params
    return found[1:], found[0]


def fitted(model, x, y):
    model.fit(x, y)
    return model.coef_, model.intercept_


OPTIMA = {
    "squared": lambda x, y: fitted(linear_model.LinearRegression(), x, y),
    "huber": huber_optimum,
    "absolute": lambda x, y: fitted(linear_model.QuantileRegressor(quantile=0.5, alpha=0), x, y),
    "quantile": lambda x, y: fitted(linear_model.QuantileRegressor(quantile=0.8, alpha=0), x, y),
    "logistic": lambda x, y: fitted(linear_model.LogisticRegression(C=np.inf, tol=1e-10), x, y),
    "softmax": lambda x, y: fitted(linear_model.LogisticRegression(C=np.inf, tol=1e-10), x, y),
    "poisson": lambda x, y: fitted(linear_model.PoissonRegressor(alpha=0, tol=1e-10), x, y),
    "gamma": lambda x, y: fitted(linear_model.GammaRegressor(alpha=0, tol=1e-10), x, y),
    "l1": lambda x, y: fitted(linear_model.Lasso(alpha=0.1, tol=1e-12), x, y),
    "l2": lambda x, y: fitted(linear_model.Ridge(alpha=0.1 * ROWS), x, y),
}
FLAGS = {
    "huber": {"huber_delta": 0.5},
    "quantile": {"quantile": 0.8},
    "softmax": {"num_classes": 3},
    "l1": {"loss": "squared", "l1": 0.1},
    "l2": {"loss": "squared", "l2": 0.1},
}


@pytest.mark.parametrize("name", OPTIMA)
def test_each_loss_reaches_the_reference_optimum_with_the_same_bits(name, x):
    y = targets(name, x)
    steep = name in ("absolute", "quantile")  # The loss is not smooth, so the steps must shrink.
    flags = {"loss": name} | FLAGS.get(name, {}) | {"lr": 0.03 if steep else 0.3, "batch_size": ROWS}
    flags |= (
        {"optimizer": "adam", "lr_schedule": "linear"}
        if steep
        else {"optimizer": "sgd" if name == "l1" else "momentum"}
    )
    config = Config(**flags, max_epochs=1200 if steep else 300)
    found = []
    for devices in (1, 8):
        trainer = dpreg.Trainer(config.max_epochs, devices, reduction="ordered", audit=False)
        data = dpreg.RegressionData(dpreg.ArraySource(x, y), None, ROWS)
        with jax.numpy_dtype_promotion("standard"):
            trainer.fit(build_model(config, 4, 1, config.max_epochs), data)
        found.append({k: np.asarray(v, np.float64) for k, v in trainer.state.params.items()})
    for one, eight in zip(found[0].values(), found[1].values(), strict=True):
        np.testing.assert_array_equal(one, eight)
    w, b = (np.asarray(value) for value in OPTIMA[name](x, y))
    ours_w, ours_b = found[0]["w"].T, found[0]["b"]
    if name == "softmax":  # The parameters are determined up to a term common to all classes.
        ours_w, ours_b, w, b = (v - v.mean(axis=0) for v in (ours_w, ours_b, w, b))
    np.testing.assert_allclose(ours_w.reshape(w.shape), w, atol=1e-3)
    np.testing.assert_allclose(ours_b.reshape(b.shape), b, atol=1e-3)
    if name == "l1":
        assert (ours_w.ravel() == 0).tolist() == (w == 0).tolist()
        assert (w == 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences_in_float64(name):
    rng = np.random.default_rng(3)
    loss = make_loss(name, 0.7, 0.3, 3)
    z = rng.normal(size=(20, 3 if name == "softmax" else 1))
    y = {
        "logistic": rng.integers(0, 2, (20, 1)),
        "softmax": rng.integers(0, 3, (20, 1)),
        "poisson": rng.poisson(2.0, (20, 1)),
        "gamma": rng.gamma(2.0, size=(20, 1)),
        "tweedie": rng.gamma(2.0, size=(20, 1)) * rng.integers(0, 2, (20, 1)),
        "negative_binomial": rng.poisson(2.0, (20, 1)),
    }.get(name, rng.normal(size=(20, 1)))
    with jax.enable_x64(True):
        z, y = jnp.asarray(z), jnp.asarray(y, jnp.float64)
        gradient = np.asarray(jax.grad(lambda z: loss.rows(z, y).sum())(z))
        for row, column in np.ndindex(z.shape):
            ends = [loss.rows(z.at[row, column].add(h), y)[row] for h in (1e-6, -1e-6)]
            assert ends[0].shape == ()
            assert gradient[row, column] == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logistic", 0.5, "in row 8 is 0.5 and has to be 0 or 1"),
        ("softmax", 2, "in row 8 is 2 and has to be a label from 0 to 1"),
        ("poisson", -1, "in row 8 is -1 and has to be 0 or more"),
        ("gamma", 0, "in row 8 is 0 and has to be above 0"),
    ],
)
def test_a_target_outside_the_domain_is_refused_with_its_first_row(name, value, message):
    y = np.ones(40)
    y[[30, 7]] = value
    trainer, data = dpreg.Trainer(1), dpreg.RegressionData(dpreg.ArraySource(np.ones((40, 2)), y), None, 8)
    with pytest.raises(dpreg.InputError, match=message):
        trainer.fit(build_model(Config(loss=name), 2, 1), data)


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
@pytest.mark.parametrize(("name", "outlier"), [("poisson", 1e3), ("gamma", -1e3)])
def test_an_outlier_of_weight_zero_does_not_change_the_result(name, outlier, reduction, x):
    """This holds even where the derivative of the loss is infinite."""
    y, weight, found = targets(name, x)[:40], np.ones(40), []
    weight[[3, 17]] = 0
    for value in (outlier, 0.0):
        rows = np.array(x[:40])
        rows[[3, 17]] = value
        trainer = dpreg.Trainer(2, 2, reduction=reduction)
        source = dpreg.ArraySource(rows, y, weight)
        trainer.fit(build_model(Config(loss=name), 4, 1), dpreg.RegressionData(source, source, 8))
        found.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trainer.state.params)]))
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


def test_a_target_outside_the_domain_is_named_by_the_users_row_number():
    y = np.ones(40)
    y[7] = -1
    source = dpreg.PermutedSource(dpreg.PermutedSource(dpreg.ArraySource(np.ones((40, 2)), y)))
    with pytest.raises(dpreg.InputError, match="in row 8 is -1"):
        dpreg.Trainer(1).fit(build_model(Config(loss="poisson"), 2, 1), dpreg.RegressionData(source, None, 8))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_schedules_warm_up_and_then_decay(name):
    rates = [float(make_schedule(name, 0.5, 110, 10)(step)) for step in (0, 5, 10, 60, 110)]
    falls = {
        "constant": [0.5, 0.5, 0.5],
        "linear": [0.5, 0.25, 0.0],
        "cosine": [0.5, 0.25, 0.0],
        "inverse_sqrt": [0.5, 0.5 * np.sqrt(10 / 60), 0.5 * np.sqrt(10 / 110)],
    }
    np.testing.assert_allclose(rates, [0, 0.25, *falls[name]], atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "lbfgs"])
def test_every_optimizer_reaches_least_squares_and_does_not_penalize_the_bias(name, x):
    y = x @ [1.0, -2.0, 3.0, 0.5] + 10
    with jax.numpy_dtype_promotion("standard"):
        trainer = dpreg.Trainer(600)
        schedule = make_schedule("cosine", {"lbfgs": 1.0, "adam": 0.5, "adamw": 0.5}.get(name, 0.1), 600)
        model = dpreg.LinearRegressionScratch(4, 0.1, optimizer=make_optimizer(name, schedule))
        trainer.fit(model, dpreg.RegressionData(dpreg.ArraySource(x, y), None, ROWS))
    np.testing.assert_allclose(trainer.state.params["w"].ravel(), [1, -2, 3, 0.5], atol=1e-3)
    np.testing.assert_allclose(trainer.state.params["b"], [10], atol=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model=mlp", "--hidden=16,8", "--dropout=0.1", "--batch_norm", "--optimizer=adam", "--batch_size=128"],
        ["--model=concise", "--loss=huber", "--optimizer=adamw", "--l2=0.01", "--lr_schedule=cosine"],
        ["--model=models_of_user:Plain"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_build_the_model_they_describe(flags, tmp_path):
    code = "from flax import linen as nn\nimport dpreg\nclass Plain(dpreg.Module):\n    @nn.compact\n"
    (tmp_path / "models_of_user.py").write_text(f"{code}    def __call__(self, x):\n        return nn.Dense(1)(x)\n")
    command = ("-m", "dpreg.main", "--platform=cpu", "--num_devices=2", *flags, "--lr=0.03", "--max_epochs=40")
    done = forked.run(*command, f"--workdir={tmp_path / 'w'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("val_loss") for line in lines]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.1 * losses[0] or losses[-1] < 0.05


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": "l3"}, "loss='l3': use squared"),
        ({"model": "nowhere:Net"}, "model='nowhere:Net': ModuleNotFoundError"),
        ({"quantile": 1.0}, "quantile=1.0: use"),
        ({"loss": "poisson", "target_transform": "log"}, "target_transform='log': it applies only to tables"),
        ({"dropout": -0.1}, "dropout=-0.1: use"),
        ({"l1": 0.1, "optimizer": "adam"}, "l1=0.1: only optimizer='sgd' reaches"),
        ({"hidden": (0,)}, r"hidden=\(0,\): use"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_one_line(flags, message):
    with pytest.raises(dpreg.InputError, match=message):
        build_model(Config(**flags), 2, 1)


@pytest.mark.parametrize("transform", ["none", "standardize", "log"])
def test_pinball_loss_is_in_the_units_of_the_table(transform, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2))
    y = 1000 + 50 * x @ rng.normal(size=(2, 2)) + rng.normal(size=(200, 2))
    weight = rng.uniform(0.5, 2, 200)
    names = ("a", "b", "y", "z", "w")
    table = pa.table(dict(zip(names, np.c_[x, y, weight].T, strict=True)))
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    columns = dpreg.Columns(
        target=("y", "z"), weight_column="w", target_transform=transform, validation_fraction=0.3, standardize=True
    )
    data = dpreg.read_table(str(tmp_path / "t.parquet"), columns, cache_dir=str(tmp_path / "cache"))
    trainer = dpreg.Trainer(3)
    trainer.fit(build_model(Config(loss="quantile", quantile=0.3, lr=0.1), 2, 2), data)
    error = y[data.val.row] - trainer.predict(np.float32(x[data.val.row]))
    pinball = np.where(error > 0, 0.3 * error, -0.7 * error).mean(axis=1)
    assert trainer.metrics["pinball"] == pytest.approx(np.average(pinball, weights=weight[data.val.row]), rel=1e-4)


@pytest.mark.parametrize("unit", [1e-36, 1e-20, 1.0, 1e19, 1e36])
def test_metrics_agree_with_float64_in_any_unit_of_the_target(unit):
    rng = np.random.default_rng(0)
    target = rng.normal([0.3, 5.0], [2.0, 0.1], (64, 2)) * [unit, 1.0]
    prediction = target + rng.normal(0, 0.5, (64, 2)) * [unit, 0.1]
    weight = rng.integers(0, 3, 64).astype(np.float64)
    target[0], weight[0] = 3e38, 0  # This row must not count.
    target, prediction, weight = (values.astype(np.float32) for values in (target, prediction, weight))
    model = dpreg.LinearRegressionScratch(1, 0.1, num_targets=2)

    def evaluated(prediction, target, weight):
        return eval_sums(model, False, {}, prediction, {"y": target, "weight": weight})

    parts = np.arange(20), np.arange(20, 64), np.zeros(1, int)
    batches = [jax.jit(evaluated)(prediction[rows], target[rows], weight[rows]) for rows in parts]
    blocks = [jax.tree.map(lambda leaf: np.asarray(leaf)[None, None], batch) for batch in batches]
    scale = np.array([3.0, 0.5])
    loss, found = metrics(blocks, scale, ("rmse", "mae", "r2", "pinball"), of_squares=True)
    y, error = target.astype(np.longdouble), prediction.astype(np.longdouble) - target
    share = weight.astype(np.longdouble) / weight.sum()
    spread = share @ np.square(y - share @ y)
    expected = {
        "rmse": np.sqrt((share @ np.square(error * scale)).mean()),
        "mae": (share @ np.abs(error * scale)).mean(),
        "r2": (1 - share @ np.square(error) / spread).mean(),
        "pinball": (share @ np.abs(error * scale)).mean() / 2,
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=2e-5)
    if unit < 1e19:
        assert loss == pytest.approx(float(share @ np.square(error).sum(axis=1) / 2), rel=1e-5)
