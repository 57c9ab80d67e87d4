"""What `plan` counts, against models that are really there, and how its answers follow the request."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from gradstore.engine.gradients.budget import MOST_ON_GPU, micro_batch_tokens
from gradstore.engine.planning import costs, memory
from gradstore.engine.planning.costs import Workload
from gradstore.engine.planning.devices import GPUS, Hardware, hardware
from gradstore.engine.planning.plan import Plan, Request, Stage, plan
from gradstore.engine.planning.shapes import KNOWN, ModelShape, measured_shape, shape_of
from gradstore.errors import RequestError

CPU = Hardware("cpu", 1e11, 1e11, 20 * 10**9, 1e10, 1.0, 1.0, is_gpu=False)
TINY = {
    **KNOWN["SmolLM2-135M"],
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
PUBLISHED = {
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.544,
    "Qwen2.5-7B": 7.616,
    "Qwen2.5-32B": 32.764,
    "Qwen3-0.6B": 0.596,
    "Qwen3-8B": 8.191,
    "Qwen3-32B": 32.762,
    "Qwen3-30B-A3B": 30.532,
    "Llama-3.1-8B": 8.030,
    "Llama-3.2-1B": 1.236,
    "SmolLM2-135M": 0.1345,
    "SmolLM2-360M": 0.3618,
    "SmolLM2-1.7B": 1.711,
}
"""Billions of parameters, as the checkpoints' files have them."""


def tiny(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, **settings})).eval()


def stages(found: Plan) -> dict[str, Stage]:
    return {stage.name: stage for stage in found.stages}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert shape_of(name).n_parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_shape_from_configuration_is_that_of_the_loaded_model(tmp_path: Path, tied: bool) -> None:
    """Without weights in the folder: only the configuration is read."""
    model = tiny(tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    found = shape_of(str(tmp_path), dtype=torch.float32)
    assert found == measured_shape(model, str(tmp_path))
    assert found == replace(shape_of(str(tmp_path / "config.json"), dtype=torch.float32), name=str(tmp_path))
    assert found.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert found.body_weights + found.head_weights == sum(module.weight.numel() for module in linear)
    assert sum(min(layer.n_outputs, layer.n_inputs) > 1 for layer in found.layers) == len(linear)
    assert sum(layer.n_weights for layer in found.layers if layer.n_outputs == 1) == norms


def test_flops_are_those_that_are_counted_while_a_model_runs() -> None:
    """Forward, input gradients and weight gradients against torch's own counter, attention's products left apart."""
    model, load = tiny(), Workload(1, 3, 16, 8)
    shape = measured_shape(model, "tiny")
    ids_BT = torch.arange(3 * 24).reshape(3, 24) % 320

    def counted(backward: bool, weights: bool) -> float:
        model.requires_grad_(weights)
        embedded_BTH = model.get_input_embeddings()(ids_BT).detach().requires_grad_(backward)
        with FlopCounterMode(display=False) as counter:
            logits_BTV = model(inputs_embeds=embedded_BTH, use_cache=False).logits
            if backward:
                logits_BTV.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        return float(sum(n for operator, n in counts.items() if str(operator) in ("aten.mm", "aten.addmm")))

    def planned(work: costs.Work, n_attention: float) -> float:
        return work.flops - n_attention * costs._attention(shape, load, False)

    everywhere = costs.forward(shape, load, sharing=False, head_everywhere=True)
    assert planned(everywhere, 1) == counted(False, False)
    whole = costs.weight_gradients(shape, load, sharing=False, head_everywhere=True)
    assert planned(whole, 3.5) == counted(True, True)
    n_prompt_logits = 2 * 2 * shape.head_weights * 3 * 16  # a sketch's output layer sees responses alone
    assert planned(costs.input_gradients(shape, load, sharing=False), 3.5) == counted(True, False) - n_prompt_logits


def test_projections_are_those_of_the_sketchers_formula() -> None:
    shape, load = measured_shape(tiny(), "tiny"), Workload(2, 2, 8, 16)
    n_body, n_response = 2 * 2 * 24, 2 * 2 * 16
    slow = 0
    for layer in shape.layers:
        n_tokens = n_response if layer.n_outputs == 320 else n_body
        slow += n_tokens * 2 * 5 * (layer.n_inputs + layer.n_outputs + 5)
    assert costs.sketch(shape, load, 5, sharing=False).projection_flops == slow


def test_a_token_goes_through_the_experts_that_are_chosen_for_it() -> None:
    """About 3 of 30.5 billion parameters work for a token of Qwen3-30B-A3B (its name says 3)."""
    found = shape_of("Qwen3-30B-A3B")
    assert 2.9e9 < found.body_weights + found.head_weights < 3.4e9
    assert sum(layer.n_weights for layer in found.layers) / found.n_parameters > 0.95


def test_twice_the_pool_takes_twice_the_time_and_as_much_memory() -> None:
    shape, request = shape_of("Qwen3-0.6B"), Request(5000, 8, 500, n_benchmark=1)
    once, twice = (stages(plan(shape, replace(request, n_pool=n), GPUS["h100"])) for n in (4999, 9999))
    for name in ("rollouts, vllm", "sketches", "probe", "query"):
        assert twice[name].seconds == pytest.approx(2 * once[name].seconds, rel=1e-3)
        assert twice[name].disk_bytes == pytest.approx(2 * once[name].disk_bytes, rel=1e-3)
    for name in ("sketches", "fit and measure", "fidelity", "training round"):
        assert twice[name].memory_bytes == once[name].memory_bytes
    for name in ("fit and measure", "fidelity", "training round"):  # of a sample, or of the picks
        assert twice[name].seconds == once[name].seconds


def test_eight_gpus_take_an_eighth_of_what_is_divided() -> None:
    shape, request = shape_of("Qwen3-8B"), Request(10_000, 16, 1000)
    one, eight = (stages(plan(shape, replace(request, n_devices=n), GPUS["h100"])) for n in (1, 8))
    assert eight["sketches"].seconds == pytest.approx(one["sketches"].seconds / 8)
    assert eight["fidelity"].seconds == one["fidelity"].seconds
    assert not one["training round"].fits
    assert eight["training round"].fits


def test_collect_of_an_8b_model_fits_one_gpu_of_80_gb() -> None:
    found = plan(shape_of("Qwen3-8B"), Request(10_000, 16, 1000), GPUS["h100"])
    by_name = stages(found)
    assert all(by_name[name].fits for name in ("sketches", "fit and measure", "fidelity", "probe"))
    assert found.micro_batch_tokens < MOST_ON_GPU
    assert [problem.split(":")[0] for problem in found.problems] == ["training round"]


def test_what_does_not_fit_says_what_would() -> None:
    found = plan(shape_of("Qwen3-32B"), Request(100, 8, 500), GPUS["4090"])
    assert {problem.split(":")[0] for problem in found.problems} >= {"sketches", "probe"}
    for problem in found.problems:
        assert "one 4090 has 24" in problem


@pytest.mark.parametrize("settings", [{}, {"hidden_size": 96, "intermediate_size": 384}])
def test_micro_batches_are_those_that_a_pass_chooses(settings: dict) -> None:
    model = tiny(**settings)
    shape = measured_shape(model, "tiny")
    chosen = memory.recommended_tokens(shape, CPU)
    assert chosen.sketching == micro_batch_tokens(model)
    assert chosen.with_inputs == micro_batch_tokens(model, inputs_kept=True)


def test_prompts_run_once_where_that_spares_enough() -> None:
    assert Workload(10, 16, 100, 100).body_tokens() == 10 * (16 * 100 + 100)
    assert Workload(10, 16, 100, 2000).body_tokens() == 10 * 16 * 2100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "neither a model's folder, nor a config.json, nor a known shape"),
        ("[1]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
        (json.dumps({"model_type": "no_such_model"}), "not the configuration of a causal language model"),
        (json.dumps({"model_type": "vit"}), "not the configuration of a causal language model"),
    ],
)
def test_a_model_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    name = "Qwen/Qwen9-900B"
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        name = str(tmp_path)
    with pytest.raises(RequestError, match=message):
        shape_of(name)


def test_requests_that_cannot_be_are_refused() -> None:
    with pytest.raises(RequestError, match="rollouts is 0"):
        Request(10, 0, 100)
    with pytest.raises(RequestError, match="is not one of cpu, h100"):
        hardware("abacus")


def test_a_basis_file_is_as_large_as_planned() -> None:
    """Facts of a real one: sides of 20 columns in float32, 231 MB for the matrices of Qwen3-8B; and its norms'."""
    shape: ModelShape = shape_of("Qwen3-8B")
    matrices = tuple(layer for layer in shape.layers if layer.n_outputs > 1)
    assert memory.basis_bytes(replace(shape, layers=matrices), 16) == pytest.approx(231e6, rel=0.01)
    widths = 4096 * (2 * 36 + 1) + 128 * 2 * 36
    assert memory.basis_bytes(shape, 16) - memory.basis_bytes(replace(shape, layers=matrices), 16) == 4 * 20 * widths
