"""Default micro-batch size in tokens: as many as free memory holds activations for.

Autograd keeps activations of every token until the backward pass, in proportion to the linear layers' outputs: about
1.6 numbers per output when the weights are frozen (a sketch), 2.2 when every layer's inputs are kept too (a weight
gradient). Both factors are estimates. If one is too high, memory stays unused. If it is too low, a GPU runs out of
memory and retrying.py halves the micro-batch.
"""

import ctypes
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gradstore.engine.gradients.layers import head_of, linear_outputs, text_config

LEAST, MOST_ON_CPU, MOST_ON_GPU = 256, 2048, 16_384
"""Bounds on the tokens of a micro-batch. More would not fit a CPU's caches; a GPU is already fully busy."""
MOST_SAMPLED = 32_768

_LEAST_ON_CPU, _OF_WEIGHTS = 5 << 27, 1.25
"""Bytes of activations on a CPU: the larger of this minimum and this multiple of the weights' bytes."""
_ON_GPU = 0.6
"""Share of a GPU's free memory planned for activations."""
_FORMED, _LEAST_FORMED = 0.15, 1 << 28
"""Memory for gradients formed in full: share of a GPU's free memory, and minimum bytes on any CPU."""
_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
"""A parameter of glibc's `mallopt`, and its value: bytes of the blocks that are returned to the system when freed."""
_FROZEN, _WITH_INPUTS = 1.6, 2.2
"""Numbers that autograd keeps per token and output of the linear layers (docs/plan.md)."""


def micro_batch_tokens(model: nn.Module, *, inputs_kept: bool = False) -> int:
    """Tokens of a micro-batch, padding included, that fit the model's device now.

    inputs_kept: the layers' inputs are kept too, for weight gradients. A resumed run must cut the same micro-batches:
    on a CPU the result depends on the model and its ranks alone, on a GPU it is a power of two.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    return tokens_within(_allowance(model), activation_bytes(model, inputs_kept=inputs_kept), on_gpu=on_gpu)


def tokens_within(allowance: int, taken: int, *, on_gpu: bool) -> int:
    """Tokens of a micro-batch that fit into `allowance` bytes at `taken` bytes per token."""
    if on_gpu:
        return max(LEAST, min(MOST_ON_GPU, 1 << max(allowance // taken, 1).bit_length() - 1))
    return max(LEAST, min(MOST_ON_CPU, allowance // taken // 128 * 128))


def sampled_tokens(model: nn.Module) -> int:
    """Tokens (prompts plus responses) of rollouts sampled at once: as many as memory holds keys and values for, at most
    MOST_SAMPLED. All are held when the longest response ends."""
    tokens = max(LEAST, min(MOST_SAMPLED, _allowance(model) // key_value_bytes(model)))
    # a power of two on a GPU: its free memory differs a little from run to run, and a resumed run needs the same size
    return 1 << tokens.bit_length() - 1 if next(model.parameters()).device.type == "cuda" else tokens


def key_value_bytes(model: nn.Module) -> int:
    """Bytes of one token's keys and values in all blocks."""
    text = text_config(model)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // getattr(text, "num_attention_heads", 1)
    return 2 * text.num_hidden_layers * heads * width * next(model.parameters()).itemsize


def activation_bytes(model: nn.Module, *, inputs_kept: bool = False) -> int:
    """Bytes that autograd keeps per token of a micro-batch. The output layer is left out: it runs on a part of the
    batch at a time."""
    head = head_of(model)
    outputs = sum(outputs for module in model.modules() if module is not head and (outputs := linear_outputs(module)))
    outputs += _of_experts(model)
    itemsize = next(model.parameters()).itemsize
    return max(1, int(outputs * itemsize * (_WITH_INPUTS if inputs_kept else _FROZEN)))


def give_back(model: nn.Module) -> None:
    """Return the C library's free memory to the system after a pass on a CPU. Freed blocks lie between kept ones and
    are too small for larger arrays: without this a process grows by half. Small models gain nothing and are skipped."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim and next(model.parameters()).device.type == "cpu" and _weight_bytes(model) >= _LEAST_FORMED:
        trim(0)


def return_large_blocks() -> None:
    """Have the C library return each large block to the system when it is freed, from now on in this process.

    By default it keeps blocks of up to 32 MB for later use once some were freed. Weights that FSDP2 gathers layer by
    layer then fill the process with the free blocks of all layers: 1.0 instead of .2 GB for a model of .5 GB. Fresh
    pages cost time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt:
        mallopt(_MMAP_THRESHOLD, _LARGE)


def formed_bytes(model: nn.Module) -> int:
    """Bytes of whole gradients held at once: half the weights' bytes on a CPU, a share of the free memory on a GPU."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return formed_within(_weight_bytes(model), free_bytes(device))
    return formed_within(_weight_bytes(model), None) // _ranks(model)


def _ranks(model: nn.Module) -> int:
    """Number of ranks that FSDP2 shards a model over: on a CPU they share its memory."""
    return next((p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor)), 1)


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def _allowance(model: nn.Module) -> int:
    """Bytes available beside weights and optimizer."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return allowance(_weight_bytes(model), free_bytes(device))
    return allowance(_weight_bytes(model), None) // _ranks(model)


def allowance(weight_bytes: int, free_on_gpu: int | None) -> int:
    """Bytes that activations may take: a share of a GPU's free memory; on a CPU (None), a multiple of the weights'."""
    return max(_LEAST_ON_CPU, int(_OF_WEIGHTS * weight_bytes)) if free_on_gpu is None else int(_ON_GPU * free_on_gpu)


def formed_within(weight_bytes: int, free_on_gpu: int | None) -> int:
    """Bytes of whole gradients that may be held at once."""
    return max(_LEAST_FORMED, weight_bytes // 2) if free_on_gpu is None else int(_FORMED * free_on_gpu)


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU, including those that torch has reserved but not allocated."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _of_experts(model: nn.Module) -> int:
    """Inputs plus outputs of each stack of experts [E, I, O], times the experts chosen per token."""
    text = text_config(model)
    n_taken = getattr(text, "num_experts_per_tok", None) or 1
    return n_taken * sum(sum(p.shape[1:]) for p in model.parameters() if p.ndim == 3 and prod(p.shape) > 0)
