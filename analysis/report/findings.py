"""The report's data, computed once from the store: collections, steps, and the analysis frames.

A frame is computed at its first use, so a section that is left out costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd

from gradstore import Store
from gradstore.analysis import alignment, curricula, drift, suspicion
from gradstore.analysis.noise import measurement_noise
from gradstore.analysis.trajectory import trajectory
from gradstore.engine.searching.query import METRICS, Metric
from gradstore.errors import RequestError, check_known
from gradstore.layout import DERIVED, is_half
from gradstore.rounds import Round


@dataclass(frozen=True)
class Findings:
    """A store seen as one pool, some benchmarks and a metric."""

    store: Store
    pool: str
    benchmarks: tuple[str, ...]
    """Benchmarks with at least one live problem, the most important first."""
    metric: Metric
    n_listed: int = 50
    """Problems shown from each end of a ranking."""
    seed: int = 0

    @property
    def main(self) -> str:
        """The benchmark used in sections that show only one."""
        return self.benchmarks[0]

    @cached_property
    def about(self) -> dict[str, Any]:
        return self.store.info()

    @cached_property
    def rounds(self) -> list[Round]:
        return list(self.store.rounds(self.pool))

    @cached_property
    def picked(self) -> dict[int, set[str]]:
        """Round number -> ids picked."""
        return {one.number: set(one.picks) for one in self.rounds}

    @cached_property
    def steps(self) -> list[int]:
        """Steps at which the pool or a benchmark was measured; without any row, those of the rounds."""
        measured = {step for name in (self.pool, *self.benchmarks) for step in self.store.steps(name)}
        return sorted(measured or {one.step for one in self.rounds})

    @cached_property
    def alignments(self) -> dict[str, pd.DataFrame]:
        """`alignment.alignment` for each benchmark; to be read only, as they share large arrays."""
        return {
            name: alignment.to_frame(trajectory(self.store, self.pool, name, self.metric, self.steps), copy=False)
            for name in self.benchmarks
        }

    @cached_property
    def newest(self) -> dict[str, pd.DataFrame]:
        """Benchmark -> rows of the newest step, in the order of the view."""
        return {name: frame[frame["step"] == self.steps[-1]] for name, frame in self.alignments.items()}

    @cached_property
    def ranking_drift(self) -> dict[str, pd.DataFrame]:
        """`drift.ranking_drift` for each benchmark."""
        return {name: drift.ranking_drift(self.store, self.pool, name, metric=self.metric) for name in self.benchmarks}

    @cached_property
    def counterfactual(self) -> pd.DataFrame:
        """`curricula.counterfactual` against the main benchmark."""
        return curricula.counterfactual(self.store, self.pool, self.main, metric=self.metric, seed=self.seed)

    @cached_property
    def judged(self) -> pd.DataFrame:
        """The steps of `counterfactual` after which some pick was measured again."""
        frame = self.counterfactual
        return frame[frame.groupby("step")["judged_later"].transform("max") > 0]

    @cached_property
    def suspicious(self) -> pd.DataFrame:
        """`suspicion.suspicious` against the main benchmark; RequestError if nothing is live."""
        return suspicion.suspicious(self.store, self.pool, self.main if self.benchmarks else None)

    def noise(self, benchmark: str) -> np.ndarray:
        """Standard deviation of each problem's score, float64 [P] in the order of `newest`; nan: measured only once.

        It is estimated from measurements at successive steps, so drift in between counts as noise: grey is too often
        said rather than too seldom.
        """
        frame, n = self.alignments[benchmark], len(self.newest[benchmark])
        if not n:
            return np.empty(0)
        fresh = np.where(frame["age"] == 0, frame["score"], np.nan).astype(np.float64)
        return measurement_noise(fresh.reshape(-1, n))

    @cached_property
    def n_picked(self) -> int:
        """Number of problems the last round picked; a tenth of the pool if no round is recorded."""
        if self.rounds:
            return max(1, len(self.rounds[-1].picks))
        return max(1, len(self.store.view(self.pool)) // 10)

    def problems(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Records of some problems, with `prompt` as text for display."""
        return self.store.problems(self.pool, list(ids)).to_pylist()

    def prompts(self, ids: Sequence[str]) -> dict[str, str]:
        """Problem id -> `prompt` as text for display; reads no other text."""
        table = self.store.problems(self.pool, list(ids), columns=["id", "prompt"])
        return dict(zip(table["id"].to_pylist(), table["prompt"].to_pylist(), strict=True))


def find(
    store: Store, pool: str | None = None, benchmarks: Sequence[str] = (), metric: str = "cosine", n_listed: int = 50
) -> Findings:
    """Choose the report's pool and benchmarks. pool: None: the collection with rounds, else the largest one.

    RequestError for an unknown collection or metric, and for a store without rows.
    """
    check_known("metric", metric, METRICS)
    sizes = {name: len(store.view(name)) for name in store.collections}
    if not any(sizes.values()) and not any(store.rounds(name) for name in store.collections):
        raise RequestError(f"{store.path}: the store has no rows yet; run `gradstore collect` first")
    for name in [*benchmarks, *([pool] if pool is not None else [])]:
        store.view(name)
    if pool is None:
        others = {name: size for name, size in sizes.items() if name not in benchmarks and not name.endswith(DERIVED)}
        if not others:
            raise RequestError("every collection was named as a benchmark; name the pool with --pool")
        pool = max(others, key=lambda name: (bool(store.rounds(name)), others[name]))
    if pool in benchmarks:
        raise RequestError(f"{pool!r} is the pool: it cannot be a benchmark too; name another with --against or --pool")
    named = [name for name in dict.fromkeys(benchmarks or _benchmarks(store, pool)) if name != pool]
    with_target = [name for name in named if bool(store.view(name).live.any())]
    if benchmarks and len(with_target) < len(named):
        absent = next(name for name in named if name not in with_target)
        raise RequestError(f"benchmark {absent!r} has no live problem: collect rollouts for it first")
    return Findings(store, pool, tuple(with_target), cast("Metric", metric), n_listed)


def _benchmarks(store: Store, pool: str) -> list[str]:
    """All other collections; those that rounds used as benchmarks come first."""
    rounds = store.rounds(pool)
    used = [name for name in (rounds[-1].about.get("benchmarks") or []) if name in store.collections] if rounds else []
    return [*used, *(name for name in store.collections if name not in (pool, *used) and not is_half(name))]


def mean_or_nan(values: Any) -> float:
    """Mean of the finite values; nan if there are none."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    return float(found.mean()) if len(found) else float("nan")


def mean_and_error(values: Any) -> tuple[float, float]:
    """Mean of the finite values and its standard error; nan where too few are known."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    error = float(found.std(ddof=1) / np.sqrt(len(found))) if len(found) > 1 else float("nan")
    return mean_or_nan(found), error
