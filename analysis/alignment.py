"""Alignment of every problem with a benchmark, step by step."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradstore import Store
from gradstore.analysis.trajectory import STATE_NAMES, UNMEASURED, Trajectory, trajectory
from gradstore.engine.searching.query import Metric

COLUMNS = ["id", "step", "score", "norm", "pass_rate", "state", "age", "source"]


def alignment(
    store: Store, pool: str, benchmark: str, metric: Metric = "cosine", steps: Sequence[int] | None = None
) -> pd.DataFrame:
    """Alignment of each problem with the benchmark at each step, one row per problem and step.

    steps: None: every step at which the benchmark has rows. At step s, the problem's newest row at or before s is
    scored against the benchmark's target at or before s (docs/methods.md: cosine, dot, fisher).

    Columns: id (categorical), step int64, score float32 (nan: not live, or no target yet), norm float32, pass_rate
    float32 (nan unknown), state (categorical: live, no_signal, failed, unmeasured), age float64 (steps since the row
    was computed; nan without a row), source (categorical). Ordered by step, then by the order of addition.
    Raises RequestError for an unknown collection or metric.
    """
    return to_frame(trajectory(store, pool, benchmark, metric, steps))


def to_frame(seen: Trajectory) -> pd.DataFrame:
    """Convert a trajectory to the frame of `alignment`."""
    n_steps, n_problems = seen.scores_SP.shape
    sources, source_codes = np.unique(seen.sources.astype(str), return_inverse=True)
    states_SP = np.where(seen.states_SP == UNMEASURED, len(STATE_NAMES) - 1, seen.states_SP).astype(np.int8)
    ages_SP = np.where(seen.row_steps_SP < 0, np.nan, seen.steps[:, None] - seen.row_steps_SP)
    return pd.DataFrame(
        {
            "id": pd.Categorical.from_codes(np.tile(np.arange(n_problems), n_steps), seen.ids),
            "step": np.repeat(seen.steps, n_problems),
            "score": seen.scores_SP.ravel(),
            "norm": seen.norms_SP.ravel(),
            "pass_rate": seen.pass_rates_SP.ravel(),
            "state": pd.Categorical.from_codes(states_SP.ravel(), list(STATE_NAMES)),
            "age": ages_SP.ravel(),
            "source": pd.Categorical.from_codes(np.tile(source_codes, n_steps), sources),
        }
    )


def summary(frame: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Quantiles of the live problems' scores at each step, from the frame of `alignment`; `by`: a column to group by.

    Columns: step, [by,] n int64 (live problems), low, median, high float64 (5th, 50th and 95th percentile), mean
    float64, positive float64 (share of scores above 0), stale float64 (mean age).
    """
    keys = ["step"] if by is None else ["step", by]
    live = frame[frame["score"].notna()]
    grouped = live.groupby(keys, observed=True)
    table = pd.DataFrame(
        {
            "n": grouped["score"].size(),
            "low": grouped["score"].quantile(0.05).astype(float),
            "median": grouped["score"].quantile(0.5).astype(float),
            "high": grouped["score"].quantile(0.95).astype(float),
            "mean": grouped["score"].mean().astype(float),
            "positive": live["score"].gt(0).groupby([live[key] for key in keys], observed=True).mean(),
            "stale": grouped["age"].mean(),
        }
    )
    return table.reset_index()


def states(frame: pd.DataFrame) -> pd.DataFrame:
    """Number of problems in each state at each step, from the frame of `alignment`.

    Columns: step, state, n int64, share float64 (of the pool).
    """
    counts = frame.groupby(["step", "state"], observed=False).size().rename("n").reset_index()
    counts["share"] = counts["n"] / counts.groupby("step")["n"].transform("sum")
    return counts
