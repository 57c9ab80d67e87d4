"""Settings are read from verl's configuration, and what cannot work is told before anything starts."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gradstore.engine.gradients.objectives import Objective
from gradstore.errors import RequestError

pytestmark = pytest.mark.verl

DOCS = Path(__file__).parents[3] / "docs" / "verl.md"
GIVEN = [
    "data.train_files=pool.parquet",
    "data.val_files=val.parquet",
    "data.train_batch_size=8",
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.rollout.n=6",
    "gradstore.store=run/store",
    "gradstore.selected=4",
    "gradstore.steps=3",
]


def settings(*more: str) -> Any:
    return _of([*GIVEN, *more])


def _of(overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_module

    from gradstore.trainer.verl.entry import _ours
    from gradstore.trainer.verl.settings import VerlSettings

    with initialize_config_module("verl.trainer.config", version_base=None):
        return VerlSettings.of(compose("ppo_trainer", overrides=[_ours(text) for text in overrides]))


def test_what_verl_says_already() -> None:
    found = settings()
    assert (found.rounds.train_batch, found.rounds.rollouts, found.rounds.selected) == (8, 6, 4)
    assert found.benchmarks == {"validation": ["val.parquet"]}
    assert found.store.is_absolute()
    assert found.rounds.spec.basis == "fitted"
    assert found.logprobs, "nothing is scaled or cut off by default"
    assert found.rounds.spec.objective == Objective("mean", "seq-mean-token-sum"), "verl averages over tokens"
    assert "adv_estimator=gae" in found.notes[0]
    grpo = settings("algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=True")
    assert grpo.rounds.spec.objective == Objective("mean_std", "seq-mean-token-sum", kl_beta=0.001)
    assert grpo.notes == ()
    assert not settings("actor_rollout_ref.rollout.temperature=0.7").logprobs
    mixed = "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32}"
    assert (found.probe_rank, settings(mixed).probe_rank) == (64, None), "verl computes in bfloat16 by default"


def test_settings_of_its_own() -> None:
    found = settings(
        "gradstore.benchmarks={amc: [one.parquet, two.parquet], math: three.parquet}",
        "gradstore.spec.dim=128",
        "gradstore.spec.objective=grpo",
        "gradstore.quotas={gsm8k: 0.5, math: 0.5}",
        "gradstore.diversity={method: mmr, relevance: 0.7}",
        "gradstore.refresh=2",
    )
    assert found.benchmarks == {"amc": ["one.parquet", "two.parquet"], "math": ["three.parquet"]}
    assert (found.rounds.spec.dim, found.rounds.spec.objective.advantage) == (128, "mean_std")
    assert found.rounds.quotas == {"gsm8k": 0.5, "math": 0.5}
    assert found.rounds.diversity is not None
    assert found.rounds.diversity.relevance == 0.7
    assert found.rounds.refresh == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataloader_num_workers=8", "set data.dataloader_num_workers=0"),
        ("actor_rollout_ref.actor.strategy=fsdp", "actor_rollout_ref.actor.strategy=fsdp2"),
        ("model_engine=megatron", "verl.model_merger merge --backend megatron"),
        ("trainer.v1.trainer_mode=separate_async", "set trainer.v1.trainer_mode=colocate_async"),
        ("actor_rollout_ref.actor.fsdp_config.offload_policy=True", "param_offload=True"),
        ("algorithm.filter_groups={enable: True}", "selector=dynamic"),
        ("gradstore.train_batch_size=16", "data.train_batch_size is 8"),
        ("gradstore.selectr=cosine", "did you mean 'selector'"),
        ("gradstore.spec.objective={kl_beta: 0.04}", "set actor_rollout_ref.actor.use_kl_loss=True"),
        ("gradstore.spec.rnk=4", "gradstore.spec.rnk is not known"),
        ("gradstore.diversity={metod: mmr}", "gradstore.diversity.metod is not known; did you mean 'method'"),
        ("gradstore.selected=5", "not a multiple of the 5 selected"),
        ("gradstore.store=null", "gradstore.store is missing"),
        ("gradstore.window=100000", "total_storage_size"),
        ("trainer.total_training_steps=1000", "leave the former out"),
        ("actor_rollout_ref.model.use_fused_kernels=True", "model.use_fused_kernels=False"),
        ("actor_rollout_ref.rollout.name=sglang", "gradstore.seeded=false"),
        ("actor_rollout_ref.actor.use_dynamic_bsz=False", "verl's configuration: [actor] Please set at least one of"),
        ("data.train_batch=8", "verl's configuration: Could not override 'data.train_batch'"),
    ],
)
def test_refused_before_anything_starts(override: str, message: str) -> None:
    """Half an hour into a cluster job is late to hear of a typing error; and none may start Ray."""
    import ray

    from gradstore.trainer.verl import main

    if override.startswith("algorithm.filter_groups"):
        override = f"+{override}"
    with pytest.raises(RequestError, match=re.escape(message)):
        main([*GIVEN, override])
    assert not ray.is_initialized()


def test_documented_command() -> None:
    """The command in docs/verl.md is one that verl and the rounds accept."""
    block = re.search(r"    (gradstore train --backend verl \\\n(?:      .*\n)+?)\n", DOCS.read_text())
    assert block is not None
    words = shlex.split(block.group(1).replace("\\\n", " "))
    assert words[:4] == ["gradstore", "train", "--backend", "verl"]
    found = _of(words[4:])
    rounds = found.rounds.for_pool(200_000)
    assert (rounds.candidates, rounds.selected, rounds.train_batch, rounds.steps) == (5120, 256, 128, 10)
    assert (rounds.rollouts, rounds.target_rollouts, rounds.rounds) == (128, 16, 100)
    assert found.benchmarks == {"amc22": ["amc22.parquet"]}


@pytest.mark.parametrize(
    ("override", "better"),
    [
        ("reward.custom_reward_function.path=pkg://trainer.verl_reward", "pkg://gradstore.trainer.verl.reward"),
        (
            "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=trainer.verl.agent_loop.SeededAgentLoopManager",
            "gradstore.trainer.verl.agent_loop.SeededAgentLoopManager",
        ),
    ],
)
def test_old_module_names_are_refused(override: str, better: str) -> None:
    """verl would say that there is no module of that name, or take another package's."""
    with pytest.raises(RequestError, match=re.escape(f"write {better}")):
        settings(override)
