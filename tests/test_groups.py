"""Rows in groups: clustered standard errors, folds and held-out rows of whole groups, beside independent references."""

import json

import forked
import jax
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from cluster import several
from jax.sharding import Mesh
from sklearn.linear_model import ElasticNetCV
from sklearn.model_selection import PredefinedSplit

import dpreg
from dpreg.config import Config
from dpreg.solvers.groups import assign_folds
from dpreg.solvers.inference import summarize_fit
from dpreg.solvers.solver import Solver

FAMILIES = {
    "poisson": sm.families.Poisson(),
    "logistic": sm.families.Binomial(),
    "gamma": sm.families.Gamma(sm.families.links.Log()),
    "negative_binomial": sm.families.NegativeBinomial(sm.families.links.Log(), 0.7),
}


@pytest.fixture(scope="module")
def rows():
    """Returns x, integer weights with zeros, targets by loss, and groups with correlated errors, of 503 rows."""
    rng, n = np.random.default_rng(4), 503
    group = rng.integers(0, 41, n) ** 2 // 40  # some numbers have no rows
    x = rng.normal(size=(n, 3)) + rng.normal(size=(41, 3))[group]
    z = x @ [0.3, -0.2, 0.1] + rng.normal(size=41)[group] / 2
    mean = np.exp(z)
    targets = {
        "squared": z + rng.normal(size=n),
        "poisson": rng.poisson(mean),
        "logistic": rng.random(n) < 1 / (1 + np.exp(-z)),
        "gamma": rng.gamma(2, mean / 2),
        "negative_binomial": rng.negative_binomial(2, 2 / (2 + mean)),
    }
    weight = rng.integers(0, 4, n).astype(np.float64)
    weight[group == group[0]] = 0  # a group without a weight is none
    return x, weight, {name: np.asarray(v, np.float64) for name, v in targets.items()}, group


def solve(loss, x, y, group, weight=None, devices=1, **settings):
    source, mesh = dpreg.ArraySource(x, y, weight, np.float64), Mesh(np.array(jax.devices()[:devices]), ("data",))
    if loss == "negative_binomial":
        settings["negative_binomial_alpha"] = 0.7
    config = Config(loss=loss, precision="float64", group_column="group", dataset="t.csv", target=("y",), **settings)
    return Solver(source, mesh, 8, groups=group).solve(config)


@pytest.mark.parametrize("loss", ["squared", *FAMILIES])
def test_clustered_covariances_are_those_of_statsmodels_with_the_same_bits_on_any_devices(rows, loss):
    x, weight, targets, group = rows
    y, a, some = targets[loss], sm.add_constant(x), weight > 0
    known = {"groups": group}
    if loss == "squared":
        theirs = sm.OLS(y, a).fit(cov_type="cluster", cov_kwds=known, use_t=True)
    else:
        theirs = sm.GLM(y, a, FAMILIES[loss]).fit(cov_type="cluster", cov_kwds=known, tol=1e-14)
    found = summarize_fit(solve(loss, x, y, group).fit, "abc")
    np.testing.assert_allclose(found.covariance, theirs.cov_params(), 1e-6, atol=1e-12)
    if loss != "gamma":  # statsmodels has the normal distribution there
        np.testing.assert_allclose(found.conf_int(), theirs.conf_int(), 1e-6)
    assert "covariance cluster" in str(found)
    one, three, eight = (solve(loss, x, y, group, weight, devices).fit for devices in (1, 3, 8))
    np.testing.assert_array_equal(one.covariance(0), three.covariance(0))
    np.testing.assert_array_equal(one.covariance(0), eight.covariance(0))
    if loss == "squared":
        known = {"groups": group[some]}
        theirs = sm.WLS(y[some], a[some], weight[some]).fit(cov_type="cluster", cov_kwds=known, use_t=True)
        np.testing.assert_allclose(one.covariance(0), theirs.cov_params(), 1e-6, atol=1e-12)
        assert one.degrees_of_test == len(np.unique(group[some])) - 1


def test_rows_that_are_repeated_by_frequency_weights_are_of_one_group(rows):
    x, weight, targets, group = rows
    repeated = np.repeat(np.arange(len(x)), weight.astype(int))
    theirs = sm.OLS(targets["squared"][repeated], sm.add_constant(x[repeated])).fit(
        cov_type="cluster", cov_kwds={"groups": group[repeated]}, use_t=True
    )
    found = solve("squared", x, targets["squared"], group, weight, weights="frequency").fit
    np.testing.assert_allclose(found.covariance(0), theirs.cov_params(), 1e-6, atol=1e-12)


def test_several_targets_of_least_squares_have_clustered_covariances(rows):
    x, _, targets, group = rows
    both = np.stack([targets["squared"], targets["gamma"]], axis=1)
    found = solve("squared", x, both, group).fit
    for target in (0, 1):
        alone = solve("squared", x, both[:, target], group).fit
        np.testing.assert_allclose(found.covariance(target), alone.covariance(0), 1e-9)


def test_a_single_group_has_no_clustered_covariance(rows):
    x, _, targets, group = rows
    with pytest.raises(
        dpreg.InputError, match="covariance='cluster': all rows are in one group; name a column of more"
    ):
        solve("squared", x, targets["squared"], np.zeros_like(group))


def test_folds_are_whole_groups_of_about_equally_many_rows(rows):
    x, _, targets, group = rows
    fold_of = assign_folds(group, 4)
    sizes = np.bincount(fold_of[group])
    assert len(sizes) == 4
    assert sizes.max() - sizes.min() <= np.bincount(group).min() + 5
    theirs = ElasticNetCV(
        cv=PredefinedSplit(fold_of[group]), l1_ratio=0.7, alphas=100, eps=1e-3, tol=1e-10, max_iter=100_000
    ).fit(x, targets["squared"])
    for devices in (1, 8):
        for offset in (0.0, 1e9):  # far from 0, sums of products hold too few digits
            found = solve("squared", x + offset, targets["squared"], group, devices=devices, folds=4, l1_ratio=0.7)
            assert found.path.strengths == pytest.approx(theirs.alphas_, rel=1e-6)
            assert found.path.strengths[found.path.best] == pytest.approx(theirs.alpha_, rel=1e-6)
            np.testing.assert_allclose(2 * found.path.fold_losses.T, theirs.mse_path_, rtol=1e-5)
    with pytest.raises(dpreg.InputError, match="folds=42: there are 31 groups to fit; use so many folds at most, or"):
        solve("squared", x, targets["squared"], group, folds=42)


def test_folds_of_groups_that_lie_together_may_have_an_offset(rows):
    """Then blocks have no rows of most folds."""
    x, _, targets, group = rows
    order = np.argsort(group, kind="stable")
    x, y, group, offset = x[order], targets["squared"][order], group[order], np.arange(len(x)) % 7 / 3.0
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    config = Config(folds=4, l1_ratio=0.7, precision="float64", dataset="t.csv", target=("y",))
    with_offset = dpreg.ArraySource(np.column_stack([x, offset]), y, dtype=np.float64)
    found = Solver(with_offset, mesh, 8, groups=group, offset=x.shape[1]).solve(config)
    expected = Solver(dpreg.ArraySource(x, y - offset, dtype=np.float64), mesh, 8, groups=group).solve(config)
    np.testing.assert_allclose(found.w[:-1], expected.w, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.path.fold_losses, expected.path.fold_losses, rtol=1e-9)


@pytest.fixture(scope="module")
def sales(tmp_path_factory):
    """Writes a table of sales of shops, whose errors are correlated in a shop."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("sales")
    shop = rng.integers(0, 60, 900)
    table = pd.DataFrame(
        {"shop": np.array([f"shop {n}" for n in range(60)])[shop], "year": rng.integers(2019, 2024, 900)}
    )
    table["price"] = rng.normal(size=900) + rng.normal(size=60)[shop]
    table["sold"] = 3 + 2 * table["price"] + rng.normal(size=60)[shop] + rng.normal(size=900)
    table.to_csv(folder / "t.csv", index=False)
    return folder, table


def run(folder, name, *flags, dataset="t.csv"):
    work = folder / name
    asked = ("--platform=cpu", f"--dataset={folder / dataset}", f"--cache_dir={folder}", "--target=sold")
    done = forked.run("-m", "dpreg.main", *asked, f"--workdir={work}", *flags)
    return done, work


def test_a_group_column_of_a_table_is_no_feature_unless_it_is_asked_for(sales):
    folder, table = sales
    done, work = run(folder, "plain", "--group_column=shop", "--precision=float64")
    assert done.returncode == 0, done.stderr
    (fit,) = json.loads((work / "summary.json").read_text())["fit"]
    assert [c["name"] for c in fit["coefficients"]] == ["(intercept)", "year", "price"]
    theirs = sm.OLS(table["sold"], sm.add_constant(table[["year", "price"]])).fit(
        cov_type="cluster", cov_kwds={"groups": pd.factorize(table["shop"])[0]}, use_t=True
    )
    np.testing.assert_allclose([c["std_error"] for c in fit["coefficients"]], theirs.bse, 1e-6)
    assert (fit["covariance_type"], fit["degrees_of_test"]) == ("cluster", 59)
    done, work = run(folder, "year", "--group_column=year", "--features=year,price", "--precision=float64")
    assert done.returncode == 0, done.stderr
    (fit,) = json.loads((work / "summary.json").read_text())["fit"]
    theirs = sm.OLS(table["sold"], sm.add_constant(table[["year", "price"]])).fit(
        cov_type="cluster", cov_kwds={"groups": table["year"]}, use_t=True
    )
    np.testing.assert_allclose([c["std_error"] for c in fit["coefficients"]], theirs.bse, 1e-6)


def test_rows_of_a_group_are_held_out_together_and_by_the_seed(sales):
    folder, table = sales
    found = {}
    for seed in (0, 1):
        columns = dpreg.Columns(target=("sold",), group_column="shop", validation_fraction=0.3)
        data = dpreg.read_table(str(folder / "t.csv"), columns, cache_dir=str(folder), seed=seed)
        held_out = {*table["shop"].iloc[data.val.row]}
        assert held_out.isdisjoint(table["shop"].iloc[data.train.row])
        assert 5 < len(held_out) < 35
        assert sorted([*data.val.row, *data.train.row]) == [*range(900)]
        shops = table["shop"].iloc[data.train.row]
        assert len({*zip(shops, data.train.group, strict=True)}) == len({*shops}) == len({*data.train.group})
        found[seed] = held_out
    assert found[0] != found[1]
    for seed in (0, 1):
        columns = dpreg.Columns(target=("sold",), exclude=("shop",))
        found[seed] = dpreg.read_table(str(folder / "t.csv"), columns, cache_dir=str(folder), seed=seed).val.row
    assert {*found[0]} != {*found[1]}


def test_runs_with_groups_have_the_same_results_in_two_processes(sales):
    folder, _ = sales
    flags = ("--group_column=shop", "--folds=4", "--l1_ratio=0.9", "--precision=float64")
    done, _ = run(folder, "folds", *flags, "--num_devices=8")
    assert done.returncode == 0, done.stderr
    asked = (f"--dataset={folder / 't.csv'}", f"--cache_dir={folder}", "--target=sold")
    several(2, folder / "two", *asked, *flags, work=("--platform=cpu",))
    one, two = (json.loads((folder / name / "summary.json").read_text()) for name in ("folds", "two"))
    assert one["path"] == two["path"]
    assert one["params_sha256"] == two["params_sha256"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--covariance=cluster",), "--covariance=cluster: name the column of the clusters, with --group_column"),
        (("--group_column=shops",), "column 'shops' is not there; use one of 'shop', 'year'"),
        (("--group_column=shop", "--covariance=cluster", "--l2=0.1"), "standard errors are unknown with --l2=0.1"),
        (("--group_column=shop", "--folds=61"), "there are 60 groups to fit"),
    ],
)
def test_groups_that_cannot_be_used_are_refused_in_one_line(sales, flags, message):
    done, work = run(sales[0], "refused", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
    assert not work.exists()


def test_missing_groups_are_refused_or_their_rows_dropped(sales):
    folder, table = sales
    table.assign(shop=table["shop"].where(table.index % 9 > 0)).to_csv(folder / "gaps.csv", index=False)
    done, _ = run(folder, "gaps", "--group_column=shop", "--missing=mean", dataset="gaps.csv")
    assert done.returncode == 2
    assert "column 'shop' has 100, the first in" in done.stderr.splitlines()[-1]
    done, work = run(folder, "gaps", "--group_column=shop", "--missing=drop", dataset="gaps.csv")
    assert done.returncode == 0, done.stderr
    (fit,) = json.loads((work / "summary.json").read_text())["fit"]
    assert (fit["rows"], fit["degrees_of_test"]) == (800, 59)
    table.drop(columns=["shop", "sold"]).to_csv(folder / "new.csv", index=False)
    asked = (f"--dataset={folder / 'new.csv'}", f"--output={folder / 'predicted.csv'}", f"--workdir={work}")
    done = forked.run("-m", "dpreg.main", "--platform=cpu", "--mode=predict", *asked)
    assert (done.returncode, len(pd.read_csv(folder / "predicted.csv"))) == (0, 900)
