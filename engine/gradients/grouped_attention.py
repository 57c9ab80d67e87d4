"""Grouped-query attention with a mask that does not copy shared keys and values for each head.

transformers repeats keys and values for every head when there is a mask, and continuations of a cached prompt always
have one. Here the queries of heads that share keys are concatenated, as more queries of one head. The products are the
same, a CPU takes a quarter less time, and the gradients of keys and values come out summed.

B sequences, H heads, G heads that share keys and values, T queries, K keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "gradstore-grouped"


@contextmanager
def grouped_attention(config: PretrainedConfig) -> Iterator[None]:
    """Use grouped attention in the context for the model of this configuration, if it uses torch's SDPA."""
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    n_sequences, n_heads, n_queries, width = query.shape
    shared_by = n_heads // key.shape[1]
    if attention_mask is None or shared_by == 1 or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    mask_B1QK = attention_mask.repeat(1, 1, shared_by, 1)
    found = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(n_sequences, -1, shared_by * n_queries, width),
        key,
        value,
        attn_mask=mask_B1QK,
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
    )
    return found.view(n_sequences, n_heads, n_queries, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
