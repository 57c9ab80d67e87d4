"""Every selector against its formula written as a loop."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gradstore import State
from gradstore.engine import SELECTORS, Selector, Target, Where, select, target
from gradstore.errors import RequestError


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def slow_scores(store, name: str) -> dict[str, float]:
    """The formula of docs/methods.md for each problem, on raw gradients in float64."""
    view = store.view("pool")
    query = target(store, "bench").vector.astype(np.float64)
    gradients = {i: view.take([i])[0].astype(np.float64) * float(n) for i, n in zip(view.ids, view.norms, strict=True)}
    rates = dict(zip(view.ids, view.pass_rates.astype(np.float64), strict=True))
    states = dict(zip(view.ids, view.states, strict=True))
    live = [i for i in view.ids if states[i] == State.LIVE]
    measured = [i for i in view.ids if states[i] != State.FAILED]
    if name == "cosine":
        return {i: cosine(gradients[i], query) for i in live}
    if name == "dot":
        return {i: float(gradients[i] @ query) for i in live}
    if name == "fisher":
        moment = sum(np.outer(gradients[i], gradients[i]) for i in live) / len(live)
        ridge = 0.1 * np.trace(moment) / len(query) * np.eye(len(query))
        return {i: float(gradients[i] @ np.linalg.inv(moment + ridge) @ query) for i in live}
    if name == "norm":
        return {i: float(np.linalg.norm(gradients[i])) for i in live}
    if name == "negsim":
        return {i: -cosine(gradients[i], query) for i in live}
    if name == "simacc":
        return {i: cosine(gradients[i], query) * 4 * rates[i] * (1 - rates[i]) for i in live}
    if name == "accgreedy":
        return {i: -abs(rates[i] - 0.5) for i in measured}
    if name == "chunk_mean":
        total = sum(gradients[i] for i in live)
        return {i: cosine(gradients[i], total) for i in live}
    if name == "learnalign":  # the paper's double loop
        value = {i: rates[i] * (1 - rates[i]) for i in live}
        return {
            i: sum(value[i] * value[j] * cosine(gradients[i], gradients[j]) for j in live) / len(live) for i in live
        }
    if name == "less":  # of one step
        rows = store.view("bench").take([f"v{i}" for i in range(8)])
        return {i: float(np.mean([cosine(gradients[i], row) for row in rows])) for i in live}
    if name == "cropi":  # of one benchmark
        ranked = sorted(live, key=lambda i: -cosine(gradients[i], query))
        return {i: 1 / (ranked.index(i) + 1) for i in live}
    raise AssertionError(name)


DRAWN = {"rand", "acc", "dynamic", "thompson"}
"""Have tests of their own, like the selectors that go by probes (test_selectors_probe.py)."""


@pytest.mark.parametrize("name", sorted(n for n in SELECTORS if n not in DRAWN and not SELECTORS[n].needs_probes))
def test_selector_is_its_formula(make_store, name: str) -> None:
    """A selector that is not what its name says makes every comparison with the papers void."""
    store = make_store()
    expected = slow_scores(store, name)
    ranked = sorted(expected, key=lambda i: (-round(expected[i], 9), i))[:12]
    wanted = target(store, "bench") if SELECTORS[name].needs_target else None
    selection = select(store, "pool", wanted, 12, name)
    assert selection.ids == ranked
    np.testing.assert_allclose(selection.scores, [expected[i] for i in ranked], rtol=1e-5, atol=1e-6)


def test_acc_draws_from_the_middle(make_store) -> None:
    """`acc` is a uniform draw among pass rates in [0.2, 0.8], other ones with another seed."""
    store = make_store()
    view = store.view("pool")
    rates = dict(zip(view.ids, view.pass_rates, strict=True))
    middle = {i for i, s in zip(view.ids, view.states, strict=True) if 0.2 <= rates[i] <= 0.8 and s != State.FAILED}
    drawn = [select(store, "pool", None, 5, "acc", seed=seed).ids for seed in range(200)]
    assert {i for ids in drawn for i in ids} == middle
    assert drawn[0] == select(store, "pool", None, 5, "acc", seed=0).ids != drawn[1]


def test_acc_has_a_window_of_ones_own(make_store) -> None:
    """GradAlign's acc_low and acc_high, in the name: so records and mixtures say it without another setting."""
    store = make_store()
    view = store.view("pool")
    rates = dict(zip(view.ids, view.pass_rates, strict=True))
    within = {i for i, s in zip(view.ids, view.states, strict=True) if 0.4 <= rates[i] <= 0.6 and s != State.FAILED}
    drawn = [select(store, "pool", None, 2, "acc(0.4..0.6)", seed=seed) for seed in range(100)]
    assert {i for one in drawn for i in one.ids} == within
    assert drawn[0].selector == "acc(0.4..0.6)"
    assert select(store, "pool", None, 2, "acc(.4 .. .60)").selector == "acc(0.4..0.6)"
    assert len(select(store, "pool", None, 4, "acc(0.4..0.6):0.5+rand:0.5").ids) == 4
    for name, message in {
        "acc(0.6..0.4)": "0 <= LOW <= HIGH",
        "acc(0..2)": "0 <= LOW",
        "acc(a..b)": "not one of",
    }.items():
        with pytest.raises(RequestError, match=message):
            select(store, "pool", None, 2, name)


def test_rand_draws_from_the_whole_pool(make_store) -> None:
    """Random is the yardstick: problems without signal and problems never measured are in it, evenly."""
    store = make_store()
    store.add_problems("pool", [{"id": f"new{i}", "prompt": "?"} for i in range(20)])
    counts: dict[str, int] = {}
    for seed in range(400):
        for problem_id in select(store, "pool", None, 20, "rand", seed=seed).ids:
            counts[problem_id] = counts.get(problem_id, 0) + 1
    assert len(counts) == 80
    assert min(counts.values()) > 60
    assert max(counts.values()) < 145


def test_dynamic_draws_evenly_from_problems_with_signal(make_store) -> None:
    """DAPO's filter drops what has no gradient and prefers nothing among the rest."""
    store = make_store()
    view = store.view("pool")
    counts = dict.fromkeys(view.ids[view.live], 0)
    for seed in range(400):
        for problem_id in select(store, "pool", None, 20, "dynamic", seed=seed).ids:
            counts[problem_id] += 1
    mean = 400 * 20 / len(counts)
    assert min(counts.values()) > 0.75 * mean
    assert max(counts.values()) < 1.25 * mean


def test_thompson_draws_from_the_posterior(make_store) -> None:
    """The score is -|q - 1/2|, q from Beta(1 + right, 1 + wrong) over every row ever, also for what has none."""
    store = make_store()
    store.add_problems("pool", [{"id": "never", "prompt": "?"}])
    with store.writer("pool", step=5) as writer:
        writer.append(["p000", "p001"], np.ones((2, store.dim)), pass_rate=[0.25, 0.5], n_rollouts=[4, 40])
    names = ["p000", "p001", "p007", "never"]
    drawn: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(400):
        chosen = select(store, "pool", None, 4, "thompson", seed=seed, candidates=names)
        for name, score in zip(chosen.ids, chosen.scores, strict=True):
            drawn[name].append(score)
    for name in names:
        a = b = 1.0
        for row in store.history("pool").to_pylist():
            if row["id"] == name:
                a += row["pass_rate"] * row["n_rollouts"]
                b += (1 - row["pass_rate"]) * row["n_rollouts"]
        posterior = stats.beta(a, b)
        distance = stats.kstest(-np.array(drawn[name]), lambda x, q=posterior: q.cdf(0.5 + x) - q.cdf(0.5 - x))
        assert distance.pvalue > 1e-3, (name, a, b)


def test_history_ends_at_the_view(make_store) -> None:
    """Asked about step 0, a selector must not know what step 5 measured; what is old can be made to count less."""
    store = make_store()
    with store.writer("pool", step=5) as writer:
        writer.append(["p000"], np.ones((1, store.dim)), pass_rate=[1.0], n_rollouts=[100])
    seen = {}

    def score(candidates) -> np.ndarray:
        place = list(candidates.ids).index("p000")
        seen["a"], seen["b"], seen["last"] = (
            float(column[place])
            for column in (candidates.history.a, candidates.history.b, candidates.history.last_step)
        )
        return np.ones(len(candidates))

    mine = Selector("mine", score, "1")
    right = float(store.view("pool", 0).pass_rates[0] * 8)
    select(store, "pool", None, 1, mine)
    assert seen == {"a": 101 + right, "b": 9 - right, "last": 5}
    select(store, "pool", None, 1, mine, at=0)
    assert seen == {"a": 1 + right, "b": 9 - right, "last": 0}
    select(store, "pool", None, 1, mine, at=7, forgetting=0.5)
    assert seen == pytest.approx({"a": 1 + 100 * 0.5**2 + right * 0.5**7, "b": 1 + (8 - right) * 0.5**7, "last": 5})


def test_less_over_steps_and_benchmarks(make_store) -> None:
    """The sum over steps weighted by learning rates, the largest over benchmarks, as a loop over rows."""
    store, random = make_store(), np.random.default_rng(5)
    ids = [f"p{i:03d}" for i in range(60)]
    store.add_problems("other", [{"id": f"o{i}", "prompt": "?"} for i in range(5)])
    for step in (10, 20):
        for name, members in (("pool", ids[step : step + 25]), ("bench", ["v0", "v3"]), ("other", ["o1", "o2", "o4"])):
            with store.writer(name, step=step) as writer:
                states = [State.NO_SIGNAL if name == "pool" and i % 9 == 4 else State.LIVE for i in range(len(members))]
                rows = random.normal(size=(len(members), store.dim))
                writer.append(members, rows, state=states)

    def slow(rates: dict[str, dict[int, float]]) -> dict[str, float]:
        scores = {}
        for problem_id in ids:
            best = -np.inf
            for benchmark, of_step in rates.items():
                total = weight = 0.0
                for step, rate in of_step.items():
                    past, goal = store.view("pool", step), store.view(benchmark, step)
                    state = past.states[past.positions([problem_id])[0]]
                    if state == State.FAILED:
                        continue
                    weight += rate
                    if state == State.LIVE:
                        mine = past.take([problem_id])[0].astype(np.float64)
                        total += rate * np.mean([cosine(mine, row) for row in goal.take(goal.ids[goal.live])])
                if weight:
                    best = max(best, total / weight)
            scores[problem_id] = best
        live = store.view("pool")
        return {i: scores[i] for i in live.ids[live.live]}

    def check(targets: list[Target], rates: dict[str, dict[int, float]]) -> None:
        expected = slow(rates)
        chosen = select(store, "pool", targets, 12, "less")
        assert chosen.ids == sorted(expected, key=lambda i: (-round(expected[i], 9), i))[:12]
        np.testing.assert_allclose(chosen.scores, [expected[i] for i in chosen.ids], rtol=1e-5, atol=1e-6)

    goals = [target(store, "bench"), target(store, "other")]
    alike = {0: 1.0, 10: 1.0, 20: 1.0}
    check(goals[:1], {"bench": alike})
    check(goals, {"bench": alike, "other": {10: 1.0, 20: 1.0}})
    rated = [replace(target(store, "bench", step), learning_rate=rate) for step, rate in ((0, 3e-6), (20, 1e-6))]
    check([*rated, goals[1]], {"bench": {0: 3e-6, 20: 1e-6}, "other": {10: 1.0, 20: 1.0}})
    with pytest.raises(RequestError, match="some targets of 'bench' have a learning rate and some have none"):
        select(store, "pool", [*rated, target(store, "bench", 10)], 12, "less")


def test_cropi_fuses_ranks(make_store) -> None:
    """The mean of 1/rank over benchmarks, as a loop."""
    store, random = make_store(), np.random.default_rng(5)
    for name in ("two", "three"):
        store.add_problems(name, [{"id": f"{name}{i}", "prompt": "?"} for i in range(3)])
        with store.writer(name, step=0) as writer:
            writer.append([f"{name}{i}" for i in range(3)], random.normal(size=(3, store.dim)))
    goals = [target(store, name) for name in ("bench", "two", "three")]
    view = store.view("pool")
    live = view.ids[view.live]
    fused = dict.fromkeys(live, 0.0)
    for goal in goals:
        cosines = {i: cosine(view.take([i])[0].astype(np.float64), goal.vector.astype(np.float64)) for i in live}
        for i in live:
            fused[i] += 1 / 3 / (1 + sum(cosines[j] > cosines[i] for j in live))
    chosen = select(store, "pool", goals, 10, "cropi")
    assert chosen.ids == sorted(live, key=lambda i: (-round(fused[i], 12), i))[:10]
    np.testing.assert_allclose(chosen.scores, [fused[i] for i in chosen.ids])
    assert [goal["benchmark"] for goal in chosen.targets] == ["bench", "two", "three"]


def test_several_targets_count_alike(make_store) -> None:
    """With cosine, the mean of the cosines, however long the targets are."""
    store = make_store()
    goals = [target(store, "bench"), replace(target(store, "bench"), vector=np.eye(store.dim, dtype=np.float32)[3] * 9)]
    view = store.view("pool")
    mean = {i: np.mean([cosine(view.take([i])[0], goal.vector) for goal in goals]) for i in view.ids[view.live]}
    assert select(store, "pool", goals, 10).ids == sorted(mean, key=lambda i: -mean[i])[:10]


def test_learnalign_leaves_out_unknown_pass_rates(make_store) -> None:
    """One problem without a pass rate must not turn every score to nan."""
    store = make_store()
    with store.writer("pool", step=1) as writer:
        writer.append(["p000"], np.ones((1, store.dim)))
    n_known = int((store.view("pool").live & ~np.isnan(store.view("pool").pass_rates)).sum())
    chosen = select(store, "pool", None, 60, "learnalign", allow_fewer=True)
    assert chosen.n_candidates == len(chosen) == n_known
    assert "p000" not in chosen.ids


@pytest.mark.parametrize(
    ("alias", "name"), [("sim", "cosine"), ("align", "chunk_mean"), ("random", "rand"), ("accgreedy", "accgreedy")]
)
def test_gradalign_names(alias: str, name: str) -> None:
    """A script written for GradAlign finds its modes."""
    assert SELECTORS[alias] is SELECTORS[name]


def test_problems_never_measured_have_no_gradient(make_store) -> None:
    """A whole-pool selector must not be shown another problem's row for one that has none."""
    store = make_store()
    store.add_problems("pool", [{"id": f"new{i}", "prompt": "?"} for i in range(5)])
    view, wanted = store.view("pool"), target(store, "bench")
    for score in (lambda c: c.norms, lambda c: c.pass_rates, lambda c: c.cosines(c.target_D)):
        chosen = select(store, "pool", wanted, 65, Selector("mine", score, "any", whole_pool=True), allow_fewer=True)
        assert sorted(chosen.ids) == sorted(view.ids)


def test_never_silently_fewer(make_store) -> None:
    """A trainer that asked for 64 and got 50 trains another schedule than it logs."""
    store = make_store()
    n_live = int(store.view("pool").live.sum())
    with pytest.raises(RequestError, match=rf"can choose {n_live} of 60 problems asked .*{n_live} live"):
        select(store, "pool", target(store, "bench"), 60)
    fewer = select(store, "pool", target(store, "bench"), 60, allow_fewer=True)
    assert len(fewer) == n_live
    assert fewer.n_asked == 60


def test_candidates_and_filters(make_store) -> None:
    """A round chooses among its chunk; an unknown candidate is a mistake, not a shorter list."""
    store = make_store()
    wanted, chunk = target(store, "bench"), [f"p{i:03d}" for i in range(20)]
    whole = select(store, "pool", wanted, 45, allow_fewer=True)
    ranked = [i for i in whole.ids if i in chunk]
    assert select(store, "pool", wanted, 5, candidates=chunk).ids == ranked[:5]
    sourced = select(store, "pool", wanted, 5, where=Where(sources=("s1",)))
    assert sourced.ids == [i for i in whole.ids if int(i[1:]) % 3 == 1][:5]
    assert set(select(store, "pool", None, 5, "rand", where=Where(sources=("s1",))).ids) <= {
        f"p{i:03d}" for i in range(1, 60, 3)
    }
    with pytest.raises(RequestError, match="nobody"):
        select(store, "pool", wanted, 5, candidates=["p000", "nobody"])
    store.add_problems("pool", [{"id": "new", "prompt": "?"}])
    assert select(store, "pool", wanted, 5, candidates=[*reversed(chunk), "new"]).ids == ranked[:5]
    assert set(select(store, "pool", None, 21, "rand", candidates=[*chunk, "new"]).ids) == {*chunk, "new"}


def test_scale_of_the_target_does_not_change_a_ranking(make_store) -> None:
    """Scores may grow with the target, picks may not."""
    store = make_store()
    wanted = target(store, "bench")
    names = [name for name in SELECTORS if SELECTORS[name].needs_target]
    ids = {name: select(store, "pool", wanted, 9, name).ids for name in names}
    wanted.vector[:] *= 1000
    assert ids == {name: select(store, "pool", wanted, 9, name).ids for name in ids}


def test_a_selector_of_ones_own(make_store) -> None:
    """A user's function ranks like a built-in one."""
    store = make_store()
    longest_id = Selector("mine", lambda c: np.array([int(i[1:]) for i in c.ids], float), "number in the id")
    view = store.view("pool")
    assert select(store, "pool", None, 4, longest_id).ids == sorted(view.ids[view.live], reverse=True)[:4]


@pytest.mark.parametrize(
    ("n", "name", "message"),
    [(0, "norm", "n is 0"), (5, "cosine", "needs a target"), (5, "best", "selector 'best' is not one of cosine")],
)
def test_bad_requests(make_store, n: int, name: str, message: str) -> None:
    """Each says what was expected."""
    with pytest.raises(RequestError, match=message):
        select(make_store(), "pool", None, n, name)
