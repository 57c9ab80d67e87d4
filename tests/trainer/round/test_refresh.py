"""The budgeted refresh: what it may spend, what it leaves out, and that it finds more than chance does."""

from collections import Counter

import numpy as np
import pytest
from scipy import integrate, stats

import gradstore
from gradstore.engine.forecasting.forecast import source_offsets
from gradstore.engine.forecasting.measured_rates import MeasuredRates
from gradstore.engine.forecasting.refresh_choice import Outlook, choose, cut, pass_rate_prior, straddling, worth
from gradstore.engine.selecting.history import History
from gradstore.trainer.round import planning
from gradstore.trainer.round.settings import RoundSettings


def settings(**changes) -> RoundSettings:
    usual = {
        "selected": 12,
        "train_batch": 6,
        "steps": 4,
        "rounds": 6,
        "rollouts": 8,
        "target_rollouts": 8,
        "window": 64,
        "fit_problems": 1,
    }
    return RoundSettings(**{**usual, **changes})


def outlook(mean, sd=None, signal=None, measured=None) -> Outlook:
    n = len(mean)
    sd = np.ones(n) if sd is None else np.asarray(sd, float)
    measured = np.ones(n, bool) if measured is None else np.asarray(measured)
    signal = np.ones(n) if signal is None else np.asarray(signal, float)
    return Outlook(np.asarray(mean, float), sd, np.full(n, 0.5), signal, measured, measured)


def test_worth_is_the_expected_gain() -> None:
    """Against the integral it stands for: what choosing after one more measurement adds to choosing now."""
    for mean, sd, noise, line in [(0.3, 1.0, 0.5, 0.0), (-2.0, 0.7, 0.1, 0.0), (1.0, 0.2, 2.0, 1.1)]:
        move = sd**2 / np.sqrt(sd**2 + noise**2)
        after, _ = integrate.quad(
            lambda x, m=mean, s=move, c=line: max(x, c) * stats.norm.pdf(x, m, s), mean - 9 * move, mean + 9 * move
        )
        found = worth(np.array([mean]), np.array([sd]), np.array([noise]), line)[0]
        assert found == pytest.approx(after - max(mean, line), abs=1e-7)


def test_choice_by_worth() -> None:
    """Near the cut and uncertain first; what is surely in or out, last; what has no signal, never."""
    random = np.random.default_rng(0)
    mean, sd = [9.0, 1.1, 0.9, 0.5, -9.0, 1.0], [0.5, 0.5, 0.5, 0.5, 0.5, 0.01]
    seen = outlook(mean, sd)
    assert set(choose(seen, 2, 3, 0.0, 0.9, random).tolist()) == {1, 2, 3}
    assert len(choose(seen, 2, 100, 0.0, 0.9, random)) == 6
    old = outlook(mean, [0.5, 0.5, 0.5, 3.0, 0.5, 0.01])
    assert choose(old, 2, 1, 0.0, 0.9, random).tolist() == [3]
    silent = outlook(mean, sd, signal=[1, 0.05, 1, 1, 1, 1])
    assert set(choose(silent, 2, 6, 0.0, 0.9, random).tolist()) == {0, 2, 3, 4, 5}
    unknown = outlook(mean, sd, measured=[True, True, True, True, False, True])
    assert 4 in choose(unknown, 2, 2, 0.5, 0.9, random).tolist()
    assert 4 not in choose(unknown, 2, 2, 0.0, 0.9, random).tolist()


def test_the_choice_is_the_slow_sort() -> None:
    """Ties, unknown worths and problems left out: a sort of all candidates, one after the other."""
    random = np.random.default_rng(5)
    for _ in range(40):
        n = int(random.integers(1, 40))
        mean, sd = random.integers(-2, 3, n).astype(float), random.integers(0, 3, n).astype(float)
        seen = outlook(mean, sd, random.integers(0, 3, n) / 2, random.integers(0, 2, n) > 0)
        budget, explore, wanted = int(random.integers(0, n + 3)), random.choice([0.0, 0.4]), int(random.integers(1, 9))
        found = choose(seen, wanted, budget, explore, 0.6, np.random.default_rng(7))
        order = np.random.default_rng(7).permutation(n).tolist()
        allowed = [place for place in order if 1 - seen.signal[place] <= 0.6]
        explored = [place for place in allowed if not seen.measured[place]][: round(explore * budget)]
        line = cut(np.where(seen.pickable, mean, np.nan), wanted)
        line = line if np.isfinite(line) else cut(mean, wanted)
        line = line if np.isfinite(line) else float(np.median(mean))
        value = seen.signal * worth(mean, sd, seen.noise, line)
        best = sorted((place for place in allowed if place not in explored), key=lambda place: -value[place])
        assert found.tolist() == [*best[: budget - len(explored)], *explored]


def test_the_cut_and_who_straddles_it() -> None:
    """A top n is settled when no interval holds the cut."""
    assert cut(np.array([3.0, 1.0, np.nan, 2.0]), 2) == 1.5
    assert cut(np.array([3.0, np.nan]), 1) == -np.inf
    mean, noise = np.array([3.0, 2.0, 1.0, 0.0, np.nan]), np.full(5, 0.1)
    assert straddling(mean, np.array([9.0, 0.1, 0.2, 0.2, 9.0]), noise, 2, 0.9).tolist() == [0]
    assert straddling(mean, np.full(5, 0.1), noise, 2, 0.9).tolist() == []
    assert straddling(mean, np.full(5, 0.4), noise, 2, 0.9).tolist() == [1, 2]
    assert straddling(mean[:2], np.ones(2), noise[:2], 2, 0.9).tolist() == []


def test_the_prior_of_pass_rates_is_fitted(tmp_path) -> None:
    """In a pool of problems that are always or never solved one silent group says much; under a flat prior, little."""
    random = np.random.default_rng(0)
    for concentration in (0.1, 1.0):
        store = gradstore.create(tmp_path / f"store-{concentration}", dim=2, fingerprint={})
        ids = [f"p{i}" for i in range(400)]
        store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
        rates = random.binomial(16, random.beta(concentration, concentration, 400)) / 16
        with store.writer("pool", step=0) as writer:
            writer.append(ids, random.normal(size=(400, 2)), pass_rate=rates, n_rollouts=[16] * 400)
        measured = MeasuredRates.of(store.view("pool"), 0, 1.0)
        prior = pass_rate_prior(measured.right, measured.wrong)
        assert concentration / 1.6 < prior < concentration * 1.6
        silent = np.flatnonzero((rates == 0) | (rates == 1))
        chance = History.of(store.history("pool"), ids, prior=prior).signal_probability(16)[silent].mean()
        assert (chance < 0.2) == (concentration == 0.1)
    assert pass_rate_prior(np.zeros(3), np.zeros(3)) == 1.0


def test_a_source_has_a_say_as_far_as_sources_differ() -> None:
    """A family that aligns is expected to align where it was not measured; chance differences are not believed."""
    random = np.random.default_rng(0)
    sources = np.array(["a", "b", "c", "d"])[random.integers(0, 4, 800)]
    truth = {"a": 0.05, "b": -0.02, "c": 0.0, "d": -0.03}
    scores = np.array([truth[name] for name in sources]) + random.normal(0, 0.03, 800)
    scores[::2] = np.nan
    found = source_offsets(scores, sources)
    for name, value in truth.items():
        assert found[sources == name] == pytest.approx(value, abs=0.012)
    alike = source_offsets(random.normal(0, 0.03, 800), sources)
    assert np.abs(alike).max() < 0.006
    assert not source_offsets(np.full(4, np.nan), np.array(["a", "a", "b", "b"])).any()


@pytest.mark.parametrize(
    ("selector", "budget"),
    [("cosine", 0), ("cosine", 1), ("cosine", 25), ("dot", 7), ("shrunk", 1), ("shrunk", 25), ("learnalign", 7)],
)
def test_the_budget_is_never_exceeded(world, training, fast_path, selector: str, budget: int) -> None:
    """A round that rolls out more than it was given is not what the user pays for."""
    made = settings(refresh=budget, boundary=0.3, selector=selector, rounds=4)
    run = training(fast_path / "store", world(60), made, observe=True)
    run.run()
    spent = Counter(step for step, name, n in run.policy.rolled if name.startswith("p"))
    assert all(count <= budget for count in spent.values())
    rounds = gradstore.open(fast_path / "store").rounds("pool")
    for found in rounds:
        assert found.about["rollouts"] == 8 * spent[found.about["step"]]
        assert found.about["n_rolled_out"] == sum(found.table["rolled_out"].to_pylist()) <= budget
        assert len(found.picks) == 12
    if budget == 25:
        assert spent[0] == 25


def test_a_first_round_of_its_own(world, training, fast_path) -> None:
    """A start that is not blind, and the budget after it."""
    run = training(fast_path / "store", world(60), settings(refresh=7, refresh_first="all", rounds=3))
    run.run()
    rounds = gradstore.open(fast_path / "store").rounds("pool")
    assert rounds[0].about["n_rolled_out"] == 60
    assert 0 < rounds[1].about["n_rolled_out"] <= 7
    assert rounds[2].about["counts"]["unmeasured"] == 0


def test_a_look_before_the_first_plan(world, training, fast_path) -> None:
    """A few rollouts of every problem without a row, once; the budget is counted beside them, and they are not lost."""
    made = settings(refresh=7, first_look=3, rounds=3, selector="shrunk")
    run = training(fast_path / "store", world(60), made)
    run.run()
    spent = Counter((step, n) for step, name, n in run.policy.rolled if name.startswith("p"))
    assert spent[0, 3] == 60
    assert spent[0, 8] == 7
    assert {n for step, n in spent if step > 0} == {8}
    store = gradstore.open(fast_path / "store")
    rounds = store.rounds("pool")
    assert rounds[0].about["rollouts"] == 60 * 3 + 7 * 8
    assert rounds[0].about["counts"]["unmeasured"] == 0
    assert rounds[1].about["rollouts"] == 8 * spent[4, 8] <= 8 * 7
    counts = Counter(store.view("pool", 0).n_rollouts.tolist())
    again = Counter(name for step, name, n in run.policy.rolled if (step, n, name[0]) == (0, 8, "p"))
    assert counts == Counter(3 + 8 * times for times in again.values()) + Counter({3: 60 - len(again)})
    assert len(store.probes("pool").table(step=0)) == 7


def test_problems_without_signal_are_left_alone(world, training, fast_path) -> None:
    """A solved problem tells nothing: after a few silent groups it is not rolled out until the policy has moved on."""
    made = world(40)
    made.rate_of |= {f"p{i:03d}": float(i % 2) for i in range(20)}
    silent = {}
    for forgetting in (1.0, 0.8):
        usual = settings(refresh=20, rounds=12, forgetting=forgetting, max_no_signal=0.7, boundary=0)
        run = training(fast_path / f"store-{forgetting}", made, usual)
        run.run()
        late = Counter(name for step, name, _ in run.policy.rolled if name.startswith("p") and step >= 32)
        silent[forgetting] = sum(late[f"p{i:03d}"] for i in range(20))
        assert sum(late[f"p{i:03d}"] for i in range(20, 40)) >= 70 - silent[forgetting]
    assert silent[1.0] == 0
    assert silent[0.8] > 0


def test_extra_rollouts_join_those_before(world, training, fast_path) -> None:
    """More rollouts of a problem at the cut make one better row, not a second opinion that hides the first."""
    made = settings(refresh=24, boundary=0.5, rounds=3)
    run = training(fast_path / "store", world(40, noise=3.0), made)
    run.run()
    store = gradstore.open(fast_path / "store")
    for found in store.rounds("pool")[1:]:
        step = found.about["step"]
        measured = Counter(name for at, name, _ in run.policy.rolled if at == step and name.startswith("p"))
        view = store.view("pool", step)
        counts = dict(zip(view.ids.tolist(), view.n_rollouts.tolist(), strict=True))
        assert max(measured.values()) > 1
        for name, times in measured.items():
            assert counts[name] == 8 * times


def _quality(training, made, path, run_settings: RoundSettings) -> float:
    """Mean true alignment of the picks, as a share of the best possible, over the rounds after the first two."""
    run = training(path, made, run_settings, observe=True)
    shares = []
    for number, picks in enumerate(run.run()):
        truth = made.alignment(4 * number)
        best = sorted(truth.values(), reverse=True)[: len(picks)]
        shares.append(np.mean([truth[name] for name in picks]) / np.mean(best))
    return float(np.mean(shares[2:]))


def test_a_budget_well_spent_beats_chance(world, training, fast_path, monkeypatch) -> None:
    """The same number of rollouts a round, the same aged scores, the same free rows; only the choice differs."""
    spent_well, at_random, everything = [], [], []
    for seed in range(2):
        usual = {"selected": 20, "train_batch": 10, "rounds": 8, "seed": seed}
        made = world(200, seed=seed, life=60.0, noise=1.0)
        everything.append(_quality(training, made, fast_path / f"all-{seed}", settings(**usual)))
        usual["refresh"] = 40
        spent_well.append(_quality(training, made, fast_path / f"well-{seed}", settings(**usual)))
        with monkeypatch.context() as patch:
            patch.setattr(planning, "choose", lambda seen, n, budget, *_: _drawn(_[-1], len(seen.mean), budget))
            random = settings(**usual, boundary=0.0)
            at_random.append(_quality(training, made, fast_path / f"random-{seed}", random))
    assert np.mean(spent_well) > np.mean(at_random) + 0.05
    assert all(well > chance for well, chance in zip(spent_well, at_random, strict=True))
    assert np.mean(everything) > np.mean(spent_well)


def _drawn(random: np.random.Generator, n: int, budget: int) -> np.ndarray:
    return random.permutation(n)[:budget]
