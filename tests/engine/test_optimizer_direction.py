"""Adam's direction for each problem, against the optimizer itself and the formulas written out."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradstore.engine import Sketcher, SketchSpec
from gradstore.engine.gradients.exact import layer_gradients
from gradstore.engine.gradients.layers import find_layers
from gradstore.engine.gradients.optimizer_direction import AdamState, OptimizerDirection, trainer_order
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from gradstore.state import State


def trained(model: nn.Module, steps: int = 3, names: list[str] | None = None) -> torch.optim.AdamW:
    """An optimizer with moments: a few steps on random sequences."""
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in names or parameters], lr=1e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(0, 61, (2, 9))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def projected(sketcher: Sketcher, matrices: list[torch.Tensor]) -> np.ndarray:
    parts = []
    for basis, matrix in zip(sketcher.projection.layers, matrices, strict=True):
        left = torch.eye(len(matrix)) if basis.left_OR is None else torch.from_numpy(basis.left_OR)
        right = torch.eye(matrix.shape[1]) if basis.right_IR is None else torch.from_numpy(basis.right_IR)
        parts.append((left.T @ matrix @ right).flatten())
    return torch.cat(parts).numpy()


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("formula", ["less", "precondition"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_sketch_of_the_direction(make_model, make_groups, architecture, formula, bias_correction) -> None:
    """Each problem's own gradient, transformed entry by entry as the formula says, then projected."""
    model, groups = make_model(architecture), make_groups(3)
    state = AdamState.of_optimizer(trained(model), model)
    direction = OptimizerDirection(state, formula, bias_correction=bias_correction)
    sketcher = Sketcher(model, SketchSpec(rank=6), optimizer=direction)
    found = sketcher.sketch(groups)
    tied = {"lm_head.weight": "model.embed_tokens.weight" if architecture == "qwen2" else "transformer.wte.weight"}
    for row, group in enumerate(groups):
        matrices = []
        gradient = layer_gradients(model, [group])
        for layer, g in zip(find_layers(model), gradient.matrices, strict=True):
            name = f"{layer.name.removesuffix('.bias')}.{layer.parameter}"
            name = name if name in state.first else tied[name]
            m, v = state.first[name], state.second[name]
            m, v = (x.T if isinstance(layer.module, Conv1D) and x.ndim == 2 else x.reshape(g.shape) for x in (m, v))
            if formula == "less":
                loss_gradient = -g
                m, v = 0.9 * m + 0.1 * loss_gradient, 0.999 * v + 0.001 * loss_gradient**2
                if bias_correction:
                    m, v = m / (1 - 0.9**4), v / (1 - 0.999**4)
                matrices.append(-(m / (v + 1e-8).sqrt()))
            else:
                v = v / (1 - 0.999**3) if bias_correction else v
                matrices.append(g / (v.sqrt() + 1e-8))
        expected = projected(sketcher, matrices)
        assert np.linalg.norm(found.sketches[row] - expected) < 1e-4 * np.linalg.norm(expected)


def test_fresh_moments_give_the_sign(make_model, make_groups) -> None:
    """LESS with m = v = 0: 0.1 g / sqrt(0.001 g^2 + 1e-8), the sign times 0.1 / sqrt(0.001) where g is large."""
    model, (group,) = make_model("qwen2"), make_groups(1)
    direction = OptimizerDirection(AdamState.zero(model))
    layers = find_layers(model)
    gradient = layer_gradients(model, [group])
    for g, moments in zip(gradient.matrices, direction.moments_of(layers, model), strict=True):
        g = g / g.abs().max()
        found = direction.apply(g, moments)
        assert torch.equal(found.sign(), g.sign())
        large = g.abs() > 0.05
        assert large.any()
        assert torch.allclose(found[large], g[large].sign() * 0.1 / math.sqrt(0.001), rtol=3e-3)


def test_problems_without_signal_stay_so(make_model, make_groups) -> None:
    """The optimizer's momentum is no signal of a problem that has none."""
    model, (group,) = make_model("qwen2"), make_groups(1)
    flat = Group("flat", group.prompt_ids, group.responses, np.ones(4))
    direction = OptimizerDirection(AdamState.of_optimizer(trained(model), model))
    batch = Sketcher(model, SketchSpec(rank=4), optimizer=direction).sketch([flat, group])
    assert batch.states == [State.NO_SIGNAL, State.LIVE]
    assert not batch.sketches[0].any()


def test_the_fingerprint_holds_formula_and_state(make_model) -> None:
    """Directions under two states, or beside plain gradients, must never meet in one store."""
    model = make_model("qwen2")
    spec = SketchSpec(rank=4)
    states = [AdamState.zero(model), AdamState.of_optimizer(trained(make_model("qwen2")), model)]
    states[1] = AdamState.of_state_dict(trained(copy.deepcopy(model)).state_dict(), model)
    sketchers = [
        Sketcher(model, spec),
        Sketcher(model, spec, optimizer=OptimizerDirection(states[0])),
        Sketcher(model, spec, optimizer=OptimizerDirection(states[1])),
        Sketcher(model, spec, optimizer=OptimizerDirection(states[1], bias_correction=True)),
        Sketcher(model, spec, optimizer=OptimizerDirection(states[1], "precondition")),
    ]
    prints = [repr(sketcher.fingerprint) for sketcher in sketchers]
    assert len(set(prints)) == 5
    assert Sketcher(model, spec, optimizer=OptimizerDirection(states[1])).fingerprint == sketchers[2].fingerprint


def same(a: AdamState, b: AdamState) -> bool:
    return a.step == b.step and all(
        torch.equal(x[name], y[name]) for x, y in ((a.first, b.first), (a.second, b.second)) for name in x
    )


def test_states_from_files(make_model, tmp_path) -> None:
    """torch's own order, the Trainer's order, states keyed by name, and a live optimizer all tell the same."""
    for number, names in enumerate((None, trainer_order(make_model("qwen2")))):
        model = make_model("qwen2")
        optimizer = trained(model, names=names)
        live = AdamState.of_optimizer(optimizer, model)
        assert live.step == 3
        assert set(live.first) == {name for name, _ in model.named_parameters()}
        path = tmp_path / f"{number}" / "optimizer.pt"
        path.parent.mkdir()
        torch.save(optimizer.state_dict(), path)
        assert same(AdamState.of_file(path, model, names), live)
        assert same(AdamState.of_file(path.parent, model, names), live)
        if names:
            assert names != [name for name, _ in model.named_parameters()]
    by_name = {"state": {name: {"exp_avg": live.first[name], "exp_avg_sq": live.second[name]} for name in live.first}}
    assert AdamState.of_state_dict(by_name, model).second.keys() == live.second.keys()


def test_the_trainers_order_is_the_trainers(make_model, tmp_path) -> None:
    """Moments under the wrong names would precondition every layer by another's history."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model("qwen2")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert [name_of[id(p)] for group in groups for p in group["params"]] == trainer_order(model)


def test_a_verl_checkpoint(make_model, tmp_path) -> None:
    """Shards of all ranks, cut along the first dimension, are put together again."""
    model = make_model("llama")
    optimizer = trained(model)
    live, whole = AdamState.of_optimizer(optimizer, model), optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    for rank in range(2):
        state = {}
        for number, entry in whole["state"].items():
            state[number] = {
                key: Shard(value.chunk(2)[rank], value.shape) if key.startswith("exp_avg") else value
                for key, value in entry.items()
            }
        part = {"state": state, "param_groups": whole["param_groups"]}
        (tmp_path / f"optim_world_size_2_rank_{rank}.pt").touch()
        SHARDS[f"optim_world_size_2_rank_{rank}.pt"] = part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradstore.engine.gradients.optimizer_direction._load", lambda path: SHARDS[path.name])
        assert same(AdamState.of_file(tmp_path, model), live)
        assert same(AdamState.of_file(tmp_path, model, names), live)
        (tmp_path / "optim_world_size_2_rank_1.pt").unlink()
        with pytest.raises(RequestError, match="shard of rank 1 of 2 is missing"):
            AdamState.of_file(tmp_path, model)


SHARDS: dict[str, dict] = {}


class Shard:
    """What is used of a DTensor split along dimension 0."""

    class _Place:
        dim = 0

        def is_shard(self) -> bool:
            return True

    placements = (_Place(),)

    def __init__(self, local: torch.Tensor, shape: torch.Size) -> None:
        self._local, self.shape = local, shape

    def to_local(self) -> torch.Tensor:
        return self._local


def test_wrong_states_are_refused(make_model, tmp_path) -> None:
    """Each error names the parameter or the file."""
    model = make_model("qwen2")
    state_dict = trained(model).state_dict()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(RequestError, match=r"parameter model.embed_tokens.weight: its exp_avg has shape \(32,\)"):
        AdamState.of_state_dict(state_dict, model, names[::-1])
    with pytest.raises(RequestError, match="26 parameters, 2 names were given"):
        AdamState.of_state_dict(state_dict, model, names[:2])
    momentum = {"state": {name: {"momentum_buffer": torch.zeros(3)} for name in names}}
    with pytest.raises(RequestError, match="has no exp_avg; is it Adam's"):
        AdamState.of_state_dict(momentum, model)
    few = AdamState.of_state_dict({"state": {}}, model)
    with pytest.raises(RequestError, match=r"parameter model.layers.0.self_attn.q_proj.weight: .* no moments"):
        Sketcher(model, SketchSpec(rank=4), optimizer=OptimizerDirection(few))
    with pytest.raises(RequestError, match=r"neither optimizer\.pt nor"):
        AdamState.of_file(tmp_path, model)
    with pytest.raises(RequestError, match="no such file"):
        AdamState.of_file(tmp_path / "optimizer.pt", model)
    (tmp_path / "optimizer.pt").write_bytes(b"not a state")
    with pytest.raises(RequestError, match="not an optimizer state that can be read"):
        AdamState.of_file(tmp_path, model)
    with pytest.raises(RequestError, match="formula 'lion'"):
        OptimizerDirection(few, "lion")
    with pytest.raises(RequestError, match="at least one step"):
        OptimizerDirection(AdamState.zero(model), "precondition", bias_correction=True)
