"""Expected accuracy without sampling: the policy's probability of each problem's right answer.

The share of right answers at temperature 1 is the probability of the answer's tokens and the end token; one forward
pass computes it. It has no sampling noise, so curves differ only by training. (The verifier also accepts a few other
spellings, with spaces or leading zeros; they do not count here.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.hooks import evaluating
from gradstore.engine.gradients.logprobs import response_logprobs
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.tokens import prompt_ids, response_ids


def expected_accuracy(model: Any, tokenizer: Any, records: Sequence[Mapping[str, Any]]) -> float:
    """Mean probability of the problems' ground truths as answers at temperature 1."""
    return float(np.exp(answer_logprobs(model, tokenizer, records)).mean())


@torch.no_grad()
def answer_logprobs(model: Any, tokenizer: Any, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Log-probability of each problem's ground truth as an answer at temperature 1, float64 [P]."""
    groups = []
    for record in records:
        prompt = np.asarray(prompt_ids(tokenizer, record["prompt"], record["id"]), np.int64)
        answer = np.asarray(response_ids(tokenizer, record["ground_truth"], append_eos=True), np.int64)
        groups.append(Group(record["id"], prompt, [answer], np.zeros(1)))
    with evaluating(model):
        found = response_logprobs(GradientPass(model, GradientSpec()), groups)
    return np.array([own[0].astype(float).sum() for own in found])
