"""What a sketch costs next to a plain forward and backward over the same rollouts.

    python -m benchmarks.sketch [--repeats 7] [--threads 2] [--token-budget 2048]

One process, every method once a round, ratios to the plain pass of the same round, median with the spread. Model: Qwen2
architecture, 13.8M parameters (hidden 384, 6 layers, intermediate 1536, vocabulary 2000), random weights, float32;
8 problems x 8 rollouts, prompt 96 and response 96 tokens. The plain pass runs one problem at a time, 1,536 tokens;
larger micro-batches do not make it faster.
"""

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine import (
    Probe,
    Sketcher,
    SketchSpec,
    exact_dots,
    fit_projection,
    layer_gradients,
    validation_gradient,
)
from engine.gradients.objectives import advantages
from engine.rollouts import Group
from gradstore.cli.show import print_table

N_PROBLEMS, N_ROLLOUTS, N_PROMPT, N_RESPONSE, N_VOCABULARY = 8, 8, 96, 96, 2000


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=N_VOCABULARY,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).float().eval()


def make_groups(n: int = N_PROBLEMS, seed: int = 0) -> list[Group]:
    random = np.random.default_rng(seed)
    return [
        Group(
            f"p{i}",
            random.integers(0, N_VOCABULARY, N_PROMPT),
            [random.integers(0, N_VOCABULARY, N_RESPONSE) for _ in range(N_ROLLOUTS)],
            random.permutation(np.arange(N_ROLLOUTS) % 2).astype(float),
        )
        for i in range(n)
    ]


def plain(model: nn.Module, groups: list[Group]) -> None:
    """Forward and backward with all weight gradients, one micro-batch a problem."""
    for group in groups:
        loss(model, group).backward()
    model.zero_grad(set_to_none=True)


def one_backward_a_problem(model: nn.Module, groups: list[Group]) -> None:
    """GradAlign's scorer, from its description: the full gradient of each problem, its norm and its dot."""
    target = [torch.ones_like(parameter) for parameter in model.parameters()]
    for group in groups:
        loss(model, group).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        sum(float((g * t).sum()) for g, t in zip(gradients, target, strict=True) if g is not None)
        sum(float(g.square().sum()) for g in gradients if g is not None)
        model.zero_grad(set_to_none=True)


def loss(model: nn.Module, group: Group) -> torch.Tensor:
    ids_GT = torch.from_numpy(np.stack([np.concatenate([group.prompt_ids, r]) for r in group.responses]))
    logits_GTV = model(input_ids=ids_GT, use_cache=False).logits[:, N_PROMPT - 1 : -1]
    logprobs_GT = -nn.functional.cross_entropy(
        logits_GTV.transpose(1, 2).float(), ids_GT[:, N_PROMPT:], reduction="none"
    )
    weights_G = torch.from_numpy(advantages(group.rewards, "mean")).float()
    return -(weights_G[:, None] * logprobs_GT).mean()


def jobs(model: nn.Module, groups: list[Group], budget: int) -> dict[str, Callable[[], object]]:
    """Method -> what is timed; whatever it needs beforehand is made here."""

    def sketcher(**settings: object) -> Sketcher:
        return Sketcher(model, SketchSpec(token_budget=budget, **settings))  # type: ignore[arg-type]

    fitted = SketchSpec(token_budget=budget, basis="fitted", dim=1024)
    with_fitted = Sketcher(model, fitted, fit_projection(model, make_groups(12, seed=1), fitted))
    unshared = SketchSpec(token_budget=budget, share_prompts=False)
    targets = [layer_gradients(model, make_groups(2, seed=2), unshared)]
    probe = Probe(model, validation_gradient(model, make_groups(2, seed=2)), token_budget=budget)
    base = probe.logprobs(groups)
    apart, together = sketcher(share_prompts=False), sketcher()
    return {
        "plain forward + backward": lambda: plain(model, groups),
        "sketch, prompts apart": lambda: apart.sketch(groups),
        "sketch, prompts shared": lambda: together.sketch(groups),
        "sketch, shared, fitted": lambda: with_fitted.sketch(groups),
        "exact dots, prompts apart": lambda: exact_dots(model, groups, targets, unshared),
        "probe, base known": lambda: probe.derivatives(groups, base_logprobs=base),
        "probe, central": lambda: probe.derivatives(groups),
        "one backward a problem": lambda: one_backward_a_problem(model, groups),
    }


def main(
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    token_budget: Annotated[int, typer.Option(help="Tokens of a micro-batch, for all but the plain pass.")] = 2048,
) -> None:
    """Time every method against the plain pass."""
    torch.set_num_threads(threads)
    model, groups = make_model(), make_groups()
    methods = jobs(model, groups, token_budget)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for job in methods.values():
        job()
    for _ in range(repeats):
        for name, job in methods.items():
            started = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - started)
    reference = np.array(seconds["plain forward + backward"])
    rows = []
    for name, taken in seconds.items():
        ratio = np.array(taken) / reference
        rows.append(
            [name, f"{np.median(ratio):.2f}", f"{ratio.min():.2f} to {ratio.max():.2f}", f"{np.median(taken):.2f}"]
        )
    print_table(
        f"{N_PROBLEMS} problems x {N_ROLLOUTS} rollouts x ({N_PROMPT} + {N_RESPONSE}) tokens, {threads} threads",
        ["method", "x plain", "spread", "seconds"],
        rows,
        right=["x plain", "seconds"],
    )


if __name__ == "__main__":
    typer.run(main)
