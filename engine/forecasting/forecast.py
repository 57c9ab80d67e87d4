"""Forecast of a round's candidates: their newest rows, and their expected alignment now, from all their rows.

Everything is read from the store as of a step. The drift model (cosine_model.py) takes the cosines of the stored
sketches with the fresh target, row by row in the order of steps. A problem never measured gets its source's mean.

Dimension letters: P candidates, D sketch dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore import State, Store, View
from gradstore.engine.forecasting.cosine_model import PRIOR_LIFE, Beliefs, Staleness, fit, measured_pairs, sum_of_units
from gradstore.engine.forecasting.kept import Kept, Places
from gradstore.engine.forecasting.live_rows import Rows, live_rows
from gradstore.engine.forecasting.local_ratios import Probed
from gradstore.engine.forecasting.measured_rates import MeasuredRates
from gradstore.engine.forecasting.norms import expected_norms
from gradstore.engine.forecasting.probe_scale import Calibration, aim, calibrate, probed_at, probed_before
from gradstore.engine.forecasting.refresh_choice import Outlook, pass_rate_prior
from gradstore.engine.selecting.history import signal_probability


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """Settings of a forecast."""

    n_rollouts: int
    """Rollouts per candidate in a new measurement."""
    forgetting: float
    """Factor per step on the weight of older rollouts in the probability of a signal (History)."""
    by_source: bool
    """Whether each source has its own mean cosine."""


@dataclass(frozen=True, slots=True, eq=False)
class ForecastTarget:
    """The target that cosines are forecast for, and what earlier steps tell about it."""

    direction: np.ndarray
    """Direction of the target now, of any length, float64 [D]."""
    benchmarks: Sequence[str]
    """Benchmarks of the target. The drift model is fitted to their targets at past steps."""
    probed: Sequence[Probed] = ()
    """Probes of earlier steps along the benchmarks' targets, newest first."""

    @classmethod
    def of(
        cls, store: Store, pool: str, benchmarks: Sequence[str], vectors: Sequence[np.ndarray], step: int
    ) -> "ForecastTarget":
        """Equal weight for the targets `vectors`, float32 [D] each, of a step; earlier steps as the store has them."""
        return cls(sum_of_units(vectors), benchmarks, probed_before(store, pool, benchmarks, step))


@dataclass(frozen=True, slots=True, eq=False)
class NewestRows:
    """Newest row of each of P candidates as of a step; arrays are [P]."""

    states: np.ndarray
    """`State` of the row, int64; -1: never measured."""
    steps: np.ndarray
    """Step of the row, int64; -1: never measured."""
    pass_rates: np.ndarray
    """Pass rate, float64; nan where unknown."""
    n_rollouts: np.ndarray
    """Number of rollouts, int64; 0: never measured."""
    norms: np.ndarray
    """Gradient norm, float64; nan where the row is not live."""

    @classmethod
    def of(cls, view: View, places: Places) -> "NewestRows":
        """The rows of candidates in a view."""
        place_P = view.positions_of(places.numbers)

        def column(values: np.ndarray, missing: float) -> np.ndarray:
            return np.append(values.astype(np.float64), missing)[place_P]

        states_P = column(view.states, -1).astype(np.int64)
        return cls(
            states_P,
            column(view.steps, -1).astype(np.int64),
            column(view.pass_rates, np.nan),
            column(view.n_rollouts, 0).astype(np.int64),
            np.where(states_P == State.LIVE, column(view.norms, np.nan), np.nan),
        )

    @property
    def live(self) -> np.ndarray:
        """True where the row is live, bool."""
        alive: np.ndarray = self.states == State.LIVE
        return alive


@dataclass(frozen=True, slots=True, eq=False)
class CosineForecast:
    """Expected cosine of P candidates with the target now; arrays are float64 [P]."""

    mean: np.ndarray
    """Expected cosine; 0 without a target."""
    sd: np.ndarray
    """Standard deviation of `mean`; without a target it grows with the age of the newest row."""
    offsets: np.ndarray
    """Mean cosine of the problem's source minus the pool's, shrunk."""
    model: Staleness | None
    """Drift model; None without a target."""


@dataclass(frozen=True, slots=True, eq=False)
class CandidateForecast:
    """Forecast of P candidates at a step; arrays are [P], in the candidates' order."""

    ids: list[str]
    numbers: np.ndarray
    """Numbers of the problems in the pool (View.problem_numbers), int64."""
    step: int
    newest: NewestRows
    cosine: CosineForecast
    norms: np.ndarray
    """Expected gradient norm now, float64; nan where no row was live."""
    signal: np.ndarray
    """Probability that new rollouts have a signal, float64."""
    calibration: Calibration | None
    """Ratio of probed to sketched dots; None with too few probes."""

    def __len__(self) -> int:
        return len(self.ids)

    def places_of(self, numbers: np.ndarray) -> np.ndarray:
        """Place of each problem among the candidates, int64; -1 for others."""
        last = int(max(self.numbers.max(initial=-1), numbers.max(initial=-1))) + 1
        place_N = np.full(last + 1, -1)  # the last one for the number -1
        known = np.flatnonzero(self.numbers >= 0)
        place_N[self.numbers[known]] = known
        found: np.ndarray = place_N[numbers]
        return found

    @property
    def fresh(self) -> np.ndarray:
        """True where the newest row is from this step, bool."""
        now: np.ndarray = self.newest.steps == self.step
        return now

    def scales(self, kind: str) -> np.ndarray:
        """Factor from a cosine to this kind of score, float64: 1 for `cosine`, else norm times calibration gain.

        An unknown norm is replaced by the median of the known ones.
        """
        if kind == "cosine":
            return np.ones(len(self))
        norm_P = self.norms
        known = norm_P[np.isfinite(norm_P)]
        norm_P = np.where(np.isfinite(norm_P), norm_P, float(np.median(known)) if len(known) else 1.0)
        return norm_P if self.calibration is None else norm_P * self.calibration.gains

    def spreads(self, kind: str) -> np.ndarray:
        """Standard deviation of this kind of score, float64; norms are taken as known."""
        return self.cosine.sd * self.scales(kind)

    def outlook(self, kind: str, n_rollouts: int) -> Outlook:
        """Input for the refresh choice (refresh_choice.py), for this kind of score and groups of n_rollouts."""
        scales_P, model, newest = self.scales(kind), self.cosine.model, self.newest
        noise = 0.0 if model is None else np.sqrt(model.noise / n_rollouts)
        mean_P, sd_P = self.cosine.mean * scales_P, self.spreads(kind)
        return Outlook(mean_P, sd_P, noise * scales_P, self.signal, newest.steps >= 0, newest.live)


def forecast_candidates(
    store: Store,
    pool: str,
    ids: Sequence[str],
    step: int,
    settings: ForecastSettings,
    toward: ForecastTarget | None = None,
) -> CandidateForecast:
    """Forecast problems of a pool at a step. toward: the target; None: without a target."""
    view = store.view(pool, step)
    ids = ids if isinstance(ids, list) else list(ids)
    places = Places.of(view, ids)
    newest, rates = NewestRows.of(view, places), MeasuredRates.of(view, step, settings.forgetting)
    prior = pass_rate_prior(rates.right, rates.wrong)
    right_P, wrong_P = (places.column(sums, 0.0) for sums in (rates.recent_right, rates.recent_wrong))
    signal_P = signal_probability(prior + right_P, prior + wrong_P, settings.n_rollouts)
    if toward is None:
        cosine = _without_target(newest, step)
        return CandidateForecast(ids, places.numbers, step, newest, cosine, newest.norms, signal_P, None)
    unit_D = (toward.direction / (np.linalg.norm(toward.direction) or 1.0)).astype(np.float32)
    rows = live_rows(store, pool, places, unit_D, step)
    sources_P = _sources(view, places) if settings.by_source else np.zeros(len(ids), np.int64)
    cosine = _cosines(view, places, step, toward.benchmarks, rows, sources_P)
    norm_P = _norms(expected_norms(places.column(rates.newest, np.nan), rows), step, newest)
    fresh = probed_at(store, pool, toward.benchmarks, step)
    known = [*([] if fresh is None else [fresh]), *toward.probed]
    calibration = calibrate(view, places, known, aim(store, toward.benchmarks, step)[1]) if known else None
    return CandidateForecast(ids, places.numbers, step, newest, cosine, norm_P, signal_P, calibration)


def _without_target(newest: NewestRows, step: int) -> CosineForecast:
    """Forecast without a target: cosine 0, with the prior's spread for the age of the newest row."""
    zeros_P = np.zeros(len(newest.steps))
    kept_P = np.where(newest.steps >= 0, np.exp(-(step - newest.steps) / PRIOR_LIFE), 0.0)
    return CosineForecast(zeros_P, np.sqrt(1 - kept_P**2), zeros_P, None)


def _cosines(
    view: View, places: Places, step: int, benchmarks: Sequence[str], rows: Sequence[Rows], sources_P: np.ndarray
) -> CosineForecast:
    """Expected cosines now: a drift model fitted to problems measured twice, then a filter over each problem's rows.

    rows: live rows, oldest first.
    """
    first_P, first_rollouts_P = np.full(len(places), np.nan), np.zeros(len(places))
    for row in reversed(rows):
        first_P[row.places], first_rollouts_P[row.places] = row.cosines, row.rollouts
    offsets_P = source_offsets(first_P, sources_P)
    offsets_N, known = np.zeros(view.n_problems), places.numbers >= 0
    offsets_N[places.numbers[known]] = offsets_P[known]
    pairs = measured_pairs(view.store, view.collection, benchmarks, step, offsets_N, view.stored.base)
    model = fit(pairs, first_P - offsets_P, first_rollouts_P)
    beliefs = Beliefs(model, len(places))
    for row in rows:
        beliefs.measure(row.places, row.step, row.cosines - offsets_P[row.places], row.rollouts)
    mean_P, sd_P = beliefs.at(step)
    return CosineForecast(mean_P + offsets_P, sd_P, offsets_P, model)


def _norms(norm_P: np.ndarray, step: int, newest: NewestRows) -> np.ndarray:
    """Expected norms now, float64 [P]; a live row of this step keeps its own norm, and so does one without forecast."""
    own_P = (newest.steps == step) & newest.live | ~np.isfinite(norm_P)
    return np.where(own_P, newest.norms, norm_P)


def _sources(view: View, places: Places) -> np.ndarray:
    """Number of each candidate's source, int64 [P]."""

    def make() -> np.ndarray:
        column = view.column_of(places.numbers, "source").combine_chunks()
        numbers_P: np.ndarray = column.dictionary_encode().indices.to_numpy().astype(np.int64)
        return numbers_P

    return Kept.of(view.store, view.collection).get("sources", places, make)


def source_offsets(scores_P: np.ndarray, sources_P: np.ndarray) -> np.ndarray:
    """Shrunken difference between the mean score of each problem's source and the overall mean, float64 [P].

    sources_P: names, or whole numbers from 0 on (int64).

    A source with m scores keeps m / (m + within / between) of its difference; both variances are moment estimates
    (one-way random effects). NaN scores do not count. All zeros if sources differ by no more than chance.
    """
    known_P = np.isfinite(scores_P)
    source_P = sources_P if sources_P.dtype == np.int64 else np.unique(sources_P, return_inverse=True)[1]
    n_sources = int(source_P.max(initial=-1)) + 1
    counts_S = np.bincount(source_P[known_P], minlength=n_sources)
    if (counts_S > 0).sum() < 2 or known_P.sum() <= n_sources:
        return np.zeros(len(scores_P))
    total = float(scores_P[known_P].mean())
    sums_S = np.bincount(source_P[known_P], scores_P[known_P] - total, n_sources)
    differences_S = sums_S / np.maximum(counts_S, 1)
    within = float(np.sum((scores_P - total - differences_S[source_P])[known_P] ** 2))
    within /= max(known_P.sum() - (counts_S > 0).sum(), 1)
    usual = known_P.sum() - (counts_S**2).sum() / known_P.sum()
    between = float((counts_S * differences_S**2).sum() - ((counts_S > 0).sum() - 1) * within) / max(usual, 1.0)
    if between <= 0:
        return np.zeros(len(scores_P))
    return (differences_S * counts_S / (counts_S + within / between))[source_P]
