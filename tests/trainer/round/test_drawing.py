"""The candidates of the rounds: GradAlign's chunks against a plain reference, and what the record tells of them."""

import random
from collections import Counter
from itertools import pairwise

import pytest

import gradstore
from gradstore.errors import RequestError
from gradstore.trainer.round.drawing import chunk, independent, shuffled
from gradstore.trainer.round.settings import RoundSettings


def reference(order: list[str], size: int, rounds: int) -> list[list[str]]:
    """The published rule as a queue: cut chunks off its front; when too few are left, carry them on into a new pass."""
    queue: list[str] = []
    chunks = []
    for _ in range(rounds):
        while len(queue) < size:
            queue += order
        chunks.append(queue[:size])
        queue = queue[size:]
    return chunks


@pytest.mark.parametrize("n", [1, 2, 7, 12, 40, 101])
@pytest.mark.parametrize("share", [0.01, 0.29, 0.5, 0.8, 1.0])
def test_chunks_are_the_published_rule(n: int, share: float) -> None:
    """Many rounds, many sizes. Without it a resumed run could draw something else, or problems never come up."""
    size = max(1, round(share * n))
    order = shuffled([f"p{i}" for i in range(n)], seed=5)
    rounds = 3 * n + 7
    drawn = [chunk(order, size, number) for number in range(rounds)]
    assert drawn == reference(order, size, rounds)
    assert all(len(set(own)) == size for own in drawn)
    per_pass = n // size
    for first in range(rounds - per_pass):
        assert len({name for own in drawn[first : first + per_pass] for name in own}) == per_pass * size  # disjoint
    for stop in range(1, rounds):
        uses = Counter(name for own in drawn[:stop] for name in own)
        assert max(uses.values()) - min(uses[name] for name in order) <= 1


def test_three_rounds_see_88_percent_of_dapo() -> None:
    """The figure by which independent draws were found wanting: 17,398 problems, 5,120 a round."""
    ids = [f"p{i}" for i in range(17398)]
    order = shuffled(ids, seed=0)
    in_turn = {name for number in range(3) for name in chunk(order, 5120, number)}
    assert len(in_turn) == 3 * 5120
    anew = {name for number in range(3) for name in independent(ids, 5120, number)}
    assert 0.62 < len(anew) / len(ids) < 0.68


def test_the_order_is_a_shuffle_that_survives_a_changed_pool() -> None:
    """Another order of the file changes nothing; problems that join or leave do not reorder the others."""
    ids = [f"problem {i} ü" for i in range(500)]
    order = shuffled(ids, seed=3)
    mixed = random.Random(0).sample(ids, len(ids))
    assert sorted(order) == sorted(ids)
    assert shuffled(mixed, seed=3) == order
    assert shuffled(ids, seed=4) != order
    assert [name for name in order if name in set(ids[::3])] == shuffled(ids[::3], seed=3)
    places = [order.index(name) for name in ids]
    steps = sum(b > a for a, b in pairwise(places))
    assert 200 < steps < 300  # neighbours in the file are not neighbours in the order


USUAL = {"candidates": 24, "selected": 8, "train_batch": 4, "steps": 4, "rounds": 6, "rollouts": 4, "fit_problems": 5}


def test_rounds_take_the_chunks_and_tell_what_they_have_seen(world, training, killed, tmp_path, caplog) -> None:
    """60 problems, 24 a round: 40, 80, then 100 percent, also in a run that is killed and goes on."""
    caplog.set_level("INFO", "gradstore")  # a command run in this process sets the level
    settings = RoundSettings(**USUAL)
    run = training(tmp_path / "store", world(), settings, kill_at=14)
    with pytest.raises(killed):
        run.run()
    assert 0 < len(run.picks) < 5
    run.resume()
    rounds = gradstore.open(tmp_path / "store").rounds("pool")
    order = shuffled([record["id"] for record in run.world.pool], settings.seed)
    assert [found.table["id"].to_pylist() for found in rounds] == reference(order, 24, 6)
    seen = [found.about["pool"]["seen"] for found in rounds]
    assert seen == [24, 48, 60, 60, 60, 60]
    assert {found.about["pool"]["problems"] for found in rounds} == {60}
    assert [values["round/pool_seen"] for values in run.logged][-1] == 1
    assert run.logged[0]["round/pool_seen"] == 0.4
    assert "24 candidates; seen so far: 40 % of the pool" in caplog.text


def test_independent_draws_are_still_there(world, training, tmp_path) -> None:
    """They may repeat; a run begun before there was a choice goes on with them, and must say so."""
    settings = RoundSettings(**USUAL, draw="independent")
    training(tmp_path / "store", world(), settings).run()
    store = gradstore.open(tmp_path / "store", mode="a")
    drawn = [set(found.table["id"].to_pylist()) for found in store.rounds("pool")]
    assert drawn[0] & drawn[1]
    old = store.rounds("pool")[0]
    before = {name: value for name, value in old.about["settings"].items() if name != "draw"}
    older = gradstore.create(tmp_path / "older", dim=store.dim, fingerprint=store.fingerprint)
    older.add_problems("pool", world().pool)
    older.rounds("pool").add({**old.about, "settings": before}, old.table)
    again = training(tmp_path / "older", world(), settings)
    assert again.rounds().next(again.policy).ids == old.picks
    other = training(tmp_path / "older", world(), RoundSettings(**USUAL))
    with pytest.raises(RequestError, match="draw was 'independent', now 'chunks'"):
        other.rounds().next(other.policy)
