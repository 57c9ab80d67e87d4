"""Search: the problems of a view that align most, or least, with a direction.

A view stores unit rows and their norms. cosine is a matrix product with the unit target; dot is the same times the
norm. fisher is dot with a query preconditioned by the view's second moment. The exact scan (scan.py) reads every live
row once, as it is stored, in bounded memory. An index (indexes/) reads fewer bytes and is worth building for many
searches of one collection; its scores are those of the scan.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from gradstore import View
from gradstore.engine.searching.blocks import laid_out, lengths_of, only_basis, scaled
from gradstore.engine.searching.fisher import DAMPING, preconditioned
from gradstore.engine.searching.indexes import Index, index_for
from gradstore.engine.searching.scan import Found, scan_best, scan_rows
from gradstore.engine.searching.targets import Target, target
from gradstore.engine.searching.where import Where
from gradstore.errors import RequestError, check_known, check_number

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

Metric = Literal["cosine", "dot", "fisher"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """The problems found, best first."""

    ids: np.ndarray
    """Problem ids, str [K]."""
    scores: np.ndarray
    """Scores, float32 [K]."""
    positions: np.ndarray
    """Positions of the hits in the view, int64 [K]."""
    n_eligible: int
    """Live problems that passed the filter; if below k, there are fewer hits than asked for."""
    n_unknown: int = field(default=0, kw_only=True)
    """Eligible problems without a score: the target was not measured in the basis of their rows."""

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Pairs of id and score, best first."""
        return zip(self.ids.tolist(), self.scores.tolist(), strict=True)

    def __repr__(self) -> str:
        first = ", ".join(f"{name!r} {score:+.4g}" for name, score in islice(self, 3))
        return f"Hits({len(self)} of {self.n_eligible} eligible: {first}{', ...' if len(self) > 3 else ''})"

    def to_pandas(self) -> "pd.DataFrame":
        """A DataFrame with the columns id, score and position, best first."""
        import pandas as pd

        return pd.DataFrame({"id": self.ids, "score": self.scores, "position": self.positions})

    def to_polars(self) -> "pl.DataFrame":
        """The same as a polars DataFrame; RequestError if polars is not installed."""
        from gradstore.notebook import as_polars

        return as_polars(self.to_pandas())

    def _repr_html_(self) -> str:
        from gradstore.notebook import SHOWN, html_table

        pairs = zip(self.ids[:SHOWN], self.scores[:SHOWN].tolist(), strict=True)
        rows = [(rank, str(problem_id), score) for rank, (problem_id, score) in enumerate(pairs, 1)]
        facts = f"of {self.n_eligible:,} eligible problems"
        return html_table(f"{len(self):,} hits", facts, ["rank", "problem", "score"], rows, len(self))


def search(
    view: View,
    query: Target | str | np.ndarray,
    k: int,
    *,
    metric: Metric = "cosine",
    largest: bool = True,
    where: Where | str | Sequence[str] | np.ndarray | None = None,
    index: Index | str | None = None,
    damping: float = DAMPING,
) -> Hits:
    """The k live problems of the view with the largest (or smallest) score, ties by id.

    query: a target, a benchmark's name, or a float vector [D] (in a store with several bases: in the newest basis).
    metric: `cosine` of gradient and query; `dot`, gradient times query; `fisher`, g^T (M/n + lambda I)^-1 q with the
    second moment M of the view's n live rows. damping: lambda over the mean eigenvalue of M/n. where: a filter, its
    terms (`"source=gsm8k"`), or a bool mask [P] over the view. index: None scans every row and is exact; a kind of
    index or `auto` opens or builds one in the collection's folder (see `index_for`); an Index is used directly. Hits of
    an index have the exact scores of the scan. The scan replaces an index that cannot answer (k above its tested k, or
    a filter that leaves few rows).
    Only live problems are ranked. RequestError for k below 1, a wrong dimension, a zero or non-finite query.
    """
    check_number("k", k, least=1)
    queries_QW = query_vectors(view, [query], metric, damping)
    eligible = eligible_positions(view, where if isinstance(where, np.ndarray) else Where.of(where))
    return best_hits(view, queries_QW, k, metric, largest, eligible, index)[0]


def best_hits(
    view: View,
    queries_QW: np.ndarray,
    k: int,
    metric: Metric,
    largest: bool,
    eligible: np.ndarray,
    index: Index | str | None = None,
) -> list[Hits]:
    """The k best of the eligible positions for each row of `query_vectors`, by the index or by the exact scan."""
    found = _indexed(view, queries_QW, k, metric, largest, eligible, index)
    if found is None:
        found = scanned(view, queries_QW, k, metric, largest, eligible)
    unknown = [n_unknown_of(view, query_W, eligible) for query_W in queries_QW]
    ids = view.ids_at(np.concatenate([positions for positions, _ in found]))  # read once for all queries
    cuts = np.cumsum([len(positions) for positions, _ in found])[:-1]
    return [
        Hits(own, scores, positions, len(eligible), n_unknown=n)
        for own, (positions, scores), n in zip(np.split(ids, cuts), found, unknown, strict=True)
    ]


def _indexed(
    view: View,
    queries_QW: np.ndarray,
    k: int,
    metric: Metric,
    largest: bool,
    eligible: np.ndarray,
    index: Index | str | None,
) -> Found | None:
    """Answers of the index; None where the scan must serve."""
    if index is None or len(view.live_bases) > 1:  # an index has entries of one basis
        return None
    block_QD = queries_QW.reshape(len(queries_QW), -1, view.dim)[:, only_basis(view, "an index")]
    if np.isnan(block_QD).any():
        return None
    if isinstance(index, str):
        index = index_for(view, k, metric=metric, kind=index, n_queries=len(queries_QW), together=True)
    if index is None or not index.serves(view, k, metric, len(eligible)):
        return None
    return index.search(view, block_QD, k, metric, largest, eligible)


def scanned(view: View, queries_QW: np.ndarray, k: int, metric: Metric, largest: bool, eligible: np.ndarray) -> Found:
    """The k best of the eligible positions for each row of `query_vectors` by the exact scan, best first."""
    sign = np.float32(1 if largest else -1)
    weights_P = None if metric == "cosine" else view.norms
    found = scan_best(view, sign * queries_QW, k, eligible, weights_P)
    return [(positions, sign * scores + np.float32(0)) for positions, scores in found]  # + 0: no -0 among scores


def n_unknown_of(view: View, query_W: np.ndarray, eligible: np.ndarray) -> int:
    """Number of eligible problems whose row is in a basis where the query is unknown."""
    known_B = ~np.isnan(query_W.reshape(view.n_bases, view.dim)).any(axis=1)
    return 0 if known_B.all() else int((~known_B[view.bases[eligible]]).sum())


def eligible_positions(view: View, where: Where | np.ndarray | None) -> np.ndarray:
    """Positions in the view of the live problems that pass the filter, int64, ascending."""
    if where is None:
        return view.live_positions
    return np.flatnonzero(
        view.live
        & (
            where.mask(view.problems_at(columns=["source", "tags"]), view.pass_rates)
            if isinstance(where, Where)
            else where
        )
    )


def query_vectors(
    view: View, queries: Sequence[Target | str | np.ndarray], metric: Metric, damping: float = DAMPING
) -> np.ndarray:
    """Query vectors to multiply the rows with, float32 [Q, D]: unit length for cosine, preconditioned for fisher.

    queries: targets, names of benchmarks (as of the view's step) or vectors. In a store with several bases
    [Q, bases * D], one block per basis (blocks.py).
    """
    if not isinstance(view, View):
        raise RequestError(f"searched is a view, as store.view(NAME) gives it, not {type(view).__name__}")
    goals = [target(view.store, query, view.at) if isinstance(query, str) else query for query in queries]
    wide = [goal.query(view) if isinstance(goal, Target) else _newest(goal, view) for goal in goals]
    queries_QD = np.stack([direction(query, view.dim, metric) for query in wide])
    return preconditioned(view, queries_QD, damping) if metric == "fisher" else queries_QD


def direction(query: Target | np.ndarray, dim: int, metric: Metric) -> np.ndarray:
    """Check the query and return it as float32 [D], of unit length for cosine.

    With several blocks, each is checked and scaled separately; blocks of NaN stay.
    """
    check_known("metric", metric, METRICS)
    query_D = _numbers(query.vector if isinstance(query, Target) else query)
    if query_D.ndim != 1 or not len(query_D) or len(query_D) % dim:
        raise RequestError(f"the query has shape {query_D.shape}, the store holds rows of {dim} dimensions")
    lengths_1B = lengths_of(query_D[None], dim)
    lengths = lengths_1B[0].tolist()
    known = [length for length in lengths if not math.isnan(length)]
    if not known or not all(0 < length < math.inf for length in known):
        shown = lengths if len(lengths) > 1 else lengths[0]
        raise RequestError(f"the query's length is {shown}, expected a finite number above 0")
    return scaled(query_D[None], lengths_1B)[0] if metric == "cosine" else query_D


def _numbers(query: object) -> np.ndarray:
    """A query as float32; RequestError for what is no vector."""
    try:
        return np.asarray(query, np.float32)
    except (TypeError, ValueError):
        expected = "a Target (engine.target(store, NAME)), a benchmark's name or a vector"
        raise RequestError(f"the query is {type(query).__name__}, expected {expected}") from None


def _newest(query: np.ndarray, view: View) -> np.ndarray:
    """The vector unchanged; in a store with several bases a vector [D] becomes the block of the newest basis."""
    query_D = _numbers(query)
    if view.n_bases == 1 or query_D.shape != (view.dim,):
        return query_D
    return laid_out({view.n_bases - 1: query_D}, view.n_bases)


def score_rows(view: View, query: np.ndarray, metric: Metric, positions: np.ndarray) -> np.ndarray:
    """Scores of the rows at the positions, NaN elsewhere: float32 [P] for a query [D], [Q, P] for queries [Q, D]."""
    scores_QP = scan_rows(view, np.atleast_2d(query), positions)
    if metric != "cosine":
        scores_QP *= view.norms
    return scores_QP[0] if np.ndim(query) == 1 else scores_QP
