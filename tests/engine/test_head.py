"""Head mode: the output layer's gradient from the forward pass alone. And what off-policy rollouts are worth."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.engine import Sketcher, SketchSpec, objective
from gradstore.engine.rollouts import Group
from gradstore.engine.sketches.projection import random_bases
from gradstore.errors import RequestError

LESSER = {"head_only": True, "rank": 10, "right_rank": 20}


def slow_head_gradient(model: nn.Module, group: Group) -> torch.Tensor:
    """sum_t alpha_t (e_y - softmax) h_t^T, token by token, from the hidden states; [V, H]."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = torch.zeros(base.get_output_embeddings().weight.shape)
    advantages = group.rewards - group.rewards.mean()
    with torch.no_grad():
        for advantage, response in zip(advantages, group.responses, strict=True):
            ids = torch.tensor([*group.prompt_ids, *response])[None]
            hidden_TH = base.base_model(input_ids=ids)[0][0]
            probabilities_TV = model(input_ids=ids).logits[0].softmax(-1)
            for t, token in enumerate(response):
                at = len(group.prompt_ids) + t - 1
                onehot_V = nn.functional.one_hot(torch.tensor(token), probabilities_TV.shape[1])
                weight = advantage / len(response) / len(group.responses)
                total += weight * torch.outer(onehot_V - probabilities_TV[at], hidden_TH[at])
    return total


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "qwen2-lora"])
def test_head_sketch_is_the_closed_form(make_model, make_groups, architecture: str, shared: bool) -> None:
    """LESSER's feature, two-sided with its own width on each side."""
    model, groups = make_model(architecture), make_groups(4)
    sketcher = Sketcher(model, SketchSpec(**LESSER, share_prompts=shared))
    found = sketcher.sketch(groups).sketches
    assert found.shape == (4, 10 * 20)
    (basis,) = sketcher.projection.layers
    for group, row in zip(groups, found, strict=True):
        expected = basis.left_OR.T @ slow_head_gradient(model, group).numpy() @ basis.right_IR
        assert np.linalg.norm(row - expected.ravel()) < 1e-5 * np.linalg.norm(expected)


def test_head_mode_equals_the_output_layers_part_of_a_full_sketch(make_model, make_groups) -> None:
    """The same numbers as from the backward pass, so that head rows and full rows tell the same story."""
    model, groups = make_model("qwen2"), make_groups(4)
    full = Sketcher(model, SketchSpec(rank=6))
    _, start, stop = full.fingerprint["layout"][-1]
    head = Sketcher(model, SketchSpec(rank=6, head_only=True))
    expected = full.sketch(groups).sketches[:, start:stop]
    assert np.abs(head.sketch(groups).sketches - expected).max() < 1e-5 * np.abs(expected).max()


def test_head_mode_runs_no_backward_below_the_logits(make_model, make_groups) -> None:
    """It is for those who cannot afford a backward: no graph may be kept of the body."""
    model = make_model("qwen2")
    sketcher = Sketcher(model, SketchSpec(**LESSER))
    graphs = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _output: graphs.append(inputs[0].requires_grad)
    )
    sketcher.sketch(make_groups(2))
    handle.remove()
    assert graphs
    assert not any(graphs)


def test_the_fingerprint_says_head_mode(make_model) -> None:
    """A head row and a row of the output layer among others have the same width and must never meet."""
    model = make_model("qwen2")
    head = Sketcher(model, SketchSpec(**LESSER)).fingerprint
    assert head["gradient"] == "output layer, from the forward pass"
    assert Sketcher(model, SketchSpec(rank=10, right_rank=20, modules=("lm_head",))).fingerprint != head
    again = SketchSpec.of(json.loads(json.dumps(head)))
    assert Sketcher(model, again).fingerprint == head


def test_bad_settings_are_refused() -> None:
    """Each says what does not go together."""
    with pytest.raises(RequestError, match="leave `modules` and `embeddings` out"):
        SketchSpec(head_only=True, modules=("lm_head",))
    with pytest.raises(RequestError, match="right_rank is 0"):
        SketchSpec(right_rank=0)


def test_sides_of_their_own_widths() -> None:
    """The narrower request must not truncate the wider side."""
    (basis,) = random_bases([("x", 50, 40)], 4, 0, 7)
    assert (basis.left_OR.shape, basis.right_IR.shape, basis.stop) == ((50, 4), (40, 7), 28)


def logprobs_of(model: nn.Module, group: Group) -> list[np.ndarray]:
    found = []
    for response in group.responses:
        ids = torch.tensor([*group.prompt_ids, *response])[None]
        with torch.no_grad():
            log_TV = model(input_ids=ids).logits[0].log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
        found.append(log_TV.gather(1, torch.tensor(response)[:, None])[:, 0].numpy())
    return found


def test_effective_sample_size(make_model, make_groups) -> None:
    """Rollouts of the current policy count in full; stale ones by Kish's formula over the tokens that carry weight."""
    model, groups = make_model("qwen2"), make_groups(3, logprobs=True)
    spec = SketchSpec(rank=4, objective=objective("gradalign", importance=True, clip_low=0.3, clip_high=0.3))
    sketcher = Sketcher(model, spec)
    fresh = [Group(g.problem_id, g.prompt_ids, g.responses, g.rewards, logprobs_of(model, g)) for g in groups]
    flat = Group("flat", groups[0].prompt_ids, groups[0].responses, np.ones(4), groups[0].logprobs)
    assert sketcher.sketch([*fresh, flat]).ess == pytest.approx([4, 4, 4, 0], rel=1e-4)
    random = np.random.default_rng(0)
    stale = [
        Group(
            g.problem_id,
            g.prompt_ids,
            g.responses,
            g.rewards,
            [x + random.normal(0, 0.3, len(x)).astype(np.float32) for x in g.logprobs],
        )
        for g in fresh
    ]
    for row, group in enumerate(stale):
        ratios = []
        for reward, now, behaviour in zip(group.rewards, logprobs_of(model, group), group.logprobs, strict=True):
            advantage = reward - group.rewards.mean()
            for ratio in np.exp(now - behaviour):
                clipped = (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.7)
                ratios.append(0.0 if clipped else float(ratio))
        expected = 4 * sum(ratios) ** 2 / len(ratios) / sum(ratio**2 for ratio in ratios)
        assert sketcher.sketch(stale).ess[row] == pytest.approx(expected, rel=1e-4)
    assert Sketcher(model, SketchSpec(rank=4)).sketch(groups).ess is None
