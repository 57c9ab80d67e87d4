"""A round's rollout files keep which tokens the policy wrote, and which outputs are of one rollout."""

from pathlib import Path

import numpy as np
import pytest

from gradstore.engine.rollouts import Group, read_rollouts, write_rollouts
from gradstore.trainer.round.measuring import rollouts_of


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_groups_are_read_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    responses = [np.arange(2, 2 + n) for n in (3, 2, 4)]
    masks = [np.array(mask, bool) for mask in ([1, 0, 1], [0, 0], [1, 1, 1, 1])]
    fill = np.float32("-inf")  # what a server wrote for a tool's tokens
    logprobs = [np.where(mask, np.float32(-1.5), fill) for mask in masks]
    prompt = np.array([7, 8])
    groups = [
        Group("a", prompt, responses, np.array([1.0, 0.0, 0.5]), logprobs, masks=masks),
        Group(
            "b",
            prompt,
            responses,
            np.array([1.0, 0.0]),
            masks=masks,
            prompts=[prompt, np.array([9]), prompt],
            rollout_of=np.array([0, 0, 1]),
        ),
        Group("c", prompt, responses, np.array([1.0, 0.0, 0.5])),
    ]
    path = tmp_path / f"rollouts.{suffix}"
    with write_rollouts(path) as writer:
        writer.append(rollouts_of([{"prompt": group.problem_id} for group in groups], groups, 3))
    for group, found in zip(groups, read_rollouts(path).groups(), strict=True):
        assert found.rewards.tolist() == group.rewards.tolist()
        assert found.rollouts.tolist() == group.rollouts.tolist()
        assert (found.masks is None) == (group.masks is None)
        assert [mask.tolist() for mask in found.masks or ()] == [mask.tolist() for mask in group.masks or ()]
        assert [ids.tolist() for ids in found.responses] == [ids.tolist() for ids in responses]
        for j in range(3):
            assert found.prompt_of(j).tolist() == group.prompt_of(j).tolist()
            if group.logprobs is not None and found.logprobs is not None:
                assert found.written(j, found.logprobs[j]).tolist() == group.written(j, group.logprobs[j]).tolist()
