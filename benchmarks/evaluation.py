"""Do scores predict the effect of training? A small task with exact retraining, scored through a store.

Digits and a perceptron. LDS: 60 models are trained on random halves of 1,000 images, and the sums of scores over each
half are compared with the models' outputs for 200 test images. Brittleness: the best images of a few test images are
removed and the model is retrained. Tail patch: one training step on these best images. AUC: a tenth of the labels is
made wrong, and images are ranked by self-influence. Gradients are projected to 256 dimensions and stored as rows;
scores are those of the store's searches.

    python -m benchmarks.evaluation [--seeds 3] [--models 60] [--dim 256] [--out FILE.json]

If dattri can be imported, its metrics evaluate the same scores.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.digits import DigitsTask
from gradstore.analysis.evaluation.brittleness import brittleness
from gradstore.analysis.evaluation.lds import lds, random_subsets
from gradstore.analysis.evaluation.mislabel import mislabel_auc
from gradstore.analysis.evaluation.scores import score_matrix, self_influence
from gradstore.analysis.evaluation.tail_patch import tail_patch
from gradstore.cli.show import print_table, say
from gradstore.engine.searching.query import Metric

METRICS: dict[str, Metric] = {"dot": "dot", "cosine": "cosine", "fisher": "fisher"}
N_QUERIES, REMOVED, STEP = 10, (50,), 10
"""Number of test images with removal, numbers of removed images, images per training step."""
WRONG_LABELS = 0.1


def main(
    seeds: Annotated[int, typer.Option(help="Repeats: images, initial weights, projection.")] = 3,
    models: Annotated[int, typer.Option(help="Models trained on random halves.")] = 60,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 256,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    """Print the figures of every score, mean and range over seeds."""
    torch.set_num_threads(1)
    runs = []
    for seed in range(seeds):
        runs.append(measure(seed, models, dim))
        say(f"seed {seed}: LDS " + ", ".join(f"{name} {runs[-1][name]['LDS']:.3f}" for name in METRICS))
    columns = list(dict.fromkeys(key for run in runs for row in run.values() for key in row))
    rows = [
        [name, *(spread([run[name][key] for run in runs if key in run[name]]) for key in columns)] for name in runs[0]
    ]
    print_table(f"digits, {models} models, {dim} dimensions, {seeds} seeds", ["score", *columns], rows)
    if out is not None:
        out.write_text(json.dumps({"models": models, "dim": dim, "runs": runs}, indent=2))


def measure(seed: int, n_models: int, dim: int) -> dict[str, dict[str, float]]:
    """Figures of every score for one seed."""
    task = DigitsTask(seed=seed)
    subsets_MP = random_subsets(task.n_train, n_models, seed=seed)
    outputs_MQ = task.retrain(subsets_MP)
    found: dict[str, dict[str, float]] = {}
    for name, dtype, metric in (
        *((name, "fp32", one) for name, one in METRICS.items()),
        ("fisher int8", "int8", "fisher"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            _, _, scores_QP = score_matrix(task.store(Path(folder) / "store", dim, dtype), "train", "test", metric)
        found[name] = {"LDS": float(np.nanmean(lds(scores_QP, subsets_MP, outputs_MQ)))}
        judge = _dattri()
        if judge is not None:
            found[name]["LDS (dattri)"] = _dattri_lds(judge, scores_QP, subsets_MP, outputs_MQ)
        if dtype == "fp32":
            few_QP = scores_QP[:N_QUERIES]
            taken = brittleness(few_QP, lambda sets: task.retrain(sets)[:, :N_QUERIES], REMOVED, seed=seed)
            for n, rows in taken.groupby("removed"):
                found[name][f"{n} removed"] = float(rows["effect"].mean())
            patched = tail_patch(scores_QP, task.patch, STEP, seed=seed)
            found[name]["step on 10 best"] = float(patched["best"].mean())
            found[name]["10 random"] = float(patched["random"].mean())
    found["self-influence"] = self_found(seed, dim)
    return found


def self_found(seed: int, dim: int) -> dict[str, float]:
    """AUC of self-influence for wrong labels."""
    task = replace(DigitsTask(seed=seed), wrong_labels=WRONG_LABELS)
    with tempfile.TemporaryDirectory() as folder:
        scores_P = self_influence(task.store(Path(folder) / "store", dim), "train")
    found = {"AUC": mislabel_auc(scores_P, task.wrong)}
    judge = _dattri()
    if judge is not None:
        value, _ = judge.mislabel_detection_auc(torch.tensor(scores_P), torch.tensor(task.wrong))
        found["AUC (dattri)"] = float(value)
    return found


def _dattri_lds(judge: object, scores_QP: np.ndarray, subsets_MP: np.ndarray, outputs_MQ: np.ndarray) -> float:
    members = torch.tensor(np.stack([np.flatnonzero(row) for row in subsets_MP]))
    truth = (torch.tensor(outputs_MQ), members)
    correlations, _ = judge.lds(torch.tensor(scores_QP.T.astype(np.float64)), truth)  # type: ignore[attr-defined]
    return float(correlations.mean())


def _dattri() -> object | None:
    """dattri's metrics, another implementation of the same definitions; None if it is not installed."""
    try:
        import dattri.metric
    except ImportError:
        return None
    return dattri.metric


def spread(values: list[float]) -> str:
    """Mean and range; empty without values."""
    if not values:
        return ""
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    typer.run(main)
