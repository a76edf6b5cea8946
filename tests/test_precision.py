"""Precisions: float64 throughout, and bfloat16 features with sums in float32."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cluster import alone
from models import Net, Rows
from test_exactness import OPTIMIZERS, Noisy, batches_of, digest, sgd_in_float64, trained

import dpreg
from dpreg.data.sampler import Sampler
from dpreg.train.predictor import Predictor


@pytest.fixture(autouse=True)
def _float64_off_again():
    yield
    jax.config.update("jax_enable_x64", False)


def float64_rows(num_rows, num_inputs=3, weighted=True):
    """Returns rows with more digits than float32 holds."""
    source, rng = Rows(num_rows, num_inputs, weighted).source(), np.random.default_rng(5)
    x = source.x + rng.uniform(-1e-9, 1e-9, source.x.shape)
    return dpreg.ArraySource(x, source.y.astype(np.float64) + 1e-10, source.weight, dtype=np.float64)


@pytest.mark.parametrize(
    ("reduction", "layouts"),
    [
        ("pmean", ((1, "device"), (2, "device"), (3, "host"), (8, "device"))),
        ("ordered", ((1, "host"), (3, "device"), (8, "host"))),
    ],
)
def test_float64_agrees_with_float64(reduction, layouts):
    source, sampler = float64_rows(1003, 5), Sampler(1003, 8, 64)
    model = dpreg.LinearRegressionScratch(5, 0.03)
    start = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 5), np.float32))["params"]
    batches = list(batches_of(sampler, 0, 3))
    w, b, losses = sgd_in_float64(source.x, source.y, source.weight, 0.03, batches, (start["w"], start["b"]))
    last_epoch = np.array(losses[-sampler.steps_per_epoch :]).sum(0)
    found = set()
    for devices, placement in layouts:
        trainer = dpreg.Trainer(3, devices, precision="float64", reduction=reduction, placement=placement)
        trainer.fit(model, dpreg.RegressionData(source, None, 64))
        assert trainer.state.params["w"].dtype == np.float64
        np.testing.assert_allclose(trainer.state.params["w"], w, rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(trainer.state.params["b"], b, rtol=1e-13, atol=1e-15)
        assert trainer.train_loss == pytest.approx(last_epoch[0] / last_epoch[1], rel=1e-13)
        np.testing.assert_allclose(trainer.predict(source.x[:7]), source.x[:7] @ w + b, rtol=1e-12)
        found.add(b"".join(np.asarray(trainer.state.params[name]).tobytes() for name in "wb"))
    assert len(found) == 1 or reduction == "pmean"


@pytest.mark.parametrize(
    ("precision", "other"), [("float64", (3, {"placement": "host"})), ("bfloat16", (8, {"placement": "device"}))]
)
def test_ordered_gives_the_same_bits_in_any_precision(precision, other):
    source = float64_rows(203)
    model = Net(OPTIMIZERS["clip+momentum"])

    def run(devices, arguments):
        data = dpreg.RegressionData(source, source, 64)
        with jax.numpy_dtype_promotion("standard"):  # Flax's dropout and optax need it.
            return digest(trained(model, data, 2, devices, reduction="ordered", precision=precision, **arguments))

    assert run(1, {}) == run(*other)


def test_bfloat16_trains_with_a_single_feature():
    trainer = dpreg.Trainer(3, 2, precision="bfloat16")
    trainer.fit(dpreg.LinearRegressionScratch(1, 0.1), Rows(200, 1).data(32))
    assert trainer.train_loss < 0.4


def test_a_float64_run_does_not_change_later_runs():
    def run(precision):
        data = dpreg.RegressionData(float64_rows(203), None, 64)
        with jax.numpy_dtype_promotion("standard"):
            return digest(trained(Noisy(), data, 1, 2, precision=precision))  # The model has dropout.

    before = run("float32")
    assert run("float64") != before
    assert run("float32") == before


@pytest.mark.parametrize("placement", ["device", "host"])
def test_bfloat16_rounds_only_features(placement):
    source, sampler = Rows(1003, 5, weighted=True).source(), Sampler(1003, 8, 64)
    model = dpreg.LinearRegressionScratch(5, 0.03)
    start = model.init(jax.random.key(0), source.x[:1])["params"]
    rounded = source.x.astype(ml_dtypes.bfloat16).astype(np.float64)
    batches = list(batches_of(sampler, 0, 3))
    w, b, _ = sgd_in_float64(rounded, source.y, source.weight, 0.03, batches, (start["w"], start["b"]))
    for devices in (1, 8):
        trainer = dpreg.Trainer(3, devices, precision="bfloat16", placement=placement)
        trainer.fit(model, dpreg.RegressionData(source, None, 64))
        block = next(iter(trainer.train))
        assert {name: column.dtype for name, column in block.data.items() if name != "tag"} == {
            "x": jnp.bfloat16,
            "y": np.float32,
            "weight": np.float32,
        }
        # This CPU has no bfloat16 products; a chip that has them rounds the parameters as well.
        np.testing.assert_allclose(trainer.state.params["w"], w, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(trainer.state.params["b"], b, rtol=1e-6, atol=1e-7)


def test_bfloat16_products_accumulate_in_float32():
    data = Rows(200).data(64)
    asked = {}
    for precision in ("float32", "bfloat16"):
        trainer = dpreg.Trainer(1, 1, precision=precision)
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.03), data)
        asked[precision] = set()
        for found in jax.make_jaxpr(lambda x, trainer=trainer: _predicted(trainer, x))(data.train.x[:8]).eqns:
            asked[precision].add(str(found.params.get("precision")))
    assert any("BF16_BF16_F32" in text for text in asked["bfloat16"])
    assert not any("BF16" in text for text in asked["float32"])


def _predicted(trainer, x):
    from dpreg.step.state import forward

    batch = {
        "x": x.astype(jnp.bfloat16 if trainer.settings.precision == "bfloat16" else x.dtype),
        "weight": jnp.ones(len(x)),
    }
    return forward(dpreg.LinearRegressionScratch(3, 0.03), trainer.variables, batch, train=False, platform="tpu")[0]


def test_a_float64_predictor_computes_in_float64():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1001, 3)), rng.normal(size=(3, 1))
    mesh = dpreg.Trainer(1, 8).mesh
    model = dpreg.LinearRegressionScratch(3, 0.03)
    variables = {"params": {"w": w, "b": np.array([0.1])}, "batch_stats": {}}
    predictor = Predictor(model, variables, 3, 1, mesh=mesh, precision="float64")
    found = predictor.predictions(predictor.chunks(dpreg.ArraySource(x, np.zeros(1001), dtype=np.float64)))
    np.testing.assert_allclose(np.concatenate(list(found)), x @ w + 0.1, rtol=1e-14, atol=1e-14)


def test_a_float64_run_resumes_to_the_same_bits(tmp_path):
    work = ("--platform=cpu", "--precision=float64", "--noise=0.5", "--num_train=300", "--num_val=50")
    alone(tmp_path / "whole", "--max_epochs=2", devices=2, work=work)
    alone(tmp_path / "parts", "--max_epochs=1", devices=2, work=work)
    alone(tmp_path / "parts", "--max_epochs=2", devices=2, work=work)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    assert summaries[0]["train_loss"] == summaries[1]["train_loss"]
    b = summaries[0]["parameters"]["b"]
    assert b != float(np.float32(b))
