"""A checkpoint that lacks weights, or has others, is refused by name: what is random would be sketched as live."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradstore.engine.gradients.models import load_model
from gradstore.errors import RequestError


def changed(folder, change, name="model.safetensors") -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name, {"format": "pt"})


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_whole_checkpoints_load(make_model, tmp_path, architecture: str) -> None:
    """Tied heads are not in the file, and old files have buffers that no model keeps any more."""
    make_model(architecture).save_pretrained(tmp_path)
    old = ["layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias", "h.0.attn.masked_bias", "embeddings.position_ids"]
    changed(tmp_path, lambda weights: weights.update({name: torch.ones(4) for name in old}))
    load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_weight_is_named(make_model, tmp_path, name: str) -> None:
    make_model("llama").save_pretrained(tmp_path)
    changed(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(RequestError, match=f"lacks weights .*{name}"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["score.weight", "v_head.summary.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_weight_of_another_model_is_named(make_model, tmp_path, name: str) -> None:
    make_model("llama").save_pretrained(tmp_path)
    changed(tmp_path, lambda weights: weights.update({name: torch.ones(1, 32)}))
    with pytest.raises(RequestError, match=f"does not have.*{name}"):
        load_model(tmp_path, device="cpu")


def test_a_backbone_is_refused(make_model, tmp_path) -> None:
    make_model("llama").model.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"lm_head\.weight"):
        load_model(tmp_path, device="cpu")


def test_a_weight_of_another_shape_is_refused(make_model, tmp_path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    changed(tmp_path, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(RequestError, match="can be loaded"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(next(key for key in weights if "lora_B" in key)), "lacks weights .*lora_B"),
        (lambda weights: weights.pop(next(key for key in weights if "lm_head" in key)), "lacks weights .*lm_head"),
        (
            lambda weights: weights.update({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}),
            "does not have.*x.lora",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_are_whole_too(make_model, tmp_path, change, said: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    make_model("llama").save_pretrained(tmp_path / "model")
    peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "adapter")
    assert isinstance(load_model(tmp_path / "model", tmp_path / "adapter", "cpu"), peft.PeftModel)
    changed(tmp_path / "adapter", change, "adapter_model.safetensors")
    with pytest.raises(RequestError, match=said):
        load_model(tmp_path / "model", tmp_path / "adapter", "cpu")
