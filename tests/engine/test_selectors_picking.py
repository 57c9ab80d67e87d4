"""Mixtures, quotas and soft sampling: whatever is asked for holds in the picks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradstore.engine import SELECTORS, Diversity, Scored, Selector, select, target
from gradstore.engine.selecting.apportionment import apportion, cross
from gradstore.engine.selecting.quotas import group_sizes, parse_quotas
from gradstore.engine.selecting.sampling import softened
from gradstore.errors import RequestError


def sources_of(store, ids: list[str]) -> list[str]:
    return [record["source"] for record in store.records("pool", ids)]


# Mixtures


def test_a_mixture_is_one_part_after_the_other(make_store) -> None:
    """Each part takes its number of best among what is left, as a loop."""
    store = make_store()
    wanted = target(store, "bench")
    chosen = select(store, "pool", wanted, 10, "cosine:0.5+norm:0.3+accgreedy:0.2")
    expected, by = [], []
    for name, number in (("cosine", 5), ("norm", 3), ("accgreedy", 2)):
        every = select(store, "pool", wanted, 60, name, allow_fewer=True)
        left = [i for i in every.ids if i not in expected][:number]
        expected += left
        by += [name] * number
        scores = dict(zip(every.ids, every.scores, strict=True))
        np.testing.assert_array_equal(
            [s for i, s in zip(chosen.ids, chosen.scores, strict=True) if i in left], [scores[i] for i in left]
        )
    assert chosen.ids == expected
    assert chosen.picked_by == by
    assert chosen.selector == "cosine:0.5+norm:0.3+accgreedy:0.2"
    assert [problem["picked_by"] for problem in chosen.describe()["problems"]] == by


@pytest.mark.parametrize(("n", "numbers"), [(1, (1, 0)), (7, (5, 2)), (10, (7, 3)), (15, (11, 4)), (40, (28, 12))])
def test_the_parts_have_their_shares(make_store, n: int, numbers: tuple[int, int]) -> None:
    """The numbers add up to n, and no problem is picked twice though both parts want the same ones."""
    chosen = select(make_store(), "pool", None, n, "norm:0.7+rand:0.3", seed=3)
    assert (chosen.picked_by.count("norm"), chosen.picked_by.count("rand")) == numbers
    assert len(set(chosen.ids)) == n


def test_weights_of_a_mixture(make_store) -> None:
    """Weights are relative, one left out is 1, aliases are understood."""
    store = make_store()
    wanted = target(store, "bench")
    names = ("cosine:0.75+rand:0.25", "sim:3+random:1", " cosine:3 + rand")
    picks = [select(store, "pool", wanted, 12, name, seed=1).ids for name in names]
    assert picks[0] == picks[1] == picks[2]
    assert select(store, "pool", wanted, 12, "cosine:2").ids == select(store, "pool", wanted, 12).ids


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("cosine:0.5+", "selector '' is not one of"),
        ("cosine:0.5+nothing:1", "selector 'nothing' is not one of"),
        ("cosine:x+rand", "weight 'x', expected"),
        ("cosine:0+rand:1", "weight '0', expected"),
        ("cosine:-1+rand:1", "weight '-1', expected"),
        ("cosine:inf+rand:1", "weight 'inf', expected"),
        ("cosine:1+sim:1", "names 'cosine' twice"),
    ],
)
def test_wrong_mixtures(make_store, mixture: str, message: str) -> None:
    """Each says what was expected."""
    store = make_store()
    with pytest.raises(RequestError, match=message):
        select(store, "pool", target(store, "bench"), 5, mixture)


def test_a_part_that_is_short(make_store) -> None:
    """It is named, with how many it could give and should have."""
    store = make_store()
    n_live = int(store.view("pool").live.sum())
    with pytest.raises(RequestError, match=rf"'norm' with a share of 0.95 can choose {n_live} of 57 problems"):
        select(store, "pool", None, 60, "norm:0.95+rand:0.05")
    fewer = select(store, "pool", None, 60, "norm:0.95+rand:0.05", allow_fewer=True)
    assert (fewer.picked_by.count("norm"), fewer.picked_by.count("rand")) == (n_live, 3)


# Numbers from shares


@given(st.integers(0, 500), st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda shares: sum(shares) > 0.01))
def test_apportion(n: int, shares: list[float]) -> None:
    """Sums to n; every number is its share rounded up or down."""
    counts = apportion(n, np.array(shares))
    exact = n * np.array(shares) / sum(shares)
    assert counts.sum() == n
    assert (np.abs(counts - exact) < 1 + 1e-6).all()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_cross(rows: list[int], shares: list[float]) -> None:
    """Both the parts' and the sources' numbers hold at once, and each cell is in proportion."""
    n = sum(rows)
    columns = apportion(n, np.array(shares))
    table = cross(np.array(rows), columns)
    exact = np.outer(rows, columns) / max(n, 1)
    np.testing.assert_array_equal(table.sum(axis=1), rows)
    np.testing.assert_array_equal(table.sum(axis=0), columns)
    assert (table >= 0).all()
    assert (np.abs(table - exact) < 1 + 1e-6).all()


# Quotas


def test_quotas_hold(make_store) -> None:
    """Each source's best, in its number; the rest from the others; in the order of their scores."""
    store = make_store()
    wanted = target(store, "bench")
    every = select(store, "pool", wanted, 60, allow_fewer=True)
    of = dict(zip(every.ids, sources_of(store, every.ids), strict=True))
    for quotas, numbers in (
        ({"s1": 0.5, "s2": 0.5}, {"s0": 0, "s1": 5, "s2": 5}),
        ({"s1": 0.7}, {"s1": 7}),
        ({"s0": 0.0, "s1": 0.2}, {"s0": 0, "s1": 2, "s2": 8}),
        ({"s0": 1.0}, {"s0": 10}),
    ):
        chosen = select(store, "pool", wanted, 10, quotas=quotas)
        expected: list[str] = []
        for source, number in numbers.items():
            expected += [i for i in every.ids if of[i] == source][:number]
        expected += [i for i in every.ids if of[i] not in numbers][: 10 - len(expected)]
        assert chosen.ids == sorted(expected, key=every.ids.index)
        assert chosen.describe()["quotas"] == quotas


def test_quotas_and_parts_hold_together(make_store) -> None:
    """Neither the mixture nor the quota gives way to the other."""
    store = make_store()
    for n in (7, 12, 20):
        chosen = select(store, "pool", target(store, "bench"), n, "cosine:0.6+rand:0.4", quotas={"s0": 0.5, "s2": 0.2})
        sources = sources_of(store, chosen.ids)
        numbers = group_sizes({"s0": 0.5, "s2": 0.2}, n)
        assert sources.count("s0") == numbers["s0"]
        assert sources.count("s2") == numbers["s2"]
        assert chosen.picked_by.count("cosine") == apportion(n, np.array([0.6, 0.4]))[0]
        assert len(set(chosen.ids)) == n


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"s0": 0.9, "s1": 0.2}, "quotas sum to 1.1"),
        ({"s9": 0.5}, "quota of source 's9': the collection has 's0', 's1', 's2'"),
        ({"s0": -0.1}, "quota of source 's0' is -0.1"),
        ({}, "no quota given"),
        ({"s0": 1.0}, r"can choose \d+ of 30 problems asked from source 's0' of 'pool' .* change the quotas"),
        ({"s1": 0.1, "s2": 0.1}, r"can choose \d+ of 24 problems asked from sources without a quota of 'pool'"),
    ],
)
def test_impossible_quotas(make_store, quotas: dict[str, float], message: str) -> None:
    """Shares that cannot hold are an error, also when fewer are allowed: fewer would be other shares."""
    store = make_store()
    chunk = [f"p{i:03d}" for i in range(40) if i % 3 or i < 9]
    for allow_fewer in (False, True):
        with pytest.raises(RequestError, match=message):
            select(store, "pool", target(store, "bench"), 30, quotas=quotas, allow_fewer=allow_fewer, candidates=chunk)


def test_quotas_as_text() -> None:
    """As the command line gives them."""
    assert parse_quotas(["gsm8k=0.5", "a=b=0.25"]) == {"gsm8k": 0.5, "a=b": 0.25}
    for term in ("gsm8k", "=0.5", "gsm8k=half", "gsm8k=1.5"):
        with pytest.raises(RequestError, match="expected SOURCE=SHARE"):
            parse_quotas([term])
    with pytest.raises(RequestError, match="has one already"):
        parse_quotas(["a=0.5", "a=0.1"])


# Soft sampling


def test_temperature_zero_is_the_ranking(make_store) -> None:
    """None, 0 and nearly 0 are the best n; at 0 ties go by id, above it they are drawn."""
    store = make_store()
    wanted = target(store, "bench")
    best = select(store, "pool", wanted, 12).ids
    for temperature in (0.0, 1e-12, 1e-3):
        assert select(store, "pool", wanted, 12, temperature=temperature, seed=5).ids == best
    tied = [select(store, "pool", None, 3, "accgreedy", temperature=t, seed=5) for t in (None, 0.0, 1e-12)]
    assert tied[0].ids == tied[1].ids
    assert tied[0].scores.tolist() == tied[2].scores.tolist()


def test_temperature_large_is_nearly_uniform(make_store) -> None:
    """Every live problem is picked alike: chi-square over 600 draws of 8."""
    store = make_store()
    view, wanted = store.view("pool"), target(store, "bench")
    counts = dict.fromkeys(view.ids[view.live], 0)
    for seed in range(600):
        for problem_id in select(store, "pool", wanted, 8, temperature=1e6, seed=seed).ids:
            counts[problem_id] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_temperature_is_a_softmax_without_replacement() -> None:
    """The first pick has the chances of a softmax of the standardised scores, the second those of what is left."""
    scores = np.array([0.3, -0.2, np.nan, 0.9, 0.1])
    ranked = np.flatnonzero(~np.isnan(scores))
    chance = np.exp(scores[ranked] / scores[ranked].std() / 0.7)
    chance /= chance.sum()
    pairs: dict[tuple[int, int], int] = {}
    for seed in range(20_000):
        keys = softened(scores, 0.7, np.random.default_rng(seed))
        assert np.isnan(keys[2])
        first, second = (int(i) for i in np.argsort(-np.nan_to_num(keys, nan=-np.inf))[:2])
        pairs[first, second] = pairs.get((first, second), 0) + 1
    observed, expected = [], []
    for a, i in enumerate(ranked):
        for b, j in enumerate(ranked):
            if a != b:
                observed.append(pairs.get((int(i), int(j)), 0))
                expected.append(20_000 * chance[a] * chance[b] / (1 - chance[a]))
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_temperature_does_not_see_the_scale(make_store) -> None:
    """A longer target draws the same picks; the scores shown are the scores, not the keys they were drawn by."""
    store = make_store()
    wanted = target(store, "bench")
    first = select(store, "pool", wanted, 9, "dot", temperature=0.5, seed=2)
    wanted.vector[:] *= 64
    again = select(store, "pool", wanted, 9, "dot", temperature=0.5, seed=2)
    assert first.ids == again.ids
    np.testing.assert_allclose(first.scores * 64, again.scores, rtol=1e-5)
    assert first.describe()["temperature"] == 0.5


@pytest.mark.parametrize("temperature", [-1.0, np.nan, np.inf])
def test_wrong_temperature(make_store, temperature: float) -> None:
    """It says what was expected."""
    with pytest.raises(RequestError, match="temperature is"):
        select(make_store(), "pool", None, 5, "norm", temperature=temperature)


# Whatever the selector


def every_name() -> list[str]:
    return [*sorted(SELECTORS), "cosine:0.6+rand:0.4", "fdr+thompson:0.5+norm"]


@pytest.mark.parametrize("name", every_name())
@pytest.mark.parametrize("how", ["plainly", "softly", "by quota"])
def test_the_same_again(make_store, make_probes, name: str, how: str) -> None:
    """Picks follow from the arguments alone: not from the order of the candidates, nor from an earlier call."""
    store, probes = make_store(), make_probes([f"p{i:03d}" for i in range(60)])
    wanted, ids = target(store, "bench"), [f"p{i:03d}" for i in range(4, 60)]
    options = {"plainly": {}, "softly": {"temperature": 1.0}, "by quota": {"quotas": {"s0": 0.5}}}[how]

    def picks(candidates: list[str], seed: int = 3) -> list[str]:
        chosen = select(store, "pool", wanted, 4, name, candidates=candidates, seed=seed, probes=probes, **options)
        assert len(set(chosen.ids)) == 4
        assert chosen.selector.startswith(name.split("+")[0])
        return chosen.ids

    assert picks(ids) == picks(ids[::-1]) == picks(ids)
    if name in ("rand", "dynamic", "acc", "thompson") or how == "softly":
        assert len({tuple(picks(ids, seed)) for seed in range(6)}) > 1


def test_ties_by_id(make_store) -> None:
    """Equal scores fall to the smaller id, whatever order problems were added in."""
    store = make_store()
    store.add_problems("pool", [{"id": "a-new-one", "prompt": "?"}])
    with store.writer("pool", step=0) as writer:
        writer.append(["a-new-one"], np.ones((1, store.dim)))
    same = Selector("same", lambda c: np.ones(len(c)), "1")
    view = store.view("pool")
    assert select(store, "pool", None, 5, same).ids == sorted(view.ids[view.live])[:5]


def test_diversity_within_parts_and_quotas(make_store) -> None:
    """Spreading out changes which are picked, not how many of what."""
    store = make_store()
    chosen = select(
        store, "pool", target(store, "bench"), 12, "cosine:0.5+norm:0.5", quotas={"s1": 0.5}, diversity=Diversity("mmr")
    )
    assert chosen.picked_by.count("norm") == 6
    assert sources_of(store, chosen.ids).count("s1") == 6
    assert len(set(chosen.ids)) == 12


def test_what_a_selector_knows_is_handed_on(make_store) -> None:
    """Intervals, weights and rollouts stay with their problems; what is not said has its default."""
    store = make_store()

    def score(candidates) -> Scored:
        number = np.array([int(i[1:]) for i in candidates.ids], float)
        return Scored(number, low=number - 1, weights=1 / (1 + number), rollouts=number.astype(int) % 5)

    chosen = select(store, "pool", None, 7, Selector("mine", score, "number in the id"))
    number = np.array([int(i[1:]) for i in chosen.ids])
    np.testing.assert_array_equal(chosen.low, number - 1)
    assert np.isnan(chosen.high).all()
    np.testing.assert_allclose(chosen.weights, 1 / (1 + number))
    np.testing.assert_allclose(chosen.relative_weights, chosen.weights * len(chosen) / chosen.weights.sum())
    same = replace(chosen, weights=np.full(len(chosen), 0.1))
    assert (same.relative_weights == 1).all(), "exactly: a trainer then leaves everything as it is"
    with pytest.raises(RequestError, match="the weight 0"):
        _ = replace(chosen, weights=np.zeros(len(chosen))).relative_weights
    np.testing.assert_array_equal(chosen.rollouts, number % 5)
    first = chosen.describe()["problems"][0]
    assert (first["low"], first["high"]) == (number[0] - 1, None)
    plain = select(store, "pool", None, 7, "norm")
    assert np.isnan(plain.low).all()
    assert (plain.weights == 1).all()
    assert (plain.rollouts == 0).all()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c: np.ones(3), r"scores of shape \(3,\) for"),
        (lambda c: Scored(np.ones(len(c)), low=np.ones(2)), r"low of shape \(2,\) for"),
        (lambda c: Scored(np.ones(len(c)), weights=-np.ones(len(c))), "weights must be finite"),
        (lambda c: Scored(np.ones(len(c)), rollouts=-np.ones(len(c))), "nor rollouts negative"),
        (lambda c: np.full(len(c), np.inf), "can choose 0 of 5"),
    ],
)
def test_wrong_answers_of_ones_own_selector(make_store, answer, message: str) -> None:
    """The selector is named, and what it returned."""
    with pytest.raises(RequestError, match=rf"'mine'.*{message}"):
        select(make_store(), "pool", None, 5, Selector("mine", answer, "?"))


@pytest.mark.parametrize(
    ("options", "message"), [({"seed": -1}, "seed is -1"), ({"confidence": 1.0}, "confidence is 1.0")]
)
def test_wrong_settings(make_store, options: dict, message: str) -> None:
    """Each says what was expected."""
    with pytest.raises(RequestError, match=message):
        select(make_store(), "pool", None, 5, "norm", **options)
