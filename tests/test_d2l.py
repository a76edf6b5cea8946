"""The API of Dive into Deep Learning: its section 3.4 as printed, and custom training loops."""

import types
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import dpreg
from dpreg import d2l
from dpreg.data.sampler import Sampler

# The code of the section, with its mistakes corrected.
CHAPTER = """
class LinearRegressionScratch(d2l.Module):
    num_inputs: int
    lr: float
    sigma: float = 0.01
    def setup(self):
        self.w = self.param('w', nn.initializers.normal(self.sigma), (self.num_inputs, 1))
        self.b = self.param('b', nn.initializers.zeros, (1,))
@d2l.add_to_class(LinearRegressionScratch)
def forward(self, X): return jnp.matmul(X, self.w) + self.b
@d2l.add_to_class(LinearRegressionScratch)
def loss(self, params, X, y, state):
    y_hat = state.apply_fn({'params': params}, *X)
    l = (y_hat - y.reshape(y_hat.shape)) ** 2 / 2
    return l.mean()
class SGD(d2l.HyperParameters):
    def __init__(self, lr): self.save_hyperparameters()
    def init(self, params): del params; return optax.EmptyState()
    def update(self, updates, state, params=None):
        del params; return jax.tree_util.tree_map(lambda g: -self.lr * g, updates), state
    def __call__(self): return optax.GradientTransformation(self.init, self.update)
@d2l.add_to_class(LinearRegressionScratch)
def configure_optimizers(self): return SGD(self.lr)
"""

# The training loop that the section adds to `d2l.Trainer`.
LOOP = """
def prepare_batch(self, batch):
    return batch

def fit_epoch(self):
    self.model.training = True
    for batch in self.train_dataloader:
        _, grads = self.model.training_step(self.state.params, self.prepare_batch(batch), self.state)
        self.state = self.state.apply_gradients(grads=grads)
        self.state = self.state.replace(dropout_rng=jax.random.split(self.state.dropout_rng)[0])
        self.train_batch_idx += 1
    if self.val_dataloader is None:
        return
    self.model.training = False
    for batch in self.val_dataloader:
        self.model.validation_step(self.state.params, self.prepare_batch(batch), self.state)
        self.val_batch_idx += 1
"""


def run(code):
    """Runs the code of a notebook and returns the names that it defines."""
    names = {"__name__": "__main__", "d2l": d2l, "jax": jax, "jnp": jnp, "nn": nn, "optax": optax}
    exec(code, names)
    return types.SimpleNamespace(**names)


@pytest.fixture(autouse=True)
def jax_as_readers_have_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def chapter():
    return run(CHAPTER)


@pytest.fixture(scope="module")
def data():
    return d2l.SyntheticRegressionData(w=jnp.array([2, -3.4]), b=4.2)


def values(params):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(params)])


def fit(trainer, model, data):
    trainer.fit(model, data)
    return values(trainer.state.params)


def sgd_in_numpy(loader, epochs, lr, decay=0.0):
    """Minibatch SGD on the mean squared error plus decay / 2 |w|^2, in float64; returns b, then w."""
    w, b = None, 0.0
    for epoch in range(epochs):
        loader.epoch = epoch
        for x, y in loader:
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)[:, 0]
            w = np.zeros(x.shape[1]) if w is None else w
            error = x @ w + b - y
            w, b = w - lr * (x.T @ error / len(y) + decay * w), b - lr * error.mean()
    return np.append(b, w)


@pytest.mark.parametrize("reduction", ["pmean", "ordered"])
def test_the_chapter_trains_to_the_numbers_of_linear_regression_scratch(chapter, data, reduction):
    found = []
    for devices in (1, 8):
        settings = {"num_devices": devices, "reduction": reduction}
        trainer = d2l.Trainer(max_epochs=3, **settings)
        found.append(fit(trainer, chapter.LinearRegressionScratch(2, lr=0.03), data))
        theirs = dpreg.Trainer(3, **settings)
        expected = fit(theirs, dpreg.LinearRegressionScratch(2, 0.03), dpreg.SyntheticRegressionData([2, -3.4], 4.2))
        np.testing.assert_allclose(found[-1], expected, rtol=1e-6)
        assert trainer.engine.val_loss == pytest.approx(theirs.val_loss, rel=1e-6)
        if reduction == "ordered":
            np.testing.assert_array_equal(found[-1], expected)
            np.testing.assert_array_equal(found[-1], found[0])
            assert trainer.engine.val_loss == theirs.val_loss


def test_the_loop_of_the_chapter_is_called_and_gives_the_same_parameters(data, monkeypatch):
    slip = run(CHAPTER.replace("(1,)", "(1)"))  # The initializer accepts this shape, too.
    compiled, by_hand = (slip.LinearRegressionScratch(2, lr=0.03, sigma=0.0) for _ in range(2))
    trainer = d2l.Trainer(3)
    expected = fit(trainer, compiled, data)
    np.testing.assert_allclose(expected, sgd_in_numpy(trainer.train_dataloader, 3, 0.03), rtol=1e-5)
    compiled_epoch = d2l.Trainer.fit_epoch
    for name in ("prepare_batch", "fit_epoch"):  # as `d2l.add_to_class(d2l.Trainer)` does
        monkeypatch.setattr(d2l.Trainer, name, getattr(run(LOOP), name))

    class OwnLoopOfTheFirstEpochs(d2l.Trainer):
        def fit_epoch(self):
            if self.epoch == 2:
                monkeypatch.undo()
            (super().fit_epoch if self.epoch < 2 else compiled_epoch.__get__(self))()
            states.append(self.state)

    states = []
    trainer = OwnLoopOfTheFirstEpochs(3)
    np.testing.assert_allclose(fit(trainer, by_hand, data), expected, rtol=1e-5)
    assert (trainer.epoch, trainer.train_batch_idx, trainer.val_batch_idx) == (2, 96, 96)
    assert [int(state.step) for state in states] == [32, 64, 96]
    assert (states[0].dropout_rng != states[1].dropout_rng).all()
    for label, points in compiled.board.points.items():
        across, up = np.array(by_hand.board.points[label]).T
        np.testing.assert_allclose(across, np.array(points)[:, 0])
        np.testing.assert_allclose(up, np.array(points)[:, 1], rtol=1e-4 if label == "train_loss" else 0.02)
    assert [x for x, _ in compiled.board.points["val_loss"]] == [1, 2, 3]
    assert len(compiled.board.points["train_loss"]) == 6


def rows(number=50, weighted=False, validated=True):
    """Returns a data module of dpreg whose last shard and batch are not full."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((number, 3)), rng.standard_normal(number)
    weight = rng.integers(0, 3, number) + (np.arange(number) == 0) if weighted else None
    return dpreg.RegressionData(
        dpreg.ArraySource(x, y, weight), dpreg.ArraySource(x[:9], y[:9]) if validated else None, 16
    )


def with_loss(function, base=d2l.LinearRegressionScratch, **members):
    """Returns a subclass of a model with another loss."""
    return type("Mine", (base,), {"loss": function, "__module__": __name__, **members})


def squares(self, params, X, y, state):
    return ((state.apply_fn({"params": params}, *X) - y) ** 2 / 2).mean()


def test_a_mean_loss_gives_the_bits_of_a_per_row_loss_on_ragged_weighted_rows():
    mine, settings = with_loss(squares), {"reduction": "ordered", "num_devices": 3}
    trainer, theirs = d2l.Trainer(2, **settings), dpreg.Trainer(2, **settings)
    found = fit(trainer, mine(3, lr=0.1), rows(weighted=True))
    np.testing.assert_array_equal(found, fit(theirs, dpreg.LinearRegressionScratch(3, 0.1), rows(weighted=True)))
    assert trainer.engine.val_loss == theirs.val_loss


def test_a_penalty_inside_the_loss_is_exact():
    def penalised(self, params, X, y, state):
        # These are not the parameters of the step.
        other = state.apply_fn({"params": {**params, "b": 0 * params["b"]}}, *X)
        penalty = 3 * (params["w"] ** 2).sum() / 2 + (state.params["w"] ** 2).sum()  # no gradient through state.params
        return ((other + params["b"] - y) ** 2 / 2).mean() + penalty

    trainer = d2l.Trainer(2)
    found = fit(trainer, with_loss(penalised)(3, lr=0.05, sigma=0.0), rows())
    np.testing.assert_allclose(found, sgd_in_numpy(trainer.train_dataloader, 2, 0.05, decay=3), rtol=1e-4, atol=1e-6)


def test_overridden_methods_of_the_loop_are_called():
    class Trainer(d2l.Trainer):
        def prepare_batch(self, batch):
            return 2 * batch[0], batch[1]

        def clip_gradients(self, grad_clip_val, grads):
            return jax.tree.map(lambda leaf: jnp.clip(leaf, -grad_clip_val, grad_clip_val), grads)

    trainer = Trainer(1, gradient_clip_val=0.1, precision="bfloat16")
    found = fit(trainer, d2l.LinearRegressionScratch(3, lr=0.1, sigma=0.0), rows())
    w, b = np.zeros(3), 0.0
    trainer.train_dataloader.epoch = 0
    for x, y in trainer.train_dataloader:
        assert (x == x.astype(jnp.bfloat16).astype(x.dtype)).all()  # On the devices the rows are bfloat16.
        x, error = 2 * np.asarray(x, float), 2 * np.asarray(x, float) @ w + b - np.asarray(y, float)[:, 0]
        w, b = w - 0.1 * np.clip(x.T @ error / len(x), -0.1, 0.1), b - 0.1 * np.clip(error.mean(), -0.1, 0.1)
    np.testing.assert_allclose(found, [b, *w], rtol=1e-4)

    class Doubled(d2l.LinearRegressionScratch):
        def training_step(self, params, batch, state):
            value, gradient = super().training_step(params, batch, state)
            return value, jax.tree.map(lambda leaf: 2 * leaf, gradient)

        def plot(self, key, value, train):
            plotted.append((key, train))

    plotted = []
    doubled = fit(d2l.Trainer(1, gradient_clip_val=0.4), Doubled(3, lr=0.1), rows())
    assert plotted == [("loss", True)] * 4 + [("loss", False)]
    compiled = fit(d2l.Trainer(1, gradient_clip_val=0.2), d2l.LinearRegressionScratch(3, lr=0.2), rows())
    np.testing.assert_allclose(doubled, compiled, rtol=1e-5)


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        (
            "return optax.EmptyState()",
            "return optax.EmptyState",
            "init returns the class EmptyState; return EmptyState()",
        ),
        ("updates), state", "updates)", "update returns the updates alone; return updates, state"),
        (
            "def loss(self",
            "def losses(self",
            "LinearRegressionScratch has no loss; define loss(self, params, X, y, state)",
        ),
        ("def forward(self", "def forwards(self", "LinearRegressionScratch has no forward; define forward(self, X)"),
        ("def configure_optimizers(", "def optimizers(", "LinearRegressionScratch has no configure_optimizers; define"),
        ("l.mean()", "l", "loss returns an array [1, 1] for 1 rows; return one number, the mean over the rows"),
        ("l.mean()", "(l.mean(), {})", "loss returns a tuple for 1 rows; return one number"),
        ("l.mean()", "l.sum()", "and the mean of the losses of each row is"),
        ("l.mean()", "l.max()", "and the mean of the losses of each row is"),
        ("l.mean()", "jnp.sqrt(l.mean())", "and the mean of the losses of each row is"),
        ("X, self.w)", "X - X.mean(0), self.w)", "of a model that predicts each row by itself"),
        ("*X)", "*X, train=True)", "loss calls state.apply_fn with train; call it as"),
        ("*X)", "*X, rngs={'dropout': jax.random.key(0)})", "loss calls state.apply_fn with rngs; call it as"),
        ("lr: float", "lr: float; training: bool = True", "has a field 'training', which no step sets"),
    ],
)
def test_a_mistake_in_the_code_of_the_chapter_is_reported_in_one_line(data, replaced, by, message):
    assert replaced in CHAPTER
    model = run(CHAPTER.replace(replaced, by)).LinearRegressionScratch(2, lr=0.03)
    with pytest.raises(dpreg.InputError) as caught:
        d2l.Trainer(1).fit(model, data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class Net(d2l.Module):
    """A network with BatchNorm, Dropout and an argument for the mode."""

    lr: float

    def setup(self):
        self.layers = nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.5), nn.Dense(1)

    def forward(self, X, train=False):
        dense, norm, dropout, last = self.layers
        return last(dropout(norm(dense(X), use_running_average=not train), deterministic=not train))

    loss = squares

    def configure_optimizers(self):
        return optax.sgd(self.lr)


def test_dropout_and_batch_norm_act_as_in_the_step_and_other_features_are_refused():
    class Theirs(dpreg.Module):
        lr: float
        setup, forward = Net.setup, Net.forward

        def __call__(self, x, train):
            return self.forward(x, train)

    trainer, theirs = d2l.Trainer(1), dpreg.Trainer(1)
    np.testing.assert_allclose(fit(trainer, Net(0.1), rows()), fit(theirs, Theirs(0.1), rows()), rtol=1e-5)
    assert trainer.engine.val_loss == pytest.approx(theirs.val_loss, rel=1e-6)

    def other_features(self, params, X, y, state):
        return ((state.apply_fn({"params": params}, 2 * X[0]) - y) ** 2).mean()

    with pytest.raises(dpreg.InputError, match=r"does not predict each row by itself; call it as state.apply_fn\("):
        d2l.Trainer(1).fit(with_loss(other_features, Net)(0.1), rows())
    with pytest.raises(dpreg.InputError, match=r"Net derives from d2l\.Module; train it with dpreg\.d2l\.Trainer"):
        dpreg.Trainer(1).fit(Net(0.1), rows())


def test_options_that_a_custom_loop_does_not_support_are_refused():
    class Mine(d2l.Trainer):
        def prepare_batch(self, batch):
            return batch

    linear = d2l.LinearRegressionScratch(3, lr=0.1)
    for trainer, model, data, message in (
        (Mine(1), Net(0.1), rows(validated=False), "does not update the statistics of BatchNorm"),
        (
            Mine(1, callbacks=[dpreg.Callback()]),
            linear,
            rows(validated=False),
            "callbacks: an epoch that runs step by step does not use it",
        ),
        (d2l.Trainer(1), linear, type("Own", (d2l.DataModule,), {"collate_fn": print})(), "change rows in a Source"),
        (d2l.Trainer(1), linear.__class__, rows(), "LinearRegressionScratch is not an instance"),
        (d2l.Trainer(1), dpreg.LinearRegressionScratch(3, 0.1), rows(), "derived from d2l.Module"),
        (type("Own", (d2l.Trainer,), {"on_epoch_end": lambda self: None})(1), linear, rows(), "dpreg does not call it"),
    ):
        with pytest.raises(dpreg.InputError) as caught:
            trainer.fit(model, data)
        assert message in str(caught.value)
    with pytest.raises(dpreg.Diverged):
        Mine(3).fit(d2l.LinearRegressionScratch(3, lr=1e30), rows(validated=False))
    weighted = d2l.Loader(rows(weighted=True).train, Sampler(50, 1, 16))
    with pytest.raises(dpreg.InputError, match=r"batches \(X, y\) carry no weights, and some rows have one"):
        list(weighted)


def test_a_data_module_of_the_book_yields_the_rows_of_its_arrays(data):
    class Data(d2l.DataModule):
        def __init__(self, num_train, num_val, batch_size):
            self.save_hyperparameters()
            self.X, self.y = data.X[: num_train + num_val], data.y[: num_train + num_val]

        def get_dataloader(self, train):
            i = slice(0, self.num_train) if train else slice(self.num_train, None)
            return self.get_tensorloader((self.X, self.y), train, i)

    mine = Data(num_train=100, num_val=20, batch_size=32)
    batches = list(mine.train_dataloader())
    assert [len(x) for x, _ in batches] == [32, 32, 32, 4]
    seen = np.concatenate([np.column_stack([x, y]) for x, y in batches])
    np.testing.assert_array_equal(np.unique(seen, axis=0), np.unique(np.column_stack([data.X, data.y])[:100], axis=0))
    held_out = np.concatenate([x for x, _ in mine.val_dataloader()])
    np.testing.assert_array_equal(held_out, data.X[100:120])
    arrays = dpreg.RegressionData(
        dpreg.ArraySource(data.X[:100], data.y[:100]), dpreg.ArraySource(held_out, data.y[100:120]), 32
    )
    model = d2l.LinearRegressionScratch(2, lr=0.1)
    trainer, theirs = d2l.Trainer(1), dpreg.Trainer(1)
    np.testing.assert_allclose(fit(trainer, model, mine), fit(theirs, dpreg.LinearRegressionScratch(2, 0.1), arrays))
    assert trainer.engine.val_loss == pytest.approx(theirs.val_loss)

    class Generator(Data):
        def get_dataloader(self, train):
            yield self.X, self.y

    with pytest.raises(dpreg.InputError, match=r"Generator.train_dataloader returns generator, .*get_tensorloader"):
        trainer.fit(model, Generator(100, 20, 32))
    with pytest.raises(dpreg.InputError, match="DataModule has no get_dataloader"):
        trainer.fit(model, d2l.DataModule())


def test_a_key_initializes_the_parameters_and_apply_init_may_be_overridden():
    class Ones(d2l.LinearRegressionScratch):
        def apply_init(self, dummy_input, key):
            assert dummy_input[0].shape == (1, 3)
            return jax.tree.map(jnp.ones_like, self.init(key, *dummy_input))

    still = {"lr": 0.0, "sigma": 1.0}
    key = jax.random.key(3)
    model = d2l.LinearRegressionScratch(3, **still)
    drawn = values(model.init(jax.random.split(key)[0], jnp.zeros((1, 3)))["params"])
    trainer = d2l.Trainer(1)
    with pytest.raises(AttributeError, match=r"Trainer\.train_dataloader: there is none before fit"):
        trainer.train_dataloader  # noqa: B018
    trainer.fit(model, rows(), key)
    np.testing.assert_allclose(values(trainer.state.params), drawn, rtol=1e-6)
    model = Ones(3, **still)
    for _ in range(2):  # Each call draws a new figure.
        assert (fit(trainer, model, rows()) == 1).all()
        assert len(model.board.points["val_loss"]) == 1


def test_fit_epoch_of_dpreg_trains_one_epoch():
    one, other = dpreg.Trainer(2), dpreg.Trainer(2)
    one.prepare_data(rows())
    one.prepare_model(dpreg.LinearRegressionScratch(3, 0.1))
    one.fit_epoch()
    assert one.step == 4
    one.fit_epoch()
    np.testing.assert_array_equal(values(one.state.params), fit(other, dpreg.LinearRegressionScratch(3, 0.1), rows()))


def test_the_board_draws_only_in_a_notebook(monkeypatch):
    class Handle(list):
        update = list.append

    import IPython
    import IPython.display

    def draw(board):
        for x in range(6):
            board.draw(x, jnp.float32(x * x), "square", every_n=2)
            board.draw(x, 1 + x, "line")
        return board

    handle = Handle()
    monkeypatch.setattr(IPython.display, "display", lambda board, display_id: handle.append(board) or handle)
    assert draw(d2l.ProgressBoard("x")).points["square"] == [(0.5, 0.5), (2.5, 6.5), (4.5, 20.5)]
    assert not handle
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel=True))
    draw(d2l.ProgressBoard("x", display=False))
    assert not handle
    board = draw(d2l.ProgressBoard("x", "y", xlim=(0, 4), yscale="log"))
    assert len(handle) == 9
    assert handle[-1]._repr_mimebundle_()["text/plain"] == "line 6, square 20.5"
    image = xml.etree.ElementTree.fromstring(board.svg())
    texts = {element.text for element in image.iter("{http://www.w3.org/2000/svg}text")}
    assert {"x", "y", "4", "0.5", "5"} <= texts
    assert "20" not in texts  # the point at x = 4.5 is beyond xlim
    board.xscale = "logarithmic"
    with pytest.raises(dpreg.InputError, match=r"ProgressBoard\.xscale='logarithmic': use linear or log"):
        board.svg()


def test_a_compact_method_may_be_added_to_a_class():
    class Late(d2l.LinearRegressionScratch):
        def setup(self):
            pass

    @d2l.add_to_class(Late)
    @nn.compact
    def forward(self, X):
        return nn.Dense(1)(X)

    assert forward.__name__ == "forward"
    assert set(Late(3, 0.1).init(jax.random.key(0), jnp.zeros((1, 3)))["params"]) == {"Dense_0"}
