"""The model, its loss and its optimizer, each against an independent computation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn
from flax import nnx
from models import Rows

import dpreg
from dpreg.config.model import LOSSES
from dpreg.models.losses import make_loss
from dpreg.step.digest import differ, digest_prediction, digest_training
from dpreg.step.state import forward, initial_state


def test_linear_model_is_initialized_as_in_the_book():
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


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "softmax"])  # softmax has a logit for each class.
@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 2), (1, 1)])
def test_a_prediction_never_broadcasts_against_a_target(loss, shape):
    for prediction, target in (((4, 1), shape), (shape, (4, 1))):
        with pytest.raises(ValueError, match="differ in shape"):
            make_loss(loss).rows(jnp.ones(prediction), jnp.ones(target))


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
    assert state == optimizer.init(tree(0))  # Neither clipping nor SGD has a state.


class Noisy(dpreg.Module):
    """A model whose layers differ in training; each subclass has another name for the mode argument."""

    lr: float = 0.1

    def setup(self):
        self.dense, self.norm, self.drop = nn.Dense(1), nn.BatchNorm(use_fast_variance=False), nn.Dropout(0.5)

    def predict(self, x, trains):
        return self.dense(self.drop(self.norm(x, use_running_average=not trains), deterministic=not trains))


class Train(Noisy):
    def __call__(self, x, train):
        return self.predict(x, train)


class Training(Noisy):
    def __call__(self, x, training=False):
        return self.predict(x, training)


class IsTraining(Noisy):
    def __call__(self, x, *, is_training=False):
        return self.predict(x, is_training)


class Deterministic(Noisy):
    def __call__(self, x, deterministic=True):
        return self.predict(x, not deterministic)


class Both(Noisy):
    def __call__(self, x, use_running_average: bool, train: bool):
        assert use_running_average != train
        return self.predict(x, train)


class Inherited(Deterministic):
    def __call__(self, x, **mode):
        return super().__call__(x, **mode)


@pytest.mark.parametrize("kind", [Training, IsTraining, Deterministic, Both, Inherited])
def test_the_training_flag_of_a_model_may_have_any_name_common_in_flax(kind):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    batch, key = {"x": jnp.asarray(x), "weight": jnp.ones(8)}, jax.random.key(1)
    state = initial_state(kind(), x, 0, np.dtype("float32"))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    for train in (True, False):
        found, wanted = (forward(model, variables, batch, train, key if train else None) for model in (kind(), Train()))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    w, b = (np.asarray(variables["params"]["dense"][name]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(found[0], x / np.sqrt(1 + 1e-5) @ w + b, rtol=1e-5)  # evaluation mode
    assert not np.allclose(forward(kind(), variables, batch, True, key)[0], found[0])


def model_with(layers, **arguments):
    """Returns a model of some layers before a Dense layer; `layers` is a function of the module, x and the mode."""

    class Made(dpreg.Module):
        lr: float = 0.1
        parameter_dtype: jnp.dtype = jnp.float32

        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(1, param_dtype=self.parameter_dtype)(layers(self, x, train))

    return Made(**arguments)


class Misnamed(dpreg.Module):
    lr: float = 0.1

    @nn.compact
    def __call__(self, x, is_train=False):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not is_train)(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


def attention(module, x, train):
    return nn.MultiHeadDotProductAttention(1, dropout_rate=0.5, deterministic=True)(x[:, None], x[:, None])[:, 0]


def noise(module, x, train):
    return x + jax.random.normal(module.make_rng("noise"), x.shape) if train else x


def noise_where_there_is_some(module, x, train):
    return x + jax.random.normal(module.make_rng("noise"), x.shape) if module.has_rng("noise") else x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Misnamed(), "Misnamed.__call__ has an argument 'is_train', which dpreg does not pass; use train, training"),
        (model_with(lambda _, x, train: nn.Dropout(0.5, deterministic=True)(x)), "the Dropout 'Dropout_0' is never on"),
        (
            model_with(lambda _, x, train: nn.Dropout(0.5, deterministic=False)(x)),
            "draws random numbers in evaluation, too",
        ),
        (
            model_with(lambda _, x, train: nn.BatchNorm(False)(x)),
            "the BatchNorm 'BatchNorm_0' is on in evaluation, too",
        ),
        (model_with(attention), "the MultiHeadDotProductAttention 'MultiHeadDotProductAttention_0' is never on"),
        (model_with(noise), "from the stream 'noise', and is given 'dropout' alone"),
        (model_with(noise_where_there_is_some), "from the stream 'noise', and is given 'dropout' alone"),
        (
            model_with(lambda _, x, train: nn.Dropout(0.5)(x)),
            'cannot be traced: ValueError: Parameter "deterministic" must be',
        ),
        (model_with(lambda _, x, train: x @ jnp.ones((2, 2))), "Made cannot be traced: TypeError: dot_general"),
        (
            model_with(lambda _, x, train: x, parameter_dtype=jnp.bfloat16),
            "['params']['Dense_0']['bias'] as bfloat16; keep",
        ),
        (Plain(), "Plain has no loss and no configure_optimizers; derive it from dpreg.Module"),
        (Plain, "Plain is a class; give an instance"),
        (nnx.Linear(3, 1, rngs=nnx.Rngs(0)), "Linear is a module of flax.nnx; give one of flax.linen"),
        (object(), "object is no flax module"),
    ],
)
def test_a_model_that_dpreg_cannot_train_is_refused_in_one_line(model, message):
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(dpreg.InputError, match=re.escape(message)) as caught,
    ):
        dpreg.Trainer(1).fit(model, Rows(16).data(8))
    assert "\n" not in str(caught.value)


def test_a_batch_norm_may_be_frozen():
    model = model_with(lambda _, x, train: nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(True)(x)))
    initial_state(model, np.ones((1, 3)), 0, np.dtype("float32"))


def linear(optimizer):
    return dpreg.LinearRegressionScratch(3, 0.1, optimizer=optimizer)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.lbfgs(), "evaluates the loss at other parameters"),
        (optax.MultiSteps(optax.sgd(0.1), 4), "use accumulate_steps"),
        (optax.chain(optax.apply_every(4), optax.sgd(0.1)), "use accumulate_steps"),
        (optax.lookahead(optax.sgd(0.1), 5, 0.5), "it steps two sets of parameters"),
        (optax.contrib.schedule_free_sgd(), "it predicts with other parameters than it steps"),
        (optax.contrib.differentially_private_aggregate(1.0, 1.0, key=0), "it needs the gradient of each row"),
        (([optax.sgd(0.1)], []), "LinearRegressionScratch.configure_optimizers gives tuple; give one optax"),
        (
            optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: leaf.astype(jnp.float16).sum(), updates)),
            "the optimizer of LinearRegressionScratch",
        ),
    ],
)
def test_an_optimizer_that_would_not_work_as_documented_is_refused_in_one_line(optimizer, message):
    with pytest.raises(dpreg.InputError, match=re.escape(message)):
        initial_state(linear(optimizer), np.ones((1, 3)), 0, np.dtype("float32"))


def test_an_optimizer_may_use_the_mean_loss():
    """Compares `reduce_on_plateau` with gradient descent in float64; the initial rate is too high."""
    source = Rows(24, weighted=True).source()
    x, y, c = np.c_[source.x, np.ones(24)].astype(np.float64), source.y.astype(np.float64), np.float64(source.weight)
    start = linear(None).init(jax.random.key(0), source.x[:1])["params"]
    theta = np.float64(np.concatenate([start["w"], start["b"][:, None]]))
    least, since, scale, rate = np.inf, 0, 1.0, 2.0
    for _ in range(12):
        error = x @ theta - y
        loss = c @ np.square(error[:, 0]) / 2 / c.sum()
        since, least = (0, loss) if loss < (1 - 1e-4) * least else (since + 1, least)
        if since == 2:
            scale, since = scale / 4, 0
        theta -= rate * scale * x.T @ (error * c[:, None]) / c.sum()
    assert 1e-3 < scale < 1
    optimizer = optax.chain(optax.sgd(rate), optax.contrib.reduce_on_plateau(factor=0.25, patience=2))
    trainer = dpreg.Trainer(12, 2)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it here.
        trainer.fit(linear(optimizer), dpreg.RegressionData(source, None, 24))
    np.testing.assert_allclose(trainer.state.params["w"], theta[:3], rtol=1e-3)


def test_a_float32_run_starts_equally_after_a_float64_run():
    def leaves():
        state = initial_state(linear(optax.lbfgs(0.1, linesearch=None)), np.ones((1, 3)), 0, np.dtype("float32"))
        return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]

    before = leaves()
    with jax.enable_x64(True):  # A float64 run leaves this setting on.
        assert leaves() == before


def test_the_digest_changes_if_and_only_if_the_computation_changes():
    class Other(Plain):
        def loss(self, prediction, target):
            return jnp.abs(prediction - target)[:, 0]

        def configure_optimizers(self):
            return optax.sgd(0.1)

    class Renamed(Other):
        """Computes the same with different code."""

        def configure_optimizers(self):
            rate = 0.1
            return optax.sgd(rate)

    class Rate(Other):
        def configure_optimizers(self):
            return optax.sgd(0.11)

    class Squared(Other):
        def loss(self, prediction, target):
            return jnp.square(prediction - target)[:, 0]

    class Start(Other):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)

    def digests(model, features=3):
        state = initial_state(model, np.ones((1, features)), 0, np.dtype("float32"))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return digest_training(model, state, features, 1), digest_prediction(model, variables, features, 1)

    training, prediction = digests(Other())
    assert digests(Renamed()) == (training, prediction)
    for model, changes_prediction in ((Rate(), False), (Squared(), True), (Start(), False)):
        assert differ(digests(model)[0], training)
        assert differ(digests(model)[1], prediction) == changes_prediction
    newer = training.replace(jax.__version__, "99.0")
    assert not differ(training, newer.replace(training[:32], "0" * 32))
    assert digests(linear(None)) == (None, None)  # Its flags already determine its computation.


def test_the_digest_of_a_run_includes_settings_in_the_optimizer_state():
    class Mine(dpreg.Module):
        lr: float

        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(x)

        def configure_optimizers(self):
            return optax.inject_hyperparams(optax.sgd)(learning_rate=self.lr)

    def computation(rate):
        trainer = dpreg.Trainer(1, 1)
        trainer.prepare_data(Rows(16).data(8))
        trainer.prepare_model(Mine(rate))
        return trainer.loop.computation

    assert differ(computation(0.1), computation(0.01))
    assert not differ(computation(0.1), computation(0.1))


def with_method(name, base, *arguments):
    return type("Mine", (base,), {name: lambda self, batch=None: batch, "__module__": __name__})(*arguments)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        *(("model", name, "override loss (one value") for name in ("training_step", "optimizer_step")),
        *(("model", name, "validation measures the loss") for name in ("validation_step", "predict_step")),
        *(("model", name, "callbacks=") for name in ("plot", "on_train_epoch_end", "training_epoch_end")),
        *(("trainer", name, "override loss (one value") for name in ("fit_epoch", "train_step")),
        ("trainer", "prepare_batch", "in the __call__ of the model, or in a dpreg.Source"),
        ("trainer", "on_epoch_end", "callbacks="),
        *(("data", name, "give rows by a dpreg.Source") for name in ("get_dataloader", "train_dataloader")),
    ],
)
def test_a_hook_of_another_training_library_is_refused_by_name(part, name, message):
    parts = {
        "model": (dpreg.LinearRegressionScratch, 3, 0.1),
        "trainer": (dpreg.Trainer, 1),
        "data": (dpreg.RegressionData, Rows(16).source(), None, 8),
    }
    made = {key: with_method(name if key == part else "helper", *arguments) for key, arguments in parts.items()}
    with pytest.raises(dpreg.InputError, match=re.escape(f"Mine.{name}: dpreg does not call it; ")) as caught:
        made["trainer"].fit(made["model"], made["data"])
    assert message in str(caught.value)


def test_a_hook_set_on_an_instance_is_refused_and_a_helper_of_the_loss_is_not():
    trainer = dpreg.Trainer(1)
    trainer.fit_epoch = lambda: None
    with pytest.raises(dpreg.InputError, match=r"Trainer\.fit_epoch: dpreg does not call it"):
        trainer.fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(16).data(8))

    class Part(dpreg.LinearRegressionScratch):
        def l1_penalty(self, prediction):
            return 0.1 * jnp.abs(prediction).sum(axis=1)

    class Whole(Part):
        def loss(self, prediction, target):
            return super().loss(prediction, target) + self.l1_penalty(prediction)

    with pytest.raises(dpreg.InputError, match=r"Part\.l1_penalty: dpreg does not call it; override loss"):
        dpreg.Trainer(1).fit(Part(3, 0.1), Rows(16).data(8))
    dpreg.Trainer(1).fit(Whole(3, 0.1), Rows(16).data(8))


def test_a_hook_added_to_a_dpreg_class_is_refused(monkeypatch):
    monkeypatch.setattr(dpreg.Trainer, "fit_epoch", lambda self: None, raising=False)  # as `d2l.add_to_class` does
    with pytest.raises(dpreg.InputError, match=r"Trainer\.fit_epoch: dpreg does not call it"):
        dpreg.Trainer(1).fit(dpreg.LinearRegressionScratch(3, 0.1), Rows(16).data(8))


def test_deprecated_names_work_and_warn():
    with pytest.deprecated_call(match="PermutedSource"):
        assert dpreg.Shuffled is dpreg.PermutedSource
    with pytest.deprecated_call(match="audit_total"):
        assert dpreg.Dataset(Rows(5).source()).tags[0] == 5
    with pytest.deprecated_call(match="row_wise"):

        class Mine(dpreg.LinearRegressionScratch):
            rows_apart = False

    assert (dpreg.LinearRegressionScratch.row_wise, Mine.row_wise) == (True, False)
    steps = []
    with pytest.deprecated_call(match="callbacks"):
        trainer = dpreg.Trainer(1, observers=[lambda progress: steps.append(progress.step)])
    trainer.fit(Mine(3, 0.1), Rows(16).data(8))
    assert steps[-1] == 2
