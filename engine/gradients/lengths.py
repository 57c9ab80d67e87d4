"""Test sequences that check a policy's micro-batches at the lengths of the data.

A sliding window, or rope frequencies that change past a trained length, have an effect on long sequences only. Padding
may change results there: of a prompt beside a longer one, or of a sequence in a longer batch. The test covers both.

B sequences, T tokens of a sequence, N response tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradstore.engine.gradients.microbatch import MicroBatch, WeightedSequence, padded_width

SHORTEST = 16
"""Tokens of the first sequences checked; each further check doubles them."""


def reach(rollouts: Sequence[WeightedSequence]) -> int:
    """Tokens of the longest padded prompt plus the longest padded response; 0 without rollouts."""
    if not rollouts:
        return 0
    longest_prompt = max(len(rollout.prompt_ids) for rollout in rollouts)
    return padded_width(longest_prompt) + padded_width(max(len(rollout.response_ids) for rollout in rollouts))


def samples(length: int, n_vocabulary: int) -> list[WeightedSequence]:
    """Two prompts of length / 2 and length / 8 fixed random tokens, each with a short and a long response.

    The four sequences have 1, 3/4, 1/2 and 3/16 times `length` tokens.
    """
    ids = np.random.default_rng(length).integers(0, n_vocabulary, 2 * length)
    long, short = ids[: length // 2], ids[-(length // 8) :]
    sizes = [(0, long, length // 2), (0, long, length // 4), (1, short, 3 * length // 8), (1, short, length // 16)]
    return [
        WeightedSequence(problem, j, prompt, ids[length // 2 + j :][:size], 1.0, None)
        for j, (problem, prompt, size) in enumerate(sizes)
    ]


def frequencies_change_at(config: Any) -> int | None:
    """Length of a forward up to which rotary embeddings of type longrope use their short factors; None without them.

    transformers chooses the factors by the longest position in a forward, the same for all its sequences
    (`modeling_rope_utils.dynamic_rope_update`).
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for settings in (rope, *(own for own in rope.values() if isinstance(own, dict))):
        if settings.get("rope_type", settings.get("type")) == "longrope":
            at = settings.get("original_max_position_embeddings")
            return at or getattr(config, "original_max_position_embeddings", None)
    return None


def alone(batch: MicroBatch) -> Iterator[MicroBatch]:
    """Each sequence of a batch without shared prompts as a micro-batch of its own, up to its last written token."""
    ends_BN = batch.written_BN * torch.arange(1, batch.written_BN.shape[1] + 1, device=batch.written_BN.device)
    for i, (first, end) in enumerate(zip(batch.first_B.tolist(), ends_BN.amax(1).tolist(), strict=True)):
        row, n = slice(i, i + 1), max(1, end)
        cut: dict[str, Any] = {
            name: None if grid_BN is None else grid_BN[row, :n]
            for name, grid_BN in (
                ("targets_BN", batch.targets_BN),
                ("weights_BN", batch.weights_BN),
                ("written_BN", batch.written_BN),
                ("behaviour_BN", batch.behaviour_BN),
                ("kl_scales_BN", batch.kl_scales_BN),
                ("reference_BN", batch.reference_BN),
            )
        }
        yield replace(
            batch,
            token_ids_BT=batch.token_ids_BT[row, : first + n],
            problem_B=batch.problem_B[row],
            rollout_B=batch.rollout_B[row],
            first_B=batch.first_B[row],
            **cut,
        )
