"""Expected accuracy without sampling: the policy's probability of each problem's right answer.

The share of right answers at temperature 1 is the probability of the answer's tokens and the end token; one forward
pass computes it. It has no sampling noise, so curves differ only by training. (The verifier also accepts a few other
spellings, with spaces or leading zeros; they do not count here.)

Dimension suffixes: B sequences, T tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradstore.engine.rollouts.tokens import prompt_ids, response_ids


@torch.no_grad()
def expected_accuracy(model: Any, tokenizer: Any, records: Sequence[Mapping[str, Any]]) -> float:
    """Mean probability of the right answer at temperature 1; the problems must have reasoning-gym entries."""
    sequences, n_prompts = [], []
    for record in records:
        prompt = prompt_ids(tokenizer, record["prompt"], record["id"])
        answer = record["extra"]["reasoning_gym"]["answer"]
        sequences.append([*prompt, *response_ids(tokenizer, answer, append_eos=True)])
        n_prompts.append(len(prompt))
    width = max(map(len, sequences))
    ids_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    answer_BT = torch.zeros(len(sequences), width, dtype=torch.bool)
    for b, (ids, n_prompt) in enumerate(zip(sequences, n_prompts, strict=True)):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        answer_BT[b, n_prompt : len(ids)] = True
    ids_BT, answer_BT = ids_BT.to(model.device), answer_BT.to(model.device)
    # Padding is on the right of a causal model, so no attention mask is needed.
    logprobs_BTV = model(input_ids=ids_BT).logits[:, :-1].float().log_softmax(-1)
    logprobs_BT = logprobs_BTV.gather(2, ids_BT[:, 1:, None])[..., 0]
    return float((logprobs_BT * answer_BT[:, 1:]).sum(1).exp().mean())
