"""One embedded Ray for all tests of the folder, with a model folder and rollouts for its workers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.engine.cluster.ray_start import connected


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Any]:
    """Ray, with room for four workers of one CPU and the actors of a store."""
    with connected("local", 8, object_store=200 << 20):
        import ray

        yield ray


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums() -> list[dict[str, Any]]:
    return [{"id": f"p{i}", "prompt": f"{i}+{i}=", "ground_truth": str(2 * i), "source": "sums"} for i in range(40)]


@pytest.fixture(scope="session")
def rollout_file(tmp_path_factory: pytest.TempPathFactory, sums: list[dict[str, Any]]) -> Path:
    """Four rollouts a problem, of different lengths; every fifth problem has no signal."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rollouts") / "r.jsonl"
    rows = [
        {
            "problem_id": problem["id"],
            "prompt": problem["prompt"],
            "response": str(int(random.integers(0, 10 ** (1 + i % 9)))),
            "reward": float(j % 2 if i % 5 else 1),
        }
        for i, problem in enumerate(sums)
        for j in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
