"""The staleness model: it finds a drift that was planted, and believes what probability theory says."""

import numpy as np
import pytest

import gradstore
from gradstore.engine.forecasting.cosine_model import PRIOR_LIFE, Beliefs, Pairs, Staleness, fit, measured_pairs


def planted(seed: int, life: float, reliability: float, n: int = 3000) -> tuple[Pairs, np.ndarray]:
    """Pairs of an Ornstein-Uhlenbeck process of mean 0.003 and deviation 0.01, 16 rollouts; half of them, chosen by
    their old score as a refresh would."""
    random = np.random.default_rng(seed)
    ages = random.integers(1, 80, n).astype(float)
    error = 0.01 * np.sqrt((1 - reliability) / reliability)
    kept = np.exp(-ages / life)
    before = random.normal(0, 0.01, n)
    after = kept * before + np.sqrt(1 - kept**2) * random.normal(0, 0.01, n)
    old, new = (0.003 + truth + random.normal(0, error, n) for truth in (before, after))
    chosen = np.argsort(-old)[: n // 2]
    counts = np.full(len(chosen), 16.0)
    return Pairs(old[chosen], new[chosen], ages[chosen], counts, counts), old


@pytest.mark.parametrize(("life", "reliability"), [(10.0, 0.8), (30.0, 0.5), (120.0, 0.6)])
def test_a_planted_drift_is_found(life: float, reliability: float) -> None:
    """A model that overrates old scores keeps what has drifted away; one that underrates them measures it all again.
    The pairs are chosen by their old scores: without the regression to the mean the drift would look faster."""
    found = []
    for seed in range(3):
        pairs, scores = planted(seed, life, reliability)
        model = fit(pairs, scores, np.full(len(scores), 16.0))
        found.append((model.life, model.signal / (model.signal + model.noise / 16), model.mean, np.sqrt(model.signal)))
    mean_life, mean_reliability, mean, deviation = np.mean(found, axis=0)
    assert life / 1.6 < mean_life < life * 1.6
    assert abs(mean_reliability - reliability) < 0.12
    assert abs(mean - 0.003) < 0.002
    assert 0.008 < deviation < 0.012


def test_the_closed_form_is_the_likelihood() -> None:
    """At the parameters found, no small change makes the pairs more probable (with the prior's ten pairs)."""
    pairs, scores = planted(0, 30.0, 0.5, n=400)
    model = fit(pairs, scores, np.full(len(scores), 16.0))

    def fits(mean: float, signal: float) -> float:
        total = 0.0
        for old, new, age in zip(pairs.old, pairs.new, pairs.ages, strict=True):
            noise = model.noise / model.signal * signal / 16
            c = np.exp(-age / model.life) * signal / (signal + noise)
            variance = signal + noise - c * np.exp(-age / model.life) * signal
            total += -0.5 * ((new - mean - c * (old - mean)) ** 2 / variance + np.log(variance))
        return total

    best = fits(model.mean, model.signal)
    assert best > fits(model.mean + 0.01, model.signal)
    assert best > fits(model.mean - 0.01, model.signal)
    assert best > fits(model.mean, model.signal * 1.3)
    assert best > fits(model.mean, model.signal / 1.3)


def test_without_pairs_there_is_a_prior() -> None:
    """Before anything was measured twice: half of the spread is signal, and it lasts for some ten rounds."""
    scores = np.array([0.1, 0.3, np.nan, -0.1])
    model = fit(Pairs(*np.zeros((5, 0))), scores, np.full(4, 8.0))
    assert model.life == PRIOR_LIFE
    assert model.n_pairs == 0
    assert model.mean == pytest.approx(0.1)
    assert model.signal + model.noise / 8 == pytest.approx(np.var([0.1, 0.3, -0.1]))
    nothing = fit(Pairs(*np.zeros((5, 0))), np.full(4, np.nan), np.zeros(4))
    assert np.isfinite([nothing.mean, nothing.signal, nothing.noise]).all()


def test_beliefs_are_the_gaussian_posterior() -> None:
    """The filter, against the joint normal of all measurements and the score now, solved at once."""
    model = Staleness(0.2, 2.0, 12.0, 25.0)
    steps, rollouts, scores = np.array([0, 10, 11, 40]), np.array([4, 16, 8, 16]), np.array([1.0, -0.5, 2.0, 0.7])
    now = 52
    beliefs = Beliefs(model, 3)
    for step, count, score in zip(steps.tolist(), rollouts, scores, strict=True):
        beliefs.measure(np.array([1]), step, np.array([score]), np.array([count]))
    mean_P, sd_P = beliefs.at(now)
    all_steps = np.append(steps, now)
    covariance = model.signal * np.exp(-np.abs(all_steps[:, None] - all_steps[None]) / model.life)
    of_scores = covariance[:-1, :-1] + np.diag(model.noise / rollouts)
    gain = np.linalg.solve(of_scores, covariance[:-1, -1])
    assert mean_P[1] == pytest.approx(model.mean + gain @ (scores - model.mean))
    assert sd_P[1] ** 2 == pytest.approx(model.signal - gain @ covariance[:-1, -1])
    assert mean_P[[0, 2]] == pytest.approx([0.2, 0.2])
    assert sd_P[[0, 2]] == pytest.approx(np.sqrt([2.0, 2.0]))


def test_a_belief_as_a_measurement_gives_the_belief_back() -> None:
    """Statistics that shrink by themselves must not shrink twice."""
    model = Staleness(0.2, 2.0, 12.0, 25.0)
    value, error = model.equivalent(np.array([0.9, 0.2]), np.array([0.8, np.sqrt(2.0)]))
    precision = 1 / model.signal + 1 / error[0] ** 2
    assert (model.mean / model.signal + value[0] / error[0] ** 2) / precision == pytest.approx(0.9)
    assert 1 / np.sqrt(precision) == pytest.approx(0.8)
    assert np.isnan(value[1])
    assert np.isnan(error[1])


def test_pairs_from_the_store(tmp_path) -> None:
    """Rows of a problem at two steps, both against the later target; without a live row before there is no pair."""
    random = np.random.default_rng(0)
    store = gradstore.create(tmp_path / "store", dim=6, fingerprint={"made": "up"}, dtype="fp32")
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in "abcd"])
    store.add_problems("bench", [{"id": "v", "prompt": "?"}])
    rows = {}
    for step, names in {0: "abc", 5: "ab", 8: "bd", 9: "ac"}.items():
        vectors = random.normal(size=(len(names), 6)).astype(np.float32)
        states = [1 if (step, name) == (5, "a") else 0 for name in names]
        with store.writer("pool", step=step) as writer:
            writer.append(list(names), vectors, state=states, n_rollouts=[step + 4] * len(names))
        rows |= {(step, name): vector for name, vector in zip(names, vectors, strict=True)}
        with store.writer("bench", step=step) as writer:
            writer.append(["v"], random.normal(size=(1, 6)).astype(np.float32))
    targets = {step: store.view("bench", step).rows(np.array([0]))[0] for step in (0, 5, 8, 9)}

    def cosine(step: int, name: str, at: int) -> float:
        row = rows[step, name]
        return float(row @ targets[at] / np.linalg.norm(row) / np.linalg.norm(targets[at]))

    pairs = measured_pairs(store, "pool", ["bench"], 8, np.array([0.0, 0.25, 0.0, 0.0]))
    expected = [(0, 5, "b"), (5, 8, "b")]
    assert pairs.ages.tolist() == [5, 3]
    assert pairs.n_old.tolist() == [4, 9]
    assert pairs.n_new.tolist() == [9, 12]
    assert pairs.old == pytest.approx([cosine(old, name, new) - 0.25 for old, new, name in expected], abs=1e-5)
    assert pairs.new == pytest.approx([cosine(new, name, new) - 0.25 for old, new, name in expected], abs=1e-5)
    assert measured_pairs(store, "pool", ["bench"], 9).ages.tolist() == [5, 3, 9]


def test_the_fit_is_that_of_every_pair_on_its_own() -> None:
    """Pairs of one age and size are summed up first; here the likelihood is taken pair by pair, on the same grid."""
    draw = np.random.default_rng(5)
    for n in (1, 4, 60):
        true = draw.normal(0.1, 0.03, n)
        pairs = Pairs(
            true + draw.normal(0, 0.02, n),
            true + draw.normal(0, 0.02, n),
            draw.integers(1, 4, n) * 10.0,
            draw.integers(0, 9, n) * 1.0,
            draw.choice([4.0, 8.0], n),
        )
        scores, rollouts = draw.normal(0.1, 0.03, 50), np.full(50, 8.0)
        found = fit(pairs, scores, rollouts)
        prior, spread = scores.mean(), scores.var()
        best = -np.inf
        for reliability in np.linspace(0.04, 0.98, 48):
            for life in np.geomspace(0.5, 5000, 47):
                ratio = (1 - reliability) / reliability * 8
                kept = np.exp(-pairs.ages / life)
                c = kept / (1 + ratio / np.maximum(pairs.n_old, 1))
                variance = 1 + ratio / np.maximum(pairs.n_new, 1) - kept * c
                rest, lever, firsts = pairs.new - c * pairs.old, 1 - c, 50 * reliability
                mean = ((lever * rest / variance).sum() + firsts * prior) / ((lever**2 / variance).sum() + firsts)
                squares = ((rest - mean * lever) ** 2 / variance).sum()
                signal = (squares + 10 * reliability * spread) / (n + 10)
                fits = -0.5 * ((n + 10) * np.log(signal) + np.log(variance).sum() - 10 * np.log(reliability))
                fits += -0.5 * (np.log(life / 50) / 1.5) ** 2 + np.log(reliability * (1 - reliability))
                if fits > best + 1e-9:
                    best, expected = fits, (mean, signal, (1 - reliability) / reliability * 8 * signal, life)
        assert (found.mean, found.signal, found.noise, found.life) == pytest.approx(expected, rel=1e-9)
