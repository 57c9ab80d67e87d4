"""Forecast of a round's candidates: their newest rows, and their expected alignment now, from all their rows.

Everything is read from the store as of a step. The drift model (cosine_model.py) takes the cosines of the stored
sketches with the fresh target, row by row in the order of steps. A problem never measured gets its source's mean.

Dimension letters: P candidates, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore import State, Store
from gradstore.engine.forecasting.cosine_model import PRIOR_LIFE, Beliefs, Staleness, fit, measured_pairs
from gradstore.engine.forecasting.live_rows import live_rows
from gradstore.engine.forecasting.norms import Trained, lengths
from gradstore.engine.forecasting.pass_rates import Motion
from gradstore.engine.forecasting.probe_scale import Calibration, Probed, aim, calibrate, probed_at
from gradstore.engine.forecasting.refresh_choice import Outlook, pass_rate_prior
from gradstore.engine.selecting.history import History
from gradstore.engine.selecting.membership import places


@dataclass(frozen=True, slots=True, eq=False)
class CandidateForecast:
    """Forecast of P candidates at a step; arrays are [P], in the candidates' order."""

    ids: list[str]
    states: np.ndarray
    """`State` of the newest row, int64; -1: never measured."""
    steps: np.ndarray
    """Step of the newest row, int64; -1: never measured."""
    pass_rates: np.ndarray
    """Pass rate of the newest row, float64; nan where unknown."""
    n_rollouts: np.ndarray
    """Rollouts of the newest row, int64; 0: never measured."""
    lengths: np.ndarray
    """Expected gradient norm now, float64; nan where no row was live."""
    length_sd: np.ndarray
    """Standard deviation of `lengths`, float64."""
    mean: np.ndarray
    """Expected cosine now, float64."""
    sd: np.ndarray
    """Standard deviation of `mean`, float64."""
    offsets: np.ndarray
    """Mean cosine of the problem's source minus the pool's, shrunk, float64."""
    signal: np.ndarray
    """Probability that new rollouts have a signal, float64."""
    model: Staleness | None
    """Drift model; None without a target: then `mean` is 0, and `sd` grows with the age of the newest row."""
    calibration: Calibration | None
    """Ratio of probed to sketched dots; None with too few probes."""
    motion: Motion | None
    """Model of how pass rates move; None without a target."""
    step: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def live(self) -> np.ndarray:
        """True where the newest row is live, bool."""
        alive: np.ndarray = self.states == State.LIVE
        return alive

    @property
    def fresh(self) -> np.ndarray:
        """True where the newest row is from this step, bool."""
        now: np.ndarray = self.steps == self.step
        return now

    def scales(self, kind: str) -> np.ndarray:
        """Factor from a cosine to this kind of score, float64: 1 for `cosine`, else norm times calibration gain.

        An unknown norm is replaced by the median of the known ones.
        """
        if kind == "cosine":
            return np.ones(len(self))
        known = self.lengths[np.isfinite(self.lengths)]
        lengths_P = np.where(np.isfinite(self.lengths), self.lengths, float(np.median(known)) if len(known) else 1.0)
        return lengths_P if self.calibration is None else lengths_P * self.calibration.gains

    def spreads(self, kind: str) -> np.ndarray:
        """Standard deviation of this kind of score, float64: from the cosine and, unless it is `cosine`, the norm."""
        from_cosine = self.sd * self.scales(kind)
        if kind == "cosine":
            return from_cosine
        gains_P = 1.0 if self.calibration is None else self.calibration.gains
        return np.hypot(from_cosine, np.hypot(self.mean, self.sd) * gains_P * np.nan_to_num(self.length_sd))

    def outlook(self, kind: str, n_rollouts: int) -> Outlook:
        """Input for the refresh choice (refresh_choice.py), for this kind of score and groups of n_rollouts."""
        scales_P = self.scales(kind)
        noise = 0.0 if self.model is None else np.sqrt(self.model.noise / n_rollouts)
        return Outlook(
            self.mean * scales_P, self.spreads(kind), noise * scales_P, self.signal, self.steps >= 0, self.live
        )


def forecast_candidates(
    store: Store,
    pool: str,
    ids: Sequence[str],
    direction_D: np.ndarray | None,
    benchmarks: Sequence[str],
    step: int,
    *,
    n_rollouts: int,
    forgetting: float,
    by_source: bool,
    trained: Sequence[Trained] = (),
    probed: Sequence[Probed] = (),
) -> CandidateForecast:
    """Forecast problems at a step, against a direction (None: without a target).

    benchmarks: the drift model is fitted to their targets at past steps. n_rollouts: size of a new group. forgetting:
    factor per step for older rollouts (History). by_source: give each source its own mean cosine. trained: the
    directions of past training steps. probed: probes of earlier steps, newest first.
    """
    view = store.view(pool, step)
    place_P = places(list(ids), view.ids)
    known_P = place_P >= 0

    def column(values: np.ndarray, missing: float) -> np.ndarray:
        return np.append(values.astype(np.float64), missing)[place_P]

    states_P = column(view.states, -1).astype(np.int64)
    steps_P = column(view.steps, -1).astype(np.int64)
    rollouts_P = column(view.n_rollouts, 0).astype(np.int64)
    live_P = states_P == State.LIVE
    history = store.history(pool, step)
    past = History.of(history, list(ids), now=step, forgetting=forgetting, prior=pass_rate_prior(history))
    offsets_P, model = np.zeros(len(ids)), None
    if direction_D is None:
        mean_P = np.zeros(len(ids))
        kept_P = np.where(known_P, np.exp(-(step - steps_P) / PRIOR_LIFE), 0.0)
        sd_P = np.sqrt(1 - kept_P**2)
    else:
        unit_D = (direction_D / (np.linalg.norm(direction_D) or 1.0)).astype(np.float32)
        rows = live_rows(store, pool, ids, np.stack([unit_D, *(pull.unit for pull in trained)]), step)
        first_P, first_rollouts_P = np.full(len(ids), np.nan), np.zeros(len(ids))
        for row in reversed(rows):
            first_P[row.places], first_rollouts_P[row.places] = row.cosines[0], row.rollouts
        offset_of: dict[str, float] = {}
        if by_source:
            table = store.problems(pool)
            sources_P = table["source"].take(places(list(ids), table["id"])).to_numpy().astype(str)
            offsets_P = source_offsets(first_P, sources_P)
            offset_of = dict(zip(ids, offsets_P.tolist(), strict=True))
        pairs = measured_pairs(store, pool, benchmarks, step, offset_of)
        model = fit(pairs, first_P - offsets_P, first_rollouts_P)
        beliefs = Beliefs(model, len(ids))
        for row in rows:
            beliefs.measure(row.places, row.step, row.cosines[0] - offsets_P[row.places], row.rollouts)
        mean_P, sd_P = beliefs.at(step)
        mean_P = mean_P + offsets_P
    norms_P = np.where(live_P, column(view.norms, np.nan), np.nan)
    lengths_P, length_sd_P, motion, calibration = norms_P, np.zeros(len(ids)), None, None
    if direction_D is not None:
        fresh = probed_at(store, pool, benchmarks, step)
        known = [*([] if fresh is None else [fresh]), *probed]
        calibration = calibrate(view, ids, known, aim(store, benchmarks, step)[1]) if known else None
        lengths_P, length_sd_P, motion = lengths(history, ids, rows, trained, step)
        now_P = (steps_P == step) & live_P | ~np.isfinite(lengths_P)
        lengths_P, length_sd_P = np.where(now_P, norms_P, lengths_P), np.where(now_P, 0.0, length_sd_P)
    return CandidateForecast(
        list(ids),
        states_P,
        steps_P,
        column(view.pass_rates, np.nan),
        rollouts_P,
        lengths_P,
        length_sd_P,
        mean_P,
        sd_P,
        offsets_P,
        past.signal_probability(n_rollouts),
        model,
        calibration,
        motion,
        step,
    )


def source_offsets(scores_P: np.ndarray, sources_P: np.ndarray) -> np.ndarray:
    """Shrunken difference between the mean score of each problem's source and the overall mean, float64 [P].

    A source with m scores keeps m / (m + within / between) of its difference; both variances are moment estimates
    (one-way random effects). NaN scores do not count. All zeros if sources differ by no more than chance.
    """
    known_P = np.isfinite(scores_P)
    names, source_P = np.unique(sources_P, return_inverse=True)
    counts_S = np.bincount(source_P[known_P], minlength=len(names))
    if (counts_S > 0).sum() < 2 or known_P.sum() <= len(names):
        return np.zeros(len(scores_P))
    total = float(scores_P[known_P].mean())
    sums_S = np.bincount(source_P[known_P], scores_P[known_P] - total, len(names))
    differences_S = sums_S / np.maximum(counts_S, 1)
    within = float(np.sum((scores_P - total - differences_S[source_P])[known_P] ** 2))
    within /= max(known_P.sum() - (counts_S > 0).sum(), 1)
    usual = known_P.sum() - (counts_S**2).sum() / known_P.sum()
    between = float((counts_S * differences_S**2).sum() - ((counts_S > 0).sum() - 1) * within) / max(usual, 1.0)
    if between <= 0:
        return np.zeros(len(scores_P))
    return (differences_S * counts_S / (counts_S + within / between))[source_P]
