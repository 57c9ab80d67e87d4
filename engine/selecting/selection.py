"""Choose n problems of a collection: filter, score with a selector, rank with ties by id."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.searching.query import direction
from engine.searching.ranking import best
from engine.searching.targets import Target
from engine.searching.where import Where
from engine.selecting.diversity import Diversity
from engine.selecting.selectors import SELECTORS, Candidates, Selector
from gradstore import State, Store, View
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The problems chosen, best first, and everything needed to choose them again."""

    collection: str
    selector: str
    ids: list[str]
    scores: np.ndarray
    """float64 [n]."""
    weights: np.ndarray
    """How much each should count in training, float64 [n]; all 1 for the selectors of this release."""
    n_candidates: int
    """Problems the selector could choose among."""
    n_asked: int
    at: int | None
    seed: int
    commit: int
    """Commit of the collection that was ranked."""
    target: dict | None
    """`Target.describe()` of the target used."""
    diversity: dict | None = None
    """`Diversity.describe()` if the best candidates were re-ranked."""

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self) -> dict:
        """JSON-ready: settings, store commit, and id and score of every problem chosen."""
        return {
            "collection": self.collection,
            "selector": self.selector,
            "n_asked": self.n_asked,
            "n_selected": len(self.ids),
            "n_candidates": self.n_candidates,
            "at": self.at,
            "seed": self.seed,
            "commit": self.commit,
            "target": self.target,
            "diversity": self.diversity,
            "problems": [
                {"id": problem_id, "score": float(score), "weight": float(weight)}
                for problem_id, score, weight in zip(self.ids, self.scores, self.weights, strict=True)
            ],
        }


def select(
    store: Store,
    collection: str,
    target: Target | None,
    n: int,
    selector: str | Selector = "cosine",
    at: int | None = None,
    *,
    where: Where | None = None,
    candidates: Sequence[str] | None = None,
    seed: int = 0,
    allow_fewer: bool = False,
    diversity: Diversity | None = None,
) -> Selection:
    """The n best problems of a collection for a selector, seen as of step `at`.

    candidates: choose among these ids only (a round's chunk). seed: drives the selectors that draw at random.
    diversity: pick n among the best few times n so that they differ (engine.Diversity has the formulas and the cost);
    problems without a gradient are left out then.
    RequestError when fewer than n can be chosen, unless allow_fewer; when the selector needs a target and none is
    given; for an unknown selector or candidate.
    """
    chosen = SELECTORS[selector] if isinstance(selector, str) else selector
    if n < 1:
        raise RequestError(f"n is {n}, expected at least 1")
    if chosen.needs_target and target is None:
        raise RequestError(f"selector {chosen.name!r} needs a target: name a benchmark")
    view = store.view(collection, at)
    target_D = None if target is None else direction(target, view.dim, "dot")
    ids, positions = _candidates(store, view, chosen, where, candidates)
    scores_P = chosen.score(Candidates(view, ids, positions, target_D, np.random.default_rng(seed)))
    if diversity is None:
        picked = best(scores_P, n, lambda rows: ids[rows])
    else:
        has_gradient_P = (positions >= 0) & np.append(view.live, False)[positions]
        scores_P = np.where(has_gradient_P, scores_P, np.nan)
        leading = best(scores_P, diversity.candidates * n, lambda rows: ids[rows])
        units_KD = view.rows(positions[leading])
        picked = leading[diversity.pick(units_KD, scores_P[leading], n, seed)] if len(leading) else leading
    if len(picked) < n and not allow_fewer:
        raise RequestError(
            f"selector {chosen.name!r} can choose {len(picked)} of {n} problems asked from {collection!r} "
            f"({_census(view)}): ask for fewer, or allow fewer"
        )
    return Selection(
        collection,
        chosen.name,
        [str(problem_id) for problem_id in ids[picked]],
        scores_P[picked].astype(np.float64),
        np.ones(len(picked)),
        int((~np.isnan(scores_P)).sum()),
        n,
        at,
        seed,
        view.commit,
        None if target is None or not chosen.needs_target else target.describe(),
        None if diversity is None else diversity.describe(),
    )


def _candidates(
    store: Store, view: View, selector: Selector, where: Where | None, among: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the problems the selector may choose among, and their places in the view (-1: never measured)."""
    if selector.whole_pool:
        problems = store.problems(view.collection)
        ids = problems.column("id").to_numpy()
        positions = view.find(ids)
        mask_P = ~np.isin(ids, store.deleted(view.collection))
    else:
        problems, ids, positions = view.problems, view.ids, np.arange(len(view))
        mask_P = view.live if selector.live_only else view.states != State.FAILED
    if where is not None:
        rates = np.append(view.pass_rates, np.float32(np.nan))[positions]
        mask_P = mask_P & where.mask(problems, rates)
    if among is not None:
        view.positions(among)
        mask_P = mask_P & np.isin(ids, np.asarray(among, object))
    return ids[mask_P], positions[mask_P]


def _census(view: View) -> str:
    return ", ".join(f"{int((view.states == state).sum())} {state.name.lower()}" for state in State)
