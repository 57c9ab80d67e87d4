"""verl's agent loop with a seed for every rollout.

verl gives no request a seed, so that a resumed run samples other responses than an undisturbed one, and picks others
in consequence. Here a row may carry `gradstore_seed`; each of its rollouts then asks the engine for a seed that depends
on that and on the rollout's number alone. The loop itself (single turn, tools, rewards) is verl's.
"""

from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from gradstore.trainer.sampling.backends import derived_seed

SEED_FIELD = "gradstore_seed"
"""Field of a row: seed of its rollouts, an integer; negative or missing: unseeded."""

_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class SeededAgentLoopWorker(_Worker):
    """Rolls prompts out as verl's worker does, each rollout with its own seed."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **row: Any) -> Any:
        seed = int(row.get(SEED_FIELD, -1))
        if seed >= 0:
            sampling_params = {**sampling_params, "seed": derived_seed(seed, int(row["session_id"]))}
        return await super()._run_agent_loop(sampling_params, trajectory, **row)


class SeededAgentLoopManager(AgentLoopManagerTQ):
    """Named in actor_rollout_ref.rollout.agent.agent_loop_manager_class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.agent_loop_workers_class = ray.remote(SeededAgentLoopWorker)
