"""Every selector against its formula written as a loop."""

import numpy as np
import pytest

from engine import SELECTORS, Selector, Where, select, target
from gradstore import State
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
    raise AssertionError(name)


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"rand", "acc"}))
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
    assert select(store, "pool", wanted, 5, candidates=chunk).ids == [i for i in whole.ids if i in chunk][:5]
    sourced = select(store, "pool", wanted, 5, where=Where(sources=("s1",)))
    assert sourced.ids == [i for i in whole.ids if int(i[1:]) % 3 == 1][:5]
    assert set(select(store, "pool", None, 5, "rand", where=Where(sources=("s1",))).ids) <= {
        f"p{i:03d}" for i in range(1, 60, 3)
    }
    with pytest.raises(RequestError, match="nobody"):
        select(store, "pool", wanted, 5, candidates=["p000", "nobody"])


def test_scale_of_the_target_does_not_change_a_ranking(make_store) -> None:
    """Scores may grow with the target, picks may not."""
    store = make_store()
    wanted = target(store, "bench")
    ids = {name: select(store, "pool", wanted, 9, name).ids for name in ("cosine", "dot", "simacc", "negsim")}
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
