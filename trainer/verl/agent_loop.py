"""verl's agent loop with a seed for every rollout.

verl sends requests without seeds. A resumed run would then sample other responses, and pick other problems, than an
uninterrupted one. Here a row may have the field `gradstore_seed`; the seed of each of its rollouts depends only on that
field and the rollout's number. The loop itself (single turn, tools, rewards) is verl's.
"""

from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

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


class SeededAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager with seeded workers; set it in actor_rollout_ref.rollout.agent.agent_loop_manager_class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.agent_loop_workers_class = ray.remote(SeededAgentLoopWorker)
