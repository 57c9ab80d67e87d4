"""The node `gradstore` of a configuration in verl's form, read without verl."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.selecting.diversity import Diversity
from gradstore.errors import RequestError
from gradstore.trainer.verl.settings import VerlSettings


def read(**node: Any) -> VerlSettings:
    """The settings of a configuration with verl's defaults, as far as they matter here."""
    return reading({}, **node)


def reading(verl: dict[str, Any], **node: Any) -> VerlSettings:
    """The same, with some of verl's own settings by dotted name."""
    rollout = {"n": 6, "name": "vllm", "calculate_log_probs": True, "temperature": 1}
    actor = {"strategy": "fsdp2", "fsdp_config": {}}
    config: dict[str, Any] = {
        "gradstore": {"store": "run/store", "selected": 4, "steps": 3, **node},
        "data": {"train_batch_size": 8, "val_files": "val.parquet", "dataloader_num_workers": 0},
        "trainer": {"total_training_steps": None},
        "algorithm": {},
        "actor_rollout_ref": {"rollout": rollout, "actor": actor, "model": {}, "ref": {}},
    }
    for dotted, value in verl.items():
        *path, name = dotted.split(".")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return VerlSettings.of(config)


def test_defaults_are_verls() -> None:
    found = read()
    assert (found.rounds.train_batch, found.rounds.rollouts, found.rounds.spec.basis) == (8, 6, "fitted")
    assert (found.benchmarks, found.probe_rank, found.logprobs) == ({"validation": ["val.parquet"]}, 64, True)
    assert found.store == Path("run/store").absolute()


def test_nodes_inside_the_node() -> None:
    """null is verl's word for what is not given; a preset's name is an objective."""
    found = read(
        spec={"dim": 128, "rank": None, "objective": "grpo"},
        diversity={"relevance": 0.7},
        quotas={"math": 0.5},
        benchmarks={"amc": ["one.parquet", "two.parquet"], "math": "three.parquet"},
        num_selections=7,
        window=None,
        seeded=False,
    )
    assert (found.rounds.spec.dim, found.rounds.spec.rank, found.rounds.spec.basis) == (128, 16, "fitted")
    assert found.rounds.spec.objective == Objective("mean_std")
    assert (found.rounds.diversity, found.rounds.quotas) == (Diversity(relevance=0.7), {"math": 0.5})
    assert found.benchmarks == {"amc": ["one.parquet", "two.parquet"], "math": ["three.parquet"]}
    assert (found.rounds.rounds, found.rounds.window, found.seeded) == (7, 256, False)
    assert read(spec={"objective": {"advantage": "rloo"}}).rounds.spec.objective == Objective("rloo")


ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GRPO = {"algorithm.adv_estimator": "grpo", f"{ACTOR}.loss_agg_mode": "token-mean"}
CLIPS = {f"{ACTOR}.clip_ratio": 0.2, f"{ACTOR}.clip_ratio_low": 0.2, f"{ACTOR}.clip_ratio_high": 0.28}
KL = {f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.kl_loss_coef": 0.04, f"{ACTOR}.kl_loss_type": "low_var_kl"}


@pytest.mark.parametrize(
    ("verl", "node", "expected"),
    [
        (GRPO, {}, Objective("mean_std", "seq-mean-token-sum")),
        ({**GRPO, "algorithm.norm_adv_by_std_in_grpo": False}, {}, Objective("mean", "seq-mean-token-sum")),
        ({**GRPO, f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean"}, {}, Objective("mean_std", "seq-mean-token-mean")),
        ({"algorithm.adv_estimator": "rloo"}, {}, Objective("rloo")),
        ({f"{ROLLOUT}.temperature": 0.7}, {}, Objective(temperature=0.7)),
        (GRPO, {"objective": "gradalign"}, Objective()),
        (GRPO, {"objective": {"advantage": "rloo"}}, Objective("rloo", "seq-mean-token-sum")),
        ({**GRPO, **CLIPS}, {}, Objective("mean_std", "seq-mean-token-sum")),
        ({**GRPO, f"{ACTOR}.policy_loss": {"loss_mode": "gspo"}}, {}, Objective("mean_std", "seq-mean-token-sum")),
        ({**GRPO, **KL}, {}, Objective("mean_std", "seq-mean-token-sum", kl_beta=0.04)),
        ({**GRPO, **KL}, {"objective": {"kl_beta": 0.1}}, Objective("mean_std", "seq-mean-token-sum", kl_beta=0.1)),
        ({**GRPO, **KL}, {"objective": {"kl_beta": 0}}, Objective("mean_std", "seq-mean-token-sum")),
        ({"actor_rollout_ref.model.lora_rank": 8}, {"objective": {"kl_beta": 0.1}}, Objective(kl_beta=0.1)),
    ],
)
def test_the_objective_follows_verls(verl: dict[str, Any], node: dict[str, Any], expected: Objective) -> None:
    """A round asks which problems move the policy under the loss that trains it; what is given here wins."""
    found = reading(verl, spec=node)
    assert found.rounds.spec.objective == expected
    assert found.notes == ()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("vanilla", {"ratio_cap": 3.0}),
        ("gspo", {"ratio": "sequence"}),
        ("cispo", {"off_policy": "cispo"}),
    ],
)
def test_ratios_follow_verls_loss(mode: str, expected: dict[str, Any]) -> None:
    """Off policy the losses differ, and so do their ratios and bounds."""
    verl = {**GRPO, **CLIPS, f"{ACTOR}.clip_ratio_c": 3.0, f"{ACTOR}.policy_loss": {"loss_mode": mode}}
    found = asdict(reading(verl, spec={"objective": {"importance": True}}).rounds.spec.objective)
    known = {name: value for name, value in expected.items() if name in found}
    expected = {"importance": True, "clip_low": 0.2, "clip_high": 0.28, **known}
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("verl", "note"),
    [
        ({"algorithm.adv_estimator": "gae"}, "adv_estimator=gae has no counterpart"),
        ({f"{ACTOR}.policy_loss": {"loss_mode": "kl_cov"}}, "loss_mode=kl_cov"),
        ({**KL, f"{ACTOR}.kl_loss_type": "mse"}, "kl_loss_type=mse"),
        ({"algorithm.use_kl_in_reward": True}, "rewards without the KL penalty"),
        ({f"{ACTOR}.entropy_coeff": 0.01}, "no entropy term"),
    ],
)
def test_what_the_objective_leaves_out_is_said(verl: dict[str, Any], note: str) -> None:
    found = reading(verl)
    assert len(found.notes) == 1
    assert note in found.notes[0]
    assert found.rounds.spec.objective == Objective()


def test_probes_leave_the_kl_term_out() -> None:
    """A probe has no KL term; a run with one, and a selector by probes, goes on without it and says so."""
    found = reading(KL, selector="cosine:0.5+snr:0.5")
    assert not found.rounds.spec.objective.kl_beta
    assert "probes" in found.notes[0]


@pytest.mark.parametrize(
    ("verl", "node", "message"),
    [
        ({f"{ACTOR}.strategy": "megatron"}, {}, "verl.model_merger merge --backend megatron"),
        ({f"{ACTOR}.strategy": "veomni"}, {}, "set model_engine=dp actor_rollout_ref.actor.strategy=fsdp2"),
        ({"trainer.v1.trainer_mode": "separate_async"}, {}, "set trainer.v1.trainer_mode=colocate_async"),
        ({"trainer.v1.trainer_mode": "mine"}, {}, "rounds know sync and colocate_async"),
        ({"trainer.use_v1": False}, {}, "set trainer.use_v1=True"),
        (
            {"trainer.v1.trainer_mode": "colocate_async", "trainer.v1.colocate_async.num_warmup_batches": 3},
            {},
            "num_warmup_batches is 3, gradstore.steps (iters_per_select) 3: two rounds would meet one policy",
        ),
        ({}, {"objective": {"kl_beta": 0.1}}, "set actor_rollout_ref.actor.use_kl_loss=True"),
        (KL, {"objective": {"temperature": 0.7}}, "kl_beta at temperature 0.7, but verl's reference works at"),
    ],
)
def test_refused(verl: dict[str, Any], node: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        reading(verl, spec=node)
    assert "\n" not in str(caught.value)


def test_generating_ahead() -> None:
    ahead = {"trainer.v1.trainer_mode": "colocate_async", "trainer.v1.colocate_async.num_warmup_batches": 2}
    assert reading(ahead).asynchronous
    assert not read().asynchronous


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"selectr": "cosine"}, "gradstore.selectr is not known; did you mean 'selector'?"),
        ({"seded": False}, "gradstore.seded is not known; did you mean 'seeded'?"),
        ({"probe_rnk": 8}, "gradstore.probe_rnk is not known; did you mean 'probe_rank'?"),
        ({"seeded": "perhaps"}, "gradstore.seeded is 'perhaps', expected true or false"),
        ({"spec": {"rnk": 4}}, "gradstore.spec.rnk is not known; did you mean 'rank'?"),
        (
            {"spec": {"objective": {"kl_bta": 1}}},
            "gradstore.spec.objective.kl_bta is not known; did you mean 'kl_beta'?",
        ),
        ({"spec": {"objective": "gpo"}}, "gradstore.spec.objective: objective 'gpo' is not one of gradalign"),
        ({"spec": {"dim": "wide"}}, "gradstore.spec.dim is 'wide', expected a whole number"),
        ({"spec": {"dim": 0}}, "gradstore.spec: dim is 0, expected at least 1"),
        ({"diversity": {"metod": "mmr"}}, "gradstore.diversity.metod is not known; did you mean 'method'?"),
        ({"train_batch_size": 16}, "data.train_batch_size is 8"),
        ({"train_batch_size": "many"}, "gradstore.train_batch (train_batch_size) is 'many', expected a whole number"),
        ({"rounds": 2, "num_selections": 2}, "gradstore: 'rounds' and 'num_selections' are the same; give one"),
        ({"store": None}, "gradstore.store is missing"),
        ({"ratio": 0.5}, "gradstore: give either `selected`"),
        ({"benchmarks": 3}, "gradstore.benchmarks is 3, expected values by name (each a list (each item a text))"),
    ],
)
def test_mistakes(node: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        read(**node)
    assert "\n" not in str(caught.value)
