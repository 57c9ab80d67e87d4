"""Counterfactual curricula: what other selectors would have picked at each step, scored with later rows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gradstore import Store, View
from gradstore.analysis.trajectory import measured_steps, steps_of, target_at
from gradstore.engine.searching.query import Metric, query_vectors, score_rows
from gradstore.engine.searching.targets import Target
from gradstore.engine.selecting.mixture import parts_of
from gradstore.engine.selecting.selection import select
from gradstore.errors import RequestError, check_known
from gradstore.rounds import Round

SELECTED = ("cosine", "dot", "fisher", "norm", "accgreedy", "rand")
"""Selectors compared by default."""
TRAINED = "(trained on)"
BEST = "(best in hindsight)"
COLUMNS = [
    "step", "selector", "n", "overlap", "alignment", "gained", "best", "regret", "judged_later", "chance",
    "chance_error", "note",
]  # fmt: skip


def counterfactual(
    store: Store,
    pool: str,
    benchmark: str | Sequence[str],
    n: int | None = None,
    selectors: Sequence[str] = SELECTED,
    steps: Sequence[int] | None = None,
    *,
    metric: Metric = "cosine",
    among: str = "candidates",
    seed: int = 0,
) -> pd.DataFrame:
    """Compare selectors in hindsight: one row per step and selector, plus the trained picks and the best possible ones.

    benchmark: one or several; scores are the mean over them. n: number of problems picked (None: as many as the step's
    round). steps: None: those of the pool's recorded rounds, or without rounds every step of the (first) benchmark.
    among: `candidates` of the step's round, or the whole `pool`.
    A pick's alignment in hindsight is its score against the step's target, from its first row *after* the step, so from
    other rollouts than the selection used. Without a later row, the newest row at the step is used. (If there are very
    many steps, only those with the most rows are searched: `measured_steps`.)

    Columns: step int64, selector, n int64 (picked), overlap float64 (share of the picks that were trained on in that
    round; nan without a round), alignment float64 (mean score of the picks as seen at the step), gained float64 (mean
    score in hindsight), best float64 (gained by the best n in hindsight), regret float64 (best - gained), judged_later
    float64 (share of the picks scored with a later row), chance float64 (expected `gained` of n problems drawn at
    random from the same candidates), chance_error float64 (standard deviation of that over draws), note (why a selector
    could not pick, else empty).
    Picks without a gradient gain 0; picks that were never measured are left out of the means.
    RequestError for an unknown selector, or if n is neither given nor recorded.
    """
    for name in selectors:
        parts_of(name)  # raises for an unknown one
    check_known("among", among, ("candidates", "pool"))
    names = [benchmark] if isinstance(benchmark, str) else list(benchmark)
    if not names:
        raise RequestError("no benchmark given: name at least one")
    recorded = {int(one.step): one for one in store.rounds(pool)}
    chosen = sorted(recorded) if steps is None and recorded else steps_of(store, names[0], steps).tolist()
    later = _LaterRows(store, pool)
    rows: list[dict] = []
    for step in chosen:
        found = [target_at(store, name, step) for name in names]
        wanted = [one for one in found if one is not None]
        view = store.view(pool, step)
        if len(wanted) == len(names) and len(view):
            rows += _at_step(store, view, step, wanted, n, selectors, recorded.get(step), metric, among, seed, later)
    return pd.DataFrame(rows, columns=COLUMNS)


def _at_step(
    store: Store,
    view: View,
    step: int,
    wanted: list[Target],
    n: int | None,
    selectors: Sequence[str],
    recorded: Round | None,
    metric: Metric,
    among: str,
    seed: int,
    later: "_LaterRows",
) -> list[dict]:
    trained = recorded.picks if recorded is not None else []
    n_picked = n or len(trained)
    if not n_picked:
        raise RequestError(f"step {step}: no round is recorded there, so say how many problems to pick (n)")
    candidates = None
    if recorded is not None and among == "candidates":
        ids = recorded.table["id"].to_pylist()
        candidates = [name for name, at in zip(ids, view.positions(ids, strict=False).tolist(), strict=True) if at >= 0]
    positions = np.arange(len(view)) if candidates is None else view.positions(candidates)
    live = positions[view.live[positions]]
    queries_QD = query_vectors(view, wanted, metric)
    now_P = score_rows(view, queries_QD, metric, live).mean(axis=0)
    hindsight_P, judged_P = later.scores(view, step, queries_QD, metric, now_P)
    best_rows = live[np.argsort(-hindsight_P[live], kind="stable")[:n_picked]]
    best = float(hindsight_P[best_rows].mean()) if len(best_rows) else float("nan")
    chance = _chance(np.nan_to_num(hindsight_P[positions]), n_picked)

    def row(selector: str, ids: Sequence[str], note: str = "") -> dict:
        at = view.positions(list(ids), strict=False)
        at = at[at >= 0]
        known = len(at) > 0
        gained = float(np.nan_to_num(hindsight_P[at]).mean()) if known else float("nan")
        return {
            "step": step,
            "selector": selector,
            "n": len(ids),
            "overlap": len(set(ids) & set(trained)) / len(ids) if trained and len(ids) else float("nan"),
            "alignment": float(np.nan_to_num(now_P[at]).mean()) if known else float("nan"),
            "gained": gained,
            "best": best,
            "regret": best - gained,
            "judged_later": float(judged_P[at].mean()) if known else float("nan"),
            "chance": chance[0],
            "chance_error": chance[1],
            "note": note,
        }

    found = [row(TRAINED, trained)] if trained else []
    for name in selectors:
        try:
            chosen = select(
                store, view.collection, wanted, n_picked, name, step, candidates=candidates, seed=seed, allow_fewer=True
            )
        except RequestError as error:  # the store lacks data that it needs at this step: report it in `note`
            found.append(row(name, [], str(error)))
            continue
        found.append(row(name, chosen.ids))
    return [*found, row(BEST, view.ids_at(best_rows).tolist())]


def _chance(values_P: np.ndarray, n: int) -> tuple[float, float]:
    """Mean and standard deviation of the mean of n values drawn without replacement (Cochran 1977, theorem 2.2)."""
    total = len(values_P)
    if total < 2:
        return (float(values_P.mean()) if total else float("nan")), float("nan")
    left = max(0.0, 1 - n / total)
    return float(values_P.mean()), float(values_P.std(ddof=1) * np.sqrt(left / min(n, total)))


class _LaterRows:
    """Finds each problem's first live row after a step."""

    def __init__(self, store: Store, pool: str) -> None:
        self._place = {
            name: number for number, name in enumerate(store.problems(pool, columns=["id"])["id"].to_pylist())
        }
        self._fresh: list[tuple[View, np.ndarray, np.ndarray]] = []
        for step in measured_steps(store, pool):
            view = store.view(pool, step)
            positions = np.flatnonzero(view.live & (view.steps == step))
            self._fresh.append((view, positions, self._places(view.ids_at(positions))))

    def scores(
        self, view: View, step: int, queries_QD: np.ndarray, metric: Metric, now_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(scores from the first live row after the step, else now_P; bool: score is from a later row): [P] each."""
        wanted = np.full(len(self._place), -1, np.int64)
        wanted[self._places(view.ids)] = np.arange(len(view))
        found_P, later_P = now_P.copy(), np.zeros(len(view), bool)
        for newer, positions, places in self._fresh:
            if newer.at is None or newer.at <= step:
                continue
            here = wanted[places] >= 0
            at = wanted[places[here]]
            if len(at):
                scores_QP = score_rows(newer, queries_QD, metric, positions[here])
                found_P[at] = scores_QP.mean(axis=0)[positions[here]]
                later_P[at] = True
                wanted[places[here]] = -1  # the first row after the step counts
        return found_P, later_P

    def _places(self, ids: np.ndarray) -> np.ndarray:
        return np.fromiter((self._place[name] for name in ids.tolist()), np.int64, len(ids))
