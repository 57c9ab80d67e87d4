"""LoRA adapters (PEFT) to train instead of the model's weights."""

from typing import Any

import torch
from torch import nn

from gradstore.errors import needing


def with_adapters(model: nn.Module, rank: int, seed: int = 0) -> Any:
    """Add a LoRA adapter of this rank to every linear layer except the output layer; only the adapters train.

    seed: for the adapters' initial values. RequestError when PEFT is not installed.
    """
    with needing("training adapters", "gradstore[lora]"):
        from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
