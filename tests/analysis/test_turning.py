"""Problems that changed sign: planted ones found, the others left alone; z and p against a loop."""

import numpy as np
import pytest
from scipy import stats

from gradstore.analysis.noise import moderated
from gradstore.analysis.turning import COLUMNS, turning
from gradstore.errors import RequestError


def test_planted_turns_are_found_and_few_others(make_history) -> None:
    """Ten of 200 turn from 1 to -1, five the other way, under noise of a fifth; at a false-discovery rate of 0.1."""
    along = np.full((6, 200), 0.8)
    along[:, 100:] = -0.8
    along[3:, :10] = -1.0
    along[3:, 100:105] = 1.0
    along[:, 195:] = 0.0  # noise alone: signs mean nothing
    history = make_history(along, noise=0.2)
    frame = turning(history.store, "pool", "bench")
    assert list(frame.columns) == COLUMNS
    sure = frame[frame["significant"]]
    assert set(sure.loc[sure["turned"] == "harmful", "id"]) == {f"p{p:04d}" for p in range(10)}
    assert set(sure.loc[sure["turned"] == "helpful", "id"]) == {f"p{p:04d}" for p in range(100, 105)}
    assert (frame["split"] == 30).all()


def test_noise_alone_turns_nobody(make_history) -> None:
    """Under no signal almost half of the problems change sign, and none is told apart from noise."""
    history = make_history(np.zeros((6, 400)), noise=0.5)
    frame = turning(history.store, "pool", "bench")
    assert len(frame) > 100
    assert frame["significant"].sum() <= 2


def test_numbers_are_those_of_a_loop(history) -> None:
    frame = turning(history.store, "pool", "bench", split=20, noise=0.1).set_index("id")
    pairs = {}
    for p, name in enumerate(history.ids):
        scores = {
            s: history.cosine(s, p) for s in range(4) if history.measured_SP[s, p] and history.states_SP[s, p] == 0
        }
        before, after = [v for s, v in scores.items() if s < 2], [v for s, v in scores.items() if s >= 2]
        if before and after:
            z = [np.mean(half) * np.sqrt(len(half)) / 0.1 for half in (before, after)]
            pairs[name] = (np.mean(before), np.mean(after), z)
    p_values = [max(stats.norm.sf(z[0]), stats.norm.cdf(z[1])) for _, _, z in pairs.values()]
    p_values += [max(stats.norm.cdf(z[0]), stats.norm.sf(z[1])) for _, _, z in pairs.values()]
    q_values = stats.false_discovery_control(p_values)
    for place, (name, (before, after, z)) in enumerate(pairs.items()):
        if before * after >= 0:
            assert name not in frame.index
            continue
        row = frame.loc[name]
        number = place if before > 0 else place + len(pairs)
        assert row["turned"] == ("harmful" if before > 0 else "helpful")
        assert (row["before"], row["after"]) == pytest.approx((before, after), abs=1e-5)
        assert (row["z_before"], row["z_after"]) == pytest.approx(tuple(z), rel=1e-3, abs=1e-3)
        assert row["p_value"] == pytest.approx(p_values[number], rel=1e-2, abs=1e-9)
        assert row["q_value"] == pytest.approx(q_values[number], rel=1e-2, abs=1e-9)


def test_noise_is_each_problems_own() -> None:
    """Half of the problems are ten times as noisy: their deviations are found, shrunk to what the pool shows."""
    random = np.random.default_rng(0)
    true = np.repeat([0.02, 0.2], 1000)
    freedom = np.tile([1, 4], 1000)
    squares = true**2 * random.chisquare(freedom)
    sigma, df = moderated(squares, freedom)
    for scale in (0.02, 0.2):
        assert np.median(sigma[(true == scale) & (freedom == 4)]) == pytest.approx(scale, rel=0.35)
    assert (df > freedom).all()
    assert (df < freedom + 5).all()
    alike, many = moderated(0.09 * random.chisquare(freedom), freedom)
    np.testing.assert_allclose(alike, 0.3, rtol=0.06)
    assert many.min() > 20
    unknown, none = moderated(np.zeros(3), np.zeros(3, int))
    assert np.isnan(unknown).all()
    assert not none.any()


def test_noisy_problems_are_not_taken_for_turned(make_history) -> None:
    """Signs that come and go by noise, among problems that are measured far better: few are called turned."""
    random = np.random.default_rng(1)
    along = np.zeros((6, 400))
    along[:, :200] = random.normal(size=(6, 200))
    along[:, 200:] = 0.5
    history = make_history(along, noise=0.05)
    frame = turning(history.store, "pool", "bench")
    assert len(frame) > 50
    assert frame["significant"].mean() < 0.05


def test_one_step_cannot_show_a_change(make_history) -> None:
    history = make_history(np.zeros((1, 10)))
    with pytest.raises(RequestError, match="at least two"):
        turning(history.store, "pool", "bench")
