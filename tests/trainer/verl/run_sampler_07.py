"""verl 0.7's use of a sampler, as its trainer does it: python run_sampler_07.py STORE OUT.

Draws batches, saves the loader's state before telling the sampler of the step, goes on from the saved state in a new
sampler, and writes down what was drawn. Which verl it runs with is the caller's choice, through PYTHONPATH.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


def main(store: str, out: Path) -> None:
    from verl.experimental.dataset.sampler import AbstractCurriculumSampler

    from gradstore.trainer.verl.sampler_07 import StoreSampler

    dataset = Pool()
    config: dict[str, Any] = {
        "train_batch_size": 2,
        "dataloader_num_workers": 0,
        "gradstore": {"store": store, "selected": 4, "steps": 2, "rollouts": str(out / "rollouts")},
    }
    sampler = StoreSampler(data_source=dataset, data_config=config)
    assert isinstance(sampler, AbstractCurriculumSampler)
    states, undisturbed = [], []
    rows = iter(sampler)
    for _ in range(5):
        drawn = [next(rows) for _ in range(2)]
        undisturbed.append(drawn)
        states.append(json.loads(json.dumps(sampler.state_dict())))
        sampler.update(batch=batch_of(dataset, drawn))
    resumed = []
    for state in states[:-1]:
        other = StoreSampler(data_source=dataset, data_config=config)
        other.load_state_dict(state)
        rows = iter(other)
        resumed.append([next(rows) for _ in range(2)])
    (out / "found.json").write_text(json.dumps({"undisturbed": undisturbed, "resumed": resumed}))


class Pool:
    """verl's dataset as far as a sampler sees it."""

    prompt_key = "prompt"

    def __init__(self) -> None:
        self.dataframe = [
            {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": f"{i}+1="}],
                "reward_model": {"ground_truth": str(i + 1)},
                "extra_info": {"index": i},
            }
            for i in range(12)
        ]

    def __len__(self) -> int:
        return len(self.dataframe)


def batch_of(dataset: Pool, drawn: list[int]) -> Any:
    """Two rollouts of each problem: prompts padded on the left, responses on the right."""
    rows = [row for row in drawn for _ in range(2)]
    prompts = torch.tensor([[0, 5, 6 + row] for row in rows])
    responses = torch.tensor([[8, 9 + j % 2, 0] for j in range(len(rows))])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]] * len(rows))
    scores = torch.tensor([[0.0, float(j % 2), 0.0] for j in range(len(rows))])
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": mask,
        "response_mask": mask[:, 3:],
        "token_level_scores": scores,
        "ref_log_prob": -torch.arange(1.0, 4.0).expand(len(rows), 3) / 8,
    }
    others = {
        "uid": np.array([f"row {row}" for row in rows], dtype=object),
        "extra_info": np.array([dataset.dataframe[row]["extra_info"] for row in rows], dtype=object),
    }
    try:
        from verl import DataProto

        return DataProto.from_dict(tensors=tensors, non_tensors=others)
    except ImportError:
        return SimpleNamespace(batch=tensors, non_tensor_batch=others)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
