"""A judge and a server that answers it as a test says."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradstore.trainer.sampling.judge import Judge, JudgeSettings
from tests.trainer.judge_server import KEY, Endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("GRADSTORE_JUDGE_URL", raising=False)
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def judge(endpoint: Endpoint, tmp_path: Path) -> Iterator[Callable[..., Judge]]:
    """judge(**settings) -> a judge at the endpoint; `equal` is its rule."""
    made: list[Judge] = []

    def make(equal: Any = None, **settings: Any) -> Judge:
        given = {"model": "m", "base_url": endpoint.url, "cache": str(tmp_path / "verdicts.sqlite"), "timeout": 5.0}
        made.append(Judge(JudgeSettings(**(given | settings)), equal))
        return made[-1]

    yield make
    for one in made:
        one.close()
