"""Fidelity of a projection against the number of problems it is fitted to.

    python -m benchmarks.fit_size [--fitted 96,72,66,48] [--seeds 5]
    python -m benchmarks.fit_size --model FOLDER --rollouts pool.jsonl --benchmark-rollouts bench.jsonl --seeds 1

The last `--scored` problems with a signal are ranked by sketched cosines with the benchmark's mean gradient, and by
exact ones. Each seed draws other problems to fit to from the rest; every size of a seed is a part of the largest. No
projection is fitted to the benchmark. Without `--rollouts`, the demo's model answers the demo's problems.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from gradstore.cli.show import print_table
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine import Sketcher, SketchSpec
from gradstore.engine.gradients.exact import exact_against
from gradstore.engine.gradients.models import load_model, load_tokenizer, vocabulary_size
from gradstore.engine.rollouts import Group, read_rollouts
from gradstore.engine.sketches.fitting import fit
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout


def main(
    model: Annotated[str, typer.Option(help="Folder or name of a transformers causal LM [the demo's].")] = "",
    rollouts: Annotated[str, typer.Option(help="Rollouts of the pool [the demo's].")] = "",
    benchmark_rollouts: Annotated[str, typer.Option(help="Rollouts of the benchmark [the demo's].")] = "",
    fitted: Annotated[str, typer.Option(help="Numbers of problems to fit to, by commas.")] = "96,72,66,48",
    scored: Annotated[int, typer.Option(min=20, help="Problems to rank.")] = 200,
    benchmark: Annotated[int, typer.Option(min=1, help="Problems of the benchmark.")] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Samples to fit to.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    policy = load_model(model or MODEL, device="cpu")
    sizes = [int(text) for text in fitted.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        if not rollouts:
            rollouts, benchmark_rollouts = _demo_rollouts(policy, Path(folder), 2 * (max(sizes) + scored), benchmark)
        pool, bench = (_live(path, model or MODEL) for path in (rollouts, benchmark_rollouts))
    rest, ranked, bench = pool[:-scored], pool[-scored:], bench[:benchmark]
    if len(rest) < max(sizes):
        raise SystemExit(f"{len(rest)} problems with a signal to fit to, {max(sizes)} are asked for")
    exact_P = exact_against(policy, ranked, bench, SketchSpec()).cosines[:, 0]
    ranked = [group for group, cosine in zip(ranked, exact_P, strict=True) if np.isfinite(cosine)]
    exact_P = exact_P[np.isfinite(exact_P)]  # a gradient may be zero although rewards differ
    rows = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(rest))
        for n in sizes:
            spec = SketchSpec(basis="fitted", dim=1024, seed=seed)
            sketcher = Sketcher(policy, spec, fit(policy, [rest[i] for i in sorted(order[:n])], spec).projection)
            found_P = _cosines(sketcher, ranked, bench)
            rows.append([n, seed, float(spearmanr(found_P, exact_P)[0]), _same_top(found_P, exact_P, 0.05)])
            print(*rows[-1], flush=True)
    table = []
    for n in sizes:
        spearman, top = (np.array([row[place] for row in rows if row[0] == n]) for place in (2, 3))
        table.append([str(n), f"{spearman.mean():.4f}", f"{spearman.min():.4f}", f"{top.mean():.2f}"])
    columns = ["fitted to", "Spearman, mean", "least", "top 5 % in common"]
    print_table(f"{len(ranked)} problems against {len(bench)}, {seeds} seeds", columns, table, right=columns)


def _demo_rollouts(policy: torch.nn.Module, folder: Path, n_pool: int, n_benchmark: int) -> tuple[str, str]:
    """Rollout files of the demo's pool and benchmark."""
    backend = TransformersBackend(policy, load_tokenizer(MODEL), batch_tokens=16_384)
    for name, records in (("pool", tasks.pool(0, n_pool)), ("benchmark", tasks.benchmark(0, n_benchmark))):
        reward = Reward("demo", tasks.reward)
        rollout(records, backend, reward, folder / f"{name}.jsonl", n=16, max_new_tokens=8, seed=0, step=0)
    return str(folder / "pool.jsonl"), str(folder / "benchmark.jsonl")


def _live(path: str, model: str) -> list[Group]:
    source = read_rollouts(path, tokenizer=load_tokenizer(model), vocabulary=vocabulary_size(model))
    return [group for group in source.groups() if group.has_signal]


def _cosines(sketcher: Sketcher, groups: list[Group], others: list[Group]) -> np.ndarray:
    """Sketched cosines with the mean sketch of the others, up to a common factor, float64 [P]."""
    rows, toward = sketcher.sketch(groups), sketcher.sketch(others).sketches.astype(np.float64).sum(axis=0)
    lengths_P = np.linalg.norm(rows.sketches, axis=1) if rows.norms is None else rows.norms
    return rows.sketches @ toward / lengths_P


def _same_top(found_P: np.ndarray, exact_P: np.ndarray, share: float) -> float:
    """Share of the best by exact cosines that are among the best by sketched ones."""
    n = max(1, round(share * len(exact_P)))
    return len({*np.argsort(-found_P)[:n]} & {*np.argsort(-exact_P)[:n]}) / n


if __name__ == "__main__":
    typer.run(main)
