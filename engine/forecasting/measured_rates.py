"""Pass rates that a pool's problems had so far: the sums over their rows that a forecast needs.

Rows of the steps before the forecast's are added up once and kept. Those of its own step, which a round adds stage by
stage, come on top. Each sum adds one row after the other, so it is the same to the last bit as in one go.

Dimension letters: N problems of the pool, M rows.
"""

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from gradstore import View
from gradstore.engine.forecasting.kept import Kept


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredRates:
    """Sums by problem number, float64 [N]; those of a problem never measured are 0."""

    right: np.ndarray
    """Right rollouts; rows without a pass rate do not count."""
    wrong: np.ndarray
    recent_right: np.ndarray
    """The same with the forgetting: a rollout counts forgetting^(steps since) (engine/selecting/history.py)."""
    recent_wrong: np.ndarray
    newest: np.ndarray
    """Pass rate of the newest row, half a right and half a wrong answer added; NaN without one."""

    @classmethod
    def of(cls, view: View, step: int, forgetting: float) -> "MeasuredRates":
        """Of all rows of the view's collection at or before a step, as of that step."""
        store, pool = view.store, view.collection
        counts = tuple((own, n) for own, n in store.steps(pool).items() if own < step)
        key = (counts, view.stored.base, view.n_problems, step, forgetting)

        def before() -> MeasuredRates:
            right, wrong, recent_right, recent_wrong = np.zeros((4, view.n_problems))
            found = cls(right, wrong, recent_right, recent_wrong, np.full(view.n_problems, np.nan))
            found._add(store.history(pool, step - 1, numbers=True), step, forgetting)
            return found

        kept = Kept.of(store, pool).get("rates", key, before)
        found = cls(*(getattr(kept, field.name).copy() for field in fields(cls)))
        found._add(store.history(pool, step, numbers=True, since=step), step, forgetting)
        return found

    def _add(self, history: pa.Table, now: int, forgetting: float) -> None:
        """Add rows, oldest first."""
        problem_M, step_M = history["problem"].to_numpy(), history["step"].to_numpy()
        rate_M, count_M = (history[name].to_numpy().astype(np.float64) for name in ("pass_rate", "n_rollouts"))
        known = np.isfinite(rate_M) & (count_M > 0)
        problem_M, step_M, rate_M, count_M = (column[known] for column in (problem_M, step_M, rate_M, count_M))
        weight_M = count_M * forgetting ** np.maximum(now - step_M, 0).astype(np.float64)
        right_M = weight_M * rate_M
        for sums_N, terms_M in (
            (self.right, rate_M * count_M),
            (self.wrong, (1 - rate_M) * count_M),
            (self.recent_right, right_M),
            (self.recent_wrong, weight_M - right_M),
        ):
            np.add.at(sums_N, problem_M, terms_M)
        self.newest[problem_M] = (rate_M * count_M + 0.5) / (count_M + 1)  # oldest first: the newest stays
