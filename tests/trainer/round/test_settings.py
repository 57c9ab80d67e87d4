"""Settings of rounds: GradAlign's names mean what they mean there, and what cannot be is refused up front."""

from dataclasses import replace

import pytest

from gradstore.engine.selecting.diversity import Diversity
from gradstore.errors import RequestError
from gradstore.trainer.round.settings import GRADALIGN_NAMES, RoundSettings
from gradstore.trainer.verl.sampler import drawing_order

PUBLISHED = {
    "chunk_size": 5120,
    "k": 20,
    "n_samples_train": 128,
    "n_samples_val": 16,
    "train_batch_size": 128,
    "iters_per_select": 10,
    "num_selections": 100,
    "mode": "sim",
}


def test_gradaligns_names_are_aliases() -> None:
    """Its published command line is understood as it stands, numbers as texts too."""
    settings = RoundSettings.from_names(PUBLISHED)
    assert settings == RoundSettings.from_names({name: str(value) for name, value in PUBLISHED.items()})
    assert settings == RoundSettings(
        candidates=5120,
        ratio=1 / 20,
        rollouts=128,
        target_rollouts=16,
        train_batch=128,
        steps=10,
        rounds=100,
        selector="sim",
    )
    assert settings.for_pool(9000).selected == 256
    assert set(GRADALIGN_NAMES) == {*PUBLISHED}


@pytest.mark.parametrize("chunk", [40, 60, 120])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("batch", [4, 10])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_constraint_is_gradaligns(chunk: int, k: int, batch: int, steps: int) -> None:
    """(k * train_batch_size * iters_per_select) % chunk_size == 0, wherever chunk_size / k is a whole number."""
    values = {"chunk_size": chunk, "k": k, "train_batch_size": batch, "iters_per_select": steps}
    if chunk % k == 0 and (k * batch * steps) % chunk == 0:
        assert RoundSettings.from_names(values).for_pool(chunk).selected == chunk // k
    else:
        with pytest.raises(RequestError, match=r"expected a whole number|not a multiple of the \d+ selected"):
            RoundSettings.from_names(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either `selected`"),
        ({"selected": 4, "ratio": 0.5}, "either `selected`"),
        ({"selected": 4, "accept_coverage": "95"}, "accept_coverage is 95.0, expected a share"),
        ({"selected": 4, "chunk_sise": 8}, "chunk_sise is not known; did you mean 'chunk_size'"),
        ({"selected": 4, "chunk_size": 8, "candidates": 8}, "'chunk_size' and 'candidates' are the same"),
        ({"k": 0}, "ratio is 0"),
        ({"selected": "four"}, "selected is 'four', expected a whole number"),
        ({"selected": 4, "n_samples_train": 0}, r"rollouts \(n_samples_train\) is 0"),
        ({"selected": 8, "candidates": 4}, "8 problems selected of 4 candidates"),
        ({"selected": 4, "refresh": "some"}, "refresh is 'some', expected `all` or a whole number"),
        ({"selected": 4, "refresh": -1}, "refresh is -1"),
        ({"selected": 4, "refresh": 2.5}, "refresh is 2.5, expected `all` or a whole number"),
        ({"selected": True}, "selected is True, expected a whole number"),
        ({"selected": 4, "k": "many"}, r"ratio \(1/k\) is 'many', expected a number"),
        ({"selected": 4, "quotas": "math=5"}, r"quotas\.math is 5.0, expected a share"),
        ({"selected": 4, "spec.rnk": 4}, "spec.rnk is not known; did you mean 'rank'"),
        ({"selected": 4, "refresh_first": -2}, "refresh_first is -2"),
        ({"selected": 4, "confidence": 1}, "confidence is 1"),
        ({"selected": 4, "explore": 0.6, "boundary": 0.6}, "together at most 1"),
        ({"selected": 4, "forgetting": 0}, "forgetting is 0"),
        ({"selected": 4, "once": "perhaps"}, "expected true or false"),
        ({"selected": 4, "warm_up": -1}, "warm_up is -1"),
        ({"selected": 4, "first_look": -1}, "first_look is -1"),
        ({"selected": 4, "observe": "some"}, "observe is 'some', expected one of last, all, none"),
        ({"selected": 4, "observe": True}, "observe is True, expected one of last"),
    ],
)
def test_wrong_settings(values: dict, message: str) -> None:
    """Each is refused with one line that names it."""
    with pytest.raises(RequestError, match=message) as caught:
        RoundSettings.from_names({"train_batch": 8, "steps": 1, **values})
    assert "\n" not in str(caught.value)


def test_texts_for_what_is_no_number() -> None:
    """A command line gives texts."""
    texts = {"diversity": "kmeans", "quotas": "math=0.5,code=0.2", "once": "true", "refresh": "all", "explore": "0.2"}
    settings = RoundSettings.from_names({"selected": "4", "train_batch": "8", "steps": "1", **texts})
    assert settings.diversity == Diversity("kmeans")
    assert settings.quotas == {"math": 0.5, "code": 0.2}
    assert settings.once
    assert settings.explore == 0.2
    with pytest.raises(RequestError, match=r"diversity\.method is 'much', expected one of mmr, kmeans"):
        RoundSettings.from_names({"selected": 4, "diversity": "much"})


def test_the_window_of_acc_is_gradaligns() -> None:
    """acc_low and acc_high become part of the selector's name, so a record needs nothing more to say them."""
    usual = {"selected": "4", "train_batch": "8", "steps": "1"}
    found = RoundSettings.from_names({**usual, "mode": "acc", "acc_low": "0.3", "acc_high": "0.9"})
    assert (found.selector, found.acc_low, found.acc_high) == ("acc(0.3..0.9)", None, None)
    assert RoundSettings.from_names({**usual, "mode": "acc", "acc_high": "0.5"}).selector == "acc(0.2..0.5)"
    assert RoundSettings.from_names({**usual, "mode": "acc"}).selector == "acc"
    assert replace(found, seed=1).selector == found.selector
    with pytest.raises(RequestError, match="acc_low and acc_high are for selector acc, not for 'cosine'"):
        RoundSettings.from_names({**usual, "acc_low": "0.3"})


def test_the_pool_must_be_large_enough() -> None:
    """Counts that depend on the pool are checked against it."""
    settings = RoundSettings(candidates=20, selected=4, train_batch=4, steps=1)
    with pytest.raises(RequestError, match="candidates \\(chunk_size\\) is 20, the pool has 12 problems"):
        settings.for_pool(12)
    whole = RoundSettings(selected=4, train_batch=4, steps=1, refresh=30)
    with pytest.raises(RequestError, match="refresh is 30 problems, a round has 20 candidates"):
        whole.for_pool(20)
    assert whole.for_pool(40).candidates == 40


@pytest.mark.parametrize(
    ("n_picks", "batch", "steps"), [(8, 4, 6), (12, 4, 6), (24, 4, 6), (6, 4, 3), (6, 4, 6), (1, 1, 3), (16, 16, 1)]
)
def test_observed_is_what_is_trained_on_for_the_last_time(n_picks: int, batch: int, steps: int) -> None:
    """A row is worth what is left of it when the next round begins, so each problem's newest rollouts are kept; whole
    steps are, as one backward pass gives them all."""
    order = drawing_order([f"p{i}" for i in range(n_picks)], batch * steps, seed=1)
    found = RoundSettings(selected=n_picks, train_batch=batch, steps=steps)
    for start in range(0, batch * steps, batch):
        stop = start + batch
        last = any(name not in order[stop:] for name in order[start:stop])
        assert found.observes(stop, n_picks) == last
        assert replace(found, observe="all").observes(stop, n_picks)
        assert not replace(found, observe="none").observes(stop, n_picks)
