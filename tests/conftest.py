"""A tokenizer of bytes, a random model of 90,000 parameters that speaks it, and a small store."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from benchmarks import tiny
from tests.s3 import S3, s3_server


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One token per byte, four special tokens, a chat template; no download."""
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> Any:
    """Qwen2 of 2 layers, hidden 64, with random weights of a fixed seed, in eval mode."""
    return tiny.model(tiny_tokenizer)


@pytest.fixture(scope="session")
def small_store() -> Callable[[Path], Path]:
    """small_store(path) -> the path, where there is a store then: a pool of eight problems, a benchmark of two."""

    def make(path: Path) -> Path:
        random = np.random.default_rng(0)
        store = gradstore.create(path, dim=32, fingerprint={"objective": {"importance": False}})
        for name, n in (("pool", 8), ("bench", 2)):
            ids = [f"p{i}" for i in range(n)]
            store.add_problems(name, [{"id": problem, "prompt": "?"} for problem in ids])
            for step in (0, 1):
                with store.writer(name, step=step) as writer:
                    writer.append(ids, random.normal(size=(n, 32)).astype(np.float32))
        return path

    return make


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """An S3 server with an empty bucket, to which the environment leads; and a cache of its own."""
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
        yield server
