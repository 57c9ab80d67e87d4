"""The built-in rewards as verl's custom reward function, so that training and sketches use the same rewards.

    reward.custom_reward_function.path=$(python -c 'import gradstore.trainer.verl.reward as r; print(r.__file__)')
    reward.custom_reward_function.name=compute_score_async

verl 0.9 awaits `compute_score_async` in its reward managers naive, dapo, gdpo and limited. So a judge asks as many
questions at a time as `JudgeSettings.concurrency` says, in each of verl's reward workers. The manager remote and verl
0.7 need `compute_score`, which gives the same scores.

Each problem's `extra_info["reward"]` names its reward (files of `gradstore data` have this field). To use one reward
for all: `+reward.custom_reward_function.reward_kwargs.reward=math`.
"""

import functools
from collections.abc import Mapping
from typing import Any

from gradstore.trainer.sampling.reward import Item
from gradstore.trainer.sampling.rewards import load_reward

_loaded = functools.cache(load_reward)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    reward: str = "auto",
    **_: Any,
) -> float:
    """Score a response with `gradstore.trainer.sampling.rewards.load_reward(reward)`; verl passes these arguments.

    Raises RequestError like the reward itself, with `extra_info["index"]` as the problem's name.
    """
    return _loaded(reward)(*_item(data_source, solution_str, ground_truth, extra_info))


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    reward: str = "auto",
    **_: Any,
) -> float:
    """`compute_score`, awaited: a judge's requests run side by side, and rules run in a thread."""
    (score,) = await _loaded(reward).many_async([_item(data_source, solution_str, ground_truth, extra_info)])
    return score


def _item(data_source: str, response: str, ground_truth: str, extra_info: Mapping[str, Any] | None) -> Item:
    info = dict(extra_info or {})
    record = {
        "id": str(info.get("index", "")),
        "source": data_source,
        "prompt": "",
        "ground_truth": ground_truth,
        "tags": [],
        "extra": info,
    }
    return record, response, int(info.get("rollout_index") or 0)
