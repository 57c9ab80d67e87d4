"""The node `gradstore` of a configuration in verl's form, read without verl."""

import re
from pathlib import Path
from typing import Any

import pytest

from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.selecting.diversity import Diversity
from gradstore.errors import RequestError
from gradstore.trainer.verl.settings import VerlSettings


def read(**node: Any) -> VerlSettings:
    """The settings of a configuration with verl's defaults, as far as they matter here."""
    rollout = {"n": 6, "name": "vllm", "calculate_log_probs": True, "temperature": 1}
    actor = {"strategy": "fsdp2", "fsdp_config": {}}
    config = {
        "gradstore": {"store": "run/store", "selected": 4, "steps": 3, **node},
        "data": {"train_batch_size": 8, "val_files": "val.parquet", "dataloader_num_workers": 0},
        "trainer": {"total_training_steps": None},
        "algorithm": {},
        "actor_rollout_ref": {"rollout": rollout, "actor": actor, "model": {}},
    }
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
