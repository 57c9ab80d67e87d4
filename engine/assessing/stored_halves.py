"""Sketches of rollout halves in the store, to compute the reliability of any ranking from the store alone.

The even and the odd rollouts of a pool are two more collections, `NAME.even` and `NAME.odd`. Their rows have steps and
are searched, compacted, verified and mirrored like all others. Ranking both by the same target gives the reliability of
the whole ranking (split_half.py). The cosine of a problem's two rows shows how reproducible its gradient is. The halves
cost as much again as the pool itself, in time and in bytes.

P problems.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gradstore import Store, View
from gradstore.engine.assessing.split_half import SplitHalf, split, split_half
from gradstore.engine.gradients.sharding import leads
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.source import RolloutSource
from gradstore.engine.searching.query import Metric, eligible_positions, query_vectors, score_rows
from gradstore.engine.searching.targets import Target
from gradstore.engine.sketches.collector import CollectReport, SketchEach, collect
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.errors import RequestError
from gradstore.layout import HALVES


@dataclass(frozen=True, slots=True, eq=False)
class StoredHalves:
    """Reliability of a pool from its stored halves."""

    ids: list[str]
    """Ids of the problems with a gradient in the whole, at the halves' step."""
    agreement: np.ndarray
    """Cosine between the gradients of even and odd rollouts, float64 [P]; NaN if a half has no gradient."""
    standard_errors: np.ndarray
    """Half the difference of the halves' scores, float64 [P]: one degree of freedom each."""
    ranking: SplitHalf
    """Agreement of the halves' rankings by the target, and the resulting reliability of the whole."""


def collect_halves(
    store: Store,
    collection: str,
    groups: RolloutSource | Iterable[Group],
    *,
    sketcher: Sketcher,
    step: int,
    sketch_each: SketchEach | None = None,
) -> list[CollectReport]:
    """Sketch the even and the odd rollouts of groups into `NAME.even` and `NAME.odd`; arguments as in `collect`.

    RequestError for a problem that is not in the collection, or a group with a single rollout.
    """
    members, writes = list(groups.groups() if isinstance(groups, RolloutSource) else groups), leads(sketcher.model)
    records = {record["id"]: record for record in store.records(collection)} if writes else {}
    for group in members if writes else ():
        if group.problem_id not in records:
            raise RequestError(f"problem {group.problem_id!r} is not in collection {collection!r}")
    reports = []
    for suffix, half in zip(HALVES, split(members), strict=True):
        if writes:
            store.add_problems(collection + suffix, [records[group.problem_id] for group in half])
        report = collect(
            store,
            collection + suffix,
            half,
            sketcher=sketcher,
            step=step,
            measure="never",
            sketch_each=sketch_each,
        )
        reports.append(report)
    return reports


def stored_halves(
    store: Store, collection: str, wanted: Target, at: int | None = None, metric: Metric = "cosine"
) -> StoredHalves:
    """Reliability of a pool's ranking by a target, from the halves in the store.

    Uses the problems whose whole and halves have rows of the same step and basis. A half without signal scores 0.
    RequestError without stored halves, or with fewer than three such problems.
    """
    missing = [collection + suffix for suffix in HALVES if collection + suffix not in store.collections]
    if missing:
        raise RequestError(f"{store.path}: there is no collection {missing[0]!r}: collect {collection!r} with --halves")
    whole = store.view(collection, at)
    even, odd = (store.view(collection + suffix, at) for suffix in HALVES)
    live = np.flatnonzero(whole.live)
    names = whole.ids[live]
    places = [half.positions(names.tolist(), strict=False) for half in (even, odd)]
    kept = np.ones(len(live), bool)
    for half, place_P in zip((even, odd), places, strict=True):
        same_step = np.append(half.steps, -1)[place_P] == whole.steps[live]
        kept &= (place_P >= 0) & same_step & (np.append(half.bases, 0)[place_P] == whole.bases[live])
    scores = [_scores(half, wanted, metric)[place_P[kept]] for half, place_P in zip((even, odd), places, strict=True)]
    places = [place_P[kept] for place_P in places]
    agreement_P = np.full(int(kept.sum()), np.nan)
    both = even.live[places[0]] & odd.live[places[1]]
    for basis in even.live_bases:
        here = np.flatnonzero(both & (even.bases[places[0]] == basis))
        rows = [half.rows(place_P[here]).astype(np.float64) for half, place_P in zip((even, odd), places, strict=True)]
        lengths_P = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
        agreement_P[here] = np.einsum("pd,pd->p", *rows) / lengths_P
    return StoredHalves(
        names[kept].tolist(), agreement_P, np.abs(scores[0] - scores[1]) / 2, split_half(scores[0], scores[1])
    )


def _scores(view: View, wanted: Target, metric: Metric) -> np.ndarray:
    """Scores of every problem of the view, float64 [P], 0 without signal."""
    query_D = query_vectors(view, [wanted], metric)[0]
    return np.nan_to_num(score_rows(view, query_D, metric, eligible_positions(view, None)).astype(np.float64))
