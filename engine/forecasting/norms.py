"""Expected gradient norms of the candidates now: contrast from their rows times p (1 - p) from the pass-rate model.

A round's training steps are taken to follow the mean gradient that its picks had when they were picked.

Dimension letters: P candidates, M measurements, R rounds, K picks, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gradstore import Store
from gradstore.engine.forecasting.live_rows import Rows
from gradstore.engine.forecasting.pass_rates import Motion, Rates, fit_motion, forecast
from gradstore.engine.selecting.membership import places

_ROUNDS_BACK = 16
"""Newest rounds whose training is assumed to have moved pass rates."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Training direction from step `start` to step `stop`."""

    start: int
    stop: int
    unit: np.ndarray
    """Direction of the problems' mean gradient when they were picked, float32 [D]."""


def trained_toward(store: Store, pool: str, step: int) -> list[Trained]:
    """Training directions of the last rounds, oldest first; empty in a store with several bases.

    Each is the mean gradient of the round's live picks; rounds without live picks are left out.
    """
    found, stop = [], step
    for number in range(len(store.rounds(pool)) - 1, -1, -1)[:_ROUNDS_BACK]:
        past = store.rounds(pool)[number]
        start = int(past.about["step"])
        if start >= stop:
            continue
        view = store.view(pool, start)
        if view.n_bases > 1:
            return []
        places_K = view.positions(past.picks, strict=False)
        places_K = places_K[places_K >= 0]
        places_K = places_K[view.live[places_K]]
        if len(places_K):
            total_D = (view.rows(places_K).astype(np.float64) * view.norms[places_K, None]).sum(axis=0)
            found.append(Trained(start, stop, (total_D / (np.linalg.norm(total_D) or 1.0)).astype(np.float32)))
        stop = start
    return found[::-1]


def lengths(
    history: pa.Table, ids: Sequence[str], rows: Sequence[Rows], pulls: Sequence[Trained], now: int
) -> tuple[np.ndarray, np.ndarray, Motion]:
    """Expected norms now and their sds, float64 [P], NaN without a live row; also returns the pass-rate model."""
    n = len(ids)
    weight_P, length_P, along_RP = np.zeros(n), np.zeros(n), np.zeros((len(pulls), n))
    for row in rows:
        sound = np.isfinite(row.slack)
        at = row.places[sound]
        share = row.counts[sound] * row.norms[sound]
        weight_P[at] += row.counts[sound] * row.slack[sound]
        length_P[at] += share
        along_RP[:, at] += share * row.cosines[1:, sound]
    along_RP /= weight_P + 1.0
    rates = measured_rates(history, ids)

    def pushes(steps: np.ndarray, places: np.ndarray) -> np.ndarray:
        total = np.zeros(len(steps))
        for pull, along_P in zip(pulls, along_RP, strict=True):
            total += np.clip(steps - pull.start, 0, pull.stop - pull.start) * along_P[places]
        return total

    pushes_M, pushes_P = pushes(rates.steps, rates.places), pushes(np.full(n, now), np.arange(n))
    motion = fit_motion(rates, pushes_M)
    mean_P, sd_P = forecast(motion, rates, pushes_M, pushes_P, now).slack()
    contrast_P = np.where(weight_P > 0, length_P / np.where(weight_P > 0, weight_P, 1.0), np.nan)
    return contrast_P * mean_P, contrast_P * sd_P, motion


def measured_rates(history: pa.Table, ids: Sequence[str]) -> Rates:
    """Last row per problem and step, in the order of the steps; rows without a pass rate are left out."""
    place_M = places(history["id"], list(ids))
    step_M, rate_M, count_M = (history[name].to_numpy() for name in ("step", "pass_rate", "n_rollouts"))
    sound = np.flatnonzero((place_M >= 0) & (rate_M >= 0) & (rate_M <= 1) & (count_M > 0))
    key = step_M[sound].astype(np.int64) * (len(ids) + 1) + place_M[sound]
    _, last = np.unique(key[::-1], return_index=True)
    chosen = sound[::-1][last]
    return Rates(
        place_M[chosen],
        step_M[chosen].astype(np.int64),
        rate_M[chosen].astype(np.float64),
        count_M[chosen].astype(np.float64),
    )
