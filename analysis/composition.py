"""Composition of problem sets: share of each source, tag and difficulty band, round by round."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa

from gradstore import Store
from gradstore.errors import RequestError

BANDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Edges of the difficulty bands, in pass rates; exactly 0 and exactly 1 are separate bands."""
UNKNOWN = "unknown"
Groups = Callable[[Sequence[str], np.ndarray], list[list[str]]]
"""(ids, pass rates) -> list of groups for each problem."""


def source_shares(problems: pa.Table) -> dict[str, float]:
    """Source -> share of the problems, in [0, 1]; problems: rows of a problem table."""
    return _shares(problems.column("source").to_pylist(), len(problems))


def tag_shares(problems: pa.Table) -> dict[str, float]:
    """Tag -> share of the problems with this tag, in [0, 1]."""
    return _shares((tag for tags in problems.column("tags").to_pylist() for tag in set(tags)), len(problems))


def picks_over_time(
    store: Store, pool: str, by: str = "source", clusters: Mapping[str, int] | pd.DataFrame | None = None
) -> pd.DataFrame:
    """Composition of each recorded round's picks, compared with its candidates; one row per round and group.

    by: `source`; `tag` (a problem counts under each of its tags); `difficulty` (band of the pass rate in the round's
    table); `cluster` (clusters: the frame of `clusters.clusters`, or id -> cluster).
    Columns: round, step int64, group str, n int64 (picks in the group), share float64 (of the round's picks),
    n_candidates int64, candidate_share float64, lift float64 (share / candidate_share; nan without candidates).
    Every group has a row in every round. RequestError for another `by`, or `cluster` without clusters.
    """
    groups_of = _grouping(store, pool, by, clusters)
    rows: list[tuple[int, str, int, int]] = []
    steps, totals = {}, {}
    for one in store.rounds(pool):
        table = one.table
        groups = groups_of(table["id"].to_pylist(), table["pass_rate"].to_numpy())
        picked = table["picked"].to_numpy() >= 0
        among = Counter(group for each in groups for group in each)
        of_picks = Counter(group for each, chosen in zip(groups, picked, strict=True) if chosen for group in each)
        rows += [(one.number, group, of_picks[group], among[group]) for group in among]
        steps[one.number], totals[one.number] = int(one.step), (int(picked.sum()), len(table))
    counts = pd.DataFrame(rows, columns=["round", "group", "n", "n_candidates"])
    every = pd.MultiIndex.from_product([list(totals), sorted(set(counts["group"]))], names=["round", "group"])
    whole = counts.set_index(["round", "group"]).reindex(every, fill_value=0).reset_index()
    whole["step"] = whole["round"].map(steps)
    whole["share"] = whole["n"] / whole["round"].map(lambda number: max(1, totals[number][0]))
    whole["candidate_share"] = whole["n_candidates"] / whole["round"].map(lambda number: max(1, totals[number][1]))
    whole["lift"] = whole["share"] / whole["candidate_share"].where(whole["candidate_share"] > 0)
    columns = ["round", "step", "group", "n", "share", "n_candidates", "candidate_share", "lift"]
    return whole[columns].sort_values(["round", "group"], ignore_index=True)


def difficulty(pass_rates: Iterable[float]) -> list[str]:
    """Band of each pass rate: `0`, `0-0.2`, `0.2-0.4`, ... , `1`, or `unknown`; a band includes its upper edge."""
    names = [f"{low:g}-{high:g}" for low, high in pairwise(BANDS)]
    found = []
    for rate in pass_rates:
        if rate is None or np.isnan(rate):
            found.append(UNKNOWN)
        elif rate <= 0 or rate >= 1:
            found.append("0" if rate <= 0 else "1")
        else:
            found.append(names[int(np.searchsorted(BANDS[1:], np.float64(np.round(rate, 6))))])
    return found


def _grouping(store: Store, pool: str, by: str, clusters: Mapping[str, int] | pd.DataFrame | None) -> Groups:
    """The function (ids, pass rates) -> list of groups for each problem."""
    problems = store.problems(pool)
    if by == "source":
        source = dict(zip(problems["id"].to_pylist(), problems["source"].to_pylist(), strict=True))
        return lambda ids, rates: [[source.get(name, UNKNOWN)] for name in ids]
    if by == "tag":
        tags = dict(zip(problems["id"].to_pylist(), problems["tags"].to_pylist(), strict=True))
        return lambda ids, rates: [sorted(set(tags.get(name, []))) for name in ids]
    if by == "difficulty":
        return lambda ids, rates: [[band] for band in difficulty(rates)]
    if by == "cluster":
        if clusters is None:
            raise RequestError(
                "picks by cluster need the clusters: give the frame of gradstore.analysis.clusters.clusters"
            )
        if isinstance(clusters, pd.DataFrame):
            clusters = dict(zip(clusters["id"].astype(str), clusters["cluster"], strict=True))
        known = {name: f"cluster {number}" for name, number in clusters.items()}
        return lambda ids, rates: [[known.get(name, UNKNOWN)] for name in ids]
    raise RequestError(f"picks by {by!r}: expected source, tag, difficulty or cluster")


def _shares(names: Iterable[str], n: int) -> dict[str, float]:
    return {name: count / n for name, count in sorted(Counter(names).items())}
