"""Selectors that go by probes, against loops over rollouts; their intervals against draws of new rollouts."""

import numpy as np
import pytest
from scipy import optimize, stats

from gradstore import State
from gradstore.engine import PRESETS, ProbeBatch, Selector, select, target
from gradstore.engine.probing.statistics import intervals, shrunk, shrunk_error
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError

OBJECTIVE = PRESETS["gradalign"]


def slow_scores(kind: str, probes: ProbeBatch, ids: list[str]) -> dict[str, float]:
    """The formulas of docs/methods.md over the problems named, a rollout at a time."""
    known: dict[str, tuple[float, float, float, float]] = {}
    for name, r_G, d_G in zip(probes.ids, probes.rewards, probes.derivatives, strict=True):
        if name not in ids or len(set(r_G)) == 1:
            continue
        n = len(r_G)
        terms = [(r - np.mean(r_G)) * d for r, d in zip(r_G, d_G, strict=True)]
        moved = [(r - np.mean(r_G)) * (d - np.mean(d_G)) for r, d in zip(r_G, d_G, strict=True)]
        r, p = stats.pearsonr(r_G, d_G, alternative="greater")
        known[name] = float(np.mean(terms)), float(np.std(moved, ddof=1) / np.sqrt(n)), float(r), float(p)
    if kind == "exact":
        return {name: dot for name, (dot, *_) in known.items()}
    if kind == "corr":
        return {name: r for name, (_, _, r, _) in known.items()}
    if kind == "snr":
        return {name: dot / error for name, (dot, error, *_) in known.items()}
    if kind == "lcb":
        return {name: dot - error for name, (dot, error, *_) in known.items()}
    if kind == "fdr":  # Benjamini and Hochberg: the largest k with p_(k) <= 0.1 k / m
        by_p = sorted(known, key=lambda name: known[name][3])
        last = max((k for k, name in enumerate(by_p, 1) if known[name][3] <= 0.1 * k / len(by_p)), default=0)
        return {name: known[name][0] for name in by_p[:last]}
    dots, errors = (np.array([known[name][i] for name in known]) for i in range(2))

    def excess(s2: float) -> float:
        weights = 1 / (s2 + errors**2)
        mean = np.sum(weights * dots) / np.sum(weights)
        return float(np.sum(weights * (dots - mean) ** 2) - (len(dots) - 1))

    s2 = optimize.brentq(excess, 0, np.var(dots) * 2, xtol=1e-14)
    mean = np.sum(dots / (s2 + errors**2)) / np.sum(1 / (s2 + errors**2))
    return {name: mean + s2 / (s2 + e**2) * (d - mean) for name, d, e in zip(known, dots, errors, strict=True)}


@pytest.fixture
def store(make_store, make_probes):
    """Probes of 45 of 60 problems, one of which has no row; five of them are new."""
    made = make_store()
    made.add_problems("pool", [{"id": f"new{i}", "prompt": "?", "source": "new"} for i in range(5)])
    probes = make_probes([f"p{i:03d}" for i in range(40)] + [f"new{i}" for i in range(5)])
    probes.save(made, "pool", step=3, target="bench")
    return made


@pytest.mark.parametrize("name", ["exact", "corr", "snr", "lcb", "shrunk", "fdr"])
def test_selector_is_its_formula(store, name: str) -> None:
    """Ranked by what was probed, not by what has a row: a problem never sketched can be chosen."""
    probes = ProbeBatch.load(store, "pool", step=3, target="bench")
    expected = slow_scores(name, probes, probes.ids)
    chosen = select(store, "pool", target(store, "bench"), 60, name, allow_fewer=True)
    assert chosen.ids == sorted(expected, key=lambda i: (-expected[i], i))
    np.testing.assert_allclose(chosen.scores, [expected[i] for i in chosen.ids], rtol=1e-5)
    assert chosen.probe_step == 3
    assert (chosen.low < chosen.scores).all()
    assert (chosen.scores < chosen.high).all()
    wider = select(store, "pool", target(store, "bench"), 60, name, allow_fewer=True, confidence=0.99)
    assert (wider.high - wider.low > chosen.high - chosen.low).all()


@pytest.mark.parametrize("name", ["shrunk", "fdr"])
def test_the_pool_is_the_candidates(store, name: str) -> None:
    """What is not to be chosen from must not decide a cut or a prior."""
    probes = ProbeBatch.load(store, "pool", step=3, target="bench")
    chunk = [i for k, i in enumerate(probes.ids) if k % 3]
    expected = slow_scores(name, probes, chunk)
    chosen = select(store, "pool", target(store, "bench"), 60, name, candidates=chunk[::-1], allow_fewer=True)
    assert chosen.ids == sorted(expected, key=lambda i: (-expected[i], i))


def test_probes_given_win_over_stored_ones(store, make_probes) -> None:
    """The round ranks by what it has just measured, with no target needed."""
    given = make_probes([f"p{i:03d}" for i in range(20)], seed=9)
    chosen = select(store, "pool", None, 5, "exact", probes=given)
    ranked = sorted((i for i in range(20) if given.states[i] is State.LIVE), key=lambda i: -given.dots[i])
    assert chosen.ids == [given.ids[i] for i in ranked[:5]]
    assert chosen.probe_step is None


def test_stored_probes_are_the_newest_of_the_view(store, make_probes) -> None:
    """A question about step 3 is not answered with what step 8 measured."""
    make_probes([f"p{i:03d}" for i in range(20)], seed=4).save(store, "pool", step=8, target="bench")
    make_probes([f"p{i:03d}" for i in range(20)], seed=5).save(store, "pool", step=9, target="other")
    for at, step in ((None, 8), (8, 8), (7, 3)):
        probes = ProbeBatch.load(store, "pool", step=step, target="bench")
        chosen = select(store, "pool", target(store, "bench"), 5, "exact", at)
        assert chosen.probe_step == step
        np.testing.assert_allclose(chosen.scores, np.sort(probes.dots[probes.live])[::-1][:5])
    with pytest.raises(RequestError, match=r"no probes along 'bench' at or before step 2: probe it first"):
        select(store, "pool", target(store, "bench"), 5, "snr", 2)
    with pytest.raises(RequestError, match="'snr' goes by probes along one benchmark, not 0"):
        select(store, "pool", None, 5, "snr")


def test_where_and_quotas_reach_problems_without_rows(store) -> None:
    """Filters on the problem's record know problems that were never sketched."""
    chosen = select(store, "pool", target(store, "bench"), 6, "exact", quotas={"new": 0.5})
    assert sum(name.startswith("new") for name in chosen.ids) == 3


def test_no_live_probe(store, make_probes) -> None:
    """Nothing to choose is said, not a division by zero."""
    dead = make_probes(["p000", "p001"])
    dead = dead.rescored([np.ones(12), np.ones(12)])
    with pytest.raises(RequestError, match=r"can choose 0 of 1 .*\(0 of 2 probes live\)"):
        select(store, "pool", None, 1, "shrunk", probes=dead)


def test_intervals_cover() -> None:
    """Over fresh rollouts of one problem, 90 % intervals hold its true dot or correlation about that often."""
    random = np.random.default_rng(0)
    n, times = 24, 3000
    held = dict.fromkeys(("dot", "corr"), 0)
    d_N = random.normal(size=400_000)
    r_N = 0.3 * d_N + random.normal(size=len(d_N))
    truth = {"dot": float(np.cov(r_N, d_N)[0, 1] * (n - 1) / n), "corr": float(np.corrcoef(r_N, d_N)[0, 1])}
    for _ in range(times):
        d_G = random.normal(size=n)
        r_G = 0.3 * d_G + random.normal(size=n)
        probe = ProbeBatch.of([Group("x", np.arange(2), [np.arange(3)] * n, r_G)], [d_G], OBJECTIVE)
        for kind in held:
            low, high = intervals(kind, probe.dots, probe.standard_errors, probe.t, np.array([n]), 0.9)
            held[kind] += bool(low[0] <= truth[kind] <= high[0])
    assert 0.85 < held["dot"] / times < 0.93
    assert 0.88 < held["corr"] / times < 0.92


def test_shrunk_intervals_cover() -> None:
    """The posterior holds 90 % of true dots when they are normal, and is narrower than the raw interval."""
    random = np.random.default_rng(1)
    true_P = random.normal(0.3, 0.5, 20_000)
    errors_P = random.uniform(0.2, 1.5, len(true_P))
    dots_P = true_P + errors_P * random.normal(size=len(true_P))
    low_P, high_P = intervals("shrunk", dots_P, errors_P, dots_P, np.full(len(true_P), 16), 0.9)
    assert np.mean((low_P <= true_P) & (true_P <= high_P)) == pytest.approx(0.9, abs=0.01)
    assert (shrunk_error(dots_P, errors_P) < errors_P).all()
    np.testing.assert_allclose((low_P + high_P) / 2, shrunk(dots_P, errors_P))


def test_probes_for_a_selector_of_ones_own(store) -> None:
    """A user's selector that says it needs probes finds them."""
    mine = Selector(
        "mine", lambda c: np.array([len(c.probes.ids) + i for i in range(len(c))]), "any", needs_probes=True
    )
    assert select(store, "pool", target(store, "bench"), 1, mine).scores[0] >= 45
