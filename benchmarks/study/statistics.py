"""Statistics of a study's rows: means over seeds with 95 % intervals, and comparisons of two methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, with the half-width of its 95 % interval."""

    mean: float
    half: float
    """Half-width of the 95 % t interval; nan for fewer than two seeds."""
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def above(self, other: "Estimate") -> bool:
        """Whether this interval lies entirely above the other; False if an interval is unknown."""
        return self.low > other.high


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t interval of values from different seeds."""
    n = len(values)
    if n < 2:
        return Estimate(float(np.mean(values)), float("nan"), n)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Estimate(float(np.mean(values)), half, n)


def of(rows: Sequence[Mapping[str, Any]], arm: str, method: str) -> list[Mapping[str, Any]]:
    """The rows of a method in an arm, sorted by seed."""
    found = [row for row in rows if row["arm"] == arm and row["method"] == method]
    return sorted(found, key=lambda row: row["seed"])


def final_accuracy(rows: Sequence[Mapping[str, Any]]) -> Estimate:
    return estimate([row["accuracy"][-1] for row in rows])


def curve(rows: Sequence[Mapping[str, Any]]) -> list[Estimate]:
    """Accuracy before the first round and after each round."""
    return [estimate(list(values)) for values in zip(*(row["accuracy"] for row in rows), strict=True)]


def difference(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Estimate:
    """Difference in final accuracy, seed by seed: both methods had the same problems and seeds."""
    of_other = {row["seed"]: row["accuracy"][-1] for row in others}
    return estimate([row["accuracy"][-1] - of_other[row["seed"]] for row in rows if row["seed"] in of_other])


def share(rows: Sequence[Mapping[str, Any]], what: str) -> Estimate:
    """Share of the picks that are `what` ("bad" or "useful"), over all rounds."""
    return estimate([float(np.mean(row[what])) for row in rows])


def selection_rollouts(row: dict[str, Any]) -> int:
    """Number of a run's rollouts for selection: first look, candidates, and the benchmark."""
    return int(sum(row["selection_rollouts"]))


def spent(row: Mapping[str, Any]) -> list[int]:
    """Rollouts spent, for selection and training together, before the first round and after each."""
    settings = row["settings"]
    training = settings["steps"] * settings["train_batch"] * settings["rollouts"]
    return [0, *np.cumsum([own + training for own in row["selection_rollouts"]]).tolist()]


def accuracy_within(row: Mapping[str, Any], total: int) -> float | None:
    """Accuracy after the last round that ends within `total` rollouts; None if the run ended a round or more short."""
    after = spent(row)
    done = sum(own <= total for own in after) - 1
    if done == len(after) - 1 and total >= 2 * after[-1] - after[-2]:
        return None
    return float(row["accuracy"][done])


def selection_seconds(row: dict[str, Any]) -> float:
    """Seconds of a run's rounds without rollouts: gradients, probes, store, selection, and observation."""
    return float(sum(row["selection_seconds"]) - sum(row["selection_rollout_seconds"]) + row["observe_seconds"])


def overhead(row: dict[str, Any]) -> float:
    """Selection seconds without rollouts as a share of the training seconds (rollouts and updates)."""
    return selection_seconds(row) / row["training_seconds"]


@dataclass(frozen=True, slots=True)
class Steady:
    """What selection takes in the rounds after the first, of the training of the same rounds."""

    seconds: float
    """Seconds without rollouts, of those of the updates alone."""
    seconds_with_rollouts: float
    """Seconds with selection's rollouts, of those of training with its rollouts."""
    rollouts: float
    """Rollouts, of those of training."""


def steady(row: Mapping[str, Any]) -> Steady:
    """Cost of selection in the rounds after the first; observation counts in equal parts for each round."""
    settings, n = row["settings"], len(row["selection_rollouts"])
    later = n - 1
    observed = row["observe_seconds"] * later / n
    whole = sum(row["selection_seconds"][1:]) + observed
    training = row["training_seconds"] * later / n
    updates = (row["training_seconds"] - row["training_rollout_seconds"]) * later / n
    trained = settings["steps"] * settings["train_batch"] * settings["rollouts"] * later
    return Steady(
        (whole - sum(row["selection_rollout_seconds"][1:])) / updates,
        whole / training,
        sum(row["selection_rollouts"][1:]) / trained,
    )
