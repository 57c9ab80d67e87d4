"""Selection of n problems of a collection: filter, score with a selector or a mixture, rank with ties by id.

The numbers of picks form a table, parts of the mixture by sources with a quota; a plain selection has one cell. Each
cell takes its number of best candidates among those not taken by an earlier cell.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from gradstore import State, Store, View
from gradstore.engine.searching.query import direction
from gradstore.engine.searching.targets import Target
from gradstore.engine.searching.targets import target as target_of
from gradstore.engine.searching.where import Where
from gradstore.engine.selecting.candidates import Candidates, Scored, Selector
from gradstore.engine.selecting.diversity import Diversity, Method
from gradstore.engine.selecting.mixture import Part, mixture_name, parts_of
from gradstore.engine.selecting.picking import Picks, answer, numbers_of_picks, pick_from_groups, refuse_shortage, taker
from gradstore.engine.selecting.quotas import check_quotas, groups_of
from gradstore.engine.selecting.sampling import softened
from gradstore.engine.selecting.scores_by_probe import stored_probes
from gradstore.errors import RequestError, check_number

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from gradstore.engine.probing.batch import ProbeBatch


_DESCRIBED = (
    "n_candidates", "at", "seed", "commit", "target", "targets", "diversity", "temperature", "quotas", "confidence",
    "probe_step",
)  # fmt: skip
"""Settings of a selection in its description, by name."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Selection:
    """Chosen problems, best first (for a mixture, part after part), and all settings needed to repeat the choice."""

    collection: str
    selector: str
    """Name of the selector; for a mixture, the parts with their shares."""
    ids: list[str]
    scores: np.ndarray
    """float64 [n]."""
    low: np.ndarray
    """Lower end of each score's interval at `confidence`, float64 [n] (`high`: upper); NaN if the selector has none."""
    high: np.ndarray
    weights: np.ndarray
    """Training weight of each problem, float64 [n]; 1 unless the selector sets it."""
    rollouts: np.ndarray
    """Training rollouts for each problem, int64 [n]; 0: the trainer's own setting."""
    picked_by: list[str]
    """Selector that chose each problem; differs only in a mixture."""
    n_candidates: int
    """Number of problems the selector could choose among."""
    n_asked: int
    at: int | None
    seed: int
    commit: int
    """Commit of the collection that was ranked."""
    targets: list[dict] = field(default_factory=list)
    """`Target.describe()` of the targets used."""
    diversity: dict | None = None
    """`Diversity.describe()` if the best candidates were re-ranked."""
    temperature: float | None = None
    quotas: dict[str, float] | None = None
    confidence: float = 0.95
    probe_step: int | None = None
    """Step of the stored probes used; None without probes, or if the caller gave them."""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Pairs of id and score, in the order chosen."""
        return zip(self.ids, self.scores.tolist(), strict=True)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {self.n_candidates} candidates of {self.collection!r} by {self.selector})"

    def to_pandas(self) -> "pd.DataFrame":
        """One row per chosen problem: id, score, low, high, weight, rollouts, picked_by."""
        import pandas as pd

        return pd.DataFrame(self.describe()["problems"])

    def to_polars(self) -> "pl.DataFrame":
        """The same as a polars DataFrame; RequestError if polars is not installed."""
        from gradstore.notebook import as_polars

        return as_polars(self.to_pandas())

    @property
    def relative_weights(self) -> np.ndarray:
        """The weights scaled to a mean of 1, float64 [n]; trainers multiply each problem's loss term by them.

        RequestError if all weights are zero.
        """
        if not self.weights.any():
            raise RequestError(f"selector {self.selector!r} gave every problem it picked the weight 0")
        if (self.weights == self.weights[0]).all():
            return np.ones(len(self))
        return self.weights / self.weights.mean()

    def _repr_html_(self) -> str:
        from gradstore.notebook import SHOWN, html_table

        best = zip(self.ids[:SHOWN], self.scores[:SHOWN].tolist(), self.weights[:SHOWN].tolist(), strict=True)
        rows = [(rank, *line) for rank, line in enumerate(best, 1)]
        against = " and ".join(str(target["benchmark"]) for target in self.targets)
        facts = f"of {self.n_candidates:,} candidates of {self.collection}" + (f" against {against}" if against else "")
        title = f"{len(self):,} chosen by {self.selector}"
        return html_table(title, facts, ["rank", "problem", "score", "weight"], rows, len(self))

    @property
    def target(self) -> dict | None:
        """The target, if there was exactly one; otherwise None."""
        return self.targets[0] if len(self.targets) == 1 else None

    def describe(self) -> dict:
        """Dict for JSON: settings, store commit, and one record per chosen problem."""
        return {
            **{name: getattr(self, name) for name in ("collection", "selector", "n_asked")},
            "n_selected": len(self.ids),
            **{name: getattr(self, name) for name in _DESCRIBED},
            "problems": [
                {
                    "id": self.ids[i],
                    "score": float(self.scores[i]),
                    "low": None if np.isnan(self.low[i]) else float(self.low[i]),
                    "high": None if np.isnan(self.high[i]) else float(self.high[i]),
                    "weight": float(self.weights[i]),
                    "rollouts": int(self.rollouts[i]),
                    "picked_by": self.picked_by[i],
                }
                for i in range(len(self.ids))
            ],
        }


def select(
    store: Store,
    collection: str,
    target: Target | str | Sequence[Target | str] | None,
    n: int,
    selector: str | Selector | Sequence[Part] = "cosine",
    at: int | None = None,
    *,
    where: Where | str | Sequence[str] | None = None,
    candidates: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
    allow_fewer: bool = False,
    diversity: Diversity | Method | None = None,
    probes: "ProbeBatch | None" = None,
    temperature: float | None = None,
    quotas: Mapping[str, float] | None = None,
    confidence: float = 0.95,
    forgetting: float = 1.0,
) -> Selection:
    """The n best problems of a collection for a selector, seen as of step `at`.

    target: one or several, or names of benchmarks; several have equal weight unless the selector combines them in its
    own way (`less`, `cropi`). selector: a name, a mixture such as `cosine:0.7+rand:0.3`, or a Selector.
    candidates: choose among these problems only (a round's chunk): ids, or their numbers as an int64 array. seed: seed
    of all random draws.
    diversity: re-rank the best few times n so that the picks differ (engine.Diversity has the formulas and the cost);
    problems without a gradient are then left out.
    probes: for probe-based selectors; None: the newest stored ones along the target's benchmark.
    temperature: soft sampling (sampling.py), in units of the scores' standard deviation; None or 0: take the best.
    quotas: share of the picks for each named source; the other sources get the rest. confidence: level of the
    intervals. forgetting: for history-based selectors, factor per step on the weight of older rollouts.
    RequestError when fewer than n can be chosen, unless allow_fewer; when the quotas cannot be met; when the selector
    needs a target or probes and there are none; for an unknown selector or candidate.
    """
    parts = parts_of(selector)
    targets = _targets(store, target, at)
    filtered = Where.of(where)
    if diversity is not None and not isinstance(diversity, Diversity):
        diversity = Diversity(diversity)
    _check(parts, targets, n, seed, confidence)
    if quotas is not None:
        check_quotas(quotas, store.problems(collection, columns=["source"])["source"].to_numpy())
    view = store.view(collection, at)
    probe_step = None
    if probes is None and any(part.selector.needs_probes for part in parts):
        probes, probe_step = stored_probes(view, _one_benchmark(parts, targets))
    picks = Picks()
    for i, (part, n_S) in enumerate(zip(parts, numbers_of_picks(n, parts, quotas), strict=True)):
        numbers, positions, group_P = _candidates(view, part.selector, filtered, candidates, quotas)
        of_scores, of_sampling = (np.random.default_rng([seed, i, purpose]) for purpose in range(2))
        seen = _seen(view, numbers, positions, targets, of_scores, probes, confidence, forgetting)
        scored = answer(part.selector, seen)
        keys_P = softened(scored.scores, temperature or 0.0, of_sampling)
        if diversity is not None:
            keys_P = np.where((positions >= 0) & np.append(view.live, False)[positions], keys_P, np.nan)
        keys_P = picks.free(seen, keys_P)
        take = taker(seen, diversity, seed)
        picked, found_S = pick_from_groups(keys_P, n_S, group_P, take, seen, in_order=diversity is None)
        if quotas is not None or not allow_fewer:
            refuse_shortage(part, n_S, found_S, collection, quotas, _census(view, part.selector, probes))
        picks.add(part.selector, seen, scored, picked)
    uses_targets = probe_step is not None or any(part.selector.needs_target for part in parts)
    return Selection(
        collection=collection,
        selector=mixture_name(parts),
        **picks.columns(),
        n_asked=n,
        at=at,
        seed=seed,
        commit=view.commit,
        targets=[goal.describe() for goal in targets] if uses_targets else [],
        diversity=None if diversity is None else diversity.describe(),
        temperature=temperature,
        quotas=None if quotas is None else dict(quotas),
        confidence=confidence,
        probe_step=probe_step,
    )


def scores_of(
    store: Store,
    collection: str,
    target: Target | str | Sequence[Target | str] | None,
    selector: Selector,
    at: int | None = None,
    *,
    candidates: Sequence[str] | np.ndarray | None = None,
    seed: int = 0,
    probes: "ProbeBatch | None" = None,
    confidence: float = 0.95,
    forgetting: float = 1.0,
) -> tuple[np.ndarray, Scored]:
    """Numbers of all problems that a selector may choose among, int64 [P], and their scores: as in `select`, unranked.

    A candidate whose score is NaN cannot be chosen. Arguments as for `select`.
    """
    view, targets = store.view(collection, at), _targets(store, target, at)
    _check([Part(selector, 1.0)], targets, 1, seed, confidence)
    numbers, positions, _ = _candidates(view, selector, None, candidates, None)
    random = np.random.default_rng([seed, 0, 0])
    seen = _seen(view, numbers, positions, targets, random, probes, confidence, forgetting)
    return numbers, answer(selector, seen)


def _targets(store: Store, target: Target | str | Sequence[Target | str] | None, at: int | None) -> list[Target]:
    named = [] if target is None else [target] if isinstance(target, Target | str) else list(target)
    return [target_of(store, one, at) if isinstance(one, str) else one for one in named]


def _seen(
    view: View,
    numbers: np.ndarray,
    positions: np.ndarray,
    targets: list[Target],
    random: np.random.Generator,
    probes: "ProbeBatch | None",
    confidence: float,
    forgetting: float,
) -> Candidates:
    """What a selector sees of its candidates."""
    target_D = _direction(targets, view)
    return Candidates(view, numbers, positions, target_D, random, tuple(targets), probes, confidence, forgetting)


def _check(parts: list[Part], targets: list[Target], n: int, seed: int, confidence: float) -> None:
    check_number("n", n, least=1)
    check_number("seed", seed, least=0)
    check_number("confidence", confidence, above=0, below=1)
    for part in parts:
        if part.selector.needs_target and not targets:
            raise RequestError(f"selector {part.selector.name!r} needs a target: name a benchmark")


def _one_benchmark(parts: list[Part], targets: list[Target]) -> str:
    """The one benchmark of the targets, for loading its stored probes; RequestError unless there is exactly one."""
    name = next(part.selector.name for part in parts if part.selector.needs_probes)
    benchmarks = {goal.benchmark for goal in targets}
    if len(benchmarks) != 1:
        raise RequestError(
            f"selector {name!r} goes by probes along one benchmark, not {len(benchmarks)}: name one, or give probes"
        )
    return benchmarks.pop()


def _direction(targets: list[Target], view: View) -> np.ndarray | None:
    """The value of `Candidates.target_D`."""
    if len(targets) < 2:
        return direction(targets[0].query(view), view.dim, "dot") if targets else None
    return np.stack([direction(goal.query(view), view.dim, "cosine") for goal in targets]).sum(axis=0)


def _candidates(
    view: View,
    selector: Selector,
    where: Where | None,
    among: Sequence[str] | np.ndarray | None,
    quotas: Mapping[str, float] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Problems the selector may choose among: numbers, positions in the view (-1: never measured), source groups."""
    if selector.whole_pool:
        numbers = np.arange(view.n_problems)
        positions = np.full(len(numbers), -1)
        positions[view.problem_numbers] = np.arange(len(view))
        mask_P = np.ones(len(numbers), bool)
        mask_P[view.deleted_numbers] = False
    else:
        numbers, positions = view.problem_numbers, np.arange(len(view))
        mask_P = view.live if selector.live_only else view.states != State.FAILED
    if where is not None:
        rates = np.append(view.pass_rates, np.float32(np.nan))[positions]
        problems = pa.table({name: view.column_of(numbers, name) for name in ("source", "tags")})
        mask_P = mask_P & where.mask(problems, rates)
    if among is not None:
        wanted = np.zeros(view.n_problems, bool)
        wanted[_numbers_of(view, among)] = True
        mask_P = mask_P & wanted[numbers]
    numbers, positions = numbers[mask_P], positions[mask_P]
    if quotas is None:
        return numbers, positions, None
    return numbers, positions, groups_of(quotas, view.column_of(numbers, "source").to_numpy())


def _numbers_of(view: View, ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Numbers of the candidates; RequestError for one that is not in the collection. One never measured is allowed."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "i":
        if len(ids) and (ids.min() < 0 or ids.max() >= view.n_problems):
            raise RequestError(f"candidates: collection {view.collection!r} has problems 0 to {view.n_problems - 1}")
        return ids
    numbers = view.numbers_of(list(ids))
    if len(numbers) and numbers.min() < 0:
        unknown = ids[int(np.argmax(numbers < 0))]
        raise RequestError(f"candidate {unknown!r} is not in collection {view.collection!r}")
    return numbers


def _census(view: View, selector: Selector, probes: "ProbeBatch | None") -> str:
    if selector.needs_probes and probes is not None:
        return f"{int(probes.live.sum())} of {len(probes.ids)} probes live"
    return ", ".join(f"{int((view.states == state).sum())} {state.name.lower()}" for state in State)
