"""A gradient that is zero but for rounding is no signal, at any scale of the rewards."""

import numpy as np
import pytest

from gradstore.engine import Sketcher, SketchSpec, objective
from gradstore.engine.rollouts import Group
from gradstore.state import State

ADVANTAGES = ["mean", "mean_std", "rloo"]
AGGREGATIONS = ["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"]
SCALES = [1e-6, 1.0, 1e6]


def _states(model, groups, **settings) -> list[State]:
    return Sketcher(model, SketchSpec(rank=4, objective=objective("gradalign", **settings))).sketch(groups).states


def _group(responses, rewards, **rest) -> Group:
    return Group("p", np.arange(1, 6), responses, np.array(rewards, float), **rest)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_equal_responses_cancel(make_model, advantage: str, aggregation: str, scale: float) -> None:
    """Their weights sum to 5e-18, not 0: the row would rank by the direction of rounding."""
    same = [np.array([7, 8, 9])]
    groups = [_group(same * n, scale * np.array([1.0] * k + [0.0] * (n - k))) for n in (3, 7, 16) for k in range(1, n)]
    groups += [_group(same * 6, scale * (1000 + np.random.default_rng(s).random(6))) for s in range(5)]
    groups += [_group(same * 4, scale * np.array([0.1, 0.7, 0.3, 0.9]), logprobs=None)]
    states = _states(make_model("qwen2"), groups, advantage=advantage, aggregation=aggregation)
    assert set(states) == {State.NO_SIGNAL}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_rewards_that_differ_by_rounding_are_equal(make_model, advantage: str, scale: float) -> None:
    """A deviation of 1e-17 in the denominator would make advantages of size 1."""
    different = [np.array([j, j + 1, 5]) for j in range(4)]
    empty = np.array([], np.int64)
    groups = [
        _group(different, scale * np.array([0.1 + 0.2, 0.3, 0.3, 0.3])),
        _group(different, scale * np.array([sum([0.1] * 10), 1.0, 1.0, sum([0.1] * 10)])),
        _group([different[0], empty, empty], scale * np.array([0.2, 0.1, 0.3])),  # its own reward is the mean
    ]
    assert not groups[0].has_signal
    assert set(_states(make_model("qwen2"), groups, advantage=advantage)) == {State.NO_SIGNAL}


@pytest.mark.parametrize("scale", [*SCALES, -1.0])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_small_differences_are_signal(make_model, advantage: str, scale: float) -> None:
    """Rewards 1e-9 apart, equal responses that do not cancel, and one token of difference all have a gradient."""
    different = [np.array([j, j + 1, 5]) for j in range(3)]
    groups = [
        _group(different, scale * np.array([1.0, 1.0, 1.0 + 1e-9])),
        _group([different[0], different[0], different[1]], scale * np.array([1.0, 0.0, 0.0])),
        _group([np.array([7, 8]), np.array([7, 9])], scale * np.array([1.0, 0.0])),
    ]
    assert set(_states(make_model("qwen2"), groups, advantage=advantage)) == {State.LIVE}


@pytest.mark.parametrize("scale", SCALES)
def test_scale_leaves_directions_alone(make_model, make_groups, scale: float) -> None:
    sketcher, groups = Sketcher(make_model("qwen2"), SketchSpec(rank=4)), make_groups(4)
    scaled = [Group(g.problem_id, g.prompt_ids, g.responses, g.rewards * scale) for g in groups]
    before, after = sketcher.sketch(groups), sketcher.sketch(scaled)
    assert before.states == after.states
    np.testing.assert_allclose(after.sketches, before.sketches * scale, rtol=1e-4, atol=1e-6 * scale)


def test_equal_rollouts_of_another_policy_cancel(make_model) -> None:
    """With importance ratios: equal tokens and equal behaviour log-probabilities; other ones make a gradient."""
    same, logprobs = [np.array([7, 8, 9])] * 3, [np.full(3, -2.0, np.float32)] * 3
    other = [np.full(3, -2.5, np.float32), *logprobs[1:]]
    groups = [_group(same, [1, 0, 0], logprobs=logprobs), _group(same, [1, 0, 0], logprobs=other)]
    batch = Sketcher(make_model("qwen2"), SketchSpec(rank=4, objective=objective("gradalign", importance=True))).sketch(
        groups
    )
    assert batch.states == [State.NO_SIGNAL, State.LIVE]
    assert batch.ess is not None
    assert batch.ess[0] == 0 < batch.ess[1]


def test_a_kl_term_is_signal_where_responses_cancel(make_model) -> None:
    same = [np.array([7, 8, 9])] * 3
    reference = [np.full(3, -2.0, np.float32)] * 3
    group = _group(same, [1, 0, 0], reference_logprobs=reference)
    assert _states(make_model("qwen2"), [group], kl_beta=0.1) == [State.LIVE]
