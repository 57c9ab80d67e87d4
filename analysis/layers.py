"""Share of each layer in a pool's alignment with a benchmark, and in the energy of its gradients, over steps.

Dimension letters: P problems, K problems drawn, L layers, D sketch dimensions.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradstore import Store, View
from gradstore.analysis.trajectory import steps_of, target_at
from gradstore.engine.searching.query import Metric
from gradstore.engine.searching.shares import layer_contributions

MOST_PROBLEMS = 2000
"""Maximum problems that a step's shares are averaged over; a larger pool is sampled with a seed."""
_BLOCK_BYTES = 32 << 20


def layers(
    store: Store,
    pool: str,
    benchmark: str,
    metric: Metric = "cosine",
    steps: Sequence[int] | None = None,
    *,
    ids: Sequence[str] | None = None,
    most: int = MOST_PROBLEMS,
    seed: int = 0,
) -> pd.DataFrame:
    """Contribution of each layer to the score, one row per step and layer.

    steps: None: every step of the benchmark. ids: use only these problems, if live. Columns: step int64, layer str,
    position int64 (the layer's index in the store), term float64 (the layer's term of the score, mean over the
    problems; a step's terms sum to the mean score), share float64 (mean absolute term over the sum of those of all
    layers), energy float64 (mean share of the squared gradient), dims int64, n int64 (problems averaged over). Steps
    without a target or a live problem are left out.
    """
    rows = []
    names = [name for name, _, _ in store.layers]
    dims = np.array([stop - start for _, start, stop in store.layers])
    for step in steps_of(store, benchmark, steps).tolist():
        view, wanted = store.view(pool, step), target_at(store, benchmark, step)
        positions = _drawn(view, ids, most, seed)
        if wanted is None or not len(positions):
            continue
        terms_L, absolute_L, energy_L = (np.zeros(len(names)) for _ in range(3))
        starts = [start for _, start, _ in store.layers]
        block = max(1, _BLOCK_BYTES // (4 * view.dim))
        for first in range(0, len(positions), block):
            some = positions[first : first + block]
            terms_KL = layer_contributions(view, some, wanted, metric).astype(np.float64)
            terms_L += terms_KL.sum(axis=0)
            absolute_L += np.abs(terms_KL).sum(axis=0)
            energy_L += np.add.reduceat(view.rows(some).astype(np.float64) ** 2, starts, axis=1).sum(axis=0)
        table = {
            "step": np.full(len(names), step, np.int64),
            "layer": names,
            "position": np.arange(len(names)),
            "term": terms_L / len(positions),
            "share": absolute_L / max(absolute_L.sum(), np.finfo(float).tiny),
            "energy": energy_L / max(energy_L.sum(), np.finfo(float).tiny),
            "dims": dims,
            "n": np.full(len(names), len(positions), np.int64),
        }
        rows.append(pd.DataFrame(table))
    columns = ["step", "layer", "position", "term", "share", "energy", "dims", "n"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def _drawn(view: View, ids: Sequence[str] | None, most: int, seed: int) -> np.ndarray:
    """Ascending positions of live problems to average over: all, or `most` of them drawn with a seed."""
    if ids is None:
        positions = view.live_positions
    else:
        at = view.positions(list(ids), strict=False)
        positions = np.sort(at[at >= 0])
        positions = positions[view.live[positions]]
    if len(positions) <= most:
        return positions
    return np.sort(np.random.default_rng(seed).choice(positions, most, replace=False))
