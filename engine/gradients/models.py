"""Load a model, its tokenizer and an adapter; errors say in one line what is missing or broken.

A folder may come from anybody. Python code in it runs only with `trust_remote_code`, and weights in pickles are read
without unpickling objects (torch's `weights_only`, the default of transformers and PEFT).
"""

import hashlib
import json
import logging
import re
import sys
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradstore.engine.gradients.adapters import check_adapters
from gradstore.engine.gradients.model_folder import HUB_S, is_model_folder
from gradstore.errors import RequestError, first_line, needing

_BUFFERS = re.compile(r"(^|\.)(attn\.bias|attention\.bias|masked_bias|inv_freq|position_ids|(cos|sin)_cached)$")
"""Masks and tables in old checkpoints that models now compute; they are not weights."""
log = logging.getLogger(__name__)
_ADAPTER = "the adapter's configuration"


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A transformers causal LM in evaluation mode.

    path: a folder or a hub name. adapter: a PEFT checkpoint to load on it. device: default a GPU if there is one.
    dtype: "auto" is the checkpoint's; default float32 on CPU and bfloat16 on a GPU. trust_remote_code: run Python code
    that the folder brings.
    RequestError if there is no such model or adapter; if it has code of its own and is not trusted; if the checkpoint
    lacks a weight of the model, or has one that the model lacks (except tied weights and those that the architecture
    ignores); for an adapter that cannot be sketched; if a weight is not finite.
    """
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # that of the weights; it turns those of downloads off as well
    if sys.stderr.isatty():
        enable_progress_bars()
    device = checked_device(device)
    local = _only_local(str(path))
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
        )
    except Exception as error:
        raise _refused(path, "not a causal language model that can be loaded", error) from error
    _check_keys(path, type(model).__name__, loaded["missing_keys"], loaded["unexpected_keys"])
    if adapter is not None:
        model = _with_adapter(model, adapter)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise RequestError(f"{path}: parameter {name} has values that are not finite")
    return model.to(device).eval()


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name; RequestError when there is none, or one that is code."""
    from transformers import AutoTokenizer

    local = _only_local(str(path))
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception as error:
        raise _refused(path, "no tokenizer that can be loaded", error) from error


def vocabulary_size(path: str | Path, *, trust_remote_code: bool = False) -> int | None:
    """Vocabulary size in a model's configuration, often larger than its tokenizer's; None if not stated."""
    from transformers import AutoConfig

    local = _only_local(str(path))
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception:  # noqa: BLE001 (a broken file can raise anything)
        return None  # loading the model says what is wrong
    return getattr(config.get_text_config(), "vocab_size", None)


def checked_device(name: str | None) -> str:
    """The device of this name, by default a GPU if there is one; RequestError for one that torch does not see."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device {name!r}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        n_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= n_seen:
            raise RequestError(f"device {name!r}: torch sees {n_seen or 'no'} GPU{'s' * (n_seen > 1)} here")
    return name


@cache
def _only_local(path: str) -> bool:
    """Whether a model is read from this machine alone: a folder, or the cache's copy while the hub cannot be asked.

    RequestError as in `is_model_folder`, and for a hub name that neither the hub nor the cache knows. The hub is asked
    once, with a time limit; its libraries would try for more than a minute.
    """
    if is_model_folder(path):
        return True
    import huggingface_hub as hub

    try:
        cached = isinstance(hub.try_to_load_from_cache(path, "config.json"), str)
        if not hub.constants.HF_HUB_OFFLINE:
            hub.HfApi().model_info(path, timeout=HUB_S)
            return False
        reason = "HF_HUB_OFFLINE is set"
    except hub.errors.HFValidationError:
        raise RequestError(f"{path}: there is no such folder, and it is no name of a model on the hub") from None
    except hub.errors.RepositoryNotFoundError:
        raise RequestError(
            f"{path}: there is no such folder, and the hub shows no such model (a private one needs `hf auth login`)"
        ) from None
    except Exception as error:  # noqa: BLE001 (errors of the network are those of whatever library the hub's uses)
        reason = f"the hub cannot be asked: {first_line(error)}"
    if not cached:
        raise RequestError(f"{path}: there is no such folder and no model of this name in the cache; {reason}")
    log.warning("%s: the copy in the cache serves; %s", path, reason)
    return True


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits over names, shapes and 64 evenly spaced values of every parameter of a model.

    Positions come from a float32 `linspace`, clamped to the weight: beyond 2^24 elements it rounds past the end. This
    keeps the digests in existing stores and rollout files valid (docs/format.md).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        last = max(len(flat) - 1, 0)
        places = torch.linspace(0, last, min(len(flat), 64)).long().clamp(max=last)
        values = flat[places.to(flat.device)].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _refused(path: str | Path, what: str, error: Exception) -> RequestError:
    """The error for a folder that cannot be loaded."""
    if "trust_remote_code" in str(error):
        return RequestError(
            f"{path}: has Python code of its own, which is not run: read it, and if you trust it, give "
            "--trust-remote-code (in Python trust_remote_code=True)"
        )
    return RequestError(f"{path}: {what}: {first_line(error)}")


def _with_adapter(model: nn.Module, adapter: str | Path) -> nn.Module:
    with needing("loading an adapter", "gradstore[lora]"):
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    _check_imports(Path(adapter))
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except KeyError as error:  # PEFT looks up the copies of `modules_to_save` without checking
        _check_keys(adapter, _ADAPTER, [str(error.args[0])], [])
        raise
    except Exception as error:
        raise RequestError(f"{adapter}: not a PEFT adapter that can be loaded: {first_line(error)}") from error
    check_adapters(adapted)
    loaded = adapted.load_adapter(str(adapter), "default")  # again, to get its missing and unexpected keys
    saved = load_peft_weights(str(adapter), device="cpu")
    copies = {key for key in get_peft_model_state_dict(adapted, save_embedding_layers=False) if "lora_" not in key}
    missing = {*loaded.missing_keys, *(copies - set(saved))}
    _check_keys(adapter, _ADAPTER, missing, loaded.unexpected_keys)
    return adapted


def _check_imports(adapter: Path) -> None:
    """Raise RequestError for an adapter whose configuration names a module that PEFT would import."""
    file = adapter / "adapter_config.json"
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("megatron_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # loading it says what is wrong
    if named is not None:
        raise RequestError(
            f"{file}: has `megatron_config`, for which PEFT imports a module that the file names: drop it"
        )


def _check_keys(path: str | Path, model: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise RequestError naming weights that the checkpoint lacks (they would be random) or that the model lacks."""
    unexpected = [key for key in unexpected if not _BUFFERS.search(key)]
    for keys, fault in (
        (missing, f"{model} has, so that they would be random: save the whole model, or name its folder"),
        (unexpected, f"{model} does not have: it is a checkpoint of another kind of model"),
    ):
        if keys:
            verb = "lacks" if keys is missing else "has"
            raise RequestError(f"{path}: the checkpoint {verb} weights that {fault}: {_some(sorted(keys))}")


def _some(names: Sequence[str], most: int = 6) -> str:
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")
