"""Fidelity of sketches by kind and size: scores of stored rows against exact cosine scores over the same layers.

The demo's trained model, problems of its pool with a signal, 16 rollouts each, the target from its benchmark. Every row
goes through a store, so quantization and row size are those in real use. For comparison: how well exact scores agree
with those of other rollouts of the same problems. This is the upper limit for any ranking.

    python -m benchmarks.fidelity [--pool 600] [--seed 0] [--seeds 3] [--only "both, int8, 480"] [--out FILE.json]
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

import gradstore
from benchmarks.probe_table import Sampler
from gradstore.cli.show import print_table, say
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine.assessing.fidelity import agreement
from gradstore.engine.assessing.split_half import split, split_half
from gradstore.engine.gradients.exact import exact_dots, layer_gradients
from gradstore.engine.gradients.models import load_model
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.rollouts.group import Group
from gradstore.engine.searching.query import search
from gradstore.engine.searching.targets import target
from gradstore.engine.sketches.fitting import fit_projection
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec

SPEC = SketchSpec(objective=objective("gradalign"), token_budget=16_384)


def main(
    pool: Annotated[int, typer.Option(help="Problems drawn; those with a signal are ranked.")] = 600,
    benchmark: Annotated[int, typer.Option(help="Problems of the benchmark.")] = tasks.BENCHMARK_SIZE,
    rollouts: Annotated[int, typer.Option(help="Rollouts of each problem.")] = 16,
    seed: Annotated[int, typer.Option(help="Draws problems and rollouts.")] = 0,
    seeds: Annotated[int, typer.Option(help="Seeds, counted from --seed.")] = 1,
    only: Annotated[str, typer.Option(help="Sketches whose name, type and dimensions contain this.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)  # for layers this small, a second thread costs more than it gains
    found = [measured(one, pool, benchmark, rollouts, only) for one in range(seed, seed + seeds)]
    if out is not None:
        out.write_text(json.dumps(found, indent=2))
    show(found)


def measured(seed: int, pool: int, benchmark: int, rollouts: int, only: str) -> dict:
    """One seed: agreement of each sketch with exact scores, and repeatability of exact scores. JSON-able."""
    model = load_model(MODEL, device="cpu")
    sample = Sampler(model, seed)
    problems = tasks.pool(seed, pool)
    groups = [group for group in sample(problems, rollouts) if group.has_signal]
    wanted = sample(tasks.benchmark(seed, benchmark), rollouts)
    gradient = layer_gradients(model, wanted, SPEC)
    exact_P = exact_dots(model, groups, gradient, SPEC, norms=True).cosines[:, 0]
    live_P = ~np.isnan(exact_P)  # if all responses are equal, the gradient is zero even if rewards differ
    groups, exact_P = [group for group, live in zip(groups, live_P, strict=True) if live], exact_P[live_P]
    say(f"seed {seed}: {len(groups)} of {pool} problems have a gradient")
    ids = [group.problem_id for group in groups]
    rows = []
    other = sample(tasks.benchmark(seed, benchmark), rollouts, first=rollouts)
    for name, dtype, dim, make in sketchers(model, groups, wanted, other, seed):
        if only not in f"{name}, {dtype}, {dim}":
            continue
        found_P, row_bytes = stored_scores(make(), groups, wanted, dtype)
        rows.append({"sketch": name, "dtype": dtype, "dim": dim, "bytes": row_bytes})
        rows[-1] |= asdict(agreement(found_P, exact_P, ids))
        say(f"{name} {dtype} {dim}: {rows[-1]['spearman']:.4f}, top 5 % {rows[-1]['top_5_percent']:.3f}")
    repeats = repeated(model, problems, sample, groups, exact_P, gradient, rollouts)
    return {"n_live": len(groups), "seed": seed, "sketches": rows, "exact": repeats}


def sketchers(
    model: torch.nn.Module, groups: Sequence[Group], wanted: Sequence[Group], other: Sequence[Group], seed: int
) -> Iterator[tuple[str, str, int, Callable[[], Sketcher]]]:
    """(name, row dtype, dimensions, factory) of each kind compared. other: other rollouts of the benchmark."""

    def fitted(spec: SketchSpec, pool: Sequence[Group], bench: Sequence[Group]) -> Sketcher:
        return Sketcher(model, spec, fit_projection(model, pool, spec, benchmark=bench))

    samples: dict[str, tuple[Sequence[Group], Sequence[Group]]] = {
        "100 of the candidates": (groups[:100], ()),
        "the benchmark": ((), wanted),
        "both": (groups[:100], wanted),
        "both, other rollouts of the benchmark": (groups[:100], other),
    }
    for name, (pool, bench) in samples.items():
        for dim, dtype in ((480, "int8"), (960, "int4"), (240, "int8")):
            spec = replace(SPEC, basis="fitted", dim=dim)
            yield f"fitted to {name}", dtype, dim, partial(fitted, spec, pool, bench)
    others: list[tuple[str, str, SketchSpec]] = [
        *((f"random two-sided, rank {rank}", "int8", replace(SPEC, rank=rank, seed=seed)) for rank in (4, 8, 16, 32)),
        *(("dense random", "int8", replace(SPEC, basis="dense", rank=64, dim=dim, seed=seed)) for dim in (480, 3584)),
        ("head mode 64 x 128 (LESSER)", "fp32", replace(SPEC, head_only=True, rank=64, right_rank=128, seed=seed)),
        ("two-sided p = 16 (bergson-like)", "fp32", replace(SPEC, rank=16, seed=seed)),
    ]
    for name, dtype, spec in others:
        sketcher = Sketcher(model, spec)
        yield name, dtype, sketcher.dim, lambda sketcher=sketcher: sketcher  # type: ignore[misc]


def stored_scores(
    sketcher: Sketcher, groups: Sequence[Group], wanted: Sequence[Group], dtype: str
) -> tuple[np.ndarray, int]:
    """(cosine scores of the groups from a search of their store, float64 [P]; bytes per row)."""
    with tempfile.TemporaryDirectory() as folder:
        store = gradstore.create(
            Path(folder) / "store", dim=sketcher.dim, fingerprint=sketcher.fingerprint, dtype=dtype
        )
        for name, members in (("pool", groups), ("benchmark", wanted)):
            batch = sketcher.sketch(members)
            store.add_problems(name, [{"id": problem_id, "prompt": "?"} for problem_id in batch.ids])
            with store.writer(name, step=0) as writer:
                writer.append(**batch.rows())
        hits = search(store.view("pool"), target(store, "benchmark"), len(groups))
        score_of = dict(zip(hits.ids.tolist(), hits.scores.tolist(), strict=True))
        return np.array([score_of.get(group.problem_id, np.nan) for group in groups]), store.row_bytes


def repeated(
    model: torch.nn.Module,
    problems: list[dict],
    sample: Sampler,
    groups: Sequence[Group],
    exact_P: np.ndarray,
    gradient: object,
    n: int,
) -> dict:
    """Agreement of exact scores with those of other rollouts of the same problems, and between halves."""

    def exactly(members: Sequence[Group]) -> np.ndarray:
        return exact_dots(model, members, gradient, SPEC, norms=True).cosines[:, 0]  # type: ignore[arg-type]

    live = {group.problem_id for group in groups}
    again_P = exactly(sample([record for record in problems if record["id"] in live], n, first=n))
    both = ~np.isnan(again_P)
    halves = split_half(*(np.nan_to_num(exactly(half)) for half in split(groups)))
    ids = [group.problem_id for group, kept in zip(groups, both, strict=True) if kept]
    return {
        "other rollouts": asdict(agreement(again_P[both], exact_P[both], ids)),
        "halves": halves.describe(),
    }


def show(found: Sequence[dict]) -> None:
    """Print a row per sketch with every seed's figures; with four or more seeds also mean and standard deviation."""

    def each(numbers: Sequence[float], digits: int = 2) -> str:
        listed = ", ".join(f"{number:.{digits}f}" for number in numbers)
        return listed if len(numbers) < 4 else f"{listed}; {np.mean(numbers):.3f} ± {np.std(numbers, ddof=1):.3f}"

    table = []
    for same in zip(*(one["sketches"] for one in found), strict=True):
        numbers = [each([row[key] for row in same], 3) for key in ("spearman", "top_5_percent", "top_k")]
        table.append([same[0]["sketch"], same[0]["dtype"], str(same[0]["dim"]), str(same[0]["bytes"]), *numbers])
    other = [one["exact"]["other rollouts"] for one in found]
    halves = [one["exact"]["halves"] for one in found]
    overlaps = [each([one[key] for one in other]) for key in ("top_5_percent", "top_k")]
    table.append(["exact, other rollouts", "", "", "", each([one["spearman"] for one in other], 3), *overlaps])
    for name, key in (("even against odd rollouts", "spearman"), ("the same carried to all", "rank_reliability")):
        table.append([f"exact, {name}", "", "", "", each([half[key] for half in halves], 3), "", ""])
    columns = ["sketch", "as", "dims", "bytes a row", "Spearman", "top 5 %", "top 10 %"]
    live = ", ".join(str(one["n_live"]) for one in found)
    print_table(f"{live} live problems, seeds {found[0]['seed']} to {found[-1]['seed']}", columns, table)


if __name__ == "__main__":
    typer.run(main)
