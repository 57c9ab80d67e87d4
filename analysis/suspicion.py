"""Detection of broken rewards. Wrong ground truths have gradients against the rest; coin flips have random ones.

The evidence below is converted to percentiles within each source and combined by a weighted mean (docs/analysis.md):

    estrangement  small dot product with the mean gradient of the other problems of the same source
    harm          small dot product with the benchmark, in sources whose mean dot product is positive
    coin          pass rate close to one half
    halves        even and odd rollouts disagree about the dot product with the benchmark (needs stored probes)
    p_value       rewards unrelated to that dot product (needs stored probes; in sources that help the benchmark)

A pull is a dot product, not a cosine. If rewards do not depend on the response, the gradient is short and its direction
is random; a cosine would hide that it is short.

Dimension letters: P problems, D sketch dimensions.
"""

from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
from scipy.stats import rankdata  # type: ignore[import-untyped]

from gradstore import Store, View
from gradstore.analysis.noise import half_dots
from gradstore.analysis.trajectory import sources_of
from gradstore.engine.searching.moment import sums_by_group
from gradstore.engine.searching.query import eligible_positions, query_vectors, score_rows
from gradstore.engine.searching.ranking import best
from gradstore.engine.searching.scan import scan_pairs
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError, check_known

WEIGHTS: Mapping[str, float] = {"estrangement": 1.0, "harm": 0.25, "coin": 0.25, "halves": 0.25, "p_value": 0.25}
"""Weight of each piece of evidence."""
THRESHOLD = 0.8
"""Suspicion from which a reward is called suspicious, if its gradient also points against the rest of its source."""
_MANY = 1000
"""From so many problems on, a source's pulls come from products with the stored rows."""
LEAST_OF_SOURCE = 20
"""Sources with fewer live problems are merged into one group for percentiles."""
COLUMNS = [
    "rank", "id", "source", "suspicion", "score", "own", "pass_rate", "disagreement", "p_value", "why", "step",
]  # fmt: skip


def suspicious(
    store: Store,
    pool: str,
    benchmark: str | None = None,
    at: int | None = None,
    *,
    weights: Mapping[str, float] = WEIGHTS,
) -> pd.DataFrame:
    """Live problems of the pool's view at a step, the most suspicious first.

    benchmark: None: without harm, halves and p_value. weights: evidence -> weight; missing evidence is left out.
    Columns: rank int64 (from 1), id, source, suspicion float64 (0 to 1: weighted mean of the evidence's percentiles),
    score float64 (cosine with the benchmark; nan without), own float64 (pull along its source: `own_pull`),
    pass_rate float64, disagreement float64 (|even - odd| / their standard error; nan without
    probes), p_value float64 (nan without probes), why str (the evidence beyond the 90th percentile, in words), step
    int64 (of the row). RequestError if nothing is live, for unknown evidence, or for a benchmark without a target.
    """
    for name in weights:
        check_known("evidence", name, WEIGHTS)
    view = store.view(pool, at)
    live = eligible_positions(view, None)
    if not len(live):
        raise RequestError(f"collection {pool!r} has no live problem in this view: there is nothing to judge")
    ids = view.ids[live]
    sources = sources_of(view)[live]
    frame = pd.DataFrame(
        {
            "id": ids,
            "source": sources,
            "score": np.nan,
            "own": own_pull(view, live),
            "pass_rate": view.pass_rates[live].astype(np.float64),
            "disagreement": np.nan,
            "p_value": np.nan,
            "step": view.steps[live],
        }
    )
    if benchmark is not None:
        query_D = query_vectors(view, [target(store, benchmark, at)], "cosine")[0]
        frame["score"] = score_rows(view, query_D, "cosine", live)[live].astype(np.float64)
        probed = half_dots(store, pool, benchmark, at).set_index("id").reindex(ids)
        error = probed["standard_error"].to_numpy(float)
        gap = np.abs(probed["even"].to_numpy(float) - probed["odd"].to_numpy(float))
        frame["disagreement"] = np.divide(gap, 2 * error, out=np.full(len(ids), np.nan), where=error > 0)
        frame["p_value"] = probed["p_value"].to_numpy(float)
    pull = frame["score"] * view.norms[live]
    towards = pull.groupby(frame["source"]).transform("sum") > 0
    evidence = {
        "harm": -pull.where(towards),
        "estrangement": -frame["own"],
        "coin": -(frame["pass_rate"] - 0.5).abs(),
        "halves": frame["disagreement"],
        "p_value": frame["p_value"].where(towards),
    }
    groups = _groups(sources)
    percentiles = {name: _percentile(evidence[name].to_numpy(float), groups) for name in weights}
    used = [name for name in weights if weights[name] > 0 and np.isfinite(percentiles[name]).any()]
    if not used:
        raise RequestError("no evidence is left: give a weight to some that the store has")
    table_PE = np.stack([percentiles[name] for name in used], axis=1)
    weight_PE = np.array([weights[name] for name in used]) * np.isfinite(table_PE)
    frame["suspicion"] = np.nansum(table_PE * weight_PE, axis=1) / np.maximum(weight_PE.sum(axis=1), 1e-12)
    highest_PE = table_PE == np.nanmax(np.where(np.isnan(table_PE), -1, table_PE), axis=1, keepdims=True)
    frame["why"] = _why((table_PE > 0.9) | highest_PE, used)
    order = best(frame["suspicion"].to_numpy(), len(frame), lambda some: ids[some])  # ties by id
    frame = frame.iloc[order].reset_index(drop=True)
    frame["rank"] = np.arange(1, len(frame) + 1)
    return frame[COLUMNS]


def beyond(frame: pd.DataFrame, threshold: float = THRESHOLD) -> pd.DataFrame:
    """The rows of a frame of `suspicious` whose rewards look broken.

    Suspicion is made of percentiles, so some problem is always at the top of it. Only a gradient that points against
    the rest of its own source (`own` below 0) says something by itself. On two seeds of the demo's pool, all 490 such
    problems had broken rewards, of 40 % in the pool; after training for 12 steps 15 of 17.
    """
    return frame[(frame["suspicion"] >= threshold) & (frame["own"] < 0)]


def own_pull(view: View, live: np.ndarray) -> np.ndarray:
    """<g_i, m> / |m| divided by the source's median |g|, with m the mean gradient of its other problems: float64 [P].

    nan for the only problem of a source. Two passes over the rows, in bounded memory.
    """
    group_P, sources = pd.factorize(sources_of(view)[live])
    norms_P = view.norms[live].astype(np.float64)
    medians = np.array([np.median(norms_P[group_P == s]) for s in range(len(sources))])
    sums_SD = sums_by_group(view, live, group_P, len(sources))
    many = np.bincount(group_P, minlength=len(sources)) >= _MANY
    own_P = np.full(len(live), np.nan)
    if many.any() and view.stored.dtype == "int8" and view.n_bases == 1:
        own_P = _pulls_of_many(view, live, group_P, sums_SD, many)
    rest = np.flatnonzero(np.isnan(own_P))
    done = 0
    for _, units_ND in view.scan(live[rest]):
        some = rest[done : done + len(units_ND)]
        rows_ND = units_ND * norms_P[some, None]
        others_ND = sums_SD[group_P[some]] - rows_ND
        lengths_N = np.linalg.norm(others_ND, axis=1)
        known_N = lengths_N > 1e-6 * norms_P[some]
        own_P[some[known_N]] = (np.einsum("nd,nd->n", others_ND, rows_ND)[known_N]) / lengths_N[known_N]
        done += len(units_ND)
    return own_P / medians[group_P]


def _pulls_of_many(
    view: View, live: np.ndarray, group_P: np.ndarray, sums_SD: np.ndarray, many: np.ndarray
) -> np.ndarray:
    """<g_i, m> / |m| from the products of stored rows with the sums; nan where the other gradients nearly cancel out.

    m is the sum less g_i, so <g_i, m> = <g_i, sum> - |g_i|^2 and |m|^2 = |sum|^2 - 2 <g_i, sum> + |g_i|^2.
    """
    own_P, lengths_S = np.full(len(live), np.nan), np.linalg.norm(sums_SD, axis=1)
    groups = [group for group in np.flatnonzero(many).tolist() if lengths_S[group] > 0]
    units_SD = (sums_SD[groups] / lengths_S[groups, None]).astype(np.float32)
    members = [np.flatnonzero(group_P == group) for group in groups]
    for group, own, scores_N in zip(
        groups, members, scan_pairs(view, units_SD, [live[own] for own in members]), strict=True
    ):
        norms_N = view.norms[live[own]].astype(np.float64)
        along_N = scores_N * norms_N  # along the sum's direction
        squared_N = lengths_S[group] ** 2 - 2 * lengths_S[group] * along_N + norms_N**2
        clear_N = squared_N > 0.01 * np.maximum(lengths_S[group], norms_N) ** 2
        pulls_N = (lengths_S[group] * along_N - norms_N**2) / np.sqrt(np.where(clear_N, squared_N, 1))
        own_P[own[clear_N]] = pulls_N[clear_N]
    return own_P


def detection(frame: pd.DataFrame, bad: Collection[str], by: str = "suspicion") -> dict[str, float]:
    """Detection quality of a column of the frame of `suspicious` for known bad problems: AUC, precision, base rate.

    `auc`: probability that a bad problem ranks above a good one; ties count half. `precision`: share of bad ones among
    the first n, with n the number of bad ones. `precision_10`: the same among the first tenth. `base`: share of bad
    ones overall. nan if all or none are bad.
    """
    bad_P = frame["id"].astype(str).isin(set(bad)).to_numpy()
    return {"auc": auc(frame[by].to_numpy(float), bad_P), **_precisions(frame[by].to_numpy(float), bad_P)}


def auc(scores_P: np.ndarray, bad_P: np.ndarray) -> float:
    """Area under the ROC curve: probability that a bad one scores above a good one; ties count half (Mann-Whitney)."""
    known = np.isfinite(scores_P)
    scores_P, bad_P = scores_P[known], bad_P[known]
    n_bad, n_good = int(bad_P.sum()), int((~bad_P).sum())
    if not n_bad or not n_good:
        return float("nan")
    return float((rankdata(scores_P)[bad_P].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good))


def _precisions(scores_P: np.ndarray, bad_P: np.ndarray) -> dict[str, float]:
    ranked = bad_P[np.argsort(-np.nan_to_num(scores_P, nan=-np.inf), kind="stable")]
    first = {"precision": int(bad_P.sum()), "precision_10": max(1, len(bad_P) // 10)}
    found = {name: float(ranked[:n].mean()) if n else float("nan") for name, n in first.items()}
    return {**found, "base": float(bad_P.mean()) if len(bad_P) else float("nan")}


def _groups(sources: np.ndarray) -> np.ndarray:
    """Group number of each problem: its source, or -1 for all small sources together."""
    group_P, _ = pd.factorize(sources)
    counts = np.bincount(group_P)
    return np.where(counts[group_P] < LEAST_OF_SOURCE, -1, group_P)


def _percentile(values_P: np.ndarray, group_P: np.ndarray) -> np.ndarray:
    """Percentile of each value among the known ones of its group, 0 to 1; nan where unknown."""
    found = np.full(len(values_P), np.nan)
    for group in np.unique(group_P):
        known = np.isfinite(values_P) & (group_P == group)
        if known.any():
            found[known] = (rankdata(values_P[known]) - 0.5) / known.sum()
    return found


_WORDS = {
    "harm": "pulls least along the benchmark",
    "estrangement": "pulls least along its source",
    "coin": "pays about half the time",
    "halves": "halves of the rollouts disagree",
    "p_value": "rewards unrelated to the benchmark",
}


def _why(high_PE: np.ndarray, names: list[str]) -> np.ndarray:
    """Words for the kinds of evidence that are high, object array of str [P]; few combinations are different."""
    kinds, kind_P = np.unique(high_PE @ (1 << np.arange(len(names))), return_inverse=True)
    words = ["; ".join(_WORDS[name] for bit, name in enumerate(names) if kind >> bit & 1) for kind in kinds.tolist()]
    return np.array(words, object)[kind_P]
