"""Load a model, its tokenizer and an adapter, with one clear line for what is missing or broken."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradstore.errors import RequestError


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """A transformers causal LM in evaluation mode.

    path: a folder or a hub name. adapter: a PEFT checkpoint to load on it. device: default a GPU where there is one.
    dtype: "auto", the checkpoint's; default float32 on CPU and bfloat16 on a GPU.
    RequestError when there is no such model or adapter, or when a weight is not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: not a causal language model that can be loaded: {_first_line(error)}") from error
    if adapter is not None:
        model = _with_adapter(model, adapter)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise RequestError(f"{path}: parameter {name} has values that are not finite")
    return model.to(device).eval()


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model folder or hub name; RequestError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{path}: no tokenizer that can be loaded: {_first_line(error)}") from error


def vocabulary_size(path: str | Path) -> int | None:
    """Token ids that a model has, by its configuration: often more than its tokenizer; None where it does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError):
        return None  # loading the model says what is wrong
    return getattr(config.get_text_config(), "vocab_size", None)


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits over names, shapes and 64 evenly spaced values of every parameter of a model.

    The places are those of a float32 `linspace`, held inside the weight: past 2^24 elements it rounds beyond the end.
    Digests that stores and rollout files keep from before stay valid (docs/format.md).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        last = max(len(flat) - 1, 0)
        places = torch.linspace(0, last, min(len(flat), 64)).long().clamp(max=last)
        values = flat[places.to(flat.device)].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _with_adapter(model: nn.Module, adapter: str | Path) -> nn.Module:
    try:
        from peft import PeftModel
    except ImportError:
        raise RequestError("loading an adapter needs PEFT: pip install peft") from None
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError) as error:
        raise RequestError(f"{adapter}: not a PEFT adapter that can be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
