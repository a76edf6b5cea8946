"""The scikit-learn estimators: scikit-learn's checks and optima, and the guarantees of data-parallel training."""

import functools
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pyarrow
import pytest
import statsmodels.api as sm
from cluster import ROOT
from models import Foreign
from scipy import special
from sklearn import linear_model
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dpreg
from dpreg.models.losses import make_loss
from dpreg.models.mlp import MLP
from dpreg.sklearn import DataParallelClassifier, DataParallelRegressor
from dpreg.solvers import softmax

ROWS = 600
# Float32 values stored as float64, far from mean 0 and deviation 1.
X = np.random.default_rng(0).normal([5, -200, 0, 1], [1, 30, 0.01, 1], size=(ROWS, 4)).astype(np.float32).astype(float)
Z = (X - [5, -200, 0, 1]) / [1, 30, 0.01, 1] @ [0.5, -0.3, 0.2, 0.1] + 0.4


@pytest.fixture(autouse=True)
def _promotion_as_for_users():
    with jax.numpy_dtype_promotion("standard"):
        yield


def targets(loss):
    rng = np.random.default_rng(1)
    return {
        "logistic": lambda: np.where(rng.random(ROWS) < special.expit(2 * Z), "yes", "no"),
        "softmax": lambda: np.argmax(np.c_[2 * Z, X[:, 0] - 5, -Z] + rng.gumbel(size=(ROWS, 3)), axis=1) * 10,
        "poisson": lambda: rng.poisson(np.exp(Z)).astype(float),
        "gamma": lambda: np.exp(Z) * rng.gamma(3, 1 / 3, ROWS),
    }.get(loss, lambda: 1000 * (Z + rng.standard_t(4, ROWS)))()


def run_python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["DataParallelRegressor", "DataParallelClassifier"])
def test_all_checks_of_scikit_learn_pass_and_none_is_skipped(name):
    code = (
        "import sys, dpreg.distributed.devices, dpreg.sklearn\n"
        "from sklearn.utils.estimator_checks import check_estimator\n"
        "dpreg.distributed.devices.start('cpu')\n"  # This enables the compilation cache.
        "for check in check_estimator(getattr(dpreg.sklearn, sys.argv[1])()):\n"
        "    print(check['status'], check['expected_to_fail'])\n"
    )
    # Without it, scikit-learn skips a check of the array API.
    lines = run_python(code, name, SCIPY_ARRAY_API="1").splitlines()
    assert len(lines) > 50
    assert set(lines) == {"passed False"}


PATHS = {
    "huber": {"optimizer": "momentum", "lr": 0.3, "max_epochs": 500},
    "l1": {"optimizer": "sgd", "lr": 0.3, "max_epochs": 500},
    "quantile": {"lr": 0.03, "max_epochs": 1500},  # The loss is not smooth, so the steps must shrink.
}


EXACT, STEPS = ("squared", "poisson", "logistic", "softmax", "l1", "l2"), ("gamma", "quantile")


@pytest.mark.parametrize(
    ("name", "solver"), [(name, "exact") for name in EXACT] + [(name, "sgd") for name in EXACT + STEPS]
)
def test_coefficients_agree_with_the_optimum_of_scikit_learn(name, solver):
    steps = {} if solver == "exact" else PATHS.get(name, PATHS["huber"]) | {"batch_size": ROWS}
    y, scaler = targets(name), StandardScaler().fit(X)
    theirs = {
        "squared": lambda: linear_model.LinearRegression(),
        "poisson": lambda: linear_model.PoissonRegressor(alpha=0.01, tol=1e-12, solver="newton-cholesky"),
        "gamma": lambda: linear_model.GammaRegressor(alpha=0.01, tol=1e-12, solver="newton-cholesky"),
        "l2": lambda: linear_model.Ridge(alpha=0.1 * ROWS),
        "l1": lambda: linear_model.Lasso(alpha=0.1 * y.std(), tol=1e-12),
        "quantile": lambda: linear_model.QuantileRegressor(quantile=0.8, alpha=0),
    }.get(name, lambda: linear_model.LogisticRegression(C=100 / ROWS, tol=1e-12, max_iter=1000))()
    # Scikit-learn penalizes the coefficients of its input columns; dpreg those of scaled columns, so scale the input.
    theirs.fit(scaler.transform(X), y)
    if name in ("logistic", "softmax"):
        ours = DataParallelClassifier(l2=0.01, solver=solver, **steps)
    else:
        penalty = {"l2": {"l2": 0.1}, "l1": {"l1": 0.1}, "poisson": {"l2": 0.01}, "gamma": {"l2": 0.01}}.get(name, {})
        loss = "squared" if name in ("l1", "l2") else name
        ours = DataParallelRegressor(loss, quantile=0.8, **penalty, solver=solver, **steps)
    ours.fit(X, y)
    size = y.std() if name in ("squared", "l2", "l1", "quantile") else 1.0
    close = {"atol": (1e-6 if solver == "exact" else 1e-3) * size, "rtol": 0}
    np.testing.assert_allclose(ours.coef_ * scaler.scale_, theirs.coef_, **close)
    np.testing.assert_allclose(ours.intercept_ + ours.coef_ @ scaler.mean_, theirs.intercept_, **close)
    if name == "l1":
        assert (ours.coef_ == 0).tolist() == (theirs.coef_ == 0).tolist()
        assert 0 < (ours.coef_ == 0).sum() < 4


def test_the_sums_for_softmax_agree_with_automatic_differentiation():
    rng = np.random.default_rng(3)
    theta, x = rng.normal(size=(3, 4)), rng.normal(size=(20, 2))
    y, weight = rng.integers(0, 4, (20, 1)).astype(float), rng.random(20)
    loss = make_loss("softmax", num_classes=4)
    with jax.enable_x64(True):

        def total(flat):
            theta = flat.reshape(3, 4)
            return jnp.vdot(loss.rows(jnp.asarray(x) @ theta[1:] + theta[:1], jnp.asarray(y)), weight)

        flat = jnp.asarray(theta.ravel())
        parts = jax.jit(lambda flat: (total(flat), jax.grad(total)(flat), jax.hessian(total)(flat)))(flat)
        expected = np.concatenate([np.ravel(part) for part in (weight.sum(), *parts)])
        np.testing.assert_allclose(softmax.sums(x, y, weight, theta), expected, atol=1e-12)


@pytest.mark.parametrize(
    "estimator",
    [
        DataParallelRegressor(),
        DataParallelRegressor("poisson"),
        DataParallelRegressor("huber", batch_size=1024, max_epochs=20),
        DataParallelClassifier(),
    ],
    ids=["squared", "poisson", "huber", "classes"],
)
def test_integer_weights_are_equivalent_to_repeated_rows(estimator):
    y = targets("logistic" if isinstance(estimator, DataParallelClassifier) else "poisson")
    weight = np.random.default_rng(2).integers(0, 4, ROWS)
    by_weight = clone(estimator).fit(X[:300], y[:300], weight[:300])
    repeated = clone(estimator).fit(X[:300].repeat(weight[:300], axis=0), y[:300].repeat(weight[:300]))
    method = "predict_proba" if isinstance(estimator, DataParallelClassifier) else "predict"
    steps = getattr(estimator, "loss", "") == "huber"  # This loss is fitted by float32 steps.
    np.testing.assert_allclose(
        getattr(by_weight, method)(X), getattr(repeated, method)(X), rtol=1e-4 if steps else 1e-9
    )


@pytest.mark.parametrize(
    "estimator",
    [
        DataParallelRegressor(),
        DataParallelClassifier(reduction="ordered"),
        DataParallelRegressor("huber", model="mlp", hidden=(8,), reduction="ordered", max_epochs=3),
    ],
    ids=["least squares", "newton and steps", "mlp"],
)
def test_estimators_give_the_same_bits_on_any_number_of_devices(estimator):
    y = targets("softmax" if isinstance(estimator, DataParallelClassifier) else "squared")
    found = []
    for num_devices in (1, 2, 8):
        fitted = clone(estimator).set_params(num_devices=num_devices).fit(X, y)
        if fitted.model == "linear":
            fitted.partial_fit(X[:100], y[:100])
        found.append(getattr(fitted, "decision_function", fitted.predict)(X))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    "estimator",
    [DataParallelClassifier(), DataParallelClassifier(model=MLP((8,), 3), max_epochs=5, num_devices=2)],
    ids=["linear", "module"],
)
def test_a_pickle_predicts_the_same_in_another_process(estimator, tmp_path):
    expected = estimator.fit(X, targets("softmax")).predict_proba(X)
    (tmp_path / "estimator").write_bytes(pickle.dumps(estimator))
    np.save(tmp_path / "x.npy", X)
    code = (
        "import pickle, sys, jax, numpy as np\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "estimator = pickle.load(open('estimator', 'rb'))\n"
        "assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(vars(estimator._fitted)))\n"
        "np.save('found.npy', estimator.predict_proba(np.load('x.npy')))\n"
    )
    run_python(f"import os\nos.chdir({str(tmp_path)!r})\n" + code)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)


def test_data_frames_provide_the_feature_names():
    names, y = ["a", "b", "c", "d"], targets("squared")
    from_arrays = DataParallelRegressor().fit(X, y)
    frame = pandas.DataFrame(X, columns=names)
    table = pyarrow.table({name: X[:, j] for j, name in enumerate(names)})
    for rows, target in ((frame, pandas.Series(y)), (table, pyarrow.array(y))):
        fitted = DataParallelRegressor().fit(rows, target)
        assert fitted.feature_names_in_.tolist() == names
        np.testing.assert_array_equal(fitted.predict(rows), from_arrays.predict(X))
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame[["b", "a", "c", "d"]])
    labels = pyarrow.array(targets("logistic"))
    np.testing.assert_array_equal(DataParallelClassifier().fit(table, labels).classes_, ["no", "yes"])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # three steps do not converge
def test_partial_fit_continues_from_the_current_state():
    y = targets("squared")
    exact = DataParallelRegressor(l2=0.1)
    for part in np.array_split(np.arange(ROWS), 7):
        exact.partial_fit(X[part], y[part])
    np.testing.assert_allclose(exact.coef_, DataParallelRegressor(l2=0.1).fit(X, y).coef_, rtol=1e-10)
    # Epochs of one step: the momentum is kept, too.
    steps = {"solver": "sgd", "optimizer": "momentum", "lr_schedule": "constant", "batch_size": ROWS, "lr": 0.05}
    for model in ("concise", "mlp"):
        several = DataParallelRegressor(model=model, **steps)
        for _ in range(3):
            several.partial_fit(X, y)
        once = DataParallelRegressor(model=model, **steps, max_epochs=3).fit(X, y)
        np.testing.assert_allclose(several.predict(X), once.predict(X), atol=1e-5 * y.std())
    # It stays at the optimum.
    labels = targets("softmax")
    classifier = DataParallelClassifier(l2=0.01, batch_size=600, lr=1e-5).fit(X, labels)
    before = classifier.decision_function(X)
    np.testing.assert_allclose(classifier.partial_fit(X, labels).decision_function(X), before, atol=1e-3)
    with pytest.raises(dpreg.InputError, match="first call of partial_fit needs all labels"):
        DataParallelClassifier().partial_fit(X, labels)
    with pytest.raises(dpreg.InputError, match="label 7 is none of the classes"):
        classifier.partial_fit(X[:2], [0, 7])


def test_sgd_fits_targets_with_a_large_mean():
    x = np.random.default_rng(0).normal(size=(300, 4))
    y = np.exp(14 + x @ [0.3, -0.2, 0.1, 0]) * np.random.default_rng(1).gamma(3, 1 / 3, 300)
    ours = DataParallelRegressor("gamma").fit(x, y)
    theirs = linear_model.GammaRegressor(alpha=0, tol=1e-10).fit(x, y)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=0.02)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=0.02)


def test_sorted_rows_train_as_well_as_shuffled_rows():
    iris = load_iris()  # The rows are sorted by class.
    order = np.random.default_rng(0).permutation(len(iris.target))
    for model in (DataParallelClassifier(solver="sgd"), DataParallelClassifier(model="mlp", hidden=(16,))):
        for rows in (np.arange(len(order)), order):
            assert clone(model).fit(iris.data[rows], iris.target[rows]).score(iris.data, iris.target) > 0.95
    y = targets("quantile")
    rising = np.argsort(y)
    found = DataParallelRegressor("absolute").fit(X[rising], y[rising])
    best = linear_model.QuantileRegressor(quantile=0.5, alpha=0).fit(X, y)
    assert np.abs(found.predict(X) - y).mean() < 1.002 * np.abs(best.predict(X) - y).mean()


def test_estimators_work_in_pipelines_and_searches():
    y = targets("logistic") == "yes"
    grid = {"dataparallelclassifier__l2": [1e-3, 1e2], "dataparallelclassifier__standardize": [True, False]}
    search = GridSearchCV(make_pipeline(StandardScaler(), DataParallelClassifier()), grid, cv=3).fit(X, y)
    assert search.best_params_["dataparallelclassifier__l2"] == 1e-3
    assert search.predict(X).dtype == bool
    assert search.score(X, y) > 0.65
    again = clone(search.best_estimator_).fit(X, y)
    np.testing.assert_array_equal(again.predict_proba(X), search.predict_proba(X))


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y == "yes",
        lambda y: np.where(y == "yes", 1, -1),
        lambda y: y.astype(object),
        lambda y: pandas.Series(y, dtype="category"),
        lambda y: pandas.Series(y, dtype="string"),
        lambda y: np.where(Z > 1, "often", y),
    ],
    ids=["bool", "numbers", "objects", "category", "string", "three"],
)
def test_labels_of_any_type_are_those_of_scikit_learn(make):
    y = make(targets("logistic"))
    ours, theirs = DataParallelClassifier(l2=0.01), linear_model.LogisticRegression(C=1 / (0.01 * ROWS), tol=1e-10)
    scaled = StandardScaler().fit_transform(X)
    ours.fit(scaled, y)
    theirs.fit(scaled, y)
    assert ours.classes_.tolist() == theirs.classes_.tolist()
    np.testing.assert_allclose(ours.predict_proba(scaled), theirs.predict_proba(scaled), atol=1e-6)
    found = ours.predict(scaled)
    assert found.dtype == theirs.predict(scaled).dtype
    assert found.tolist() == theirs.predict(scaled).tolist()


def test_estimators_fit_several_targets_and_few_rows():
    y = np.c_[targets("squared"), X @ [1, 2, 3, 4]]
    linear, theirs = DataParallelRegressor().fit(X, y), linear_model.LinearRegression().fit(X, y)
    np.testing.assert_allclose(linear.coef_, theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(linear.intercept_, theirs.intercept_, rtol=1e-6, atol=1e-6)
    assert DataParallelRegressor(model="mlp").fit(X, y).score(X, y) > 0.5
    counts = np.random.default_rng(0).poisson(np.exp(np.c_[Z, -Z]))
    together = DataParallelRegressor("poisson").fit(X, counts)
    for k in range(2):
        apart = DataParallelRegressor("poisson").fit(X, counts[:, k])
        np.testing.assert_allclose(together.predict(X)[:, k], apart.predict(X), rtol=1e-8)
    for solver in ("exact", "sgd"):
        for n in (1, 3):
            few = DataParallelRegressor(solver=solver).fit(X[:n, :1], np.arange(n))
            assert np.isfinite(few.predict(X[:, :1])).all()
    # If the rows do not determine the coefficients: the solution of least norm, as in scikit-learn.
    wide = np.random.default_rng(0).normal(size=(10, 25))
    ours = DataParallelRegressor(standardize=False).fit(wide, wide[:, 0])
    theirs = linear_model.LinearRegression().fit(wide, wide[:, 0])
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-10)
    x, labels = np.c_[X, X[:, 0], np.ones(ROWS)], targets("softmax")
    doubled, single = DataParallelClassifier(l2=0).fit(x, labels), DataParallelClassifier(l2=0).fit(X, labels)
    np.testing.assert_allclose(doubled.predict_proba(x), single.predict_proba(X), rtol=1e-8)
    np.testing.assert_allclose(doubled.coef_[:, 0], doubled.coef_[:, 4], rtol=1e-8)
    np.testing.assert_allclose(doubled.coef_[:, 5], 0, atol=1e-12)


def test_estimators_train_a_module_of_the_user():
    y = targets("absolute") / 1000
    foreign = DataParallelRegressor(model=Foreign(), standardize=True).fit(X, y)
    best = linear_model.QuantileRegressor(quantile=0.5, alpha=0).fit(X, y)
    assert np.abs(foreign.predict(X) - y).mean() < 1.01 * np.abs(best.predict(X) - y).mean()
    with pytest.raises(dpreg.InputError, match=r"predicts \[1, 2\] for one row; give one that predicts \[1, 3\]"):
        DataParallelClassifier(model=MLP((4,), 2)).fit(X, targets("softmax"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "newton"}, "solver='newton': use auto, exact or sgd"),
        ({"solver": "exact", "model": "mlp"}, "solver='exact': it applies only to"),
        ({"loss": "logistic"}, "use DataParallelClassifier"),
        ({"lr": -1.0}, "^lr=-1.0: use a value above 0$"),
        (
            {"solver": "sgd", "batch_size": 20},
            "^batch_size=20: it is not a multiple of num_shards=8; use",
        ),
        ({"loss": "gamma"}, "the target in row 4 is -5 and has to be above 0"),
    ],
)
def test_input_that_cannot_be_fitted_is_refused_in_one_line(arguments, message):
    y = np.abs(targets("squared")) + 1
    y[3] = -5
    with pytest.raises(dpreg.InputError, match=message):
        DataParallelRegressor(**arguments).fit(X, y)


def test_scikit_learn_is_optional():
    code = (
        "import sys\n"
        "import dpreg\n"
        "assert 'sklearn' not in sys.modules\n"
        "sys.modules['sklearn'] = None\n"
        "try:\n"
        "    import dpreg.sklearn\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert run_python(code) == "dpreg.sklearn: needs scikit-learn 1.6 or newer; pip install 'dpreg[sklearn]'\n"


def test_wide_least_squares_are_exact_by_default():
    """As in the command."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1_300, 1_100)).astype(np.float32)
    y = (x[:, :5].sum(axis=1) + rng.standard_normal(1_300)).astype(np.float32)
    found = DataParallelRegressor().fit(x, y)
    a = np.column_stack([np.ones(1_300), x]).astype(np.float64)
    np.testing.assert_allclose(found.coef_, np.linalg.lstsq(a, y.astype(np.float64))[0][1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [np.full((ROWS, 1), 0.1), np.c_[X[:, 1] / 3 + 0.1, X[:, 1] / 7], X[:, :1] + X[:, 3:]],
    ids=["constant", "linear", "sum"],
)
def test_redundant_columns_do_not_change_the_exact_solution(more):
    """After centering, only rounding errors are left of them."""
    y = Z + np.random.default_rng(1).normal(size=ROWS)
    wanted = linear_model.LinearRegression().fit(X, y).predict(X)
    fitted = DataParallelRegressor(l2=0).fit(np.c_[X, more], y)
    np.testing.assert_allclose(fitted.predict(np.c_[X, more]), wanted, rtol=1e-8)
    assert np.abs(fitted.coef_).max() < 100


@pytest.mark.parametrize("weight", [2.0**-160, 2.0**130])  # Neither fits in float32.
def test_scaling_all_weights_changes_nothing(weight):
    arguments = {"loss": "huber", "max_epochs": 2}
    coefs = [
        DataParallelRegressor(**arguments).fit(X, Z, sample_weight=np.full(ROWS, value)).coef_
        for value in (weight, 1.0)
    ]
    np.testing.assert_array_equal(*coefs)


def test_weights_that_are_all_zero_are_reported_before_missing_classes(monkeypatch):
    # Old versions of scikit-learn do not check the weights.
    monkeypatch.setattr("dpreg.estimators.rows._check_sample_weight", lambda weight, *_, **__: weight)
    with pytest.raises(ValueError, match="zero in every row"):
        DataParallelClassifier().fit(X, Z > 0, np.zeros(ROWS))


@pytest.mark.parametrize(("loss", "quantile"), [("absolute", 0.5), ("quantile", 0.9), ("quantile", 0.05)])
@pytest.mark.parametrize("weighted", [False, True])
def test_quantile_regression_agrees_with_a_linear_program(loss, quantile, weighted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(203, 3)) * [1, 10, 0.1] + [3, 0, 1]
    y = x @ [3, -2, 1] + 4 + rng.standard_t(2, size=203)
    weight = rng.integers(0, 4, 203).astype(float) if weighted else np.ones(203)
    theirs = linear_model.QuantileRegressor(quantile=quantile, alpha=0).fit(x, y, weight)
    ours = DataParallelRegressor(loss, quantile=quantile).fit(x, y, weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-6)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-6)
    bits = [DataParallelRegressor(loss, quantile=quantile, num_devices=n).fit(x, y, weight).coef_ for n in (1, 8)]
    np.testing.assert_array_equal(*bits)


@pytest.mark.parametrize("loss", ["huber", "absolute", "quantile"])
def test_robust_losses_reach_the_optimum_of_rows_without_noise(loss):
    x = np.random.default_rng(0).normal(size=(300, 3))
    for scale in (1e-9, 1.0, 1e6):
        model = DataParallelRegressor(loss).fit(x, scale * (x @ [3, -2, 1]))
        np.testing.assert_allclose(model.coef_, scale * np.array([3.0, -2.0, 1.0]), rtol=1e-9)


@pytest.mark.parametrize("loss", ["huber", "absolute", "gamma"])
def test_sgd_that_ends_far_from_the_optimum_warns(loss):
    x = np.random.default_rng(0).normal(size=(200, 3))
    y = np.exp(x @ [0.9, -0.6, 0.3]) if loss == "gamma" else x @ [3, -2, 1]
    with pytest.warns(ConvergenceWarning, match="max_epochs=2 ended far from the optimum"):
        DataParallelRegressor(loss, solver="sgd", max_epochs=2, lr=0.001).fit(x, y)


def test_a_constant_column_has_coefficient_zero_with_either_solver():
    x = np.c_[np.random.default_rng(0).normal(size=(200, 2)), np.full(200, 17.0)]
    y = x @ [3, -2, 0] + 5
    for arguments in ({"solver": "sgd"}, {"solver": "sgd", "standardize": False}, {"loss": "huber"}, {}):
        model = DataParallelRegressor(**arguments).fit(x, y)
        assert model.coef_[2] == 0, arguments
        other = x.copy()
        other[:, 2] = 900
        np.testing.assert_array_equal(model.predict(other), model.predict(x))
    mlp = DataParallelRegressor(model="mlp", max_epochs=1).fit(x, y)
    np.testing.assert_array_equal(mlp.predict(other), mlp.predict(x))


def test_a_perceptron_accepts_features_that_fit_in_float32_only_after_scaling():
    x = np.random.default_rng(0).normal(size=(80, 2))
    fits = [DataParallelRegressor(model="mlp", hidden=(4,), max_epochs=1).fit(c * x, x[:, 0]) for c in (1.0, 2.0**140)]
    np.testing.assert_allclose(fits[1].predict(2.0**140 * x), fits[0].predict(x), rtol=1e-5)


@pytest.mark.parametrize("loss", ["squared", "huber", "poisson"])
@pytest.mark.parametrize(("small", "large"), [(1e-12, 1e6), (1e-9, 1e9)])
def test_the_rounding_residue_of_a_linear_combination_is_not_a_direction(loss, small, large):
    """The rounding residue of a dropped column is larger than all values of another column."""
    z = np.random.default_rng(0).normal(size=(120, 2))
    x, y = np.c_[small * z[:, 0], large * z[:, 1], 3 * large * z[:, 1]], z @ [1, 2]
    fitted = DataParallelRegressor(loss, standardize=False).fit(x, np.exp(y) if loss == "poisson" else y)
    np.testing.assert_allclose(fitted.coef_ * [small, large, large], [1, 0.2, 0.6], rtol=1e-7)  # 2 = 0.2 + 3 * 0.6


@pytest.mark.parametrize("loss", ["squared", "huber", "poisson"])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("origin", "unit"), [(4e14, 1), (1.7e15, 1), (1_760_000_000_000_000_000, 256), (1e17, 16)])
def test_a_column_that_varies_is_not_taken_for_constant_however_large_its_mean(loss, standardize, origin, unit):
    rng = np.random.default_rng(0)
    z = np.c_[rng.normal(size=120), rng.integers(0, 2, 120)]
    x, y = np.c_[z[:, 0], origin + unit * z[:, 1]], z @ [0.3, 0.2]
    fitted = DataParallelRegressor(loss, standardize=standardize)
    fitted.fit(x, np.exp(y) if loss == "poisson" else y)
    np.testing.assert_allclose(fitted.coef_ * [1, unit], [0.3, 0.2], rtol=1e-6)
    assert not fitted._fitted.schema.constant.any()


def test_constant_columns_are_detected_over_all_parts():
    x = np.c_[np.arange(40.0) % 7, np.full(40, 0.1), 4e14 + (np.arange(40) > 25)]
    parts, y = DataParallelRegressor(), x @ [3, 0, 2] - 8e14
    found = [parts.partial_fit(x[i : i + 10], y[i : i + 10])._fitted.schema.constant.tolist() for i in range(0, 40, 10)]
    assert found == [[False, True, True]] * 2 + [[False, True, False]] * 2
    np.testing.assert_allclose(parts.coef_, [3, 0, 2], atol=1e-9)
    lonely = np.c_[np.arange(10.0) % 4, np.full(10, 1e17)]
    lonely[0, 1] += 16
    np.testing.assert_allclose(DataParallelRegressor().fit(lonely, 3 * lonely[:, 0]).coef_, [3, 0], atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"l2": 0.1, "standardize": False}, {"loss": "huber"}, {"solver": "sgd"}])
def test_values_whose_squares_overflow_are_refused(arguments):
    x = np.random.default_rng(0).normal(size=(80, 2))
    y, weight = x @ [1, 2], np.ones(80)
    model = DataParallelRegressor(**arguments)
    for rows, target in ((x, y * 1e200), (x, y * 1e160), (x * 1e160, y)):
        with pytest.raises(dpreg.InputError, match=r"column 1 has .* in row 1; scale it to 1e\+150 at most"):
            model.fit(rows, target)
    for rows, target, name in ((x * 1e-170, y, "x0"), (x * 1e-200, y, "x0"), (x, y * 1e-170, "y0")):
        with pytest.raises(dpreg.InputError, match=f"column '{name}' varies by less than 1e-150"):
            model.fit(rows, target)
    exact = DataParallelRegressor().fit(x * 1e-140, y * 1e140)
    np.testing.assert_allclose(exact.coef_, [1e280, 2e280], rtol=1e-9)
    with pytest.raises(dpreg.InputError, match="scale it to 1 at most, or use smaller weights"):
        model.fit(x * 1e2, y, np.full(80, 1e300))
    if "solver" not in arguments:  # Steps use only relative weights.
        with pytest.raises(dpreg.InputError, match="its weights are as small"):
            model.fit(x, y, np.full(80, 1e-305))
    x[3], y[3], weight[3] = 1e200, 1e200, 0  # This row must not count.
    np.testing.assert_allclose(DataParallelRegressor().fit(x, y, weight).coef_, [1, 2], rtol=1e-9)


@pytest.mark.parametrize("loss", ["poisson", "gamma"])
def test_a_target_of_weight_zero_may_be_outside_the_domain(loss):
    x, weight = np.random.default_rng(0).normal(size=(80, 2)), np.ones(80)
    y = np.exp(x @ [0.3, -0.2])
    y[3], weight[3] = -3, 0
    model = DataParallelRegressor(loss, max_epochs=100)
    with_row = model.fit(x, y, weight).coef_
    np.testing.assert_allclose(with_row, model.fit(np.delete(x, 3, 0), np.delete(y, 3)).coef_, rtol=1e-6)
    y[5] = -4
    with pytest.raises(dpreg.InputError, match="the target in row 6 is -4"):
        model.fit(x, y, weight)


@pytest.mark.parametrize("loss", ["squared", "poisson", "logistic"])
def test_the_summary_agrees_with_statsmodels(loss):
    y = targets(loss)
    model = DataParallelClassifier(l2=0) if loss == "logistic" else DataParallelRegressor(loss, l2=0)
    found = model.fit(X, y).summary_
    family = {
        "squared": sm.families.Gaussian(),
        "poisson": sm.families.Poisson(),
        "logistic": sm.families.Binomial(),
    }[loss]
    theirs = sm.GLM((y == "yes") * 1.0 if loss == "logistic" else y, sm.add_constant(X), family).fit(tol=1e-14)
    names = ["(intercept)", "x0", "x1", "x2", "x3"]
    assert [c.name for c in found.coefficients] == names
    np.testing.assert_allclose([c.estimate for c in found.coefficients], theirs.params, rtol=1e-7)
    np.testing.assert_allclose([c.std_error for c in found.coefficients], theirs.bse, rtol=1e-6)
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), rtol=1e-5, atol=1e-9 * found.covariance.max())
    assert found.deviance == pytest.approx(theirs.deviance, rel=1e-9)
    assert pickle.loads(pickle.dumps(model)).summary_.coefficients == found.coefficients
    with pytest.warns(ConvergenceWarning):
        assert not hasattr(model.set_params(solver="sgd", max_epochs=1).fit(X, y), "summary_")


# For generalised linear models, statsmodels has HC0 alone, also under the other names.
@pytest.mark.parametrize(
    ("loss", "covariance"),
    [
        *(("squared", kind) for kind in ("HC0", "HC1", "HC2", "HC3", "cluster", None)),
        *((loss, kind) for loss in ("poisson", "logistic") for kind in ("HC0", "cluster", None)),
    ],
)
def test_robust_and_clustered_standard_errors_agree_with_statsmodels(loss, covariance):
    y, group = targets(loss), np.arange(len(X)) * 7 % 23
    groups = np.array([f"g{number}" for number in group]) if covariance in ("cluster", None) else None
    classify = loss == "logistic"
    model = (DataParallelClassifier if classify else functools.partial(DataParallelRegressor, loss))(
        l2=0, covariance=covariance
    )
    found = model.fit(X, y, groups=groups).summary_
    asked = {"cov_type": covariance} if groups is None else {"cov_type": "cluster", "cov_kwds": {"groups": group}}
    if loss == "squared":
        theirs = sm.OLS(y, sm.add_constant(X)).fit(**asked)
    else:
        family = sm.families.Binomial() if classify else sm.families.Poisson()
        theirs = sm.GLM((y == "yes") * 1.0 if classify else y, sm.add_constant(X), family).fit(tol=1e-14, **asked)
    assert found.covariance_type == (covariance or "cluster")
    np.testing.assert_allclose([c.std_error for c in found.coefficients], theirs.bse, rtol=1e-6)
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), rtol=1e-5, atol=1e-9 * found.covariance.max())


def test_several_targets_of_least_squares_have_clustered_errors_in_their_units():
    both = np.stack([targets("squared"), 100 * targets("absolute") + 3], axis=1)
    group = np.arange(len(X)) % 17
    for found, y in zip(DataParallelRegressor().fit(X, both, groups=group).summary_, both.T, strict=True):
        theirs = sm.OLS(y, sm.add_constant(X)).fit(cov_type="cluster", cov_kwds={"groups": group})
        np.testing.assert_allclose([c.std_error for c in found.coefficients], theirs.bse, rtol=1e-6)


def test_groups_are_those_of_the_folds():
    group = np.arange(len(X)) * 7 % 23
    x, y = X + np.eye(23)[group][:, : X.shape[1]], targets("squared") + group
    model = DataParallelRegressor(cv=GroupKFold(5), l1_ratio=0.5).fit(x, y, groups=group)
    pairs = list(GroupKFold(5).split(x, y, group))
    assert model.alpha_ == DataParallelRegressor(cv=pairs, l1_ratio=0.5).fit(x, y).alpha_


@pytest.mark.parametrize(
    ("arguments", "fit", "message"),
    [
        ({"covariance": "cluster"}, {}, "give fit the groups"),
        ({"covariance": "HC9"}, {}, "covariance='HC9': use"),
        ({"covariance": "HC1"}, {"groups": np.arange(200)}, "groups: they are not used with"),
        ({}, {"groups": np.arange(3)}, "the shape is"),
        ({}, {"groups": np.array([None, *range(199)], object)}, "groups: row 1 has none"),
        ({}, {"groups": np.array([*range(199), "a"], object)}, "several types"),
        ({}, {"groups": np.zeros(200)}, "all rows are in one group"),
        ({"loss": "huber"}, {"groups": np.arange(200)}, "groups: only for standard errors"),
        ({"l2": 0.1}, {"groups": np.arange(200)}, "groups: only for standard errors"),
        ({"model": "mlp", "max_epochs": 1}, {"groups": np.arange(200)}, "groups: only for standard errors"),
        ({"solver": "sgd", "max_epochs": 1}, {"groups": np.arange(200)}, "groups: only for standard errors"),
        ({"covariance": "HC1", "cv": 3}, {}, "standard errors are unknown with cv"),
    ],
)
def test_covariances_and_groups_that_cannot_be_used_are_refused(arguments, fit, message):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2))
    with pytest.raises(dpreg.InputError, match=message):
        DataParallelRegressor(**arguments).fit(x, x @ [1.0, 2.0] + rng.normal(size=200), **fit)
    with pytest.raises(dpreg.InputError, match="covariance='HC1'"):
        DataParallelRegressor(covariance="HC1").partial_fit(x, x[:, 0])
