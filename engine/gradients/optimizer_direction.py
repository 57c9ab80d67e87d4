"""Adam's update for a single problem, in place of its plain gradient: LESS's training side, or preconditioning by the
second moment.

The transform is elementwise, so each problem's full gradient of a layer is formed before it is projected. Cost: a plain
backward per problem, and one float32 matrix per layer beside the two moments.

Gradients here are ascent directions. An optimizer's first moment averages loss gradients, so its sign is flipped.

Dimension letters: I and O a layer's inputs and outputs.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gradstore.engine.gradients.layers import Layer
from gradstore.errors import RequestError, check_known, first_line

Formula = Literal["less", "precondition"]

_VERL_SHARD = re.compile(r"optim_world_size_(\d+)_rank_(\d+)\.pt")


@dataclass(frozen=True, slots=True, eq=False)
class AdamState:
    """Adam's moments, by parameter name."""

    first: dict[str, Tensor]
    """`exp_avg` of the loss gradient, in the parameter's shape."""
    second: dict[str, Tensor]
    """`exp_avg_sq`, in the parameter's shape."""
    step: int
    """Number of updates made."""

    @classmethod
    def zero(cls, model: nn.Module) -> "AdamState":
        """The state before the first update."""
        first, second = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(2))
        return cls(first, second, 0)

    @classmethod
    def of_optimizer(cls, optimizer: torch.optim.Optimizer, model: nn.Module) -> "AdamState":
        """From a live optimizer of the model. Moments sharded by FSDP2 are gathered, so every rank must call it."""
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        entries = {name_of[id(p)]: state for p, state in optimizer.state.items() if id(p) in name_of}
        return cls._from_entries(entries, model)

    @classmethod
    def of_state_dict(
        cls, state_dict: Mapping[str, Any], model: nn.Module, names: Sequence[str] | None = None
    ) -> "AdamState":
        """From an optimizer's `state_dict()`, also a full or sharded one by parameter name (FSDP).

        names: parameter names in the optimizer's order, for states numbered 0, 1, ...; default: the names in the state,
        else the model's own order. `trainer_order(model)` gives the order of transformers' Trainer.
        RequestError naming a parameter that is missing or whose moments have another shape.
        """
        entries = state_dict["state"]
        if entries and isinstance(next(iter(entries)), int):
            carried = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
            order = list(names or carried or [name for name, _ in model.named_parameters()])
            if max(entries) >= len(order):
                raise RequestError(
                    f"the optimizer state has {max(entries) + 1} parameters, {len(order)} names were given: "
                    "name them in the order the optimizer was given them"
                )
            entries = {order[number]: entry for number, entry in entries.items()}
        return cls._from_entries(entries, model)

    @classmethod
    def of_file(cls, path: str | Path, model: nn.Module, names: Sequence[str] | None = None) -> "AdamState":
        """From `optimizer.pt` (torch, or transformers' Trainer), or a folder of a verl checkpoint of FSDP2.

        Without names, the model's own order is tried first, then that of transformers' Trainer; the first with matching
        shapes is used. Only tensors are read, no code is run. RequestError if no order fits.
        """
        path = Path(path)
        if path.is_dir() and not (path / "optimizer.pt").exists():
            return cls.of_state_dict(_verl_state(path), model, names)
        found = _load(path / "optimizer.pt" if path.is_dir() else path)
        if names is not None:
            return cls.of_state_dict(found, model, names)
        try:
            return cls.of_state_dict(found, model)
        except RequestError as error:
            try:
                return cls.of_state_dict(found, model, trainer_order(model))
            except RequestError:
                raise error from None

    @classmethod
    def _from_entries(cls, entries: Mapping[str, Mapping[str, Any]], model: nn.Module) -> "AdamState":
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        steps = [0]
        for name, parameter in model.named_parameters():
            keys = [key for key in (name, f"module.{name}", f"_orig_mod.{name}") if key in entries]
            entry = entries[keys[0]] if keys else None
            if entry is None:
                continue
            for kept, key in ((first, "exp_avg"), (second, "exp_avg_sq")):
                if key not in entry:
                    raise RequestError(f"parameter {name}: the optimizer state has no {key}; is it Adam's?")
                moment = _whole(entry[key]).float()
                if moment.shape != parameter.shape:
                    raise RequestError(
                        f"parameter {name}: its {key} has shape {tuple(moment.shape)}, expected "
                        f"{tuple(parameter.shape)}: give the names in the optimizer's order"
                    )
                kept[name] = moment
            steps.append(int(entry.get("step", 0)))
        return cls(first, second, max(steps))

    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over names, step and values."""
        digest = hashlib.sha256(str(self.step).encode())
        for name in sorted(self.first):
            digest.update(name.encode())
            for moments in (self.first, self.second):
                digest.update(moments[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class OptimizerDirection:
    """Turns a layer's gradient into Adam's direction. Formulas: docs/methods.md."""

    def __init__(
        self,
        state: AdamState,
        formula: Formula = "less",
        *,
        bias_correction: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """formula: `less`, m' / sqrt(v' + eps) with both moments updated by the gradient (LESS, ICML 2024);
        `precondition`, g / (sqrt(v) + eps). RequestError for another, or for bias correction of a state without steps.
        """
        check_known("formula", formula, get_args(Formula))
        if bias_correction and formula == "precondition" and state.step < 1:
            raise RequestError("bias correction needs a state of at least one step")
        self.state, self.formula, self.bias_correction, self.betas, self.eps = (
            state,
            formula,
            bias_correction,
            betas,
            eps,
        )
        self._digest = state.digest()

    def describe(self) -> dict:
        """The direction's settings in the fingerprint."""
        return {
            "kind": "adam",
            "formula": self.formula,
            "bias_correction": self.bias_correction,
            "betas": list(self.betas),
            "eps": self.eps,
            "step": self.state.step,
            "state": self._digest,
        }

    def moments_of(self, layers: Sequence[Layer], model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """First and second moment of each layer, [O, I], on the optimizer's device; RequestError naming a layer without
        moments."""
        name_of: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in self.state.first:
                name_of[id(parameter)] = name  # a tied weight's moments may have either name
        found = []
        for layer in layers:
            known = name_of.get(id(layer.weight))
            if known is None:
                raise RequestError(f"parameter {layer.name}.weight: the optimizer state has no moments of it")
            first, second = self.state.first[known], self.state.second[known]
            found.append((layer.oriented(first), layer.oriented(second)))
        return found

    def apply(self, gradient_OI: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
        """Adam's direction for one layer's gradient, float32 [O, I]. moments: from `moments_of`; moved to the
        gradient's device during the call."""
        first_OI, second_OI = (moment.to(gradient_OI.device) for moment in moments)
        beta1, beta2 = self.betas
        step = self.state.step
        if self.formula == "precondition":
            scale = 1 - beta2**step if self.bias_correction else 1.0
            return gradient_OI / ((second_OI / scale).sqrt() + self.eps)
        first_OI = (1 - beta1) * gradient_OI - beta1 * first_OI
        second_OI = beta2 * second_OI + (1 - beta2) * gradient_OI.square()
        if self.bias_correction:
            first_OI = first_OI / (1 - beta1 ** (step + 1))
            second_OI = second_OI / (1 - beta2 ** (step + 1))
        return first_OI / (second_OI + self.eps).sqrt()


def trainer_order(model: nn.Module) -> list[str]:
    """Parameter names in the order of transformers' Trainer: first those with weight decay, then those without."""
    from transformers.trainer_pt_utils import get_parameter_names

    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], forbidden))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in trained if name in decayed] + [name for name in trained if name not in decayed]


def _verl_state(folder: Path) -> dict[str, Any]:
    """The optimizer state joined from the shards `optim_world_size_W_rank_R.pt` in a folder (or its `actor` folder)."""
    shards = {
        int(match[2]): (path, int(match[1]))
        for path in [*folder.glob("*.pt"), *folder.glob("actor/*.pt")]
        if (match := _VERL_SHARD.fullmatch(path.name))
    }
    if not shards:
        raise RequestError(f"{folder}: neither optimizer.pt nor optim_world_size_W_rank_R.pt of a verl checkpoint")
    world = next(iter(shards.values()))[1]
    missing = sorted(set(range(world)) - set(shards))
    if missing:
        raise RequestError(f"{folder}: the optimizer shard of rank {missing[0]} of {world} is missing")
    parts = [_load(shards[rank][0]) for rank in range(world)]
    state = {}
    for key, entry in parts[0]["state"].items():
        state[key] = {
            field: _joined([part["state"][key][field] for part in parts]) if field.startswith("exp_avg") else value
            for field, value in entry.items()
        }
    return {"state": state, "param_groups": parts[0].get("param_groups", [])}


def _joined(shards: Sequence[Any]) -> Tensor:
    """One tensor joined from all ranks' shards: DTensors by their placement; plain tensors are whole on every rank."""
    first = shards[0]
    if not hasattr(first, "placements"):
        return first
    place = first.placements[-1]
    if not place.is_shard():
        return first.to_local()
    return torch.cat([shard.to_local() for shard in shards], dim=place.dim).narrow(place.dim, 0, first.shape[place.dim])


def _whole(moment: Tensor) -> Tensor:
    return moment.full_tensor() if hasattr(moment, "full_tensor") else moment


def _load(path: Path) -> dict[str, Any]:
    import torch.distributed.tensor

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except Exception as error:  # torch raises pickle's, zip's and its own errors alike
        raise RequestError(f"{path}: not an optimizer state that can be read: {first_line(error)}") from error
    if not isinstance(found, Mapping) or "state" not in found:
        raise RequestError(f"{path}: not an optimizer's state_dict: it has no `state`")
    return dict(found)
