"""The sampler draws what rounds feed it, and goes on where its state was taken."""

from collections import Counter

import pytest

from gradstore.errors import RequestError
from gradstore.trainer.verl.sampler import RoundSampler, drawing_order

POOL = [f"problem {i}" for i in range(10)]


def drawn(sampler: RoundSampler, n: int) -> list[int]:
    order = iter(sampler)
    return [next(order) for _ in range(n)]


def test_draws_in_the_order_fed() -> None:
    sampler = RoundSampler(POOL)
    sampler.feed(["problem 7", "problem 2", "problem 7"])
    assert drawn(sampler, 2) == [7, 2]
    assert sampler.left == 1
    assert list(sampler) == [7], "what is left, and then the end"
    assert len(sampler) == 10


@pytest.mark.parametrize("stop", range(7))
def test_goes_on_where_its_state_was_taken(stop: int) -> None:
    """verl saves in the middle of a round as well as at its end, and a run may be resumed more than once."""
    order = drawing_order(POOL[:3], 6, seed=4)
    undisturbed = RoundSampler(POOL)
    undisturbed.feed(order)
    expected = list(undisturbed)
    sampler = RoundSampler(POOL)
    sampler.feed(order, {"problem 1": 12}, {"problem 2": 0.5})
    sampler.keep({"rounds": 1})
    found = drawn(sampler, stop)
    for _ in range(2):
        other = RoundSampler(POOL)
        other.load_state_dict(sampler.state_dict())
        sampler = other
    assert (sampler.rounds, sampler.rollouts) == ({"rounds": 1}, {"problem 1": 12})
    assert sampler.weights == {"problem 2": 0.5}
    sampler.load_state_dict({name: value for name, value in sampler.state_dict().items() if name != "weights"})
    assert sampler.weights == {}, "a checkpoint of before there were weights"
    assert found + list(sampler) == expected


@pytest.mark.verl
def test_kept_by_verls_loader() -> None:
    """verl's loader saves a sampler's state and restores it when first iterated; without workers it draws no row
    before it is asked for it."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(sampler: RoundSampler) -> StatefulDataLoader:
        return StatefulDataLoader(list(range(10)), batch_size=2, num_workers=0, drop_last=True, sampler=sampler)

    sampler = RoundSampler(POOL)
    first = loader(sampler)
    seen = []
    for round_number in range(3):
        sampler.feed(drawing_order(POOL[round_number : round_number + 4], 8, seed=round_number))
        rows = iter(first)
        for step in range(4):
            seen += next(rows).tolist()
            assert sampler.left == 8 - 2 * (step + 1)
            resumed = RoundSampler(POOL)
            second = loader(resumed)
            second.load_state_dict(first.state_dict())
            rest = [number for batch in second for number in batch.tolist()]
            assert seen[-2 * (step + 1) :] + rest == [POOL.index(name) for name in sampler.order]
    assert len(seen) == 24


def test_every_pick_is_drawn_equally_often() -> None:
    order = drawing_order(POOL[:4], 20, seed=0)
    assert set(Counter(order).values()) == {5}
    for start in range(0, 20, 4):
        assert set(order[start : start + 4]) == set(POOL[:4]), "each time through before the next"
    assert order != drawing_order(POOL[:4], 20, seed=1)
    with pytest.raises(RequestError, match="not a multiple"):
        drawing_order(POOL[:4], 18, seed=0)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(RequestError, match="'a' occurs more than once"):
        RoundSampler(["a", "b", "a"])
    sampler = RoundSampler(POOL)
    with pytest.raises(RequestError, match=r"'other', which data\.train_files does not have"):
        sampler.feed(["other"])
    sampler.feed(POOL[:2])
    with pytest.raises(RequestError, match="2 problems still to draw"):
        sampler.feed(POOL[:2])
    state = sampler.state_dict()
    with pytest.raises(RequestError, match="another pool"):
        RoundSampler(POOL[::-1]).load_state_dict(state)
    with pytest.raises(RequestError, match="not made by gradstore"):
        sampler.load_state_dict({"samples_yielded": 3})
