"""Do bases fitted to the base policy still serve after training? Fidelity before and after GRPO, old bases and new.

    python -m benchmarks.drift [--steps 40] [--seeds 3] [--dim 480]

The demo's model is trained with GRPO on clean problems of the target family, 48 problems x 16 rollouts a step.
Before and after, problems of the pool and the benchmark are rolled out anew, and the cosine scores of fitted sketches
compared with exact ones over the same layers: bases fitted before training, and bases fitted at that moment. Beside
them the fidelity that `gradstore collect` measures by itself, without a benchmark, and whether it asks for a new fit.
"""

from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.probe_table import Sampler
from engine import Sketcher, SketchSpec, exact_dots, fit_projection, layer_gradients
from engine.gradients.directions import validation_gradient
from engine.gradients.models import load_model
from engine.gradients.objectives import objective
from engine.rollouts import Group
from engine.sketches.collector import REFIT_BELOW
from engine.sketches.faithfulness import agreement, rank_fidelity
from engine.sketches.projection import Projection
from gradstore.cli.show import print_table, say
from trainer.demo import tasks
from trainer.demo.run import MODEL

N_POOL, N_FIT, N_TRAIN, N_ROLLOUTS, LEARNING_RATE = 400, 200, 48, 16, 5e-5


def main(
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = 40,
    seeds: Annotated[int, typer.Option(help="Repeats.")] = 3,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 480,
) -> None:
    """Print fidelity and captured energy before and after training."""
    torch.set_num_threads(1)
    rows = []
    for seed in range(seeds):
        model = load_model(MODEL, device="cpu")
        spec = SketchSpec(basis="fitted", dim=dim, seed=seed, token_budget=16_384)
        problems, bench = tasks.pool(seed, N_POOL + N_FIT), tasks.benchmark(seed)
        first = None
        for moment in (0, steps):
            if moment:
                train(model, problems, seed, steps)
            sample = Sampler(model, seed + moment)
            groups, wanted = sample(problems[:N_POOL], N_ROLLOUTS), sample(bench, N_ROLLOUTS)
            fitted = fit_projection(model, sample(problems[N_POOL:], N_ROLLOUTS), spec)
            first = first or fitted
            solved = float(np.mean([group.pass_rate for group in wanted]))
            for name, projection in {"step 0": first, f"step {moment}": fitted}.items():
                spearman, top = fidelity(model, spec, projection, groups, wanted)
                own = rank_fidelity(Sketcher(model, spec, projection), groups) or float("nan")
                refit = "yes" if own < REFIT_BELOW else "no"
                figures = [f"{solved:.2f}", f"{spearman:.4f}", f"{top:.2f}", f"{own:.3f}", refit]
                rows.append([str(seed), str(moment), name, *figures])
                say(" ".join(rows[-1]))
    columns = ["seed", "policy at step", "bases fitted at", "solved", "Spearman", "top 5 %", "measured alone", "refit"]
    print_table(f"Fitted bases, {dim} dimensions, against exact cosine scores", columns, rows, right=columns)


def train(model: nn.Module, problems: list[dict], seed: int, steps: int) -> None:
    """GRPO on the target family's clean problems."""
    clean = [p for p in problems if p["source"] == tasks.TARGET_FAMILY and tasks.CLEAN in p["tags"]]
    random, settings = np.random.default_rng(seed), objective("grpo")
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step in range(steps):
        chosen = [clean[i] for i in random.choice(len(clean), N_TRAIN, replace=False)]
        groups = Sampler(model, 1000 + step)(chosen, N_ROLLOUTS)
        if not any(group.has_signal for group in groups):
            continue
        ascent = validation_gradient(model, groups, settings, token_budget=16_384)
        for name, parameter in model.named_parameters():
            parameter.grad = -ascent.tensors[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def fidelity(
    model: nn.Module, spec: SketchSpec, projection: Projection, groups: list[Group], wanted: list[Group]
) -> tuple[float, float]:
    """Spearman and top-5 % overlap of sketched cosines with exact ones, over problems with a signal."""
    live = [group for group in groups if group.has_signal]
    exact_P = exact_dots(model, live, layer_gradients(model, wanted, spec), spec, norms=True).cosines[:, 0]
    sketcher = Sketcher(model, spec, projection)
    rows_PD = sketcher.sketch(live).sketches.astype(np.float64)
    found_P = rows_PD @ sketcher.sketch(wanted).sketches.mean(axis=0) / np.linalg.norm(rows_PD, axis=1)
    kept = np.isfinite(exact_P) & np.isfinite(found_P)
    ids = [group.problem_id for group, keep in zip(live, kept, strict=True) if keep]
    found = agreement(found_P[kept], exact_P[kept], ids)
    return found.spearman, found.top_5_percent


if __name__ == "__main__":
    typer.run(main)
