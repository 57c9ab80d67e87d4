"""Detection of the demo's broken rewards from one step of 16 rollouts, by all evidence and by each piece of it.

    python -m benchmarks.suspicion [--seeds 3] [--pool 2000]

The demo's pool has wrong ground truths and coin flips in every source. Tags name them; the tags are read only after the
ranking is done. AUC is against the clean problems; precision is among the first n, with n the number of broken ones.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.probe_table import Sampler
from gradstore import Store
from gradstore.analysis.suspicion import WEIGHTS, detection, suspicious
from gradstore.cli.show import print_table, say
from gradstore.demo import tasks
from gradstore.demo.run import MODEL
from gradstore.engine.gradients.models import load_model
from gradstore.engine.gradients.objectives import objective
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.fitting import fit_projection
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec

DIM, N_ROLLOUTS, N_FITTED = 1024, 16, 200


def main(
    seeds: Annotated[int, typer.Option(help="Repeats.")] = 3,
    pool: Annotated[int, typer.Option(help="Problems of the pool.")] = tasks.POOL_SIZE,
) -> None:
    """Print AUC and precision for all broken rewards and for each kind, by all evidence and by each piece."""
    results = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(Path(folder), seed, pool))
        say(f"seed {seed}: AUC {results[-1]['all']['auc']:.3f}")
    rows = []
    for name in results[0]:
        found = {key: np.array([one[name][key] for one in results]) for key in results[0][name]}
        spreads = [f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})" for values in found.values()]
        rows.append([name, *spreads])
    print_table(f"{pool} problems, {seeds} seeds", ["what", *results[0]["all"]], rows)


def measure(folder: Path, seed: int, n_pool: int) -> dict[str, dict[str, float]]:
    """`detection` results: all broken rewards, each kind against the clean ones, and each piece of evidence alone."""
    torch.set_num_threads(1)
    problems = tasks.pool(seed, n_pool)
    store = collected(folder, seed, problems)
    kind_of = {record["id"]: record["tags"][0] for record in problems}
    broken = [name for name, kind in kind_of.items() if kind != tasks.CLEAN]
    frame = suspicious(store, "pool", "benchmark")
    found = {"all": detection(frame, broken)}
    kinds = frame["id"].map(kind_of)
    for kind in (tasks.WRONG_TRUTH, tasks.COIN_FLIP):
        found[kind] = detection(frame[kinds.isin([tasks.CLEAN, kind])], broken)
    for name in WEIGHTS:
        if name not in ("halves", "p_value"):  # the store has no probes
            alone = suspicious(store, "pool", "benchmark", weights={name: 1.0})
            found[f"{name} alone"] = detection(alone, broken)
    return found


def collected(folder: Path, seed: int, problems: list[dict]) -> Store:
    """Make a store of the pool and the benchmark, with 16 rollouts each at step 0."""
    model = load_model(MODEL, device="cpu")
    sample = Sampler(model, seed)
    spec = SketchSpec(basis="fitted", dim=DIM, seed=seed, token_budget=16_384, objective=objective("gradalign"))
    groups = {"pool": sample(problems, N_ROLLOUTS)}
    records = {"pool": problems, "benchmark": tasks.benchmark(seed)}
    groups["benchmark"] = sample(records["benchmark"], N_ROLLOUTS)
    live = [group for group in groups["pool"] if group.has_signal]
    sketcher = Sketcher(model, spec, fit_projection(model, live[:N_FITTED], spec))
    store = create_store(folder / "store", sketcher)
    for name, members in groups.items():
        store.add_problems(name, records[name])
        batch = sketcher.sketch(members)
        with store.writer(name, step=0) as writer:
            writer.append(
                batch.ids,
                batch.sketches,
                state=batch.states,
                pass_rate=[group.pass_rate for group in members],
                n_rollouts=[len(group.responses) for group in members],
                reason=batch.reasons,
            )
    return store


if __name__ == "__main__":
    typer.run(main)
