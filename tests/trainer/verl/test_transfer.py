"""Groups read from verl's queue: order, masks of tools' tokens, log-probabilities, policy versions."""

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.verl

PROMPT = [5, 6, 7]


class Queue:
    """verl's queue of rollouts, as far as reading goes: fields of each key."""

    def __init__(self, rows: dict[str, dict[str, list[float]]]) -> None:
        self.rows = rows

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        import torch
        from tensordict import TensorDict

        columns = {
            field: torch.nested.as_nested_tensor(
                [torch.tensor(self.rows[key][field]) for key in keys], layout=torch.jagged
            )
            for field in select_fields
        }
        return TensorDict(columns, batch_size=len(keys))


def row(response: list[int], mask: list[int], reward: float) -> dict[str, list[float]]:
    """A rollout's fields; verl puts the reward on the last token."""
    n = len(response)
    return {
        "prompts": PROMPT,
        "responses": response,
        "response_mask": mask,
        "rm_scores": [0.0] * (n - 1) + [reward],
        "rollout_log_probs": [-0.5 * token for token in mask],
        "ref_log_prob": [-0.25] * n,
    }


ROWS = {
    "b_1_0": row([3, 4], [1, 1], 1.0),
    "b_0_0": row([3], [1], 0.0),
    "a_10_0": row([8, 9, 9, 8], [1, 0, 0, 1], 1.0),
    "a_2_0": row([8, 8], [1, 1], 0.5),
}


def groups(monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any], **options: Any) -> dict[str, Any]:
    from gradstore.trainer.verl import transfer

    monkeypatch.setattr(transfer, "tq", Queue(rows))
    names = {"a": "first", "b": "second"}
    return transfer.groups_of(list(rows), names, **{"logprobs": False, **options})


def test_groups_and_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts are in the order of their numbers; a group that the policy wrote alone has no mask."""
    found = groups(monkeypatch, ROWS, logprobs=True, reference=True)
    assert (found["a"].problem_id, found["b"].problem_id) == ("first", "second")
    np.testing.assert_array_equal(found["a"].prompt_ids, PROMPT)
    assert [response.tolist() for response in found["a"].responses] == [[8, 8], [8, 9, 9, 8]]
    assert found["a"].rewards.tolist() == [0.5, 1.0]
    assert [mask.tolist() for mask in found["a"].masks] == [[True, True], [True, False, False, True]]
    assert found["a"].n_written.tolist() == [2, 2]
    assert [given.tolist() for given in found["a"].logprobs] == [[-0.5, -0.5], [-0.5, 0, 0, -0.5]]
    assert [given.tolist() for given in found["a"].reference_logprobs] == [[-0.25] * 2, [-0.25] * 4]
    assert found["b"].masks is None
    bare = groups(monkeypatch, ROWS)
    assert bare["a"].logprobs is None
    assert bare["a"].reference_logprobs is None


def test_versions() -> None:
    from gradstore.trainer.verl.transfer import versions_of

    tags = [{"min_global_steps": 2, "max_global_steps": 3}, {"min_global_steps": 2, "max_global_steps": 2}]
    assert versions_of(tags) == {2, 3}
    assert versions_of([{"min_global_steps": None, "max_global_steps": None}, {}]) == set()


def test_several_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that goes on from a summary gives a sequence with a prompt of its own. verl takes the reward of a
    rollout's last output, and gives its advantage to all."""
    later = {**row([4, 4, 4], [1, 1, 0], 1.0), "prompts": [9, 9]}
    found = groups(monkeypatch, {**ROWS, "b_1_1": later, "b_1_0": row([3, 4], [1, 1], 0.25)})["b"]
    assert [response.tolist() for response in found.responses] == [[3], [3, 4], [4, 4, 4]]
    assert [prompt.tolist() for prompt in found.prompts] == [PROMPT, PROMPT, [9, 9]]
    assert found.rollout_of.tolist() == [0, 1, 1]
    assert found.rewards.tolist() == [0.0, 1.0]
    assert found.n_written.tolist() == [1, 2, 2]
    assert groups(monkeypatch, ROWS)["b"].rollout_of is None
    assert groups(monkeypatch, ROWS)["b"].prompts is None
