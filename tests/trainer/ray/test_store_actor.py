"""The owner of a store: its answers are those of direct calls, whoever asks, and whoever dies."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore import FingerprintError, RequestError, State
from gradstore.engine import select, target
from gradstore.engine.sketches.spec import SketchBatch
from gradstore.errors import GradstoreError
from gradstore.trainer.feed import OwnerFeed
from gradstore.trainer.sampling.backends import derived_seed
from gradstore.trainer.store_actor import NAMESPACE, Owner, OwnerSettings, StoreOwner, connect, start

SAME = {"objective": {"importance": False}}
PATIENCE = 180.0
"""Seconds: no call may wait for ever."""


def _batch(seed: int = 1, names: tuple[str, ...] = ("p1", "p2")) -> SketchBatch:
    rows_PD = np.random.default_rng(seed).normal(size=(len(names), 32)).astype(np.float32)
    ones = np.ones(len(names), np.float32)
    states, counts = [State.LIVE] * len(names), np.full(len(names), 4, np.int32)
    return SketchBatch(list(names), rows_PD, states, [""] * len(names), ones / 2, counts, 0)


@pytest.fixture
def settings(small_store: Callable[[Path], Path], tmp_path: Path) -> OwnerSettings:
    return OwnerSettings(store=small_store(tmp_path / "store"), selected=4, benchmarks=("bench",), seed=5)


def _directly(settings: OwnerSettings, number: int, at: int | None = None) -> list[str]:
    store = gradstore.open(settings.store)
    goals, seed = [target(store, "bench", at)], derived_seed(settings.seed, number)
    return select(store, "pool", goals, settings.selected, settings.selector, at, seed=seed).ids


def test_a_round_is_chosen_once_and_read_back(settings: OwnerSettings) -> None:
    """Rows that come later change the next round, not one that was answered; a new owner answers equally."""
    owner, expected = StoreOwner(settings), _directly(settings, 0, 1)
    first = owner.picks(0, 1)
    assert first.ids == expected
    assert owner.push("pool", _batch(), 2, SAME) == 2
    assert owner.push("bench", _batch(2, ("p0", "p1")), 2, SAME) == 2
    for again in (owner.picks(0, 1), StoreOwner(settings).picks(0), StoreOwner(settings).picks(0, 1)):
        assert again.ids == first.ids
        np.testing.assert_array_equal(again.scores, first.scores)
    assert owner.picks(1, 2).ids == _directly(settings, 1, 2)
    assert (owner.target("bench").vector == target(gradstore.open(settings.store), "bench", 2).vector).all()
    assert (owner.target("bench", 1).vector != owner.target("bench").vector).any()


def test_a_repeated_push_writes_nothing(settings: OwnerSettings) -> None:
    owner = StoreOwner(settings)
    assert [owner.push("pool", _batch(), 2, SAME) for _ in range(2)] == [2, 2]
    assert owner.push("pool", _batch(3, ("p2", "p3")), 2, SAME) == 2
    view = gradstore.open(settings.store).view("pool")
    assert gradstore.open(settings.store).steps("pool")[2] == 3
    expected = _batch().sketches[1]
    assert view.take(["p2"])[0] @ expected / np.linalg.norm(expected) > 0.999, "the first row of a step stays"


@pytest.mark.parametrize("selector", ["cosine", "rand", "cosine:0.5+rand:0.5"])
def test_the_record_says_what_was_chosen_among(settings: OwnerSettings, selector: str) -> None:
    store = gradstore.open(settings.store, "a")
    store.add_problems("pool", [{"id": "new", "prompt": "?"}])
    store.delete("pool", ["p7"])
    owner = StoreOwner(OwnerSettings(store=settings.store, selected=4, selector=selector, benchmarks=("bench",)))
    picks, (found,) = owner.picks(0), list(gradstore.open(settings.store).rounds("pool"))
    table = found.table.to_pandas().set_index("id")
    assert set(table.index) == {"new", *(f"p{i}" for i in range(7))}
    assert found.picks == picks.ids
    assert table.loc[picks.ids, "score"].tolist() == picks.scores.tolist()
    assert (table.loc["new", "state"], table.loc["new", "step"]) == ("unmeasured", -1)
    assert found.about["counts"] == {"live": 7, "no_signal": 0, "failed": 0, "unmeasured": 1}
    assert found.step == 1


def test_wrong_requests(settings: OwnerSettings) -> None:
    owner = StoreOwner(settings)
    with pytest.raises(RequestError, match="has 0 rounds: 1 is not the next"):
        owner.picks(1)
    owner.picks(0, 1)
    with pytest.raises(RequestError, match="round 0 is of other settings: step was 1, now 0"):
        owner.picks(0, 0)
    other = OwnerSettings(store=settings.store, selected=3, benchmarks=("bench",), seed=5)
    with pytest.raises(RequestError, match="selected was 4, now 3"):
        StoreOwner(other).picks(0)
    with pytest.raises(FingerprintError):
        owner.push("pool", _batch(), 2, {"objective": {"importance": True}})
    with pytest.raises(RequestError, match="'nobody'"):
        owner.push("pool", _batch(1, ("nobody",)), 2, SAME)
    with pytest.raises(RequestError, match="has no collection 'none'"):
        StoreOwner(OwnerSettings(store=settings.store, selected=4, pool="none")).check()


def test_a_feed_of_an_owner_goes_on_where_it_was(settings: OwnerSettings) -> None:
    """Each choice is a round; a feed that is loaded, and another trainer's, draw the same."""
    owner, ids = StoreOwner(settings), [f"p{i}" for i in range(8)]
    feed = OwnerFeed(owner, ids, draws=8)
    first = feed.draw(5)
    assert set(first) <= set(_directly(settings, 0))
    state = feed.state_dict()
    later = feed.draw(9)
    assert sorted([*first, *later[:3]]) == sorted(2 * _directly(settings, 0))
    again = OwnerFeed(owner, ids, draws=8)
    again.load_state_dict(state)
    assert again.draw(9) == later
    assert OwnerFeed(StoreOwner(settings), ids, draws=8).draw(14) == [*first, *later]
    with pytest.raises(RequestError, match="which this trainer does not have"):
        OwnerFeed(owner, ["p0"], draws=8).draw(1)


class _Caller:
    """A process that asks."""

    def pid(self) -> int:
        return os.getpid()

    def ask(self, name: str, calls: list[tuple[Any, ...]]) -> list[Any]:
        owner = connect(name, patience=PATIENCE)
        answers = [getattr(owner, method)(*arguments) for method, *arguments in calls]
        return [getattr(answer, "ids", answer) for answer in answers]

    def submit(self, name: str, calls: list[tuple[Any, ...]]) -> None:
        """Ask without waiting for an answer."""
        import ray

        handle = ray.get_actor(name, namespace=NAMESPACE)
        self.asked = [getattr(handle, method).remote(*arguments) for method, *arguments in calls]


@pytest.fixture
def owner(ray_here: Any, settings: OwnerSettings, request: pytest.FixtureRequest) -> Any:
    started = start(request.node.name, settings, patience=PATIENCE)
    yield started
    started.stop()


def _callers(ray: Any, n: int) -> list[Any]:
    return [ray.remote(_Caller).options(num_cpus=0, max_restarts=0).remote() for _ in range(n)]


CALLS = [("push", "pool", _batch(), 2, SAME), ("push", "bench", _batch(2, ("p0", "p1")), 2, SAME), ("picks", 0, 2)]


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_two_callers_at_once_get_the_answers_of_direct_calls(
    ray_here: Any, settings: OwnerSettings, owner: Owner, request: pytest.FixtureRequest
) -> None:
    callers = _callers(ray_here, 2)
    one, other = ray_here.get([caller.ask.remote(request.node.name, CALLS) for caller in callers], timeout=PATIENCE)
    assert one == other == [2, 2, _directly(settings, 0, 2)]
    assert gradstore.open(settings.store).steps("pool")[2] == 2
    with pytest.raises(RequestError, match="3 is not the next") as caught:
        owner.picks(3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("begun", [True, False], ids=["begun", "at_once"])
def test_a_caller_is_killed_and_another_gets_the_answers(
    ray_here: Any, settings: OwnerSettings, owner: Owner, request: pytest.FixtureRequest, begun: bool
) -> None:
    """Killed when its calls had reached the owner: they are done without it. Killed at once: the other makes them."""
    name, (first, second) = request.node.name, _callers(ray_here, 2)
    pid = ray_here.get(first.pid.remote(), timeout=PATIENCE)
    ray_here.get(first.submit.remote(name, CALLS), timeout=PATIENCE)
    if begun:
        _until(lambda: 2 in gradstore.open(settings.store).steps("pool"))
    os.kill(pid, signal.SIGKILL)
    if begun:
        _until(lambda: len(gradstore.open(settings.store).rounds("pool")) == 1)
    answers = ray_here.get(second.ask.remote(name, CALLS), timeout=PATIENCE)
    assert answers == [2, 2, _directly(settings, 0, 2)]
    assert gradstore.open(settings.store).steps("pool")[2] == 2


def test_a_killed_owner_is_started_again_and_answers_equally(
    ray_here: Any, settings: OwnerSettings, owner: Owner, request: pytest.FixtureRequest
) -> None:
    """Also while calls are under way: Ray repeats them."""
    before = [owner.push("pool", _batch(), 2, SAME), owner.picks(0, 2).ids]
    pids = [_pid(ray_here, request.node.name)]
    os.kill(pids[0], signal.SIGKILL)
    assert [owner.push("pool", _batch(), 2, SAME), owner.picks(0, 2).ids] == before
    killer = threading.Timer(0.2, lambda: os.kill(_pid(ray_here, request.node.name), signal.SIGKILL))
    killer.start()
    for number in range(1, 12):
        step = 2 + number
        owner.push("pool", _batch(step), step, SAME)
        assert owner.picks(number, step).ids == _directly(settings, number, step)
    killer.join()
    assert gradstore.open(settings.store).steps("pool")[3] == 2
    assert gradstore.open(settings.store).verify().ok


def _pid(ray: Any, name: str) -> int:
    handle = ray.get_actor(name, namespace=NAMESPACE)
    return int(ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=PATIENCE))


def test_names_and_a_stopped_owner(ray_here: Any, settings: OwnerSettings, owner: Owner, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no owner 'nobody'"):
        connect("nobody")
    with pytest.raises(RequestError, match="choose another name"):
        start("test_names_and_a_stopped_owner", settings)
    with pytest.raises(GradstoreError, match="no-store"):
        start("wrong", OwnerSettings(store=tmp_path / "no-store", selected=1), patience=PATIENCE)
    owner.stop()
    with pytest.raises(GradstoreError, match="is gone"):
        owner.picks(0)
