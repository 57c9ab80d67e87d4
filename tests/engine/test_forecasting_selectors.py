"""Rows of every age in one ranking: what an old score may claim, and what an old sketch is worth as a probe."""

from dataclasses import replace

import numpy as np
import pytest

from gradstore import State
from gradstore.engine.forecasting.cosine_model import Beliefs, Staleness
from gradstore.engine.forecasting.forecast import CandidateForecast, CosineForecast, NewestRows
from gradstore.engine.forecasting.probe_scale import Calibration
from gradstore.engine.forecasting.selectors import aged_scores, with_old_sketches
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.rollouts.group import Group

MODEL = Staleness(0.01, 0.04, 0.16, 30.0)
STEP, N = 60, 400


def forecast_candidates(ages: np.ndarray, seed: int = 0) -> tuple[CandidateForecast, np.ndarray]:
    """Problems measured once, `ages` steps ago with 16 rollouts; and the true cosines now."""
    random = np.random.default_rng(seed)
    n = len(ages)
    then = random.normal(MODEL.mean, np.sqrt(MODEL.signal), n)
    kept = np.exp(-ages / MODEL.life)
    now = MODEL.mean + kept * (then - MODEL.mean) + np.sqrt((1 - kept**2) * MODEL.signal) * random.normal(size=n)
    scores = then + random.normal(0, np.sqrt(MODEL.noise / 16), n)
    beliefs = Beliefs(MODEL, n)
    for age in sorted(set(ages.tolist()), reverse=True):
        here = np.flatnonzero(ages == age)
        beliefs.measure(here, STEP - age, scores[here], np.full(len(here), 16.0))
    mean, sd = beliefs.at(STEP)
    ids, norms = [f"p{i}" for i in range(n)], random.lognormal(0, 0.3, n)
    newest = NewestRows(np.full(n, int(State.LIVE)), STEP - ages, np.full(n, 0.5), np.full(n, 16), norms)
    cosine = CosineForecast(mean, sd, np.zeros(n), MODEL)
    found = CandidateForecast(ids, np.arange(n), STEP, newest, cosine, norms, np.full(n, 0.75), None)
    return found, now


def probed(now: CandidateForecast, truth: np.ndarray, places: np.ndarray, slope: float) -> ProbeBatch:
    """Probes along a target `slope` times as long, of the true dots, with 16 rollouts."""
    random = np.random.default_rng(1)
    groups, derivatives = [], []
    for place in places.tolist():
        rewards = np.repeat([0.0, 1.0], 8)
        responses = [np.array([1, 2])] * 16
        groups.append(Group(now.ids[place], np.array([1]), responses, rewards))
        dot = slope * truth[place] * now.norms[place]
        derivatives.append((rewards - 0.5) * dot / 0.25 + random.normal(0, 0.1, 16))
    return ProbeBatch.of(groups, derivatives, objective("gradalign"))


def joined(probes: ProbeBatch, now: CandidateForecast, length: float = 0.0) -> ProbeBatch:
    return with_old_sketches(probes, np.array([int(name[1:]) for name in probes.ids]), now, length)


def scaled(now: CandidateForecast, gain: float, left: float = 0.0) -> CandidateForecast:
    """With every sketched dot worth so much as a probed one, along a target of length 2."""
    return replace(now, calibration=Calibration(np.full(len(now), gain / 2), left, 2.0, 150))


def test_an_old_score_claims_less() -> None:
    """The same score, older: nearer to the mean, wider, and only as likely to have a signal as its past says."""
    now, _ = forecast_candidates(np.array([0, 10, 40]))
    same = Beliefs(MODEL, 3)
    for place, age in ((2, 40), (1, 10), (0, 0)):
        same.measure(np.array([place]), STEP - age, np.array([0.5]), np.array([16.0]))
    mean, sd = same.at(STEP)
    now = replace(now, cosine=replace(now.cosine, mean=mean, sd=sd))
    scores, spread = aged_scores("cosine", now)
    assert scores == pytest.approx(mean * [1, 0.75, 0.75])
    assert (np.diff(scores) < 0).all()
    assert (np.diff(spread) > 0).all()
    dots, errors = aged_scores("dot", now, 3.0)
    assert dots == pytest.approx(scores * now.norms * 3)
    assert errors == pytest.approx(spread * now.norms * 3)
    now.newest.states[1] = int(State.NO_SIGNAL)
    assert np.isnan(aged_scores("cosine", now)[0]).tolist() == [False, True, False]


def test_old_sketches_as_probes() -> None:
    """On the probes' scale, unbiased, with an error that tells how far off they are."""
    ages = np.where(np.arange(N) < 200, 0, np.where(np.arange(N) < 300, 5, 25))
    now, truth = forecast_candidates(ages)
    object.__setattr__(now, "signal", np.ones(N))
    probes = probed(now, truth, np.arange(150), slope=7.0)
    both = joined(probes, scaled(now, 7.0))
    assert both.ids == now.ids
    np.testing.assert_array_equal(both.dots[:150], probes.dots)
    np.testing.assert_array_equal(both.standard_errors[:150], probes.standard_errors)
    for part in (np.arange(150, 200), np.arange(200, 300), np.arange(300, 400)):
        true_dots = 7.0 * truth[part] * now.norms[part]
        off = (both.dots[part] - true_dots) / both.standard_errors[part]
        assert abs(off.mean()) < 0.4
        assert 0.6 < off.std() < 1.3
    assert both.standard_errors[300:].mean() > 1.5 * both.standard_errors[150:200].mean()
    assert both.live.all()
    assert np.isfinite(both.scores("shrunk")).all()


def test_what_a_sketch_misses_widens_the_error() -> None:
    """Else an old sketch that says little would outrank a probe under a lower bound."""
    now, truth = forecast_candidates(np.full(N, 5))
    probes = probed(now, truth, np.arange(2), slope=2.0)
    plain = joined(probes, scaled(now, 2.0)).standard_errors[2:]
    missed = joined(probes, scaled(now, 2.0, 0.01)).standard_errors[2:]
    assert missed**2 - plain**2 == pytest.approx(4 * now.norms[2:] ** 2 * 0.01)


def test_what_is_not_known_is_no_probe() -> None:
    """Nothing beyond the prior, no gradient, or no scale to put it on: no pseudo-measurement."""
    now, truth = forecast_candidates(np.zeros(10, np.int64))
    probes = probed(now, truth, np.arange(5), slope=2.0)
    now.cosine.sd[6], now.cosine.mean[6] = np.sqrt(MODEL.signal), MODEL.mean
    now.newest.states[7] = int(State.NO_SIGNAL)
    assert joined(probes, scaled(now, 2.0)).ids == ["p0", "p1", "p2", "p3", "p4", "p5", "p8", "p9"]
    few = probed(now, truth, np.arange(2), slope=2.0)
    assert joined(few, now).ids == ["p0", "p1"]


def test_too_few_probes_for_a_scale_take_the_targets() -> None:
    """A round whose budget met no signal still knows what earlier rounds measured; picks at random would forget it."""
    now, truth = forecast_candidates(np.zeros(N, np.int64))
    object.__setattr__(now, "signal", np.ones(N))
    few = probed(now, truth, np.arange(2), slope=3.0)
    both = joined(few, now, 3.0)
    assert both.ids == now.ids
    off = (both.dots[2:] - 3.0 * truth[2:] * now.norms[2:]) / both.standard_errors[2:]
    assert abs(off.mean()) < 0.4
    assert 0.6 < off.std() < 1.3
