"""DAPO's overlong shaping: the formula, and the same rewards wherever rollouts are made."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.engine.rollouts import read_rollouts
from gradstore.errors import RequestError
from gradstore.settings import read
from gradstore.trainer.local.policy import LocalPolicy
from gradstore.trainer.local.settings import RunSettings, Sampling
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from gradstore.trainer.sampling.overlong import penalties
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout

VOWELS = Reward("vowels", lambda record, response, rollout_index: float(sum(c in "aeiou" for c in response) > 1))
PROBLEMS = [{"id": f"p{j}", "prompt": f"{j} plus {j + 1} ="} for j in range(3)]
L_MAX, BUFFER = 24, 10


def published(length: int, l_max: int, l_cache: int) -> float:
    """arXiv 2503.14476, equation 13."""
    if length <= l_max - l_cache:
        return 0.0
    return (l_max - l_cache - length) / l_cache if length <= l_max else -1.0


def test_penalties_are_the_published_formula() -> None:
    """Times the penalty's weight; nothing without a buffer."""
    lengths = list(range(41))
    for buffer in (1, 7, 30):
        wanted = [0.5 * published(length, 30, buffer) for length in lengths]
        np.testing.assert_allclose(penalties(lengths, 30, buffer, 0.5), wanted, atol=1e-15)
    assert not penalties(lengths, 30, 0).any()


def test_rollout_files_and_the_trainer_pay_alike(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """What is sketched from a file must be what the trainer trains on; the file says how its rewards came about."""
    model = copy.deepcopy(tiny_model)
    shaping = {"overlong_buffer": BUFFER, "overlong_penalty": 0.5}
    policy = LocalPolicy(model, tiny_tokenizer, VOWELS, Sampling(max_new_tokens=L_MAX, **shaping))
    plain = LocalPolicy(model, tiny_tokenizer, VOWELS, Sampling(max_new_tokens=L_MAX))
    for group, bare in zip(policy.roll_out(PROBLEMS, 8, seed=3), plain.roll_out(PROBLEMS, 8, seed=3), strict=True):
        own = [0.5 * published(len(response), L_MAX, BUFFER) for response in group.responses]
        assert min(own) < 0
        np.testing.assert_allclose(group.rewards, bare.rewards + own)

    backend, out = TransformersBackend(model, tiny_tokenizer), tmp_path / "r.jsonl"
    rollout(PROBLEMS, backend, VOWELS, out, n=8, max_new_tokens=L_MAX, **shaping)
    rows = [row for group in read_rollouts(out).rollouts() for row in group]
    for row in rows:
        assert row.response_ids is not None
        added = 0.5 * published(len(row.response_ids), L_MAX, BUFFER)
        assert row.extra.get("reward_overlong", 0.0) == pytest.approx(added)
        assert row.reward == pytest.approx(VOWELS({"id": "p"}, row.response or "", 0) + added)
    assert {row.extra.get("reward_overlong") for row in rows} - {None}
    assert not any(record["extra"] for record in read_rollouts(out).records()), "a penalty is no part of a problem"
    settings = json.loads((tmp_path / "r.jsonl.settings.json").read_text())
    assert (settings["overlong_buffer"], settings["overlong_penalty"]) == (BUFFER, 0.5)
    with pytest.raises(RequestError, match="overlong_buffer was 10, now None"):
        rollout(PROBLEMS, backend, VOWELS, out, n=8, max_new_tokens=L_MAX)


def test_settings_are_checked_and_have_short_names() -> None:
    """A buffer longer than the response would penalise every answer."""
    where = {"model": "m", "pool": "p", "out": "o", "rounds": {"selected": 4, "train_batch": 4, "steps": 1}}
    found = read(RunSettings, {**where, "max_new_tokens": 64, "overlong_buffer": 16, "overlong_penalty": 0.5}, "")
    assert (found.sampling.overlong_buffer, found.sampling.overlong_penalty) == (16, 0.5)
    for changed, message in (
        ({"overlong_buffer": 65}, "overlong_buffer is 65 tokens, expected at most max_new_tokens, 64"),
        ({"overlong_buffer": -1}, "overlong_buffer is -1"),
        ({"overlong_buffer": 8, "overlong_penalty": 0}, "overlong_penalty is 0"),
    ):
        with pytest.raises(RequestError, match=message):
            Sampling(max_new_tokens=64, **changed)
