"""verl's agent loop with a seed for every rollout.

verl sends requests without seeds. A resumed run would then sample other responses, and pick other problems, than an
uninterrupted one. Here a row may have the field `gradstore_seed`; the seed of each of its rollouts depends only on that
field and the rollout's number, and each request's on that and on the tokens so far: turns of a rollout, and the parts
of one that was broken off, do not draw the same random numbers. The loop itself (turns, tools, rewards) is verl's.
"""

from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from gradstore.trainer.sampling.backends import derived_seed

SEED_FIELD = "gradstore_seed"
"""Field of a row with the seed of its rollouts, an integer; negative or missing: unseeded."""

_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class SeededAgentLoopWorker(_Worker):
    """verl's agent loop worker, with a separate seed for each rollout."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **row: Any) -> Any:
        seed = int(row.get(SEED_FIELD, -1))
        if seed >= 0:
            sampling_params = {**sampling_params, "seed": derived_seed(seed, int(row["session_id"]))}
        return await super()._run_agent_loop(sampling_params, trajectory, **row)


class SeededClient(LLMServerClient):
    """verl's client of the rollout engine; a request's seed depends on the number of tokens before it."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **more: Any
    ) -> Any:
        seed = sampling_params.get("seed")
        if seed is not None:
            sampling_params = {**sampling_params, "seed": derived_seed(int(seed), len(prompt_ids))}
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **more)


class SeededResumingClient(FullyAsyncLLMServerClient, SeededClient):
    """The same for verl's client that goes on with responses that were broken off."""


class SeededAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with seeded workers; set it in actor_rollout_ref.rollout.agent.agent_loop_manager_class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.agent_loop_workers_class = ray.remote(SeededAgentLoopWorker)
