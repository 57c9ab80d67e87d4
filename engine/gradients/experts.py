"""A forward of fused experts that exposes every product of a token with an expert's weight.

A fused weight [E, O, I] is one linear layer whose input is the token in the slot of its expert, x (x) onehot(e). The
rows keep the natural order of tokens and chosen experts, [B, T * chosen, I], so that each row's sequence is known.
They are sorted by expert only for the product.

The forward computes the same as transformers' own `batched_mm` and `grouped_mm` experts (integrations/moe.py), from the
same attributes of the module. Cost per token and chosen expert: 2 I O FLOPs for the product, and the same for the
gradient of its input. No weight gradient is formed.

Dimension letters: N tokens, K experts chosen for a token, S = N K slots, E experts, I and O a product's inputs and
outputs, R a LoRA rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")
"""Fused weights of a module that transformers' experts interface dispatches."""

See = Callable[[str, Tensor, Tensor, Tensor], None]
"""Callback(product's name, its inputs [S, I], the expert of each row [S], its outputs [S, O])."""


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs the module (`use_experts_implementation`)."""
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "num_experts", "down_proj"))


def watched_experts(module: nn.Module, see: See, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Output of the module's own forward; `see` is called with each product."""
    experts = cast(Any, module)
    hidden_NI = hidden.reshape(-1, hidden.shape[-1])
    expert_S = top_k_index.reshape(-1)
    slots = expert_S.numel() // len(hidden_NI)

    def product(name: str, x_SI: Tensor) -> Tensor:
        weight = getattr(experts, name)
        found_SO = routed_product(x_SI, weight if experts.is_transposed else weight.transpose(1, 2), expert_S)
        bias_EO = getattr(experts, f"{name}_bias", None)
        if bias_EO is not None:
            found_SO = found_SO + bias_EO[expert_S]
        see(name, x_SI, expert_S, found_SO)
        return found_SO

    has_gate = hasattr(experts, "gate_up_proj")
    raised_SW = product("gate_up_proj" if has_gate else "up_proj", hidden_NI.repeat_interleave(slots, dim=0))
    inner_SW = experts._apply_gate(raised_SW) if has_gate else experts.act_fn(raised_SW)
    weighted_SO = product("down_proj", inner_SW) * top_k_weights.reshape(-1, 1)
    return weighted_SO.view(len(hidden_NI), slots, -1).sum(1).to(hidden.dtype).view(hidden.shape)


def routed_product(x_SI: Tensor, weight_EIO: Tensor, expert_S: Tensor) -> Tensor:
    """Product of each row with the weight of its expert, [S, O]."""
    if weight_EIO.shape[1] == 1:  # an embedding
        return x_SI * weight_EIO[expert_S, 0]
    if x_SI.is_meta:
        return torch.bmm(x_SI[:, None], weight_EIO[expert_S])[:, 0]
    order_S, ends_E = by_expert(expert_S, len(weight_EIO))
    sorted_SI = x_SI[order_S]
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is not None and x_SI.is_cuda and torch.cuda.get_device_capability(x_SI.device) >= (8, 0):
        sorted_SO = grouped_mm(sorted_SI.to(weight_EIO.dtype), weight_EIO, offs=ends_E)
    else:
        ends = ends_E.tolist()
        parts = [
            sorted_SI[start:end] @ weight_IO
            for weight_IO, start, end in zip(weight_EIO.unbind(), [0, *ends[:-1]], ends, strict=True)
            if end > start
        ]
        sorted_SO = torch.cat(parts) if parts else x_SI.new_zeros(0, weight_EIO.shape[2])
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return sorted_SO[place_S]


def by_expert(expert_S: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by expert, and the end of each expert's rows, int32 [E]."""
    sorted_S, order_S = expert_S.sort(stable=True)
    every_E = torch.arange(n_experts, device=expert_S.device, dtype=sorted_S.dtype)
    return order_S, torch.searchsorted(sorted_S, every_E, right=True).to(torch.int32)


def lora_a_gradient(grad_SO: Tensor, weight_OC: Tensor, expert_S: Tensor, n_experts: int) -> Tensor:
    """Gradient of the outputs of A for all experts, [S, E * R]: zero outside the row's own expert.

    weight_OC: lora_B of PEFT's ParamWrapper. Its column index is rank * E + expert; A's row index is expert * R + rank.
    """
    all_SRE = (grad_SO.to(weight_OC.dtype) @ weight_OC).unflatten(1, (-1, n_experts))
    return (all_SRE * _own(expert_S, n_experts)[:, None]).transpose(1, 2).flatten(1)


def lora_b_input(x_SI: Tensor, weight_CI: Tensor, expert_S: Tensor, n_experts: int) -> Tensor:
    """Inputs of B for all experts, [S, R * E], zero outside the row's own expert; weight_CI: lora_A."""
    all_SER = (x_SI.to(weight_CI.dtype) @ weight_CI.T).unflatten(1, (n_experts, -1))
    return (all_SER * _own(expert_S, n_experts)[:, :, None]).transpose(1, 2).flatten(1)


def _own(expert_S: Tensor, n_experts: int) -> Tensor:
    return expert_S[:, None] == torch.arange(n_experts, device=expert_S.device)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward in the context, as an instance attribute; hooks are still called."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
