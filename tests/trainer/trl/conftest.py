"""A tiny GRPO run on the processor: a random model, sums for problems, a reward that likes some answers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

N, BATCH, GENERATIONS = 16, 4, 4
POOL = [{"id": f"p{i:02d}", "prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1)} for i in range(N)]
BENCHMARK = [{"id": f"v{i}", "prompt": f"{20 + i}-{i}=", "answer": "20"} for i in range(4)]
SELECTION = {
    "candidates": 8,
    "selected": 4,
    "steps": 2,
    "target_rollouts": 4,
    "spec": {"rank": 4, "dim": 64},
    "accept_coverage": 0.1,
}


def odd(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Share of odd token ids: something in which a random model's responses differ."""
    return [sum(token % 2 for token in ids) / 8 for ids in completion_ids]


@pytest.fixture
def make_trainer(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """make_trainer(selection=None, name="run", cls=..., **settings of GRPOConfig) -> a trainer on the processor."""

    def make(
        selection: dict | None = None,
        name: str = "run",
        cls: Any = None,
        pool: Any = None,
        rewards: Any = odd,
        more: dict | None = None,
        **settings: Any,
    ) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig

        from gradstore.trainer.trl import SelectingGRPOTrainer

        usual = {
            "per_device_train_batch_size": BATCH * GENERATIONS,
            "num_generations": GENERATIONS,
            "max_completion_length": 8,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 4,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "beta": 0.0,
            "seed": 5,
            "disable_tqdm": True,
        }
        args = GRPOConfig(str(tmp_path / name / "out"), **{**usual, **settings})
        chosen = {} if selection is None else {"store": tmp_path / name / "store", "benchmarks": {"bench": BENCHMARK}}
        given = {} if selection is None else {"selection": chosen | selection}
        return (cls or SelectingGRPOTrainer)(
            model=copy.deepcopy(tiny_model),
            reward_funcs=rewards,
            args=args,
            train_dataset=Dataset.from_list(pool or POOL),
            processing_class=copy.deepcopy(tiny_tokenizer),
            **given,
            **(more or {}),
        )

    return make
