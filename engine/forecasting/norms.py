"""Expected gradient norms of the candidates now: contrast from their rows times p (1 - p) at the newest pass rate.

With rewards 0 and 1, a problem's policy gradient is the gradient of its pass rate p: p (1 - p) times a contrast, the
mean score of right responses minus that of wrong ones. The contrast is taken to stay while p moves.
Formulas: docs/methods.md, Budgeted refresh.

Dimension letters: P candidates.
"""

from collections.abc import Sequence

import numpy as np

from gradstore.engine.forecasting.live_rows import Rows


def expected_norms(rate_P: np.ndarray, rows: Sequence[Rows]) -> np.ndarray:
    """Expected norms of candidates now, float64 [P]; NaN for one without a live row or without a pass rate.

    rate_P: pass rate of each candidate's newest row (`MeasuredRates.newest`), NaN where unknown.
    """
    weight_P, length_P = np.zeros(len(rate_P)), np.zeros(len(rate_P))
    for row in rows:
        sound = np.isfinite(row.slack)
        weight_P[row.places[sound]] += row.counts[sound] * row.slack[sound]
        length_P[row.places[sound]] += row.counts[sound] * row.norms[sound]
    contrast_P = np.where(weight_P > 0, length_P / np.where(weight_P > 0, weight_P, 1.0), np.nan)
    return contrast_P * rate_P * (1 - rate_P)
