"""Feeds, and the adapters to trainers that do not install on a processor.

The fakes have the published signatures: prime-rl's `TaskSampler` and verifiers' traces, slime's `DataSource` and
`Sample`. Neither library is run here.
"""

import enum
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradstore import RequestError
from gradstore.engine.rollouts import read_rollouts
from gradstore.engine.rollouts.group import Group
from gradstore.trainer.feed import RoundFeed, StoreFeed, StoreFeedSettings
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings
from tests.trainer.round.conftest import FakePolicy, World

RECORDS = [{"id": f"p{i}", "prompt": f"{i}?"} for i in range(8)]


@pytest.fixture
def store_feed(small_store: Callable[[Path], Path], tmp_path: Path) -> Callable[..., StoreFeed]:
    path = small_store(tmp_path / "store")

    def make(**more: Any) -> StoreFeed:
        usual = {"store": path, "selected": 4, "draws": 8, "benchmarks": ("bench",), "rollouts": tmp_path / "seen"}
        return StoreFeed(StoreFeedSettings(**(usual | more)), more.pop("records", RECORDS))

    return make


def test_a_store_feed_draws_each_pick_equally_often_and_goes_on(store_feed: Callable[..., StoreFeed]) -> None:
    feed = store_feed()
    first = feed.draw(8)
    assert {first.count(name) for name in first} == {2}
    assert len(set(first)) == 4
    again = store_feed()
    assert again.draw(3) + again.draw(5) == first
    again.draw(3)
    resumed = store_feed()
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    assert resumed.draw(9) == again.draw(9)
    with pytest.raises(RequestError, match="another pool"):
        StoreFeed(feed._settings, RECORDS[::-1]).load_state_dict(feed.state_dict())
    with pytest.raises(RequestError, match="multiple of the 3"):
        store_feed(selected=3)
    with pytest.raises(RequestError, match="no collection 'amc'"):
        store_feed(benchmarks=("amc",))


def test_a_round_feed_does_rounds_when_its_picks_are_used_up(tmp_path: Path) -> None:
    """Stopped and resumed in the middle of a round, it draws and picks the same."""
    world = World(n=20, n_benchmark=3)
    settings = RoundSettings(candidates=10, selected=4, train_batch=4, steps=2, rounds=3, rollouts=4, target_rollouts=4)

    def make(path: Path, step: int = 0) -> tuple[RoundFeed, FakePolicy]:
        policy = FakePolicy(world, step)
        return RoundFeed(Rounds(path, world.pool, {"bench": world.benchmark}, settings), policy), policy

    def train(feed: RoundFeed, policy: FakePolicy, steps: int) -> list[list[str]]:
        drawn = []
        for _ in range(steps):
            drawn.append(feed.draw(4))
            feed.observe([policy._group(name, 4, 7) for name in drawn[-1]], policy.step)
            policy.train()
        return drawn

    whole = train(*make(tmp_path / "whole"), 6)
    for place in range(0, 6, 2):
        assert set(whole[place]) == set(whole[place + 1])
    feed, policy = make(tmp_path / "stopped")
    begun = train(feed, policy, 3)
    resumed, later = make(tmp_path / "stopped", policy.step)
    resumed.load_state_dict(json.loads(json.dumps(feed.state_dict())))
    assert begun + train(resumed, later, 3) == whole
    with pytest.raises(RequestError, match="policy is at step 6"):
        resumed.observe([], 5)


def _group_of(name: str, rewards: list[float]) -> Group:
    return Group(name, np.array([1, 2]), [np.array([3, 4])] * len(rewards), np.array(rewards))


def test_a_store_feed_writes_what_it_sees_once(store_feed: Callable[..., StoreFeed], tmp_path: Path) -> None:
    feed = store_feed()
    feed.observe([_group_of("p1", [1.0, 0.0]), _group_of("p0", [0.0, 0.5])], 7)
    feed.observe([_group_of("p2", [1.0, 1.0])], 7)  # repeated after an interruption
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["step-000007.jsonl"]
    groups = read_rollouts(tmp_path / "seen" / "step-000007.jsonl").groups()
    assert [(group.problem_id, group.rewards.tolist()) for group in groups] == [("p1", [1.0, 0.0]), ("p0", [0.0, 0.5])]
    assert {row["step"] for row in map(json.loads, (tmp_path / "seen" / "step-000007.jsonl").open())} == {7}
    with pytest.raises(RequestError, match="'q' is not in the pool"):
        feed.observe([_group_of("q", [1.0])], 8)


class Seen:
    """A feed that draws in order and keeps what it is told."""

    def __init__(self) -> None:
        self.place, self.told = 0, []

    def draw(self, n: int) -> list[str]:
        self.place += n
        return [f"p{i % 8}" for i in range(self.place - n, self.place)]

    def weight(self, problem_id: str) -> float:
        return 1.0

    def observe(self, groups: Any, step: int) -> None:
        self.told.append((step, list(groups)))

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Any) -> None:
        self.place = state["place"]


def _episode(key: str, reward: float, error: bool = False) -> Any:
    branch = SimpleNamespace(token_ids=[1, 2, 3, 4, 5], sampled_mask=[False, False, True, False, True])
    agent = SimpleNamespace(trainable=True)
    trace = SimpleNamespace(has_error=error, agent=agent, branches=[branch], reward=reward)
    return SimpleNamespace(ok=True, task=SimpleNamespace(key=key), traces=[trace])


def test_prime_rl_draws_tasks_and_tells_of_groups() -> None:
    from gradstore.trainer.adapters.prime_rl import FeedSampler

    tasks = [SimpleNamespace(key=f"p{i}") for i in range(8)]
    feed = Seen()
    sampler = FeedSampler(feed, tasks, batch=2)
    assert [next(sampler).key for _ in range(3)] == ["p0", "p1", "p2"]
    sampler.observe([_episode("p0", 1.0), _episode("p0", 0.0), _episode("p0", 5.0, error=True)])
    assert not feed.told
    sampler.observe([_episode("p1", 1.0)])
    ((step, groups),) = feed.told
    assert step == 0
    assert [group.problem_id for group in groups] == ["p0", "p1"]
    assert groups[0].rewards.tolist() == [1.0, 0.0]
    assert groups[0].prompt_ids.tolist() == [1, 2]
    assert [mask.tolist() for mask in groups[0].masks] == [[True, False, True]] * 2
    other = FeedSampler(Seen(), tasks, batch=2)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert next(other).key == "p3"
    assert other.metrics() == sampler.metrics() == {"gradstore/steps_observed": 1.0}
    with pytest.raises(RequestError, match="key of its own"):
        FeedSampler(feed, [*tasks, tasks[0]], batch=2)


class Status(enum.Enum):
    COMPLETED = "completed"
    ABORTED = "aborted"


@dataclass
class Sample:
    """The fields of slime's `Sample` that matter."""

    prompt: str = ""
    label: str | None = None
    metadata: dict = field(default_factory=dict)
    group_index: int | None = None
    index: int | None = None
    tokens: list[int] = field(default_factory=list)
    response_length: int = 0
    reward: float = 0.0
    loss_mask: list[int] | None = None
    remove_sample: bool = False
    status: Status = Status.COMPLETED

    def get_reward_value(self, args: Any) -> float:
        return self.reward


@pytest.fixture
def slime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter, on a fake of slime."""

    class RolloutDataSourceWithBuffer:
        def __init__(self, args: Any) -> None:
            self.args, self.buffer = args, []
            self.sample_group_index = self.sample_index = 0
            samples = [Sample(r["prompt"], "1", {"id": r["id"]}) for r in RECORDS]
            self.dataset = SimpleNamespace(samples=samples)

        def _get_samples_from_buffer(self, num_samples: int) -> list:
            found, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
            return found

        def add_samples(self, samples: list) -> None:
            self.buffer += samples

        def save(self, rollout_id: int) -> None: ...

        def load(self, rollout_id: int | None = None) -> None: ...

    def generate(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        groups = data_source.get_samples(2)
        for group in groups:
            for j, sample in enumerate(group):
                sample.tokens, sample.response_length, sample.reward = [1, 2, 5, 6], 2, float(j)
        groups[0][0].status = Status.ABORTED
        groups[1][0].loss_mask = [1, 0]
        return SimpleNamespace(samples=groups)

    modules = {name: ModuleType(name) for name in ("slime", "slime.rollout")}
    modules["slime.rollout.data_source"] = ModuleType("slime.rollout.data_source")
    modules["slime.rollout.sglang_rollout"] = ModuleType("slime.rollout.sglang_rollout")
    modules["slime.rollout.data_source"].RolloutDataSourceWithBuffer = RolloutDataSourceWithBuffer  # type: ignore[attr-defined]
    modules["slime.rollout.sglang_rollout"].generate_rollout = generate  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    name = "gradstore.trainer.adapters.slime"
    sys.modules.pop(name, None)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_slime_draws_samples_and_tells_of_them(slime: Any, tmp_path: Path) -> None:
    args = SimpleNamespace(n_samples_per_prompt=3, save=str(tmp_path), load=str(tmp_path))
    feed = Seen()
    source = slime.FeedDataSource(args, feed)
    output = slime.generate_rollout(args, 4, source)
    assert [[sample.index for sample in group] for group in output.samples] == [[0, 1, 2], [3, 4, 5]]
    ((step, groups),) = feed.told
    assert step == 4
    assert [(group.problem_id, group.rewards.tolist()) for group in groups] == [("p0", [1.0, 2.0]), ("p1", [0, 1, 2])]
    assert groups[0].prompt_ids.tolist() == [1, 2]
    assert groups[0].masks is None
    assert groups[1].masks[0].tolist() == [True, False]
    slime.generate_rollout(args, 5, source, evaluation=True)
    assert len(feed.told) == 1
    source.save(4)
    other = slime.FeedDataSource(args, Seen())
    other.load(4)
    source.add_samples([["put back"]])
    assert source.get_samples(2)[0] == ["put back"]
    assert other.get_samples(1)[0][0].metadata == {"id": "p4"}


def test_slimes_settings_are_read(slime: Any, store_feed: Callable[..., StoreFeed], tmp_path: Path) -> None:
    args = SimpleNamespace(n_samples_per_prompt=1, save=None, load=None, gradstore=None)
    args.gradstore = {"store": str(tmp_path / "none"), "selected": 2, "draws": 4, "selctor": "rand"}
    with pytest.raises(RequestError, match="did you mean 'selector'"):
        slime.FeedDataSource(args)
    path = store_feed()._settings.store
    args.gradstore = {"store": str(path), "selected": 2, "draws": 4, "selector": "rand"}
    assert len(slime.FeedDataSource(args).get_samples(4)) == 4
