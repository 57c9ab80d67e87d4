"""Per-problem ratio of probed to sketched dot products, from the probes of the last rounds.

A sketch keeps the part of a gradient that its projection was fitted to. As the policy changes, that part shrinks, for
some problems sooner than for others. Probed problems have both dots, along the target of their step. Another problem's
ratio is a regression on theirs, weighted by the similarity of the sketches. Formulas: docs/methods.md, Budgeted
refresh.

Dimension letters: P problems, K probed ones, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstore import Store, View
from gradstore.engine.forecasting.cosine_model import sum_of_units
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.searching.query import score_rows
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError

_STEPS_BACK = 4
"""Newest steps whose probes count."""
_FEWEST = 3
_MOST = 1024
"""Newest probes that count: each is compared with every problem."""
_AT_ONCE = 1 << 20
"""Pairs of a problem and a probe per block."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Ratio of probed to sketched dots, per problem."""

    gains: np.ndarray
    """Ratio for each problem, float64 [P]; a sketched dot is norm x cosine x the sketched target's length."""
    left: float
    """Residual variance of a cosine: the error of the sketch, without that of the rollouts."""
    length: float
    """Length of the sketched target now; 1 with several benchmarks."""
    n: int
    """Number of probes used."""

    def describe(self) -> dict[str, Any]:
        """Summary as a dict for JSON: quantiles of the gains, residual variance and number of probes."""
        low, usual, high = np.quantile(self.gains, (0.1, 0.5, 0.9)).tolist()
        return {"gain": usual, "gain_low": low, "gain_high": high, "left": self.left, "n_probes": self.n}


class LocalRatios:
    """Locally weighted regression of probed on sketched dots, through the origin; slopes are at least 0.

    Probed problem k has the weight max(cos, 0)^2. The global slope is added as one pseudo-problem of weight 1.
    """

    def __init__(self, rows_KD: np.ndarray, sketched_K: np.ndarray, probed_K: np.ndarray) -> None:
        """rows_KD: unit sketches of the probed problems, float32."""
        squares_K, products_K = sketched_K**2, probed_K * sketched_K
        self._usual = float(products_K.sum() / (squares_K.sum() or 1.0))
        self._one = float(squares_K.mean()) or 1.0
        self._rows_KD = rows_KD
        self._sums_K2 = np.stack([products_K, squares_K], axis=1).astype(np.float32)
        self.usual = max(self._usual, 0.0)
        """Global slope, at least 0; also the slope of a problem that is similar to no probed one."""

    def __call__(self, rows_PD: np.ndarray) -> np.ndarray:
        """Slopes for problems with these unit sketches, float64 [P]; memory for P x K numbers."""
        similar_PK = rows_PD @ self._rows_KD.T
        np.maximum(similar_PK, 0.0, out=similar_PK)
        np.square(similar_PK, out=similar_PK)
        products_P, squares_P = (similar_PK @ self._sums_K2).T.astype(np.float64)
        slope_P: np.ndarray = (products_P + self._one * self._usual) / (squares_P + self._one)
        return np.maximum(slope_P, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """Live probes of one step and the sketches of their problems at that step; both dots are divided by the norm."""

    rows: np.ndarray
    """Unit sketches, float32 [K, D]."""
    sketched: np.ndarray
    """Cosine with the target times its length, float64 [K]."""
    dots: np.ndarray
    """Probed dot over the norm, float64 [K]."""
    errors: np.ndarray
    """Standard error of the probed dot over the norm, float64 [K]."""


def probed_before(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> list[Probed]:
    """Probes of the newest steps before `step`, along the benchmarks' target, newest first."""
    steps = sorted({at for name in benchmarks for at in store.steps(name) if at < step}, reverse=True)
    found = (probed_at(store, pool, benchmarks, at) for at in steps[: _STEPS_BACK - 1])
    return [probed for probed in found if probed is not None]


def probed_at(store: Store, pool: str, benchmarks: Sequence[str], step: int) -> Probed | None:
    """Probes of a step along the benchmarks' target; None if none can be compared with a sketch."""
    try:
        batch = ProbeBatch.load(store, pool, step=step, target="+".join(benchmarks))
        direction_D, length = aim(store, benchmarks, step)
    except RequestError:
        return None
    view = store.view(pool, step)
    places_K = view.positions(batch.ids, strict=False)
    known_K = (places_K >= 0) & batch.live
    known_K[known_K] = view.live[places_K[known_K]] & (view.steps[places_K[known_K]] == step)
    places_K = places_K[known_K]
    if view.n_bases > 1 or not len(places_K):
        return None
    norms_K = view.norms[places_K].astype(np.float64)
    sketched_K = score_rows(view, direction_D, "cosine", places_K)[places_K].astype(np.float64) * length
    errors_K = batch.standard_errors[known_K] / norms_K
    return Probed(view.rows(places_K), sketched_K, batch.dots[known_K] / norms_K, errors_K)


def calibrate(view: View, ids: Sequence[str], probes: Sequence[Probed], length: float) -> Calibration | None:
    """Calibration of problems from their newest rows in a view; None with fewer than 3 probes.

    probes: probes of several steps, newest first. length: length of the target now.
    """
    if sum(len(own.dots) for own in probes) < _FEWEST:
        return None
    rows_KD, sketched_K, probed_K, errors_K = (
        np.concatenate([getattr(own, name) for own in probes])[:_MOST]
        for name in ("rows", "sketched", "dots", "errors")
    )
    ratios = LocalRatios(rows_KD, sketched_K, probed_K)
    place_P = view.positions(list(ids), strict=False)
    live = np.flatnonzero((place_P >= 0) & np.append(view.live, False)[place_P])
    gains_P = np.full(len(ids), ratios.usual)
    done = 0
    for block, rows_BD in view.scan(place_P[live], max(1, _AT_ONCE // len(rows_KD))):
        gains_P[live[done : done + len(block)]] = ratios(rows_BD)
        done += len(block)
    left = max(float(np.mean((probed_K - ratios(rows_KD) * sketched_K) ** 2)) - float(np.mean(errors_K**2)), 0.0)
    return Calibration(gains_P, left / ((ratios.usual * length) ** 2 or 1.0), length, len(probed_K))


def aim(store: Store, benchmarks: Sequence[str], step: int) -> tuple[np.ndarray, float]:
    """Unit direction of the benchmarks at a step, float32 [D], and the target's length: 1 with several benchmarks."""
    vectors = [target(store, name, step).vector for name in benchmarks]
    total_D = sum_of_units(vectors)
    length = float(np.linalg.norm(vectors[0].astype(np.float64))) if len(vectors) == 1 else 1.0
    return (total_D / (np.linalg.norm(total_D) or 1.0)).astype(np.float32), length
