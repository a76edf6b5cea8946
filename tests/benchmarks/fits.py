"""Measures the quality of default fits: `python tests/benchmarks/fits.py` (15 minutes; `--only=NAME` for one table).

This program splits each table, shipped with a package or generated, and holds out a fifth of the rows from all fits.
dpreg fits the rest with only the table, the target and possibly the loss given, once with the default model and once
with `--model=mlp`. The peers are the best linear model of the same rows (statsmodels, by maximum likelihood), and
scikit-learn's MLPRegressor with its defaults on standardised features and targets.

It prints the share of the deviance (for squared loss, of the variance) of the held-out rows that each explains.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import sklearn.datasets as sk
import statsmodels.api as sm
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler

FAMILIES = {
    "squared": sm.families.Gaussian(),
    "logistic": sm.families.Binomial(),
    "poisson": sm.families.Poisson(),
    "gamma": sm.families.Gamma(sm.families.links.Log()),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A table, its target, and the loss that the user gives."""

    name: str
    table: Callable[[], pd.DataFrame]
    target: str
    loss: str = "squared"


def from_statsmodels(name: str, *without: str) -> Callable[[], pd.DataFrame]:
    """Returns a loader of a statsmodels table."""
    return lambda: getattr(sm.datasets, name).load_pandas().data.drop(columns=[*without])


def from_sklearn(load: Callable[..., object], **arguments: object) -> Callable[[], pd.DataFrame]:
    """Returns a loader of a scikit-learn table."""
    return lambda: load(as_frame=True, **arguments).frame  # type: ignore[attr-defined]


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
    Case("prices", prices, "price"),
    Case("prices", prices, "price", "gamma"),
    Case("few_rows", few_rows, "y"),
    Case("friedman", friedman, "y"),
    Case("many_rows", many_rows, "y"),
)


def explained(family: sm.families.Family, y: np.ndarray, mean: np.ndarray, null: float) -> float:
    """Returns 1 - deviance / null deviance, with the mean of the fitted rows as the null model."""
    with np.errstate(all="ignore"):
        return float(1 - family.deviance(y, mean) / family.deviance(y, np.full(len(y), null)))


def run(folder: pathlib.Path, case: Case, model: str) -> tuple[np.ndarray | None, float]:
    """Returns (predictions of the held-out rows, or None if the run failed; seconds of the run)."""
    start = [sys.executable, "-m", "dpreg.main", "--platform=cpu", f"--workdir={folder}/{model}"]
    fit = [*start, f"--dataset={folder}/train.csv", f"--target={case.target}", f"--loss={case.loss}"]
    fit += [f"--model={model}"]
    began = time.perf_counter()
    code = subprocess.run(fit, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if code.returncode:
        print(code.stderr.splitlines()[-1:], flush=True)
        return None, seconds
    output = f"{folder}/{model}.csv"
    subprocess.run(
        [*start, "--mode=predict", f"--dataset={folder}/held.csv", f"--output={output}"],
        check=True,
        capture_output=True,
    )
    return pd.read_csv(output).to_numpy(np.float64)[:, -1], seconds


def measure(case: Case) -> dict[str, float]:
    """Returns the shares explained by dpreg and by the peers."""
    table = case.table().dropna()
    held = np.random.default_rng(0).permutation(len(table)) < max(len(table) // 5, 3)
    train, held_out = table[~held], table[held]
    family, y = FAMILIES[case.loss], held_out[case.target].to_numpy(np.float64)
    null = float(train[case.target].mean())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train.to_csv(folder / "train.csv", index=False)
        held_out.to_csv(folder / "held.csv", index=False)
        found = {model: run(folder, case, model) for model in ("linear", "mlp")}
    shares = {
        model: float("nan") if mean is None else explained(family, y, mean, null) for model, (mean, _) in found.items()
    }
    x, x_held = (rows.drop(columns=case.target).to_numpy(np.float64) for rows in (train, held_out))
    scaler, target = StandardScaler().fit(x), train[case.target].to_numpy(np.float64)
    warnings.simplefilter("ignore")
    best = sm.GLM(target, sm.add_constant(scaler.transform(x)), family=family).fit()
    shares["best linear"] = explained(
        family, y, best.predict(sm.add_constant(scaler.transform(x_held), has_constant="add")), null
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.loss == "logistic":
            net = MLPClassifier(random_state=0).fit(scaler.transform(x), target)
            mean = net.predict_proba(scaler.transform(x_held))[:, 1]
        else:
            scale = target.std()
            net = MLPRegressor(random_state=0).fit(scaler.transform(x), (target - target.mean()) / scale)
            mean = net.predict(scaler.transform(x_held)) * scale + target.mean()
    if case.loss in ("squared", "logistic"):
        shares["sklearn mlp"] = explained(family, y, mean, null)
    return shares | {f"seconds {model}": seconds for model, (_, seconds) in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    only = parser.parse_args().only
    print(f"{'table':<15} {'loss':<9} {'linear':>8} {'best':>8} {'mlp':>8} {'sklearn':>8}   seconds of linear and mlp")
    for case in CASES:
        if only in (None, case.name):
            found = measure(case)
            values = (found.get(name, float("nan")) for name in ("linear", "best linear", "mlp", "sklearn mlp"))
            row = " ".join(f"{value:8.4f}" for value in values)
            times = " ".join(f"{found[f'seconds {model}']:6.1f}" for model in ("linear", "mlp"))
            print(f"{case.name:<15} {case.loss:<9} {row}   {times}", flush=True)
