"""Selectors over rows of every age, for the budgeted refresh; GradAlign ranks fresh rows only.

`cosine` and `dot` become the expected score now, times the probability of a signal for a problem not measured at this
step. For probe-based selectors, problems without a probe at this step get a pseudo-probe from old sketches, with a
larger standard error. Every other selector uses the stored rows unchanged.

Dimension letters: P candidates, K of them with a probe of this step.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import special  # type: ignore[import-untyped]

from gradstore import State
from gradstore.engine.forecasting.forecast import CandidateForecast
from gradstore.engine.forecasting.refresh_choice import quantile
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.selecting.candidates import Candidates, Scored, Selector
from gradstore.engine.selecting.mixture import Part

AGED = ("cosine", "dot")
"""Selectors whose scores are replaced by a forecast."""


def aged_parts(parts: Sequence[Part], now: CandidateForecast, length: float, confidence: float) -> list[Part]:
    """The parts of a mixture, with the selectors in AGED scored by the forecast `now`; length: the target's length."""
    return [
        replace(part, selector=_aged(part.selector, now, length, confidence)) if part.selector.name in AGED else part
        for part in parts
    ]


def aged_scores(kind: str, now: CandidateForecast, length: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Expected score and its standard deviation, float64 [P]; score NaN where the newest row is not live."""
    scales_P = now.scales(kind) * (1.0 if kind == "cosine" else length)
    chance_P = np.where(now.fresh, 1.0, now.signal)
    mean_P = now.cosine.mean * scales_P
    mean_P = np.where(mean_P > 0, chance_P, 1.0) * mean_P
    spreads_P = now.spreads(kind) * (1.0 if kind == "cosine" else length)
    return np.where(now.newest.live, mean_P, np.nan), spreads_P


def _aged(selector: Selector, now: CandidateForecast, length: float, confidence: float) -> Selector:
    def score(candidates: Candidates) -> Scored:
        mean_P, sd_P = aged_scores(selector.name, now, length)
        half_P = quantile(confidence) * sd_P
        place_P = now.places_of(candidates.numbers)
        return Scored(*(np.append(column, np.nan)[place_P] for column in (mean_P, mean_P - half_P, mean_P + half_P)))

    return replace(selector, score=score)


def with_old_sketches(
    probes: ProbeBatch, number_K: np.ndarray, now: CandidateForecast, length: float = 0.0
) -> ProbeBatch:
    """Add pseudo-probes, made from old sketches, for live candidates without a probe.

    number_K: numbers of the probed problems in the pool, int64.

    The forecast's calibration scales a sketched dot (cosine x norm now) to a probed one. Its residual variance
    increases the standard error. Without a calibration the scale is `length`, the target's length: probe and sketch
    then measure the same dot. A candidate with no information beyond the prior, or with a scale of 0, gets no
    pseudo-probe.
    """
    if now.cosine.model is None:
        return probes
    dot_P, error_P = _as_probes(now, length)
    open_P = np.isfinite(dot_P)
    place_K = now.places_of(number_K)
    open_P[place_K[place_K >= 0]] = False
    old = np.flatnonzero(open_P)
    dots, errors = dot_P[old], error_P[old]
    dots = np.where(dots > 0, now.signal[old], 1.0) * dots
    t = dots / np.where(errors > 0, errors, 1.0)
    counts = np.maximum(now.newest.n_rollouts[old], 3)
    blank = {count: np.full(count, np.nan) for count in np.unique(counts).tolist()}
    unknown = {count: np.zeros(count, np.int64) for count in blank}
    nothing = [blank[count] for count in counts.tolist()]
    return replace(
        probes,
        ids=[*probes.ids, *map(now.ids.__getitem__, old.tolist())],
        derivatives=[*probes.derivatives, *nothing],
        rewards=[*probes.rewards, *nothing],
        lengths=[*probes.lengths, *(unknown[count] for count in counts.tolist())],
        dots=np.concatenate([probes.dots, dots]),
        standard_errors=np.concatenate([probes.standard_errors, errors]),
        t=np.concatenate([probes.t, t]),
        p_values=np.concatenate([probes.p_values, special.ndtr(-t)]),
        states=[*probes.states, *([State.LIVE] * len(old))],
        reasons=[*probes.reasons, *([""] * len(old))],
        numbers=np.append(number_K, now.numbers[old]),
    )


def _as_probes(now: CandidateForecast, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-probe of each live candidate: dot and standard error, float64 [P]; dot NaN where there is none."""
    cosine = now.cosine
    assert cosine.model is not None
    scale_P, left = np.full(len(now), length), 0.0
    if now.calibration is not None:
        scale_P, left = now.calibration.gains * now.calibration.length, now.calibration.left
    value_P, error_P = cosine.model.equivalent(cosine.mean - cosine.offsets, cosine.sd)
    value_P = value_P + cosine.offsets
    norm_P = np.where(now.newest.live & (scale_P > 0), scale_P * now.norms, np.nan)
    error_P = norm_P * np.sqrt(error_P**2 + left)
    return value_P * norm_P, error_P
