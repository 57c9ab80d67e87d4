"""Adapters: what of them is sketched, what is refused by name, what identifies them."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

from gradstore.engine import Sketcher, SketchSpec
from gradstore.engine.gradients.adapters import adapter_identity
from gradstore.engine.rollouts import Group
from gradstore.errors import RequestError
from tests.engine.test_sketcher import relative_error, slow_objective

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(model: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """The model with an adapter whose second matrices are not zero, as at the start of training."""
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def slow_sketch(model: nn.Module, sketcher: Sketcher, group: Group) -> np.ndarray:
    """Autograd's gradient of the problem alone, projected layer by layer and folded."""
    layers = sketcher.gradients.layers
    stored = torch.autograd.grad(slow_objective(model, group, sketcher.spec.objective), [x.weight for x in layers])
    gradients = [layer.oriented(gradient) for layer, gradient in zip(layers, stored, strict=True)]
    core = []
    for basis, gradient in zip(sketcher.projection.layers, gradients, strict=True):
        left_RO = np.eye(len(gradient)) if basis.left_OR is None else basis.left_OR.T
        right_IR = np.eye(gradient.shape[1]) if basis.right_IR is None else basis.right_IR
        core.append((left_RO @ gradient.numpy() @ right_IR).ravel())
    fold = sketcher.projection.fold
    if fold is None:
        return np.concatenate(core)
    folded = np.zeros(sketcher.dim)
    np.add.at(folded, fold.to_M, fold.sign_M * np.concatenate(core)[fold.of_M])
    return folded


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
        {"bias": "all"},
        {"lora_bias": True},
    ],
)
@pytest.mark.parametrize("basis", ["random", "dense"])
def test_what_trains_and_is_linear_is_sketched(make_model, make_groups, options: dict, basis: str) -> None:
    """The sketch is the projected gradient of all that trains: adapters, and copies and biases beside them."""
    model = adapted(make_model("llama"), peft.LoraConfig(**{**LORA, **options}))
    sketcher = Sketcher(model, SketchSpec(rank=4, basis=basis, dim=300))
    seen = {id(layer.weight) for layer in sketcher.gradients.layers}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert seen == {id(p) for name, p in trained.items() if "embed_tokens" not in name}
    for group, found in zip(make_groups(3), sketcher.sketch(make_groups(3)).sketches, strict=True):
        assert relative_error(found, slow_sketch(model, sketcher, group)) < 1e-5


def test_head_mode_sees_the_head_that_trains(make_model, make_groups) -> None:
    model = adapted(make_model("llama"), peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    sketcher = Sketcher(model, SketchSpec(rank=4, head_only=True))
    assert [layer.name for layer in sketcher.gradients.layers] == ["base_model.model.lm_head.modules_to_save.default"]
    assert np.linalg.norm(sketcher.sketch(make_groups(1)).sketches[0]) > 0


def test_patterns_leave_out_what_takes_no_part(make_model) -> None:
    """A frozen original, or another adapter's matrices, would be a row of zeros in every sketch."""
    model = adapted(make_model("llama"), peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    model.add_adapter("other", peft.LoraConfig(**LORA))
    names = [layer.name for layer in Sketcher(model, SketchSpec(modules=("lm_head", "lora_A"))).gradients.layers]
    assert "base_model.model.lm_head.modules_to_save.default" in names
    assert not [name for name in names if "original_module" in name or name.endswith(".other")]


REFUSED = {
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": peft.LoHaConfig(r=4, alpha=8, target_modules=["q_proj"]),
    "LOKR": peft.LoKrConfig(r=4, alpha=8, target_modules=["q_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
    "BOFT": peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj"]),
    "VERA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "ADALORA": peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["norm"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "trainable token indices": peft.LoraConfig(**LORA, trainable_token_indices=[1, 2]),
    "LoRA on an embedding": peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_others_are_refused_by_name(make_model, kind: str) -> None:
    model = peft.get_peft_model(make_model("llama"), REFUSED[kind])
    with pytest.raises(RequestError, match=kind) as refused:
        Sketcher(model, SketchSpec(rank=4))
    assert "merge_and_unload" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_merged_and_disabled_adapters_are_refused(make_model) -> None:
    """A merged adapter's matrices see no tokens, so that every gradient of theirs would be zero."""
    model = adapted(make_model("llama"), peft.LoraConfig(**LORA))
    model.merge_adapter()
    with pytest.raises(RequestError, match="merged"):
        Sketcher(model, SketchSpec(rank=4))
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(RequestError, match="disabled"):
        Sketcher(model, SketchSpec(rank=4))
    Sketcher(model, SketchSpec(rank=4))


def _identity(make_model, **options) -> dict | None:
    return adapter_identity(peft.get_peft_model(make_model("llama"), peft.LoraConfig(**{**LORA, **options})))


def test_identity_is_of_the_scaling_that_acts(make_model) -> None:
    """rsLoRA scales by alpha / sqrt(rank): at rank 4 and alpha 8 as plain LoRA with alpha 16."""
    plain = _identity(make_model)
    assert plain == {"default": {"kind": "LORA", "rank": 4, "alpha": 8}}  # as stores have had it from the first
    assert _identity(make_model, use_rslora=True) == _identity(make_model, lora_alpha=16) != plain
    assert _identity(make_model, r=3, lora_alpha=16)["default"]["alpha"] == 16
    one = _identity(make_model, alpha_pattern={"q_proj": 32})
    other = _identity(make_model, alpha_pattern={"down_proj": 32})
    assert plain != one != other != plain
    assert one == _identity(make_model, lora_alpha=32, alpha_pattern={"down_proj": 8})
