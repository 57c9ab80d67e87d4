"""Mixtures of experts: fused experts, routers and shared experts are sketched as a plain autograd loop says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from scipy.stats import spearmanr
from torch import Tensor, nn

from gradstore.engine import exact_dots, fit_projection, layer_gradients
from gradstore.engine.gradients.layers import Layer, find_layers
from gradstore.engine.gradients.optimizer_direction import AdamState, OptimizerDirection
from gradstore.engine.rollouts import Group
from gradstore.engine.sketches.bases import create_store, load_projection
from gradstore.engine.sketches.from_training_pass import sketched_and_summed
from gradstore.engine.sketches.projection import EXPERT_RANK, Projection
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import RequestError

N_VOCABULARY = 61

_SHARED: dict[str, Any] = {
    "vocab_size": N_VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_QWEN = {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_SHARED, **_QWEN, shared_expert_intermediate_size=24, decoder_sparse_step=1)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_SHARED, **_QWEN)),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **_SHARED,
            **_QWEN,
            shared_expert_intermediate_size=24,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_SHARED, num_local_experts=8, intermediate_size=24, head_dim=8)
    ),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_SHARED, num_experts=8, intermediate_size=24)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_SHARED, num_local_experts=4, intermediate_size=32, head_dim=8, sliding_window=6)
    ),
    "glm4-moe": lambda: hf.Glm4MoeForCausalLM(hf.Glm4MoeConfig(**_SHARED, **_DEEPSEEK, head_dim=8)),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**_SHARED, "num_key_value_heads": 4},
            **_DEEPSEEK,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
}


def random_mixture(name: str) -> nn.Module:
    """A seeded random float32 mixture, with weights large enough that tokens are routed differently."""
    torch.manual_seed(3)
    model = ARCHITECTURES[name]().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.06) if parameter.ndim >= 2 else None
            parameter.mul_(3.0) if parameter.ndim == 2 else None
    return model


def _groups(n: int, seed: int = 0) -> list[Group]:
    """Prompts and responses of unlike lengths, so that micro-batches are padded."""
    random = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        rewards = np.zeros(4)
        rewards[: random.integers(1, 4)] = 1.0
        responses = [random.integers(0, N_VOCABULARY, random.integers(1, 14)) for _ in range(4)]
        prompt = random.integers(0, N_VOCABULARY, random.integers(3, 20))
        groups.append(Group(f"p{i}", prompt, responses, random.permutation(rewards)))
    return groups


def _plain(model: nn.Module, group: Group, weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """d/dW of sum_j sum_t (r_j - mean r) / (G T_j) log pi by autograd, every rollout alone and unpadded, float64."""
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    totals = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    n = len(group.prompt_ids)
    for response, advantage in zip(group.responses, group.rewards - group.rewards.mean(), strict=True):
        ids = torch.tensor(np.concatenate([group.prompt_ids, response]))[None]
        logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, n - 1 : -1]
        chosen = logprobs.gather(1, ids[0, n:, None]).sum()
        loss = advantage / (len(group.responses) * len(response)) * chosen
        for total, found in zip(totals, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if found is not None:
                total += found.double()
    for weight, flag in zip(weights, flags, strict=True):
        weight.requires_grad_(flag)
    return totals


def _projected(projection: Projection, layers: Sequence[Layer], gradients: Sequence[Tensor]) -> np.ndarray:
    """The core of gradients that are stored as the weights are, one expert after the other."""
    core_C = np.zeros(projection.core_dim)
    for basis, layer, stored in zip(projection.layers, layers, gradients, strict=True):
        gradient = layer.oriented(stored).numpy()
        left = np.eye(layer.n_outputs) if basis.left_OR is None else basis.left_OR.astype(float)
        right = np.eye(layer.n_inputs) if basis.right_IR is None else basis.right_IR.astype(float)
        if basis.expert_EK is None:
            core = left.T @ gradient @ right
        else:
            cores = [left.T @ of_expert @ right for of_expert in gradient]
            core = np.stack(
                [sum(weight * one for weight, one in zip(column, cores, strict=True)) for column in basis.expert_EK.T],
                axis=1,
            )
        core_C[basis.start : basis.stop] = core.ravel()
    return core_C


def _largest_error(sketcher: Sketcher, groups: Sequence[Group]) -> float:
    layers = sketcher.gradients.layers
    weights = [layer.weight for layer in layers]
    errors = []
    for row, group in zip(sketcher.sketch(groups).sketches, groups, strict=True):
        expected = _projected(sketcher.projection, layers, _plain(sketcher.model, group, weights))
        errors.append(float(np.linalg.norm(row - expected) / np.linalg.norm(expected)))
    return max(errors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sketch_is_the_projection_of_plain_gradients_of_all_experts_and_routers(name: str) -> None:
    model = random_mixture(name)
    sketcher = Sketcher(model, SketchSpec(rank=4, token_budget=256))
    names = [layer.name for layer in sketcher.gradients.layers]
    assert any(name.endswith("gate_up_proj") for name in names)
    assert any("experts.down_proj" in name for name in names)
    assert any(layer.name.endswith(("gate", "router")) and not layer.is_called for layer in sketcher.gradients.layers)
    assert _largest_error(sketcher, _groups(3)) < 1e-4


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_experts_gives_the_same_sketch(name: str, implementation: str) -> None:
    model = random_mixture(name)
    expected = Sketcher(model, SketchSpec(rank=4)).sketch(_groups(3)).sketches
    model.config._experts_implementation = implementation
    found = Sketcher(model, SketchSpec(rank=4)).sketch(_groups(3)).sketches
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert model.config._experts_implementation == implementation
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_more_experts_than_the_side_is_wide_are_folded_by_signs() -> None:
    torch.manual_seed(3)
    n = EXPERT_RANK + 4
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_SHARED, **{**_QWEN, "num_experts": n})).eval()
    sketcher = Sketcher(model, SketchSpec(rank=3))
    sides = [basis.expert_EK for basis in sketcher.projection.layers if basis.expert_EK is not None]
    assert {side.shape for side in sides} == {(n, EXPERT_RANK)}
    assert _largest_error(sketcher, _groups(2)) < 1e-4


def test_exact_dots_and_norms_are_those_of_plain_gradients() -> None:
    model, groups = random_mixture("gpt-oss"), _groups(4)
    layers = find_layers(model)
    plain = [_plain(model, group, [layer.weight for layer in layers]) for group in groups]
    target = layer_gradients(model, groups[2:])
    mean = [(a + b) / 2 for a, b in zip(plain[2], plain[3], strict=True)]
    for layer, matrix, expected in zip(layers, target.matrices, mean, strict=True):
        assert matrix.shape == layer.matrix_shape
        assert torch.allclose(matrix.double(), layer.oriented(expected), atol=1e-6 + 1e-4 * float(expected.abs().max()))
    expected_P = [sum(float((a * b).sum()) for a, b in zip(of, mean, strict=True)) for of in plain[:2]]
    for norms in (False, True):
        assert exact_dots(model, groups[:2], target, norms=norms).dots[:, 0] == pytest.approx(expected_P, rel=1e-3)


def test_an_optimizer_direction_of_experts_is_elementwise_in_the_stored_layout() -> None:
    model, group = random_mixture("gpt-oss"), _groups(1)[0]
    state = AdamState.zero(model)
    torch.manual_seed(0)
    for moments in (state.first, state.second):
        for name, moment in moments.items():
            moments[name] = torch.rand_like(moment) * 1e-3
    direction = OptimizerDirection(state)
    sketcher = Sketcher(model, SketchSpec(rank=4), optimizer=direction)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers, moved = sketcher.gradients.layers, []
    for layer, gradient in zip(layers, _plain(model, group, [layer.weight for layer in layers]), strict=True):
        first, second = (moments[names[id(layer.weight)]].double() for moments in (state.first, state.second))
        first, second = -0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        moved.append(first / (second + 1e-8).sqrt())
    expected = _projected(sketcher.projection, layers, moved)
    found = sketcher.sketch([group]).sketches[0]
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fitted_sketches_rank_as_gradients_over_all_layers_do(name: str) -> None:
    """At 1,024 dimensions, 1,055 bytes a row with 8 bits a dimension."""
    model, groups = random_mixture(name), _groups(36)
    spec = SketchSpec(rank=16, basis="fitted", dim=1020, token_budget=512)
    pool, benchmark = groups[:28], groups[28:]
    projection = fit_projection(model, pool, spec, benchmark=benchmark)
    sketcher = Sketcher(model, spec, projection)
    exact = exact_dots(model, pool, layer_gradients(model, benchmark, spec), spec, norms=True).cosines[:, 0]
    rows, target = sketcher.sketch(pool), sketcher.sketch(benchmark).sketches.mean(0)
    found = rows.sketches @ target / (rows.norms * np.linalg.norm(target))
    assert spearmanr(found, exact).statistic >= 0.98


@pytest.mark.parametrize("adapted", [False, True])
def test_a_training_pass_gives_sketches_and_the_gradients_of_experts(adapted: bool) -> None:
    model, groups = _adapted("qwen3-moe") if adapted else random_mixture("qwen3-moe"), _groups(2)
    sketcher = Sketcher(model, SketchSpec(rank=4))
    batch, sums = sketched_and_summed(sketcher, groups)
    expected = sketcher.sketch(groups).sketches
    assert np.abs(batch.sketches - expected).max() < 1e-4 * np.abs(expected).max()
    weights = {id(layer.weight): layer.name for layer in sketcher.gradients.layers}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in weights}
    plain = [_plain(model, group, list(trained.values())) for group in groups]
    for number, name in enumerate(trained):
        total = plain[0][number] + plain[1][number]
        assert torch.allclose(sums[name].double(), total, atol=1e-6 + 1e-4 * float(total.abs().max()))


def test_a_projection_with_experts_is_kept_and_found_again(tmp_path: Path) -> None:
    model, groups = random_mixture("mixtral"), _groups(6)
    spec = SketchSpec(rank=4, basis="fitted", dim=64)
    sketcher = Sketcher(model, spec, fit_projection(model, groups, spec))
    store = create_store(tmp_path / "store", sketcher)
    found = load_projection(store)
    sides = [(a.expert_EK, b.expert_EK) for a, b in zip(found.layers, sketcher.projection.layers, strict=True)]
    assert any(a is not None for a, _ in sides)
    assert all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in sides)


def _adapted(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(3)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=8, target_parameters=parameters, **settings)
    model = peft.get_peft_model(random_mixture(name), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.2) if "lora_" in parameter_name else None
    return model.eval()


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj"]}, {"target_modules": [], "use_rslora": True}])
def test_lora_on_fused_experts_is_sketched_exactly(name: str, settings: dict) -> None:
    sketcher = Sketcher(_adapted(name, **settings), SketchSpec(rank=4, token_budget=256))
    layers = sketcher.gradients.layers
    assert sum("experts" in layer.name for layer in layers) == 8
    assert all("lora_" in layer.name for layer in layers)
    assert _largest_error(sketcher, _groups(3)) < 1e-4


def test_lora_on_a_parameter_that_is_no_fused_weight_is_refused_by_name() -> None:
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["q_proj.weight"])
    model = peft.get_peft_model(random_mixture("qwen3-moe"), config)
    with pytest.raises(RequestError, match=r"q_proj adapts the parameter weight of a Linear.*target_modules"):
        Sketcher(model, SketchSpec(rank=4))


def test_layers_without_the_batch_dimension_are_given_it_back() -> None:
    torch.manual_seed(3)
    sizes = {"vocab_size": N_VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = hf.OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=False)
    model = hf.OPTForCausalLM(config).eval()
    for modules in (None, ("fc1", "fc2")):
        assert _largest_error(Sketcher(model, SketchSpec(rank=4, modules=modules)), _groups(3)) < 1e-4


def test_the_input_embedding_is_sketched_where_it_is_asked_for() -> None:
    """More token ids than directions of their side, and a padding id whose row has no gradient."""
    torch.manual_seed(3)
    config = hf.Qwen2Config(
        **{name: _SHARED[name] for name in _SHARED if "experts" not in name}, intermediate_size=48, pad_token_id=7
    )
    model, groups = hf.Qwen2ForCausalLM(config).eval(), _groups(4)
    spec = SketchSpec(rank=4, embeddings=True, token_budget=256)
    sketcher = Sketcher(model, spec)
    layers = sketcher.gradients.layers
    assert layers[0].name == "model.embed_tokens"
    assert len(layers) == len(find_layers(model)) + 1
    assert _largest_error(sketcher, groups) < 1e-4
    assert SketchSpec.of(sketcher.fingerprint).embeddings
    plain = [_plain(model, group, [layer.weight for layer in layers]) for group in groups[:2]]
    target = layer_gradients(model, groups[1:2], spec)
    expected_P = [sum(float((a * b).sum()) for a, b in zip(of, plain[1], strict=True)) for of in plain]
    for norms in (False, True):
        assert exact_dots(model, groups[:2], target, spec, norms=norms).dots[:, 0] == pytest.approx(
            expected_P, rel=1e-3
        )
    fitted = replace(spec, basis="fitted", dim=64)
    assert Sketcher(model, fitted, fit_projection(model, groups, fitted)).sketch(groups).sketches.any()


def _llama4() -> nn.Module:
    torch.manual_seed(3)
    sizes = {**_SHARED, "num_experts_per_tok": 1, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 8}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, num_local_experts=4)).eval()


def test_experts_that_no_interface_runs_are_refused_by_name() -> None:
    with pytest.raises(RequestError, match=r"feed_forward.experts \(Llama4TextExperts\) holds weights of several"):
        Sketcher(_llama4(), SketchSpec(rank=4))


def test_a_router_that_is_a_linear_layer_and_returns_more_than_logits_is_seen() -> None:
    sketcher = Sketcher(_llama4(), SketchSpec(rank=4, modules=("router", "q_proj"), share_prompts=False))
    assert sum("router" in layer.name for layer in sketcher.gradients.layers) == 2
    assert _largest_error(sketcher, _groups(3)) < 1e-4


class _Pooled(nn.Module):
    """Mixes neighbouring tokens before a linear layer: rows are no longer those of tokens."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x) + self.inner(x.mean(1))[:, None]


def test_a_layer_whose_rows_are_not_tokens_is_refused_with_a_pattern_that_leaves_it_out() -> None:
    torch.manual_seed(3)
    model = random_mixture("qwen3-moe")
    block = model.model.layers[0].self_attn
    block.q_proj = _Pooled(block.q_proj)
    with pytest.raises(RequestError, match=r"layers.0.self_attn.q_proj.inner sees inputs of shape") as refused:
        Sketcher(model, SketchSpec(rank=4)).sketch(_groups(2))
    pattern = str(refused.value).split("'")[1]
    left = Sketcher(model, SketchSpec(rank=4, modules=(pattern,)))
    assert len(left.gradients.layers) == len(find_layers(model)) - 2  # its bias too
    left.sketch(_groups(2))


def test_a_weight_that_is_not_used_linearly_is_refused_by_name() -> None:
    model = random_mixture("qwen3-moe")
    router = model.model.layers[1].mlp.gate
    weight = router.weight

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.einsum("ni,ei->ne", hidden, weight)
        values, indices = logits.softmax(-1).topk(2)
        return logits, values, indices

    router.forward = forward
    with pytest.raises(RequestError, match=r"layers.1.mlp.gate \(Qwen3MoeTopKRouter\) does not use its weight"):
        Sketcher(model, SketchSpec(rank=4)).sketch(_groups(2))


def test_layers_cover_a_model_of_the_size_of_qwen3_30b_a3b() -> None:
    """Counted on the meta device: no weight is made. Left out are the embedding and the norms."""
    config = hf.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = hf.Qwen3MoeForCausalLM(config)
    layers = find_layers(model)
    assert sum(layer.n_experts == 128 for layer in layers) == 96
    covered = sum({id(layer.weight): layer.weight.numel() for layer in layers}.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 30e9 < total < 31e9
    assert covered / total >= 0.95
