"""PEFT adapters of a model: which are active, what identifies them, and which can be sketched.

A sketch sees linear layers whose gradient comes from the layer's own inputs and outputs. The two matrices of plain LoRA
are such layers, whatever scales their product (alpha / rank, rsLoRA, patterns by layer). Other adapters train something
else, and are refused by name before anything is computed.
"""

import hashlib
import re
from typing import Any, cast

from torch import nn

from gradstore.errors import RequestError

_TRAINED = re.compile(r"\.(?:lora_[AB]|modules_to_save)\.([^.]+)(?:\.|$)")
_REPLACED = re.compile(r"\.original_module(?:\.|$)")
_NAMES = {"Dora": "DoRA", "QALora": "QALoRA", "ALora": "aLoRA", "Velora": "VeLoRA", "BdLora": "BD-LoRA"}
_INSTEAD = (
    "sketches are made of plain LoRA on linear layers (rsLoRA and modules_to_save too): train such an adapter, or "
    "merge this one into the model (`merge_and_unload`) and sketch the merged model's own layers"
)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters in use: a property of PEFT's models, a method of transformers' own."""
    if not getattr(model, "peft_config", None):
        return []
    active = cast(Any, model).active_adapters
    return list(active() if callable(active) else active)


def is_trained(name: str, active: list[str]) -> bool:
    """Whether a module or parameter of this name belongs to an active adapter: a LoRA matrix or a copy that
    `modules_to_save` trains."""
    found = _TRAINED.search(name)
    return found is not None and found[1] in active


def is_idle(name: str, active: list[str]) -> bool:
    """Whether a module is unused in the forward: it belongs to an inactive adapter, or a trained copy replaces it."""
    found = _TRAINED.search(name)
    replaced = bool(active) and _REPLACED.search(name) is not None
    return replaced or (found is not None and found[1] not in active)


def active_copy(module: nn.Module, active: list[str]) -> nn.Module:
    """The copy of a module that `modules_to_save` trains instead of it; the module itself if there is no copy."""
    copies = getattr(module, "modules_to_save", None)
    return next((copies[name] for name in active if copies is not None and name in copies), module)


def check_adapters(model: nn.Module) -> None:
    """Raise RequestError for an adapter that cannot be sketched exactly, or that is merged or disabled."""
    active = active_adapters(model)
    for name in active:
        kind = str(cast(Any, model).peft_config[name].peft_type.value)
        if kind != "LORA":
            raise RequestError(f"adapter {name!r} is of kind {kind}: {_INSTEAD}")
    for path, module in model.named_modules() if active else ():
        if getattr(module, "merged_adapters", None):
            raise RequestError(
                f"adapter {module.merged_adapters[0]!r} is merged into {path}: take it out again "
                "(`unmerge_adapter`), or make the model whole (`merge_and_unload`)"
            )
        if getattr(module, "disable_adapters", False) is True:
            raise RequestError(
                f"the adapters of {path} are disabled: enable them (`enable_adapter_layers`), or take the base model "
                "without them (`unload`)"
            )
        for name in active:
            if fault := _fault(module, name):
                raise RequestError(f"adapter {name!r} has {fault} at {path}: {_INSTEAD}")


def adapter_identity(model: nn.Module) -> dict | None:
    """Kind, rank and scaling of each active adapter, which must be LoRA; None without adapters.

    `alpha` is the effective scaling times the rank: alpha as given, or alpha x sqrt(rank) under rsLoRA. If layers
    differ in rank or scaling, the distinct pairs and a digest over the layers replace the two numbers.
    """
    return {name: _identity(model, name) for name in active_adapters(model)} or None


def _identity(model: nn.Module, adapter: str) -> dict:
    layers = {
        path: (cast(Any, module).r[adapter], _whole(module.scaling[adapter] * cast(Any, module).r[adapter]))
        for path, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and adapter in cast(Any, module).scaling
    }
    kind = str(cast(Any, model).peft_config[adapter].peft_type.value)
    distinct = sorted(set(layers.values()))
    if len(distinct) == 1:
        return {"kind": kind, "rank": distinct[0][0], "alpha": distinct[0][1]}
    digest = hashlib.sha256(repr(sorted(layers.items())).encode()).hexdigest()[:16]
    return {"kind": kind, "rank_and_alpha": [list(pair) for pair in distinct], "by_layer": digest}


def _whole(alpha: float) -> float:
    """Alpha without the rounding error of a division and a multiplication: 8 / 3 x 3 is 8."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else round(alpha, 9)


def _fault(module: nn.Module, adapter: str) -> str | None:
    """The part of the adapter at this module that is not plain LoRA on a linear layer; None if all of it is."""
    variant = getattr(module, "lora_variant", None) or {}
    if adapter in variant:
        kind = re.sub(r"(Linear|Embedding|Conv\dd)?Variant$", "", type(variant[adapter]).__name__)
        return f"{_NAMES.get(kind, kind)}, which is more than two linear layers,"
    if adapter in (getattr(module, "lora_embedding_A", None) or {}):
        return "LoRA on an embedding"
    if adapter in (getattr(module, "trainable_tokens_delta", None) or {}):
        return "trainable token indices"
    matrices = getattr(module, "lora_A", None)
    if isinstance(matrices, nn.ModuleDict) and adapter in matrices and not isinstance(matrices[adapter], nn.Linear):
        return f"LoRA on a {type(matrices[adapter]).__name__}"
    return None
