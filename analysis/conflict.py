"""Conflicts between benchmarks: cosines of targets, correlation of scores, problems that help one and harm another.

Dimension letters: B benchmarks, P problems, D sketch dimensions.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from gradstore import Store
from gradstore.analysis.agreement import spearman
from gradstore.analysis.trajectory import target_at
from gradstore.engine.searching.query import Metric, eligible_positions, query_vectors, score_rows
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError

COLUMNS = [
    "step", "a", "b", "cosine", "correlation", "rank_correlation", "n", "both_help", "a_only", "b_only", "both_harm",
]  # fmt: skip


def conflict(
    store: Store, benchmarks: Sequence[str], pool: str, at: int | Sequence[int] | None = None, metric: Metric = "cosine"
) -> pd.DataFrame:
    """Agreement of each pair of benchmarks, one row per pair (and step).

    at: a step, several, or None for the newest rows. Columns: step (int64; -1 for the newest), a, b (benchmarks),
    cosine float64 (of the targets), correlation, rank_correlation float64 (Pearson and Spearman of the pool's scores),
    n int64 (live problems), both_help, a_only, b_only, both_harm float64 (shares of the live problems by the signs of
    the two scores; a_only: helps a, harms b). Pairs without both targets at a step have no row.
    RequestError for fewer than two benchmarks.
    """
    names = list(dict.fromkeys(benchmarks))
    if len(names) < 2:
        raise RequestError(f"a conflict needs at least two benchmarks, got {', '.join(names) or 'none'}")
    moments = [None] if at is None else np.atleast_1d(at).tolist()
    rows = []
    for moment in moments:
        scores, vectors = _scores(store, names, pool, moment, metric)
        for a, b in combinations([name for name in names if name in scores], 2):
            x_P, y_P = scores[a], scores[b]
            u_D, v_D = vectors[a].astype(np.float64), vectors[b].astype(np.float64)
            rows.append(
                {
                    "step": -1 if moment is None else moment,
                    "a": a,
                    "b": b,
                    "cosine": float(u_D @ v_D / (np.linalg.norm(u_D) * np.linalg.norm(v_D))),
                    "correlation": float(np.corrcoef(x_P, y_P)[0, 1]) if len(x_P) > 2 else float("nan"),
                    "rank_correlation": spearman(x_P, y_P),
                    "n": len(x_P),
                    "both_help": float(np.mean((x_P > 0) & (y_P > 0))),
                    "a_only": float(np.mean((x_P > 0) & (y_P <= 0))),
                    "b_only": float(np.mean((x_P <= 0) & (y_P > 0))),
                    "both_harm": float(np.mean((x_P <= 0) & (y_P <= 0))),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def contested(
    store: Store, helped: str, harmed: str, pool: str, at: int | None = None, metric: Metric = "cosine", k: int = 20
) -> pd.DataFrame:
    """The k problems that most help one benchmark and harm the other: largest min(score_helped, -score_harmed).

    Columns: id, source, score_helped, score_harmed, contest float64 (that minimum; only above 0). Fewer than k rows if
    fewer problems qualify. RequestError if a benchmark has no live problem.
    """
    for name in (helped, harmed):
        target(store, name, at)  # raises for a benchmark without a live problem
    view = store.view(pool, at)
    positions = eligible_positions(view, None)
    scores, _ = _scores(store, [helped, harmed], pool, at, metric)
    contest_P = np.minimum(scores[helped], -scores[harmed])
    best = np.argsort(-contest_P, kind="stable")[:k]
    best = best[contest_P[best] > 0]
    ids = view.ids_at(positions[best])
    return pd.DataFrame(
        {
            "id": ids,
            "source": view.problems_at(positions[best], ["source"])["source"].to_pylist(),
            "score_helped": scores[helped][best].astype(float),
            "score_harmed": scores[harmed][best].astype(float),
            "contest": contest_P[best].astype(float),
        }
    )


def _scores(
    store: Store, benchmarks: Sequence[str], pool: str, at: int | None, metric: Metric
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of the live problems, and target vectors, of each benchmark that has a target at the step."""
    view = store.view(pool, at)
    positions = eligible_positions(view, None)
    targets = {name: target_at(store, name, at) for name in benchmarks}
    known = {name: one for name, one in targets.items() if one is not None}
    if not known or not len(positions):
        return {}, {}
    scores_BP = score_rows(view, query_vectors(view, list(known.values()), metric), metric, positions)
    scores = {name: scores_BP[b, positions] for b, name in enumerate(known)}
    return scores, {name: one.vector for name, one in known.items()}
