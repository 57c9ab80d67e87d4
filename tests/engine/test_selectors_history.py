"""Posteriors over the pass rate against a loop over the rows, and what they predict against simulation."""

import numpy as np
import pytest

import gradstore
from gradstore.engine import History
from gradstore.errors import RequestError


@pytest.fixture
def store(tmp_path):
    """Thirty problems, each measured at some of six steps, some rows without a pass rate."""
    random = np.random.default_rng(1)
    made = gradstore.create(tmp_path / "store", dim=4, fingerprint={})
    ids = [f"p{i:02d}" for i in range(30)]
    made.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    for step in (0, 10, 20, 20, 5, 30):
        some = list(random.permutation(ids)[:12])
        rates = random.integers(0, 9, 12).astype(np.float32) / 8
        rates[0] = np.nan
        with made.writer("pool", step=step) as writer:
            writer.append(some, random.normal(size=(12, 4)), pass_rate=rates, n_rollouts=np.full(12, 8))
    return made


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_posterior_is_its_sum(store, forgetting: float) -> None:
    """A wrong count makes a problem look settled that is not."""
    rows = store.history("pool").to_pylist()
    asked = [f"p{i:02d}" for i in reversed(range(30))] + ["never"]
    history = History.of(store.history("pool"), asked, forgetting=forgetting, prior=2.0)
    for i, name in enumerate(asked):
        a = b = 2.0
        mine = [row for row in rows if row["id"] == name]
        for row in mine:
            if not np.isnan(row["pass_rate"]):
                weight = forgetting ** (30 - row["step"])
                a += weight * row["n_rollouts"] * row["pass_rate"]
                b += weight * row["n_rollouts"] * (1 - row["pass_rate"])
        assert (history.a[i], history.b[i]) == pytest.approx((a, b))
        assert history.pass_rates[i] == pytest.approx(a / (a + b))
        assert history.n_measurements[i] == len(mine)
        assert history.last_step[i] == max((row["step"] for row in mine), default=-1)


def test_now_is_the_policys_step(store) -> None:
    """A hundred steps after the last measurement nearly nothing is left but the prior."""
    history = History.of(store.history("pool"), [f"p{i:02d}" for i in range(30)], now=130, forgetting=0.9)
    np.testing.assert_allclose(history.a, 1.0, atol=0.01)


def test_probability_of_signal_against_simulation() -> None:
    """Problems without signal are skipped by this number: if it were too low, good ones would never be looked at."""
    random = np.random.default_rng(0)
    history = History(np.array([1.0, 9, 1, 30]), np.array([1.0, 1, 17, 30]), np.zeros(4, int), np.ones(4, int))
    for n in (1, 2, 8):
        drawn = random.binomial(n, random.beta(history.a, history.b, (200_000, 4)))
        simulated = ((drawn > 0) & (drawn < n)).mean(axis=0)
        np.testing.assert_allclose(history.signal_probability(n), simulated, atol=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forgetting": 0.0}, "forgetting is 0"),
        ({"forgetting": 1.1}, "forgetting is 1.1"),
        ({"prior": 0}, "prior is 0"),
    ],
)
def test_wrong_settings(store, settings: dict, message: str) -> None:
    """Each says what was expected."""
    with pytest.raises(RequestError, match=message):
        History.of(store.history("pool"), ["p00"], **settings)
