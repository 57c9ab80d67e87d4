"""Selectors over rows of every age: what the budgeted refresh ranks by, where GradAlign ranks fresh rows alone.

`cosine` and `dot` become the expected score now, times the probability of a signal for a problem not measured at this
step. The selectors that go by probes see, beside the probes of this step, what the other problems' old sketches are
worth as one, with the larger standard error. Every other selector takes the stored rows as they are.

Dimension letters: P candidates, K of them with a probe of this step.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from gradstore import State
from gradstore.engine.forecasting.forecast import Standing
from gradstore.engine.forecasting.refresh_choice import quantile
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.selecting.candidates import Candidates, Scored, Selector
from gradstore.engine.selecting.membership import places
from gradstore.engine.selecting.mixture import Part

AGED = ("cosine", "dot")
"""Selectors whose scores are aged."""


def aged_parts(parts: Sequence[Part], now: Standing, length: float, confidence: float) -> list[Part]:
    """The parts of a mixture with the scores of AGED taken from the standing; length: of the target."""
    return [
        replace(part, selector=_aged(part.selector, now, length, confidence)) if part.selector.name in AGED else part
        for part in parts
    ]


def aged_scores(kind: str, now: Standing, length: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Expected score and its standard deviation, float64 [P]; NaN where the problem cannot be picked as it is."""
    scales_P = now.scales(kind) * (1.0 if kind == "cosine" else length)
    chance_P = np.where(now.fresh, 1.0, now.signal)
    mean_P = now.mean * scales_P
    mean_P = np.where(mean_P > 0, chance_P, 1.0) * mean_P
    spreads_P = now.spreads(kind) * (1.0 if kind == "cosine" else length)
    return np.where(now.live, mean_P, np.nan), spreads_P


def _aged(selector: Selector, now: Standing, length: float, confidence: float) -> Selector:
    def score(candidates: Candidates) -> Scored:
        mean_P, sd_P = aged_scores(selector.name, now, length)
        half_P = quantile(confidence) * sd_P
        place_P = places(candidates.ids, now.ids)
        return Scored(*(np.append(column, np.nan)[place_P] for column in (mean_P, mean_P - half_P, mean_P + half_P)))

    return replace(selector, score=score)


def with_old_sketches(probes: ProbeBatch, now: Standing, length: float = 0.0) -> ProbeBatch:
    """The probes, and for other live candidates what their sketches are worth as one.

    A sketch's dot, cosine x length now, is brought to the probes' scale by the standing's calibration, and what that
    leaves unexplained adds to the standard error, as does how unsure the length is. Without a calibration the scale is
    taken to be `length`, the target's: probe and sketch then measure the same dot. Candidates of which nothing is known
    beyond the prior get none, and so do all where there is no scale.
    """
    if now.model is None:
        return probes
    place_P = places(now.ids, probes.ids)
    dot_P, error_P = _as_probes(now, length)
    old = np.flatnonzero((place_P < 0) & np.isfinite(dot_P))
    dots, errors = dot_P[old], error_P[old]
    dots = np.where(dots > 0, now.signal[old], 1.0) * dots
    t = dots / np.where(errors > 0, errors, 1.0)
    counts = np.maximum(now.n_rollouts[old], 3)
    nothing = [np.full(count, np.nan) for count in counts]
    return replace(
        probes,
        ids=[*probes.ids, *(now.ids[place] for place in old)],
        derivatives=[*probes.derivatives, *nothing],
        rewards=[*probes.rewards, *nothing],
        lengths=[*probes.lengths, *(np.zeros(count, np.int64) for count in counts)],
        dots=np.concatenate([probes.dots, dots]),
        standard_errors=np.concatenate([probes.standard_errors, errors]),
        t=np.concatenate([probes.t, t]),
        p_values=np.concatenate([probes.p_values, stats.norm.sf(t)]),
        states=[*probes.states, *([State.LIVE] * len(old))],
        reasons=[*probes.reasons, *([""] * len(old))],
    )


def _as_probes(now: Standing, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Dot and standard error of the measurement that each live sketch is worth, float64 [P]; NaN where it is none."""
    assert now.model is not None
    scale_P, left = np.full(len(now), length), 0.0
    if now.calibration is not None:
        scale_P, left = now.calibration.gains * now.calibration.length, now.calibration.left
    value_P, error_P = now.model.equivalent(now.mean - now.offsets, now.sd)
    value_P = value_P + now.offsets
    lengths_P = np.where(now.live & (scale_P > 0), scale_P * now.lengths, np.nan)
    error_P = np.hypot(lengths_P * np.sqrt(error_P**2 + left), scale_P * value_P * now.length_sd)
    return value_P * lengths_P, error_P
