"""verl's own reward manager awaits the judge: as many questions under way as there are responses."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.judge_server import Endpoint

pytestmark = pytest.mark.verl

N = 48
"""More than a thread pool of verl's takes at a time."""


class _Tokenizer:
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return f"\\boxed{{answer {int(ids[0])}}}"


def _response(number: int) -> Any:
    import numpy as np
    import torch
    from verl import DataProto

    info = {"index": number, "reward": "judge", "question": "Why tides?"}
    columns = {"data_source": "s", "reward_model": {"ground_truth": "the tide"}, "extra_info": info}
    return DataProto.from_dict(
        tensors={"responses": torch.tensor([[number, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)},
        non_tensors={name: np.array([value], dtype=object) for name, value in columns.items()},
    )


def test_a_reward_manager_awaits_the_judge(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier opens when all questions are under way, so with a thread for each it would break."""
    from omegaconf import OmegaConf
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GRADSTORE_JUDGE_MODEL", "m")
    monkeypatch.setenv("GRADSTORE_JUDGE_URL", endpoint.url)
    gate = threading.Barrier(N, timeout=60)
    endpoint.answer = lambda number, body: f"{gate.wait()}\nVERDICT: CORRECT"
    function = {"path": "pkg://gradstore.trainer.verl.reward", "name": "compute_score_async", "reward_kwargs": {}}
    config = OmegaConf.create({"reward": {"custom_reward_function": function}})

    async def score_all() -> list[dict[str, Any]]:
        manager = NaiveRewardManager(config, _Tokenizer(), get_custom_reward_fn(config))
        manager.loop = asyncio.get_running_loop()
        return await asyncio.gather(*(manager.run_single(_response(number)) for number in range(N)))

    assert [result["reward_score"] for result in asyncio.run(score_all())] == [1.0] * N
