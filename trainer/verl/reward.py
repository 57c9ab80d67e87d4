"""The built-in rewards as verl's custom reward function, so that training and sketches use the same rewards.

    reward.custom_reward_function.path=$(python -c 'import gradstore.trainer.verl.reward as r; print(r.__file__)')
    reward.custom_reward_function.name=compute_score

Each problem's `extra_info["reward"]` names its reward (files of `gradstore data` have this field). To use one reward
for all: `+reward.custom_reward_function.reward_kwargs.reward=math`.
"""

import functools
from collections.abc import Mapping
from typing import Any

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
    info = dict(extra_info or {})
    record = {
        "id": str(info.get("index", "")),
        "source": data_source,
        "prompt": "",
        "ground_truth": ground_truth,
        "tags": [],
        "extra": info,
    }
    return _loaded(reward)(record, solution_str, int(info.get("rollout_index") or 0))
