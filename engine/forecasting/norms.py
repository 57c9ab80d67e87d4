"""Expected gradient norms of the candidates now: contrast from their rows times p (1 - p) at the newest pass rate.

With rewards 0 and 1, a problem's policy gradient is the gradient of its pass rate p: p (1 - p) times a contrast, the
mean score of right responses minus that of wrong ones. The contrast is taken to stay while p moves.
Formulas: docs/methods.md, Budgeted refresh.

Dimension letters: P candidates, M measurements.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from gradstore.engine.forecasting.live_rows import Rows


def expected_norms(history: pa.Table, place_M: np.ndarray, n: int, rows: Sequence[Rows]) -> np.ndarray:
    """Expected norms of n candidates now, float64 [P]; NaN for one without a live row or without a pass rate.

    place_M: place among the candidates of each row of the history, int64 [M]; -1 for others.
    """
    weight_P, length_P = np.zeros(n), np.zeros(n)
    for row in rows:
        sound = np.isfinite(row.slack)
        weight_P[row.places[sound]] += row.counts[sound] * row.slack[sound]
        length_P[row.places[sound]] += row.counts[sound] * row.norms[sound]
    contrast_P = np.where(weight_P > 0, length_P / np.where(weight_P > 0, weight_P, 1.0), np.nan)
    rate_P = newest_rates(history, place_M, n)
    return contrast_P * rate_P * (1 - rate_P)


def newest_rates(history: pa.Table, place_M: np.ndarray, n: int) -> np.ndarray:
    """Pass rate of each problem's newest row, half a right and half a wrong answer added, float64 [P]; NaN without."""
    rate_M, count_M = (history[name].to_numpy().astype(np.float64) for name in ("pass_rate", "n_rollouts"))
    sound = (place_M >= 0) & (rate_M >= 0) & (rate_M <= 1) & (count_M > 0)
    newest_P = np.full(n, np.nan)
    newest_P[place_M[sound]] = ((rate_M * count_M + 0.5) / (count_M + 1))[sound]  # oldest first: the newest stays
    return newest_P
