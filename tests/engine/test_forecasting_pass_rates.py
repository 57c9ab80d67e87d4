"""Pass rates between measurements: against simulated problems that a known push moves, and against slow loops."""

import numpy as np
import pytest
from scipy import integrate, stats

from gradstore.engine.forecasting.pass_rates import Forecast, Motion, Rates, effective, fit_motion, forecast, slack


def simulated(pull: float, drift: float, seed: int = 0, n: int = 600) -> tuple[Rates, np.ndarray, np.ndarray]:
    """Problems measured at steps 0 and 10 and some at 20; rates, the push at each row, and log odds at step 20."""
    random = np.random.default_rng(seed)
    odds, push = random.normal(-0.5, 1.0, n), random.normal(0, 1.0, n)
    places, steps, rates, pushes = [], [], [], []
    for step in (0, 10, 20):
        measured = np.flatnonzero(random.random(n) < 0.7)
        right = random.binomial(16, 1 / (1 + np.exp(-odds[measured])))
        places.append(measured)
        steps.append(np.full(len(measured), step))
        rates.append(right / 16)
        pushes.append(push[measured] * step)
        if step < 20:
            odds = odds + pull * push * 10 + random.normal(0, np.sqrt(drift * 10), n)
    found = Rates(*(np.concatenate(part) for part in (places, steps, rates)), np.full(sum(map(len, places)), 16.0))
    return found, np.concatenate(pushes), odds


def test_a_push_is_found_and_chance_is_not() -> None:
    """A pull that is not there would move every forecast the wrong way as often as the right one."""
    rates, pushes, _ = simulated(0.08, 0.02)
    found = fit_motion(rates, pushes)
    assert 0.055 < found.pull < 0.085  # too small where rates come near 0 or 1
    assert found.drift < 0.05
    assert fit_motion(*simulated(0.08, 0.2)[:2]).drift > 0.05
    assert found.mean == pytest.approx(-0.5, abs=0.12)
    assert 0.7 < found.variance < 1.4
    for seed in range(5):
        rates, pushes, _ = simulated(0.0, 0.02, seed)
        assert fit_motion(rates, pushes).pull < 0.015
        rates, pushes, _ = simulated(-0.08, 0.02, seed)
        assert fit_motion(rates, pushes).pull == 0.0
    nothing = Rates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    assert fit_motion(nothing, np.zeros(0)).pull == 0.0


def test_forecasts_are_as_sure_as_they_say() -> None:
    """Log odds of problems, measured or not, lie within what the forecast claims; with the push they lie nearer."""
    rates, pushes, truth = simulated(0.08, 0.02)
    random = np.random.default_rng(0)
    random.normal(-0.5, 1.0, 600)
    push = random.normal(0, 1.0, 600)
    motion = Motion(-0.5, 1.0, 0.02, 0.08)
    found = forecast(motion, rates, pushes, push * 20, 20)
    off = (truth - found.mean) / np.sqrt(found.variance)
    seen = np.isin(np.arange(600), rates.places)
    assert abs(off[seen].mean()) < 0.15
    assert 0.8 < off[seen].std() < 1.2
    still = forecast(Motion(-0.5, 1.0, 0.02, 0.0), rates, pushes, push * 20, 20)
    assert np.mean((truth - found.mean) ** 2) < 0.7 * np.mean((truth - still.mean) ** 2)


def test_a_forecast_is_the_slow_loop() -> None:
    """One problem at a time, every posterior by integration: the normal in its place has its mode and curvature."""
    rates, pushes, _ = simulated(0.08, 0.02, n=12)
    motion, ends = Motion(-0.4, 0.9, 0.03, 0.05), np.linspace(-10, 10, 12)
    found = forecast(motion, rates, pushes, ends, 25)
    for place in range(12):
        mean, variance, step, push = motion.mean, motion.variance, None, 0.0
        for row in np.flatnonzero(rates.places == place):
            mean += motion.pull * (pushes[row] - push)
            variance += 0.0 if step is None else motion.drift * (rates.steps[row] - step)
            grid = np.linspace(-12, 12, 240_001)
            p = 1 / (1 + np.exp(-grid))
            n, right = rates.rollouts[row], rates.rollouts[row] * rates.rates[row]
            log = stats.norm.logpdf(grid, mean, np.sqrt(variance)) + right * np.log(p) + (n - right) * np.log1p(-p)
            mean = grid[np.argmax(log)]
            p = 1 / (1 + np.exp(-mean))
            variance, step, push = 1 / (1 / variance + n * p * (1 - p)), rates.steps[row], pushes[row]
        assert found.mean[place] == pytest.approx(mean + motion.pull * (ends[place] - push), abs=2e-4)
        assert found.variance[place] == pytest.approx(variance + (0 if step is None else 0.03 * (25 - step)), abs=1e-4)


def test_the_order_of_problems_does_not_matter() -> None:
    """Places are labels: a forecast belongs to its problem, whatever number it has."""
    rates, pushes, _ = simulated(0.08, 0.02, n=40)
    other = np.random.default_rng(3).permutation(40)
    renamed = Rates(other[rates.places], rates.steps, rates.rates, rates.rollouts)
    motion = fit_motion(rates, pushes)
    assert fit_motion(renamed, pushes).pull == pytest.approx(motion.pull)
    one, two = (forecast(motion, own, pushes, np.zeros(40), 30) for own in (rates, renamed))
    np.testing.assert_allclose(two.mean[other], one.mean)
    np.testing.assert_allclose(two.variance[other], one.variance)


def test_slack_is_the_integral() -> None:
    """p (1 - p) under normal log odds: a rate that may be anything has less of it on average than 1/4."""
    means, variances = np.array([0.0, -2.0, 1.0]), np.array([0.3, 1.5, 4.0])
    found, spread = Forecast(means, variances).slack()
    for k in range(3):

        def expected(power: int, k: int = k) -> float:
            sd = np.sqrt(variances[k])
            density = stats.norm(means[k], sd).pdf
            inside = lambda x: slack(1 / (1 + np.exp(-x))) ** power * density(x)  # noqa: E731
            return integrate.quad(inside, means[k] - 9 * sd, means[k] + 9 * sd)[0]

        assert found[k] == pytest.approx(expected(1), abs=2e-4)
        assert spread[k] == pytest.approx(np.sqrt(expected(2) - expected(1) ** 2), abs=1e-3)


def test_rollouts_count_by_what_they_tell() -> None:
    """All of them at a rate of one half, few at a rate near 0 or 1, and all where the rate is not known."""
    rates = np.array([0.5, 1 / 16, np.nan, -1.0])
    assert effective(np.full(4, 16.0), rates) == pytest.approx([16, 64 * 15 / 256, 16, 16])
    assert slack(rates) == pytest.approx([0.25, 15 / 256, np.nan, np.nan], nan_ok=True)
