"""Sections on the pool's composition: its sources, and clusters of problems with similar gradients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from gradstore.analysis import alignment, clusters, composition, figures
from gradstore.analysis.report.findings import Findings, mean_and_error, mean_or_nan
from gradstore.analysis.report.holdings import axis_of
from gradstore.analysis.report.pieces import Figure, Section, Series, Table, columns_of
from gradstore.errors import RequestError
from gradstore.wording import first_words

MOST_SOURCES = 20
MOST_LINES = 8
MOST_POINTS = 4000
"""Maximum points of the map; more would only overlap."""


def sources(found: Findings) -> Section:
    """Section on alignment and state by source, over steps, and on the composition of the picks."""
    blocks: list[Figure | Table] = []
    if found.benchmarks:
        frame = _with_few_sources(found.alignments[found.main])
        by_step = alignment.summary(frame, "source")
        last = by_step[by_step["step"] == by_step["step"].max()].set_index("source")["median"].abs()
        shown = set(last.nlargest(MOST_LINES).index)
        left = f" The {MOST_LINES} of {len(last)} furthest from 0 at the newest step." if len(last) > MOST_LINES else ""
        series = []
        for name, rows in by_step[by_step["source"].isin(shown)].groupby("source", observed=True):
            series.append(Series(str(name) or "(none)", rows["step"].tolist(), rows["median"].tolist()))
        blocks.append(
            Figure(
                "sources-over-steps",
                f"Alignment with {found.main} by source",
                f"Median {found.metric} of each source's problems with a gradient.{left}",
                "lines",
                series,
                "Step",
                axis_of(found),
                y_kind="signed",
                named="source",
            )
        )
        blocks.append(_table(found))
    if found.rounds:
        for by in ("source", "tag", "difficulty"):
            picked = composition.picks_over_time(found.store, found.pool, by)
            if picked["group"].nunique() > 1:
                blocks.append(figures.picks_over_time(picked, by=by))
    if not blocks:
        return Section("sources", "Sources", missing="No benchmark has a target and no round was recorded.")
    return Section("sources", "Sources", "Which parts of the pool help, and which were taken.", blocks)


def _with_few_sources(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the largest sources; merge the others into "other"."""
    counts = frame["source"].value_counts()
    if len(counts) <= MOST_SOURCES:
        return frame
    kept = set(counts.index[: MOST_SOURCES - 1])
    return frame.assign(source=[name if name in kept else "other" for name in frame["source"].astype(str)])


def _table(found: Findings) -> Table:
    newest = {name: _with_few_sources(frame) for name, frame in found.newest.items()}
    rows: list[list[Any]] = []
    for name, part in newest[found.main].groupby("source", observed=True):
        means = [mean_and_error(frame.loc[frame["source"] == name, "score"]) for frame in newest.values()]
        scores = [mean for mean, _ in means]
        states = part["state"].astype(str)
        rows.append(
            [
                str(name) or "(none)",
                len(part),
                float((states == "live").mean()),
                float((states == "no_signal").mean()),
                mean_or_nan(part["pass_rate"]),
                *scores,
                *(error for _, error in means),
            ]
        )
    headings = " | ".join(f"Mean {found.metric}, {name}:signed" for name in found.benchmarks)
    columns = columns_of(
        f"Source | Problems:integer | With a gradient:percent | No signal:percent | Pass rate:percent | {headings}"
    )
    rows.sort(key=lambda row: -_or_zero(row[5]))  # what helps the main benchmark most comes first
    n = len(found.benchmarks)
    errors = {column.name: [row[5 + n + j] for row in rows] for j, column in enumerate(columns[5:])}
    says = "Grey: a mean within two standard errors of 0, over the source's problems with a gradient."
    cells = [row[: 5 + n] for row in rows]
    return Table("sources-table", f"Sources at step {found.steps[-1]}", columns, cells, says=says, errors=errors)


def _or_zero(value: float) -> float:
    return value if value == value else 0.0


def clustered(found: Findings) -> Section:
    """Section on clusters of gradients: a map, and the composition of each cluster."""
    try:
        frame = clusters.clusters(found.store, found.pool, seed=found.seed)
    except RequestError as error:
        return Section("clusters", "Clusters", missing=f"No clusters: {error}")
    sizes = clusters.sizes(frame)
    texts = found.prompts(_named(sizes))
    rows = []
    for line in sizes.to_dict("records"):
        typical = [first_words(texts[name], 110) for name in line["representatives"][:3]]
        rows.append(
            [
                figures.cluster_name(line["cluster"]),
                line["n"],
                line["similarity"],
                line["pass_rate"],
                f"{line['source'] or '(none)'} ({100 * line['source_share']:.0f} %)",
                " · ".join(typical),
            ]
        )
    columns = columns_of(
        "Cluster:id | Problems:integer | Cosine with centre:number | Pass rate:percent | Mostly | Typical problems"
    )
    blocks: list[Figure | Table] = [_map(found, frame), Table("clusters-table", "What each cluster is", columns, rows)]
    if found.rounds:
        picked = composition.picks_over_time(found.store, found.pool, "cluster", frame)
        blocks.append(figures.picks_over_time(picked, by="cluster"))
    lead = "Problems whose gradients point the same way teach the policy the same thing (k-means on unit sketches)."
    return Section("clusters", "Clusters", lead, blocks)


def _map(found: Findings, frame: pd.DataFrame) -> Figure:
    shown = frame
    if len(frame) > MOST_POINTS:
        keep = np.random.default_rng(found.seed).choice(len(frame), MOST_POINTS, replace=False)
        shown = frame.iloc[np.sort(keep)]
    texts = found.prompts(shown["id"].tolist())
    described = figures.clusters(shown, texts)
    if len(shown) == len(frame):
        return described
    return replace(described, says=f"{described.says} {len(shown)} of {len(frame)} problems are drawn.")


def _named(sizes: pd.DataFrame) -> list[str]:
    return [name for names in sizes["representatives"] for name in names]
