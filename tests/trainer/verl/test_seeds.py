"""Seeds of requests: one for each turn of a rollout, the same in every run."""

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.verl


@pytest.mark.parametrize("name", ["SeededClient", "SeededResumingClient"])
def test_a_seed_for_each_turn(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With one seed for all turns each would draw the random numbers of the one before. A response that was broken off
    goes on by a request of its own, which needs new ones, too."""
    from types import SimpleNamespace

    from verl.workers.rollout.llm_server import LLMServerClient

    from gradstore.trainer.verl import agent_loop

    asked: list[tuple[int, Any]] = []

    async def generate(self: Any, request_id: str, *, prompt_ids: list[int], sampling_params: dict, **more: Any) -> Any:
        asked.append((len(prompt_ids), sampling_params.get("seed")))
        stop = "abort" if len(prompt_ids) == 20 else "completed"
        return SimpleNamespace(
            token_ids=[1, 2],
            log_probs=[0.0, 0.0],
            routed_experts=None,
            num_preempted=0,
            stop_reason=stop,
            extra_fields={},
        )

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    client = object.__new__(getattr(agent_loop, name))
    client.config = {}
    client._configured_response_length = lambda: None
    given = {"temperature": 1.0, "seed": 7}

    def ask(n_tokens: int, params: dict[str, Any]) -> None:
        asyncio.run(client.generate("r", prompt_ids=list(range(n_tokens)), sampling_params=params))

    for n_tokens in (10, 30, 10):
        ask(n_tokens, given)
    seeds = [seed for _, seed in asked]
    assert seeds[0] == seeds[2] != seeds[1]
    assert given == {"temperature": 1.0, "seed": 7}
    asked.clear()
    if name == "SeededResumingClient":
        ask(20, given)
        (first, one), (second, other) = asked
        assert (first, second) == (20, 22)
        assert one != other
        asked.clear()
    ask(10, {"temperature": 1.0})
    assert asked == [(10, None)]
