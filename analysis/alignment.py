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


def to_frame(seen: Trajectory, *, copy: bool = True) -> pd.DataFrame:
    """Convert a trajectory to the frame of `alignment`. copy: False: it shares the trajectory's read-only arrays."""
    n_steps, n_problems = seen.scores_SP.shape
    source_codes, sources = pd.factorize(seen.sources, sort=True)
    states_SP = np.where(seen.states_SP == UNMEASURED, len(STATE_NAMES) - 1, seen.states_SP).astype(np.int8)
    ages_SP = np.subtract(seen.steps[:, None], seen.row_steps_SP, dtype=np.float64)
    ages_SP[seen.row_steps_SP < 0] = np.nan
    columns = {
        "id": pd.Categorical.from_codes(np.tile(np.arange(n_problems, dtype=np.int32), n_steps), seen.ids),
        "step": np.repeat(seen.steps, n_problems),
        "score": seen.scores_SP.ravel(),
        "norm": seen.norms_SP.ravel(),
        "pass_rate": seen.pass_rates_SP.ravel(),
        "state": pd.Categorical.from_codes(states_SP.ravel(), list(STATE_NAMES)),
        "age": ages_SP.ravel(),
        "source": pd.Categorical.from_codes(np.tile(source_codes.astype(np.int32), n_steps), sources),
    }
    return pd.DataFrame(columns, copy=copy)


def summary(frame: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Quantiles of the live problems' scores at each step, from the frame of `alignment`; `by`: a column to group by.

    Columns: step, [by,] n int64 (live problems), low, median, high float64 (5th, 50th and 95th percentile), mean
    float64, positive float64 (share of scores above 0), stale float64 (mean age).
    """
    if not frame["step"].is_monotonic_increasing:
        frame = frame.sort_values("step", kind="stable")
    steps = frame["step"].to_numpy()
    parts = []
    for step in np.unique(steps):  # one at a time: the frame of a large pool is several times its scores
        here = slice(*np.searchsorted(steps, [step, step + 1]))
        part = frame.iloc[here][["score", "age", *([] if by is None else [by])]]
        part = part[part["score"].notna()]
        groups = [(None, part)] if by is None else part.groupby(by, observed=True)
        for name, own in groups:
            if len(own):
                parts.append((int(step), name, *_described(own["score"].to_numpy(np.float64)), own["age"].mean()))
    numbers = ["low", "median", "high", "mean", "positive", "stale"]
    table = pd.DataFrame(parts, columns=["step", by or "", "n", *numbers])
    table = table.astype(dict.fromkeys(["step", "n"], np.int64) | dict.fromkeys(numbers, np.float64))
    return table if by else table.drop(columns=[""])


def _described(scores_N: np.ndarray) -> tuple[int, float, float, float, float, float]:
    """Number, 5th, 50th and 95th percentile, mean and share above 0."""
    low, median, high = np.quantile(scores_N, [0.05, 0.5, 0.95])
    return len(scores_N), float(low), float(median), float(high), float(scores_N.mean()), float((scores_N > 0).mean())


def states(frame: pd.DataFrame) -> pd.DataFrame:
    """Number of problems in each state at each step, from the frame of `alignment`.

    Columns: step, state, n int64, share float64 (of the pool).
    """
    steps, codes = frame["step"].to_numpy(), frame["state"].cat.codes.to_numpy()
    names = frame["state"].cat.categories
    found = np.unique(steps)
    counts = np.zeros((len(found), len(names)), np.int64)
    for row, step in enumerate(found):
        counts[row] = np.bincount(codes[steps == step], minlength=len(names))
    return pd.DataFrame(
        {
            "step": np.repeat(found, len(names)),
            "state": pd.Categorical.from_codes(np.tile(np.arange(len(names)), len(found)), names),
            "n": counts.ravel(),
            "share": (counts / counts.sum(axis=1, keepdims=True)).ravel(),
        }
    )
