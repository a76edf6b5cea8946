"""The model, its loss and its optimizer, each against an independent computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpreg
from dpreg.config import LOSSES
from dpreg.models.losses import loss_called


def test_linear_model_starts_as_the_book_says():
    model = dpreg.LinearRegressionScratch(2000, lr=0.03, sigma=0.5)
    params = model.init(jax.random.key(3), jnp.zeros((1, 2000)))["params"]
    assert params["w"].shape == (2000, 1)
    assert abs(np.std(params["w"]) - 0.5) < 0.05
    np.testing.assert_array_equal(params["b"], [0.0])


def test_linear_model_predicts_x_w_plus_b():
    model = dpreg.LinearRegressionScratch(2, lr=0.03)
    params = {"w": jnp.array([[2.0], [-3.0]]), "b": jnp.array([4.0])}
    np.testing.assert_array_equal(model.apply({"params": params}, jnp.array([[1.0, 1.0], [0.0, 2.0]])), [[3], [-2]])


def test_squared_loss_is_per_row():
    loss = dpreg.squared_loss(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[3.0, 2.0], [1.0, -1.0]]))
    np.testing.assert_array_equal(loss, [2.0, 1.0])


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "softmax"])  # it has a logit for each class
@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 2), (1, 1)])
def test_a_prediction_never_broadcasts_against_a_target(loss, shape):
    for prediction, target in (((4, 1), shape), (shape, (4, 1))):
        with pytest.raises(ValueError, match="differ in shape"):
            loss_called(loss).rows(jnp.ones(prediction), jnp.ones(target))


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.normal(size=(17, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}


@pytest.mark.parametrize("lr", [0.03, 1e-7, 3.0])
def test_sgd_equals_optax_to_the_bit(lr):
    ours, theirs = dpreg.SGD(lr), optax.sgd(lr)
    params = tree(0)
    state, their_state = ours.init(params), theirs.init(params)
    for seed in range(1, 5):
        updates, state = jax.jit(ours.update)(tree(seed), state, params)
        expected, their_state = jax.jit(theirs.update)(tree(seed), their_state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_sgd_is_a_value_that_does_not_retrace_and_chains():
    traced = []
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), dpreg.SGD(0.5))

    @jax.jit
    def step(params, gradients, state):
        traced.append(1)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = tree(0), optimizer.init(tree(0))
    for seed in (1, 2, 3):
        params, state = step(params, tree(seed), state)
    assert len(traced) == 1
    assert state == optimizer.init(tree(0))  # neither clipping nor SGD remembers anything
