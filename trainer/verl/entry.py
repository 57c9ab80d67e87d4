"""Entry points for verl: a command, and verl's task runner with gradstore's trainer class.

Your own entry module needs two lines:

    from gradstore.trainer.verl import task_runner
    run_ppo(config, task_runner_class=task_runner())

verl itself is not modified: its task runner looks trainers up in a registry, where ours replace "sync" and
"colocate_async".
"""

import logging
from collections.abc import Sequence
from typing import Any

from gradstore.errors import GradstoreError, RequestError
from gradstore.trainer.verl.settings import NODE, VerlSettings

log = logging.getLogger(__name__)

AGENT_LOOP_MANAGER = "gradstore.trainer.verl.agent_loop.SeededAgentLoopManager"


def main(overrides: Sequence[str]) -> None:
    """Train with verl; gradstore picks each round's problems: `gradstore train --backend verl OVERRIDE...`.

    overrides: those of verl's own command, and `gradstore.NAME=VALUE` (settings.py). Ray is started if none runs, and
    stopped afterwards; a Ray that is already running is used and left running. RequestError for invalid settings and
    if verl is not installed. If the run fails, its error is raised.
    """
    try:
        import ray
        import verl
        from hydra import compose, initialize_config_module
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise RequestError(f"training with verl needs verl 0.9 (pip install 'gradstore[verl]'): {error}") from None
    if not verl.__version__.startswith("0.9."):
        raise RequestError(
            f"verl {verl.__version__} is installed, this integration is for 0.9.x; "
            "verl 0.7.x takes gradstore.trainer.verl.sampler_07 (docs/verl.md)"
        )
    from verl.trainer.main_ppo import auto_set_device, need_critic, need_reference_policy, run_ppo, validate_config

    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=[_ours(override) for override in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise RequestError(f"verl's configuration: {' '.join(str(error).split())}") from None
    VerlSettings.of(config)  # report a mistake before anything starts
    auto_set_device(config)
    reference, critic = need_reference_policy(config), need_critic(config)
    try:
        validate_config(config=config, use_reference_policy=reference, use_critic=critic)
    except (HydraException, AssertionError, ValueError, NotImplementedError) as error:
        raise RequestError(f"verl's configuration: {_last_cause(error)}") from None
    was_running = ray.is_initialized()
    try:
        run_ppo(config, task_runner_class=task_runner())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GradstoreError):
            raise error.cause from None
        raise
    finally:
        if not was_running:
            ray.shutdown()


def task_runner(base: Any = None) -> Any:
    """A Ray actor class to pass to `run_ppo`: verl's task runner, training with rounds.

    base: the user's own task runner, as a Ray actor class or a plain class; None: verl's.
    """
    import ray
    from verl.trainer.main_ppo import TaskRunnerV1

    given: Any = base or TaskRunnerV1
    plain: Any = given.__ray_metadata__.modified_class if hasattr(given, "__ray_metadata__") else given

    class SelectingTaskRunner(plain):
        """verl's task runner, with our classes as its trainers."""

        def run(self, config: Any) -> None:
            from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

            from gradstore.trainer.verl.selecting_trainer import SelectingAheadTrainer, SelectingTrainer

            _seed_rollouts(config)
            TRAINER_REGISTRY |= {"sync": SelectingTrainer, "colocate_async": SelectingAheadTrainer}
            super().run(config)

    return ray.remote(SelectingTaskRunner)


def _last_cause(error: BaseException) -> str:
    """Message of the innermost cause (hydra wraps errors), on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _ours(override: str) -> str:
    """Turn `gradstore.x=1` into `++gradstore.x=1`, because verl's configuration has no such node."""
    return f"++{override}" if override.startswith(f"{NODE}.") else override


def _seed_rollouts(config: Any) -> None:
    """Set our agent loop manager in verl's configuration, unless the user has set one."""
    from omegaconf import open_dict

    if not VerlSettings.of(config).seeded:
        return
    agent = config.actor_rollout_ref.rollout.agent
    named = agent.get("agent_loop_manager_class")
    if named:
        log.warning(
            "%s makes the rollouts: they are seeded only if it does what gradstore.trainer.verl.agent_loop does; "
            "without seeds a resumed run may pick other problems",
            named,
        )
        return
    with open_dict(config):
        agent.agent_loop_manager_class = AGENT_LOOP_MANAGER
