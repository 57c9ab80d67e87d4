"""Batched sampling of many responses per prompt with a shared KV cache: nothing is computed twice.

Rollouts of a problem with the same tokens so far share one row. A prompt is prefilled once; a row is split only when
its rollouts sample different tokens. After a few tokens of free text, every rollout has its own row, as in plain
batched decoding. Short answers of a confident policy cost a fraction of that. Rows whose rollouts have all ended are
dropped.

Each rollout has its own uniform numbers, drawn beforehand; tokens come from them by inverting the cumulative
distribution, in one pass over the vocabulary. So a rollout does not depend on the others in its batch, except by
rounding.

Dimension suffixes: R rollouts, U rows (different beginnings), S tokens of prompts and responses, T response tokens,
V vocabulary, K blocks of it, B tokens of a block.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gradstore.engine.gradients.layers import base_of

DEAD_SHARE = 0.125
"""Ended rows are dropped from the cache when they reach this share of it; dropping copies the cache."""

_ENTRIES = 1 << 22
"""Logits (rows x vocabulary) processed at once: more would not fit a CPU's caches, and would double the memory."""


def decodes(model: Any) -> bool:
    """Whether the rows of the model's cache can be selected; models with a recurrent state do not allow it."""
    stateful = getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder
    return not stateful and model._supports_default_dynamic_cache()


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    draws_RT: Tensor,
    prompt_R: Tensor,
    *,
    temperature: float,
    top_p: float,
    pad_id: int,
    end_ids: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample a response per rollout: token ids int64 [R, T], log-probabilities float32 [R, T], lengths int64 [R].

    The log-probabilities are at temperature 1. Values after a rollout's end are meaningless. draws_RT: uniform numbers
    in [0, 1), float64; T is the maximum response length. prompt_R: index of each rollout's prompt, ascending.
    temperature: 0 takes the most probable token.
    """
    device = model.device
    logits_of = _step(model)
    ids_US, mask_US = _padded_left(prompts, pad_id, device)
    end_V = torch.zeros(model.config.get_text_config().vocab_size, dtype=torch.bool, device=device)
    end_V[list(end_ids)] = True
    n_rollouts, n_tokens = draws_RT.shape
    draws_RT, row_R = draws_RT.to(device), prompt_R.to(device)
    ids_RT = torch.full((n_rollouts, n_tokens), pad_id, device=device)
    logprobs_RT = torch.zeros(n_rollouts, n_tokens, device=device)
    length_R = torch.full((n_rollouts,), n_tokens, device=device)
    alive_R = torch.arange(n_rollouts, device=device)  # unfinished rollouts; row_R is the row of each
    cache = DynamicCache(config=model.config)
    for t in range(n_tokens):
        logits_UV = logits_of(ids_US, mask_US, cache).float()
        token_R, logprob_R = chosen(logits_UV, row_R, draws_RT[alive_R, t], temperature, top_p)
        ids_RT[alive_R, t] = token_R
        logprobs_RT[alive_R, t] = logprob_R
        ended_R = end_V[token_R]
        length_R[alive_R[ended_R]] = t + 1
        if t + 1 == n_tokens or bool(ended_R.all()):
            break
        alive_R, row_R, token_R = alive_R[~ended_R], row_R[~ended_R], token_R[~ended_R]
        rows_U, row_R, next_U = _split(row_R, token_R, len(logits_UV), len(end_V), pad_id)
        if rows_U is not None:
            cache.batch_select_indices(rows_U)
            mask_US = mask_US[rows_U]
        ids_US = next_U[:, None]
        mask_US = torch.cat([mask_US, mask_US.new_ones(len(mask_US), 1)], 1)
    return ids_RT.cpu().numpy(), logprobs_RT.cpu().numpy(), length_R.cpu().numpy()


def _split(
    row_R: Tensor, token_R: Tensor, n_rows: int, n_vocabulary: int, pad_id: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(old row of each new row, or None if rows stay unchanged; new row of each rollout; next token of each row)."""
    keys_U, new_R = torch.unique(row_R * n_vocabulary + token_R, return_inverse=True)
    parents_U, tokens_U = keys_U // n_vocabulary, keys_U % n_vocabulary
    distinct = len(torch.unique_consecutive(parents_U)) == len(parents_U)
    if distinct and len(parents_U) > (1 - DEAD_SHARE) * n_rows:
        next_U = torch.full((n_rows,), pad_id, device=row_R.device)
        next_U[parents_U] = tokens_U
        return None, row_R, next_U
    return parents_U, new_R, tokens_U


def chosen(logits_UV: Tensor, row_R: Tensor, draw_R: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample one token per rollout from its row's logits: ids int64 [R] and log-probabilities at temperature 1.

    logits_UV: float32. draw_R: uniform in [0, 1), float64. The token is the first whose cumulative probability exceeds
    the draw.
    """
    size = max(1, _ENTRIES // logits_UV.shape[1])
    if len(logits_UV) <= size:
        return _chosen_of_part(logits_UV, row_R, draw_R, temperature, top_p)
    token_R, logprob_R = torch.zeros_like(row_R), logits_UV.new_zeros(len(row_R))
    for start in range(0, len(logits_UV), size):
        own = ((row_R >= start) & (row_R < start + size)).nonzero()[:, 0]
        part_UV = logits_UV[start : start + size]
        token_R[own], logprob_R[own] = _chosen_of_part(part_UV, row_R[own] - start, draw_R[own], temperature, top_p)
    return token_R, logprob_R


def _chosen_of_part(
    logits_UV: Tensor, row_R: Tensor, draw_R: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    largest_U, greedy_U = logits_UV.max(-1)
    # exp(logit - largest): its sum is the softmax denominator at temperature 1; at that temperature also the weights
    weights_UV = (logits_UV - largest_U[:, None]).exp_()
    log_total_U = largest_U + weights_UV.sum(-1).log_()
    if not temperature:
        token_R = greedy_U[row_R]
    else:
        if temperature != 1:
            weights_UV = ((logits_UV - largest_U[:, None]) / temperature).exp_()
        token_R = _drawn(_nucleus(weights_UV, top_p) if top_p < 1 else weights_UV, row_R, draw_R)
    return token_R, logits_UV[row_R, token_R] - log_total_U[row_R]


def _nucleus(weights_UV: Tensor, top_p: float) -> Tensor:
    """Probabilities of the smallest set of tokens whose sum reaches top_p, 0 elsewhere, float64."""
    probs_UV = weights_UV.double()
    probs_UV /= probs_UV.sum(-1, keepdim=True)
    sorted_UV, order_UV = probs_UV.sort(-1, descending=True)
    # keep a token if the more probable ones together do not reach top_p
    sorted_UV[sorted_UV.cumsum(-1) - sorted_UV >= top_p] = 0.0
    return torch.zeros_like(probs_UV).scatter_(-1, order_UV, sorted_UV)


def _drawn(weights_UV: Tensor, row_R: Tensor, draw_R: Tensor) -> Tensor:
    """Per rollout, the first token where the cumulative weight of its row exceeds draw x total weight.

    The search has two steps: first the block of tokens, then the token in the block. So the vocabulary is read once,
    and only block sums are cumulated in float64. A token of weight 0 is never drawn.
    """
    n_vocabulary = weights_UV.shape[1]
    width = 1 << (n_vocabulary.bit_length() + 1) // 2  # about as many blocks as tokens in each
    whole = n_vocabulary // width * width
    blocks_UK = weights_UV[:, :whole].unflatten(1, (whole // width, width)).sum(-1)
    reached_UK = torch.cat([blocks_UK, weights_UV[:, whole:].sum(-1, keepdim=True)], 1).double().cumsum_(-1)
    reached_RK = reached_UK[row_R]
    total_R = reached_RK[:, -1:]
    target_R = draw_R[:, None] * total_R
    # a product that rounds up to the total belongs to the last block with any weight
    block_R = torch.minimum((reached_RK <= target_R).sum(-1), (reached_RK < total_R).sum(-1))
    before_R = torch.where(block_R > 0, reached_RK.gather(1, (block_R - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    places_RB = block_R[:, None] * width + torch.arange(width, device=row_R.device)
    within_RB = weights_UV[row_R[:, None], places_RB.clamp(max=n_vocabulary - 1)].double()
    within_RB.masked_fill_(places_RB >= n_vocabulary, 0.0)
    # The block's own sum may round differently: a draw beyond it takes the block's last token.
    last_R = width - 1 - (within_RB > 0).flip(-1).int().argmax(-1)
    place_R = (within_RB.cumsum_(-1) <= target_R - before_R[:, None]).sum(-1)
    return block_R * width + torch.minimum(place_R, last_R)


def _padded_left(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids_US = torch.full((len(prompts), width), pad_id)
    mask_US = torch.zeros_like(ids_US)
    for u, ids in enumerate(prompts):
        ids_US[u, width - len(ids) :] = torch.as_tensor(ids)
        mask_US[u, width - len(ids) :] = 1
    return ids_US.to(device), mask_US.to(device)


def _step(model: Any) -> Callable[[Tensor, Tensor, DynamicCache], Tensor]:
    """The forward pass of new tokens: (ids [U, new], mask [U, S], cache) -> logits [U, V] of the last position."""
    takes = inspect.signature(base_of(model).forward).parameters
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def step(ids_US: Tensor, mask_US: Tensor, cache: DynamicCache) -> Tensor:
        positions = {}
        if "position_ids" in takes:
            positions_US = (mask_US.cumsum(-1) - 1).clamp(min=0)
            positions["position_ids"] = positions_US[:, -ids_US.shape[1] :]
        output = model(
            input_ids=ids_US, attention_mask=mask_US, past_key_values=cache, use_cache=True, **positions, **only_last
        )
        return output.logits[:, -1]

    return step
