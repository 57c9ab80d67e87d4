"""Do bases fitted to the base policy still rank well after training, and does the measurement detect it if not?

    python -m benchmarks.drift [--steps 40] [--seeds 3] [--dim 480]

The demo's model is trained with GRPO on clean problems of the target family, 48 problems x 16 rollouts per step. Bases
are fitted to a sample of problems and the benchmark before training. Before and after, another part of the pool and the
benchmark are rolled out again, and cosine scores of sketches are compared with exact ones over the same layers. After
training, `engine.refit` works like `gradstore collect --refit auto`. It measures the old bases on a sample against the
benchmark, fits new ones if the old ones have lost more than 0.01, and keeps the new ones if they rank better.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from benchmarks.probe_table import Sampler
from gradstore.cli.show import print_table, say
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine import Sketcher, SketchSpec, exact_dots, fit_projection, layer_gradients
from gradstore.engine.assessing.fidelity import agreement
from gradstore.engine.assessing.refit import refit
from gradstore.engine.gradients.directions import validation_gradient
from gradstore.engine.gradients.models import load_model
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.rollouts import Group
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.exact_ranking import ExactRanking

N_POOL, N_FIT, N_TRAIN, N_ROLLOUTS, LEARNING_RATE = 400, 400, 48, 16, 5e-5


def main(
    steps: Annotated[int, typer.Option(help="GRPO steps.")] = 40,
    seeds: Annotated[int, typer.Option(help="Repeats.")] = 3,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 480,
) -> None:
    """Print fidelity before and after training, the measured loss, and the refit's decision."""
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for seed in range(seeds):
        model = load_model(MODEL, device="cpu")
        spec = SketchSpec(basis="fitted", dim=dim, seed=seed, token_budget=16_384)
        problems, bench = tasks.pool(seed, N_POOL + N_FIT), tasks.benchmark(seed)

        def drawn(
            moment: int, model: nn.Module = model, seed: int = seed, problems: list = problems, bench: list = bench
        ) -> tuple[list[Group], list[Group], list[Group]]:
            """(groups of the problems to rank, of the sample to fit to, of the benchmark)."""
            sample = Sampler(model, seed + moment)
            return tuple(sample(some, N_ROLLOUTS) for some in (problems[:N_POOL], problems[N_POOL:], bench))  # type: ignore[return-value]

        groups, to_fit, wanted = drawn(0)
        live = [group for group in to_fit if group.has_signal]
        projection = fit_projection(model, live[::2], spec, benchmark=wanted)
        ranking = ExactRanking.of(model, spec, live[1::2], wanted, len(live))
        found_then = None if ranking is None else ranking.fidelity_of(Sketcher(model, spec, projection))
        sketcher = Sketcher(model, spec, replace(projection, fidelity=found_then))
        rows.append([str(seed), "0", "step 0", *figures(sketcher, groups, wanted), "", "", ""])
        say(" ".join(rows[-1]))
        with tempfile.TemporaryDirectory() as folder:
            store = create_store(Path(folder) / "store", sketcher)
            train(model, problems, seed, steps)
            groups, to_fit, wanted = drawn(steps)
            newer, found = refit(store, sketcher, to_fit, wanted, step=steps)
        measured = ["-" if x is None else f"{x:.3f}" for x in (found.when_fitted, found.fidelity)]
        asked = "yes" if found.needed else "no"
        rows.append([str(seed), str(steps), "step 0", *figures(sketcher, groups, wanted), *measured, asked])
        say(" ".join(rows[-1]))
        if found.anew is not None:
            kept = "kept" if found.basis is not None else "no better"
            fresh = newer if found.basis is not None else None
            shown = figures(fresh, groups, wanted) if fresh else ["", "", ""]
            rows.append([str(seed), str(steps), f"step {steps}", *shown, "", f"{found.anew:.3f}", kept])
            say(" ".join(rows[-1]))
    columns = ["seed", "policy at step", "bases fitted at", "solved", "Spearman", "top 5 %"]
    columns += ["measured when fitted", "measured now", "new fit"]
    print_table(f"Fitted bases, {dim} dimensions, against exact cosine scores", columns, rows, right=columns)


def figures(sketcher: Sketcher, groups: list[Group], wanted: list[Group]) -> list[str]:
    """Benchmark accuracy, Spearman correlation and top-5 % overlap between sketched and exact cosines."""
    live = [group for group in groups if group.has_signal]
    model, spec = sketcher.model, sketcher.spec
    exact_P = exact_dots(model, live, layer_gradients(model, wanted, spec), spec, norms=True).cosines[:, 0]
    rows, target = sketcher.sketch(live), sketcher.sketch(wanted).sketches.mean(axis=0)
    kept = np.isfinite(exact_P)
    norms_P = np.linalg.norm(rows.sketches, axis=1) if rows.norms is None else rows.norms
    found_P = (rows.sketches.astype(np.float64) @ target)[kept] / norms_P[kept]
    found = agreement(
        found_P, exact_P[kept], [group.problem_id for group, keep in zip(live, kept, strict=True) if keep]
    )
    solved = float(np.mean([group.pass_rate for group in wanted]))
    return [f"{solved:.2f}", f"{found.spearman:.4f}", f"{found.top_5_percent:.2f}"]


def train(model: nn.Module, problems: list[dict], seed: int, steps: int) -> None:
    """Train with GRPO on the target family's clean problems."""
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


if __name__ == "__main__":
    typer.run(main)
