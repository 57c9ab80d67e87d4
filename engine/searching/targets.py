"""Targets: the aggregated gradient of a benchmark's problems, in sketch space."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from gradstore import State, Store, View
from gradstore.engine.searching.blocks import laid_out
from gradstore.errors import RequestError, check_known
from gradstore.layout import SOLUTIONS

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

Aggregate = Literal["mean", "unit_mean"]
Kind = Literal["rollouts", "solutions"]
"""Origin of gradients: the policy's rollouts and their rewards, or the likelihood of reference solutions."""


def kind_of(collection: str) -> Kind:
    """Kind of a collection's rows. A collection holds one kind alone, and its name says which."""
    return "solutions" if collection.endswith(SOLUTIONS) else "rollouts"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A query vector and where it came from."""

    vector: np.ndarray
    """float32 [D], in the newest basis in which the benchmark was measured."""
    benchmark: str
    steps: tuple[int, int]
    """Oldest and newest step among the rows used; equal when the benchmark was measured in one go."""
    aggregate: Aggregate
    n_problems: int
    """Problems that entered the mean."""
    n_live: int
    """Problems of these that have a gradient."""
    commit: int
    """Commit of the benchmark's collection."""
    learning_rate: float | None = None
    """Learning rate of the training at this step: the step's weight for the selector `less`; None: equal weights."""

    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    """Vector per basis, for the bases that contain every problem's newest measurement; empty: `vector` only."""

    def __repr__(self) -> str:
        old, new = self.steps
        steps = f"step {new}" if old == new else f"steps {old} to {new}"
        return f"Target({self.benchmark!r} at {steps}, {self.aggregate} of {self.n_problems}, {self.n_live} live)"

    @property
    def kind(self) -> Kind:
        """Whether the gradients are of rollouts or of solutions."""
        return kind_of(self.benchmark)

    def query(self, view: View) -> np.ndarray:
        """Query for the rows of the view: `vector`, or one block per basis of the store (blocks.py)."""
        if view.n_bases == 1:
            return self.vector
        return laid_out(self.vectors or {view.n_bases - 1: self.vector}, view.n_bases)

    def to_pandas(self) -> "pd.DataFrame":
        """The fields of `describe` as one row."""
        import pandas as pd

        return pd.DataFrame([self.describe()])

    def to_polars(self) -> "pl.DataFrame":
        """The same as a polars DataFrame; RequestError if polars is not installed."""
        from gradstore.notebook import as_polars

        return as_polars(self.to_pandas())

    def describe(self) -> dict:
        """All fields except the vectors, for records and `--json`."""
        return {
            "benchmark": self.benchmark,
            **({} if self.kind == "rollouts" else {"kind": self.kind}),
            "steps": list(self.steps),
            "aggregate": self.aggregate,
            "n_problems": self.n_problems,
            "n_live": self.n_live,
            "commit": self.commit,
            **({} if self.learning_rate is None else {"learning_rate": self.learning_rate}),
            **({"bases": sorted(self.vectors)} if len(self.vectors) > 1 else {}),
        }


def target(store: Store, benchmark: str, at: int | None = None, aggregate: Aggregate = "mean") -> Target:
    """Aggregate the newest gradient of every problem of a benchmark at or before step `at`.

    mean: mean gradient; problems without signal count as zero (GradAlign, arXiv 2602.21492). unit_mean: mean of the
    live problems' unit gradients, so that all problems have equal weight. Failed problems are left out.
    In a store with several bases, each basis that contains all of these measurements gets a vector.
    RequestError when no problem of the benchmark is live.
    """
    check_known("aggregate", aggregate, get_args(Aggregate))
    view = store.view(benchmark, at)
    live = view.live
    if not live.any():
        steps = sorted(set(store.view(benchmark).steps.tolist())) if at is not None else []
        if steps and at is not None and at < steps[0]:
            raise RequestError(f"benchmark {benchmark!r} has nothing up to step {at}; its first step is {steps[0]}")
        moment = "" if at is None else f" at step {at}"
        if np.any(view.states == State.NO_SIGNAL):
            raise RequestError(
                f"benchmark {benchmark!r} has no gradient{moment}: the rollouts of each of its {len(view)} measured "
                "problems are all rewarded alike; sample more of them, or problems that the policy sometimes solves"
            )
        raise RequestError(
            f"benchmark {benchmark!r} has no live problem{moment} ({len(view)} measured): collect rollouts for it first"
        )
    n_live = int(live.sum())
    n_problems = n_live if aggregate == "unit_mean" else int((view.states != State.FAILED).sum())
    steps = view.steps[live]
    if view.n_bases == 1:
        vectors = {0: _mean(view, np.flatnonzero(live), aggregate, n_problems)}
    else:
        vectors = _in_each_basis(store, view, at, aggregate, n_problems)
    return Target(
        vectors[max(vectors)],
        benchmark,
        (int(steps.min()), int(steps.max())),
        aggregate,
        n_problems,
        n_live,
        view.commit,
        vectors=vectors,
    )


def _in_each_basis(
    store: Store, newest: View, at: int | None, aggregate: Aggregate, n_problems: int
) -> dict[int, np.ndarray]:
    """Basis -> vector, for the bases where every live problem has a live row from its newest step."""
    names, steps = newest.ids[newest.live].tolist(), newest.steps[newest.live]
    vectors = {}
    for basis in range(newest.n_bases):
        view = store.view(newest.collection, at, basis=basis)
        places = view.positions(names, strict=False)
        if (places >= 0).all() and (view.steps[places] == steps).all() and view.live[places].all():
            vectors[basis] = _mean(view, places, aggregate, n_problems)
    if not vectors:
        raise RequestError(
            f"benchmark {newest.collection!r}: its problems' newest rows are in several bases and none has them all: "
            "collect all of them anew, in one step"
        )
    return vectors


def _mean(view: View, positions: np.ndarray, aggregate: Aggregate, n_problems: int) -> np.ndarray:
    """Sum of the gradients (or unit gradients) at the positions, divided by n_problems, float32 [D]."""
    total_D = np.zeros(view.dim)
    for block, units_PD in view.scan(positions):
        weights_P = view.norms[block] if aggregate == "mean" else np.ones(len(block), np.float32)
        total_D += weights_P.astype(np.float64) @ units_PD
    return (total_D / n_problems).astype(np.float32)
