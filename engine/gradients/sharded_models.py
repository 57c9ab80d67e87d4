"""Load a model sharded by FSDP2: no rank ever holds all of it, if the checkpoint has the model's own weights by name.

The model is built without memory for its weights and sharded, block by block; then each rank reads its own rows of
every weight from the safetensors files. Other checkpoints (adapters, converted or pickled weights) are loaded by one
rank of a machine after the other: each loads the whole model into host memory, keeps its part and frees the rest.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from gradstore.engine.gradients.layers import base_of
from gradstore.engine.gradients.models import load_model
from gradstore.engine.gradients.sharding import own_part, spare_memory
from gradstore.errors import RequestError

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_sharded(
    path: str | Path,
    adapter: str | Path | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> nn.Module:
    """`load_model`, sharded over all ranks of the default process group; all call it together. On a CPU it is gathered
    layer by layer (`spare_memory`).

    device: this rank's, cpu or cuda:N. The weights are the same, bit for bit, as those of the whole model.
    RequestError as in `load_model`, and for a model without blocks to shard.
    """
    kind = torch.device(device).type
    dtype = dtype or (torch.float32 if kind == "cpu" else torch.bfloat16)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    files = None if adapter is not None else _files(Path(path))
    model = None if files is None else _skeleton(path, dtype, trust_remote_code)
    if model is None or files is None or not _has_all(model, files):
        model = _in_turn(path, adapter, dtype, mesh, trust_remote_code)
    else:
        shard(model, mesh)
        for name, parameter in _allocated(model, torch.device(device)):
            _read(parameter, *files[_key(name, model, files)])
            _check_finite(path, name, parameter)
    spare_memory(model)
    return model.eval()


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model in place over a mesh: its blocks one by one, then the rest (embedding, output layer) as one."""
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model: modules of the classes that it says must stay on one device."""
    kinds = set(getattr(base_of(model), "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in kinds]
    inside = {id(part) for module in found for part in module.modules() if part is not module}
    blocks = [module for module in found if id(module) not in inside]
    if not blocks:
        raise RequestError(
            f"{type(base_of(model)).__name__}: the model names no blocks (`_no_split_modules`) to shard it by: "
            "run it in one process"
        )
    return blocks


def _skeleton(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module | None:
    """The model with its weights on the meta device, its buffers computed; None if it cannot be built so."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with _weightless():
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        cast(Any, model).tie_weights()
    except Exception:  # noqa: BLE001 (`load_model` says what is wrong)
        return None
    return model if all(p.is_meta for p in model.parameters()) else None


class _weightless:  # noqa: N801 (a context)
    """Modules made in the context have their parameters on the meta device; buffers are computed as ever."""

    def __enter__(self) -> None:
        self._register = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None:
                parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            self._register(module, name, parameter)

        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        nn.Module.register_parameter = self._register  # type: ignore[method-assign]


def _files(folder: Path) -> dict[str, tuple[Path, str]] | None:
    """File and key of each weight of a folder of safetensors, by key; None if the folder has none."""
    from safetensors import safe_open

    try:
        if (folder / _INDEX).is_file():
            of_key = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {key: (folder / Path(name).name, key) for key, name in of_key.items()}
        with safe_open(folder / _WEIGHTS, "pt") as file:
            return {key: (folder / _WEIGHTS, key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception:  # noqa: BLE001 (`load_model` says what is wrong)
        return None


def _has_all(model: nn.Module, files: dict[str, tuple[Path, str]]) -> bool:
    """Whether the files have each of the model's weights under its name and in its shape, and nothing else."""
    from safetensors import safe_open

    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    keys = {_key(name, model, files): parameter for name, parameter in model.named_parameters()}
    if not set(keys) <= set(files) or not set(files) <= {_key(name, model, files) for name in every}:
        return False
    for file in {file for file, _ in files.values()}:
        with safe_open(file, "pt") as opened:
            for key in set(opened.keys()) & set(keys):
                if tuple(opened.get_slice(key).get_shape()) != tuple(keys[key].shape):
                    return False
    return True


def _key(name: str, model: nn.Module, files: dict[str, tuple[Path, str]]) -> str:
    """The key of a parameter in the files: its name, or that without the base model's prefix."""
    short = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    return short if name not in files and short in files else name


def _allocated(model: nn.Module, device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """Give each parameter memory for this rank's part, one at a time; yields each with its name. Tied ones stay so."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    for full_name, parameter in list(model.named_parameters()):
        made = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
        for module, name in holders[id(parameter)]:
            module._parameters[name] = made
        yield full_name, made


def _read(parameter: nn.Parameter, file: Path, key: str) -> None:
    """Read this rank's rows of a weight."""
    from safetensors import safe_open

    sharded = cast(DTensor, parameter.data)
    (n_rows, *_), (start, *_) = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    if n_rows:  # the file is opened anew each time: pages of it that were read count as memory while it is open
        with safe_open(file, "pt") as opened:
            own_part(parameter).copy_(opened.get_slice(key)[start : start + n_rows])


def _check_finite(path: str | Path, name: str, parameter: Tensor) -> None:
    if not torch.isfinite(own_part(parameter)).all():
        raise RequestError(f"{path}: parameter {name} has values that are not finite")


def _in_turn(
    path: str | Path, adapter: str | Path | None, dtype: torch.dtype, mesh: DeviceMesh, trust_remote_code: bool
) -> nn.Module:
    """The model, loaded whole by one rank of this machine after the other."""
    own, n_here = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    model = None
    for turn in range(max(n_here, own + 1)):
        if turn == own:
            model = shard(load_model(path, adapter, "cpu", dtype, trust_remote_code=trust_remote_code), mesh)
        dist.barrier()
    return cast(nn.Module, model)
