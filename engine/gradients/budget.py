"""How many tokens go through a model at once, where the settings do not say: what its activations leave room for.

Autograd keeps some numbers of every token until the backward pass, in proportion to what the linear layers put out:
about 1.6 times their outputs where the weights are frozen (a sketch), 2.2 times where every layer's inputs are kept too
(a weight gradient). That is an estimate: where it is too high, memory lies idle; where it is too low, a GPU runs out of
memory and the micro-batch is halved (retrying.py).
"""

import ctypes
from math import prod
from typing import Any, cast

import torch
from torch import nn

from gradstore.engine.gradients.layers import head_of, linear_outputs

LEAST, MOST_ON_CPU, MOST_ON_GPU = 256, 2048, 16_384
"""Tokens of a micro-batch. The activations of more leave a CPU's caches, and a GPU is busy with so many."""
MOST_SAMPLED = 32_768

_LEAST_ON_CPU, _OF_WEIGHTS = 5 << 27, 1.25
"""Bytes of activations on a CPU: so many, or this times the weights', whichever is more."""
_ON_GPU = 0.6
"""Share of a GPU's free memory that activations are planned to take."""
_FORMED, _LEAST_FORMED = 0.15, 1 << 28
"""Share of a GPU's free memory for gradients formed in full, and bytes that they may take on any CPU."""
_FROZEN, _WITH_INPUTS = 1.6, 2.2
"""Numbers that autograd keeps of a token, for each output of the linear layers (docs/plan.md)."""


def micro_batch_tokens(model: nn.Module, *, inputs_kept: bool = False) -> int:
    """Tokens of a micro-batch, padding included, for a model on its device as it is now.

    inputs_kept: the layers' inputs are kept too, for weight gradients. On a CPU it is a function of the model alone, so
    that a run that is resumed cuts the same micro-batches; on a GPU it is a power of two, for the same reason.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    return tokens_within(_allowance(model), activation_bytes(model, inputs_kept=inputs_kept), on_gpu=on_gpu)


def tokens_within(allowance: int, taken: int, *, on_gpu: bool) -> int:
    """Tokens of a micro-batch that take so many bytes each, and may take the allowance together."""
    if on_gpu:
        return max(LEAST, min(MOST_ON_GPU, 1 << max(allowance // taken, 1).bit_length() - 1))
    return max(LEAST, min(MOST_ON_CPU, allowance // taken // 128 * 128))


def sampled_tokens(model: nn.Module) -> int:
    """Tokens, prompts and responses together, of rollouts that are sampled at once: as many as their keys and values
    leave room for, at most MOST_SAMPLED. The whole is held at the end of the longest."""
    tokens = max(LEAST, min(MOST_SAMPLED, _allowance(model) // key_value_bytes(model)))
    # a power of two on a GPU: what is free there differs a little from run to run, and a resumed run needs the same
    return 1 << tokens.bit_length() - 1 if next(model.parameters()).device.type == "cuda" else tokens


def key_value_bytes(model: nn.Module) -> int:
    """Bytes of one token's keys and values in all blocks."""
    config = cast(Any, getattr(model, "config", None))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    return 2 * text.num_hidden_layers * heads * width * next(model.parameters()).itemsize


def activation_bytes(model: nn.Module, *, inputs_kept: bool = False) -> int:
    """Bytes that autograd keeps of one token of a micro-batch, without the output layer's, which sees a part at a
    time."""
    head = head_of(model)
    outputs = sum(outputs for module in model.modules() if module is not head and (outputs := linear_outputs(module)))
    outputs += _of_experts(model)
    itemsize = next(model.parameters()).itemsize
    return max(1, int(outputs * itemsize * (_WITH_INPUTS if inputs_kept else _FROZEN)))


def give_back(model: nn.Module) -> None:
    """Returns the C library's free memory to the system after a pass on a CPU. What a pass frees lies between what is
    kept, and larger arrays find no place in it: without this a process grows by half. Small models save nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim and next(model.parameters()).device.type == "cpu" and _weight_bytes(model) >= _LEAST_FORMED:
        trim(0)


def formed_bytes(model: nn.Module) -> int:
    """Bytes of whole gradients that are held at once: half of what the weights take on a CPU, a part of what is free
    on a GPU."""
    device = next(model.parameters()).device
    return formed_within(_weight_bytes(model), free_bytes(device) if device.type == "cuda" else None)


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def _allowance(model: nn.Module) -> int:
    """Bytes that may be taken beside weights and optimizer."""
    device = next(model.parameters()).device
    return allowance(_weight_bytes(model), free_bytes(device) if device.type == "cuda" else None)


def allowance(weight_bytes: int, free_on_gpu: int | None) -> int:
    """Bytes that activations may take: a share of what a GPU has left, on a CPU (None) a matter of the weights."""
    return max(_LEAST_ON_CPU, int(_OF_WEIGHTS * weight_bytes)) if free_on_gpu is None else int(_ON_GPU * free_on_gpu)


def formed_within(weight_bytes: int, free_on_gpu: int | None) -> int:
    """Bytes of whole gradients that may be held at once."""
    return max(_LEAST_FORMED, weight_bytes // 2) if free_on_gpu is None else int(_FORMED * free_on_gpu)


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that can still be had, those that torch holds in reserve counted."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _of_experts(model: nn.Module) -> int:
    """Both sides of each stack of experts [E, I, O], as often as a token goes through one."""
    config = cast(Any, getattr(model, "config", None))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    n_taken = getattr(text, "num_experts_per_tok", None) or 1
    return n_taken * sum(sum(p.shape[1:]) for p in model.parameters() if p.ndim == 3 and prod(p.shape) > 0)
