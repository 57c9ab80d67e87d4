"""The direction a benchmark wants the policy to go: the aggregated gradient of its problems, in sketch space."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gradstore import State, Store
from gradstore.errors import RequestError

Aggregate = Literal["mean", "unit_mean"]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A query vector and where it came from."""

    vector: np.ndarray
    """float32 [D]."""
    benchmark: str
    steps: tuple[int, int]
    """Oldest and newest step among the rows used; equal when the benchmark was measured in one go."""
    aggregate: Aggregate
    n_problems: int
    """Problems that entered the mean."""
    n_live: int
    """Those of them with a gradient."""
    commit: int
    """Commit of the benchmark's collection."""
    learning_rate: float | None = None
    """Of the training at its step: how much the step counts for the selector `less`; None: as much as every other."""

    def describe(self) -> dict:
        """Everything but the vector, for records and `--json`."""
        return {
            "benchmark": self.benchmark,
            "steps": list(self.steps),
            "aggregate": self.aggregate,
            "n_problems": self.n_problems,
            "n_live": self.n_live,
            "commit": self.commit,
            **({} if self.learning_rate is None else {"learning_rate": self.learning_rate}),
        }


def target(store: Store, benchmark: str, at: int | None = None, aggregate: Aggregate = "mean") -> Target:
    """Aggregate the newest gradient of every problem of a benchmark at or before step `at`.

    mean: mean gradient, problems without signal counting as zero (GradAlign, arXiv 2602.21492). unit_mean: mean of
    the live problems' unit gradients, so that no problem weighs more than another. Failed problems are left out.
    RequestError when no problem of the benchmark is live.
    """
    if aggregate not in ("mean", "unit_mean"):
        raise RequestError(f"aggregate {aggregate!r} is not one of mean, unit_mean")
    view = store.view(benchmark, at)
    live = view.live
    if not live.any():
        moment = "" if at is None else f" at step {at}"
        raise RequestError(
            f"benchmark {benchmark!r} has no live problem{moment} ({len(view)} measured): collect rollouts for it first"
        )
    total_D = np.zeros(view.dim)
    for positions, units_PD in view.scan(np.flatnonzero(live)):
        weights_P = view.norms[positions] if aggregate == "mean" else np.ones(len(positions), np.float32)
        total_D += weights_P.astype(np.float64) @ units_PD
    n_live = int(live.sum())
    n_problems = n_live if aggregate == "unit_mean" else int((view.states != State.FAILED).sum())
    steps = view.steps[live]
    return Target(
        (total_D / n_problems).astype(np.float32),
        benchmark,
        (int(steps.min()), int(steps.max())),
        aggregate,
        n_problems,
        n_live,
        view.commit,
    )
