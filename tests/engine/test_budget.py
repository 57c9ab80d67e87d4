"""The size of micro-batches that nobody gave: from what activations take, and less once memory has run out."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3Config

from gradstore.engine import OptimizerDirection, SketchSpec, exact_dots, fit_projection, layer_gradients, objective
from gradstore.engine.gradients.budget import LEAST, MOST_ON_CPU, activation_bytes, micro_batch_tokens
from gradstore.engine.gradients.directions import dot_along, summed_gradient, validation_gradient
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.hooks import frozen
from gradstore.engine.gradients.logprobs import Reference
from gradstore.engine.gradients.optimizer_direction import AdamState
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.errors import RequestError

SIZE: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen3": Qwen3Config(**SIZE, head_dim=32),
    "gpt2": GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=500),
    "mixtral": MixtralConfig(**SIZE, num_local_experts=8, num_experts_per_tok=2),
}


def kept_by_autograd(model: nn.Module, n_tokens: int) -> int:
    """Bytes of every storage that autograd keeps of a forward through the backbone, the weights' left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes, kept = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no other storage takes its place
        return tensor

    ids_BT = torch.arange(n_tokens).reshape(2, -1) % 500
    embedded = model.get_input_embeddings()(ids_BT).detach().requires_grad_(True)  # type: ignore[operator]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(inputs_embeds=embedded, use_cache=False)  # type: ignore[operator]
    return sum(sizes.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("inputs_kept", [False, True])
def test_a_tokens_activations_are_estimated(config: PreTrainedConfig, inputs_kept: bool) -> None:
    """An estimate of half would run out of memory in the first micro-batch, one of twice would leave a GPU idle."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if inputs_kept:
        true = (kept_by_autograd(model, 256) - kept_by_autograd(model, 128)) / 128
    else:
        with frozen(model):
            true = (kept_by_autograd(model, 256) - kept_by_autograd(model, 128)) / 128
    assert 0.55 < activation_bytes(model, inputs_kept=inputs_kept) / true < 1.8


def test_activations_take_a_fixed_part_or_a_quarter_more_than_the_weights() -> None:
    """On the meta device, where nothing is allocated: the size follows from the configuration alone."""
    for width, n_layers in ((64, 2), (576, 30), (2048, 24), (8192, 80)):
        shape = {"hidden_size": width, "num_hidden_layers": n_layers, "intermediate_size": 3 * width}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZE, **shape}))
        allowed = max(5 << 27, 1.25 * sum(parameter.numel() * 4 for parameter in model.parameters()))
        for kept in (False, True):
            tokens, taken = micro_batch_tokens(model, inputs_kept=kept), activation_bytes(model, inputs_kept=kept)
            assert LEAST < tokens <= MOST_ON_CPU
            assert tokens * taken <= allowed
            assert tokens == MOST_ON_CPU or (tokens + 128) * taken > allowed


def test_a_given_budget_is_taken(tiny_model: nn.Module) -> None:
    for given in (7, 100_000):
        budget = GradientPass(tiny_model, SketchSpec(token_budget=given)).budget
        assert budget.tokens() == budget.tokens(inputs_kept=True) == given


@contextmanager
def memory_for(model: nn.Module, n_tokens: int, *, backward: bool = True) -> Iterator[list[int]]:
    """A machine that has memory for so many tokens at once: more of them fail in the middle of the backward pass, when
    the upper layers have been observed, or else in the forward. Yields the tokens of each failure."""
    layers = cast_layers(model)
    failures: list[int] = []

    def fail(tokens: int) -> None:
        failures.append(tokens)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        tokens = hidden.shape[0] * hidden.shape[1]
        if tokens <= n_tokens:
            return
        if not backward or not hidden.requires_grad:
            fail(tokens)
        hidden.register_hook(lambda grad: fail(tokens))

    handle = layers[0].register_forward_hook(hook)
    try:
        yield failures
    finally:
        handle.remove()


def cast_layers(model: Any) -> Sequence[nn.Module]:
    return model.base_model.layers


def sketches(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    return Sketcher(model, SketchSpec(rank=4)).sketch(groups).sketches


def weighted_sketches(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    batch = Sketcher(model, SketchSpec(rank=4, objective=objective("gradalign", importance=True))).sketch(groups)
    assert batch.ess is not None
    return np.concatenate([batch.sketches, batch.ess[:, None]], 1)


def directions(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    optimizer = OptimizerDirection(AdamState.zero(model))
    return Sketcher(model, SketchSpec(rank=4), optimizer=optimizer).sketch(groups).sketches


def exact_without_norms(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    return exact_dots(model, groups, layer_gradients(model, groups)).dots


def exact_with_norms(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    return exact_dots(model, groups, layer_gradients(model, groups), norms=True).cosines


def whole_gradient(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    sums = summed_gradient(GradientPass(model, SketchSpec()), groups)
    return np.concatenate([sums[name].flatten().numpy() for name in sorted(sums)])


def along(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    return np.array([dot_along(GradientPass(model, SketchSpec()), groups, validation_gradient(model, groups[:2]))])


def logprobs(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    found = Reference(model).of(groups)
    return np.concatenate([row for group in found for row in group.reference_logprobs or []])


def fitted(model: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    spec = SketchSpec(rank=4, dim=64, basis="fitted")
    return np.abs(Sketcher(model, spec, fit_projection(model, groups, spec)).sketch(groups).sketches)


PASSES: dict[str, Callable[[nn.Module, Sequence[Group]], np.ndarray]] = {
    "sketch": sketches,
    "sketch and effective sample size": weighted_sketches,
    "optimizer direction": directions,
    "exact dots": exact_without_norms,
    "exact cosines": exact_with_norms,
    "sum of gradients": whole_gradient,
    "dot along a direction": along,
    "log-probabilities": logprobs,
    "fit": fitted,
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "qwen2-lora"])
def test_a_dot_without_the_gradient_is_that_with_it(make_model, make_groups, architecture: str) -> None:
    """A tied weight's gradient comes in several parts, each of which counts once; nothing of it is left behind."""
    model, groups = make_model(architecture), make_groups(4)
    direction = validation_gradient(model, groups[:2])
    runner = GradientPass(model, SketchSpec(token_budget=40))
    expected = direction.dot(summed_gradient(runner, groups))
    assert dot_along(runner, groups, direction) == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert summed_gradient(runner, groups[:1])  # the hooks are gone


@pytest.mark.parametrize("work", PASSES.values(), ids=PASSES)
def test_after_running_out_of_memory_nothing_counts_twice(make_model, make_groups, work: Any, caplog) -> None:
    """A failed backward has added the upper layers' part of its gradients: it would be in the sums twice."""
    model, groups = make_model("llama"), make_groups(5, logprobs=True)
    undisturbed = work(model, groups)
    widest = max(group.n_tokens for group in groups)
    with memory_for(model, 2 * widest) as failures:
        found = work(model, groups)
    assert failures, "the test did not run out of memory"
    scale = np.abs(undisturbed).max()
    np.testing.assert_allclose(found, undisturbed, atol=2e-5 * scale, rtol=1e-4)
    assert "out of memory in a micro-batch of" in caplog.text


def test_the_smaller_size_is_learnt_once(make_model, make_groups, caplog) -> None:
    """Otherwise every window of a collection fails first, which costs a pass each."""
    model, groups = make_model("llama"), make_groups(5)
    sketcher = Sketcher(model, SketchSpec(rank=4))
    with memory_for(model, 2 * max(group.n_tokens for group in groups)) as failures:
        sketcher.sketch(groups)
        n_failures = len(failures)
        sketcher.sketch(groups)
        Sketcher(model, SketchSpec(rank=4)).sketch(groups)
    assert len(failures) == n_failures == caplog.text.count("out of memory")


@pytest.mark.parametrize("backward", [False, True])
def test_a_response_that_does_not_fit_is_named(make_model, make_groups, backward: bool) -> None:
    model, groups = make_model("llama"), make_groups(3)
    sketches(model, groups)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with (
        memory_for(model, 1, backward=backward),
        pytest.raises(
            RequestError, match=r"problem 'problem-\d': one response and its prompt, \d+ tokens .* do not fit"
        ),
    ):
        sketches(model, groups)
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


def test_other_errors_are_not_taken_for_a_lack_of_memory(make_model, make_groups) -> None:
    model = make_model("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    sketcher = Sketcher(model, SketchSpec(rank=4))
    handle = cast_layers(model)[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        sketcher.sketch(make_groups(2))
    handle.remove()


def test_layers_inputs_live_no_longer_than_what_the_observer_keeps(make_model, make_groups) -> None:
    """A hook that held them would double what a sketch takes."""
    inputs: list[weakref.ref] = []

    class Watching:
        def reset(self) -> None: ...

        def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> None:
            inputs.append(weakref.ref(x_BTI))

        def on_gradient(self, layer: int, kept: None, grad_BTO: Tensor, problem_B: Tensor) -> None:
            alive.append(sum(ref() is not None for ref in inputs))

    alive: list[int] = []
    gradients = GradientPass(make_model("qwen2"), SketchSpec())
    gradients.run(make_groups(1), Watching())
    assert alive
    assert max(alive) <= 1 < len(inputs)
