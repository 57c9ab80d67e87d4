"""Rounds that aim at reference solutions: a benchmark whose name ends in .solutions is not rolled out."""

import numpy as np
import pytest

import gradstore
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings

SETTINGS = {
    "candidates": 24,
    "selected": 8,
    "train_batch": 4,
    "steps": 4,
    "rounds": 2,
    "rollouts": 4,
    "fit_problems": 5,
}


@pytest.fixture
def reading_policy(fake_policy):
    """A policy that can make groups of solutions."""

    class Reading(fake_policy):
        def solutions(self, problems):
            return [
                Group(own["id"], np.array([1, 2]), [np.array([n, 5])], np.ones(1), solution=True)
                for n, own in enumerate(problems)
            ]

    return Reading


def solved(world) -> list[dict]:
    return [{**own, "extra": {"solution": "7"}} for own in world.benchmark]


@pytest.mark.parametrize("names", [["bench.solutions"], ["bench", "bench.solutions"]])
def test_a_round_aims_at_solutions(world, reading_policy, tmp_path, names) -> None:
    """Alone, without any rollout of the benchmark; or fused with its rollouts, as any two benchmarks are."""
    own = world()
    rounds = Rounds(tmp_path / "store", own.pool, {name: solved(own) for name in names}, RoundSettings(**SETTINGS))
    policy = reading_policy(own)
    picks = rounds.next(policy).ids
    rolled = [name for _, name, _ in policy.rolled if name.startswith("v")]
    assert len(rolled) == (6 if "bench" in names else 0)
    store = gradstore.open(tmp_path / "store")
    about = store.rounds("pool")[0].about
    assert [target.get("kind", "rollouts") for target in about["targets"]] == [
        "solutions" if name.endswith(".solutions") else "rollouts" for name in names
    ]
    assert about["target_rollouts"] == 16 * len(rolled)
    assert np.isnan(store.view("bench.solutions").pass_rates).all()
    again = Rounds(tmp_path / "store", own.pool, {name: solved(own) for name in names}, RoundSettings(**SETTINGS))
    assert again.next(reading_policy(own)).ids == picks


def test_what_cannot_aim_at_solutions_is_refused(world, reading_policy, fake_policy, tmp_path) -> None:
    """Before anything is rolled out: a problem without a solution, probes, and a trainer that cannot."""
    own, settings = world(), RoundSettings(**SETTINGS)
    with pytest.raises(RequestError, match=r"problem 'v0': field 'extra.solution' is missing"):
        Rounds(tmp_path / "store", own.pool, {"bench.solutions": own.benchmark}, settings)
    with pytest.raises(RequestError, match="probes need its rollouts"):
        probing = RoundSettings(**SETTINGS, selector="shrunk")
        Rounds(tmp_path / "store", own.pool, {"bench.solutions": solved(own)}, probing)
    with pytest.raises(RequestError, match=r"the pool is called 'x.solutions'"):
        Rounds(tmp_path / "store", own.pool, {"bench": solved(own)}, settings, name="x.solutions")
    rounds, policy = Rounds(tmp_path / "store", own.pool, {"bench.solutions": solved(own)}, settings), fake_policy(own)
    with pytest.raises(RequestError, match="this trainer makes no targets from solutions"):
        rounds.next(policy)
    assert not policy.rolled
    assert not (tmp_path / "store").exists()
