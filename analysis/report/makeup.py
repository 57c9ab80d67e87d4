"""What the pool is made of: its sources, and groups of problems whose gradients point the same way."""

import numpy as np
import pandas as pd

from analysis import alignment, clusters, composition
from analysis.report.findings import Findings, mean_or_nan
from analysis.report.holdings import axis_of
from analysis.report.pieces import Column, Figure, Section, Series, Table
from gradstore.errors import RequestError

MOST_SOURCES = 20
MOST_LINES = 8
MOST_POINTS = 4000
"""Points of the map: more would only lie on each other."""


def sources(found: Findings) -> Section:
    """Alignment and state by source, over steps; and what the picks were made of."""
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
            )
        )
        blocks.append(_table(found))
    if found.rounds:
        for by, words in (("source", "source"), ("tag", "tag"), ("difficulty", "pass rate")):
            picked = composition.picks_over_time(found.store, found.pool, by)
            if picked["group"].nunique() < 2:
                continue
            blocks.append(_picks(picked, by, words))
    if not blocks:
        return Section("sources", "Sources", missing="No benchmark has a target and no round was recorded.")
    return Section("sources", "Sources", "Which parts of the pool help, and which were taken.", blocks)


def _with_few_sources(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest sources by name, the others together."""
    counts = frame["source"].value_counts()
    if len(counts) <= MOST_SOURCES:
        return frame
    kept = set(counts.index[: MOST_SOURCES - 1])
    return frame.assign(source=[name if name in kept else "other" for name in frame["source"].astype(str)])


def _table(found: Findings) -> Table:
    newest = {name: _with_few_sources(frame) for name, frame in found.newest.items()}
    rows = []
    for name, part in newest[found.main].groupby("source", observed=True):
        scores = [
            mean_or_nan(frame.loc[frame["source"].astype(str) == str(name), "score"]) for frame in newest.values()
        ]
        states = part["state"].astype(str)
        rows.append(
            [
                str(name) or "(none)",
                len(part),
                float((states == "live").mean()),
                float((states == "no_signal").mean()),
                mean_or_nan(part["pass_rate"]),
                *scores,
            ]
        )
    columns = [
        Column("Source"),
        Column("Problems", "integer"),
        Column("With a gradient", "percent"),
        Column("No signal", "percent"),
        Column("Pass rate", "percent"),
        *(Column(f"Mean {found.metric}, {name}", "signed") for name in found.benchmarks),
    ]
    return Table(
        "sources-table", f"Sources at step {found.steps[-1]}", columns, sorted(rows, key=lambda row: -float(row[1]))
    )


def _picks(picked: pd.DataFrame, by: str, words: str) -> Figure:
    totals = picked.groupby("group")["n"].sum().sort_values(ascending=False)
    kept = [str(name) for name in totals.index[:9]]
    x = [str(step) for step in sorted(set(picked["step"]))]
    series = []
    for name in sorted(kept) if by == "difficulty" else kept:
        share = picked[picked["group"] == name].groupby("step")["share"].mean()
        series.append(Series("no gradient now" if name == "unknown" else name or "(none)", x, share.tolist()))
    rest = picked[~picked["group"].isin(kept)]
    if len(rest):
        series.append(Series("other", x, rest.groupby("step")["share"].sum().tolist()))
    note = " A problem counts under each of its tags." if by == "tag" else ""
    first = picked.loc[picked["n"].idxmax()]
    says = (
        f"Share of each round's picks.{note} At step {first['step']}, {100 * first['share']:.0f} % of the picks were "
        f"{first['group'] or '(none)'}, which is {100 * first['candidate_share']:.0f} % of the candidates."
    )
    return Figure(
        f"picks-by-{by}",
        f"What was picked, by {words}",
        says,
        "stacked bars",
        series,
        "Step",
        "Share of the picks",
        y_kind="percent",
        y_range=(0, 1) if by != "tag" else None,
        categories=True,
    )


def clustered(found: Findings) -> Section:
    """Clusters of gradients: a map and what each is made of."""
    try:
        frame = clusters.clusters(found.store, found.pool, seed=found.seed)
    except RequestError as error:
        return Section("clusters", "Clusters", missing=f"No clusters: {error}")
    sizes = clusters.sizes(frame)
    texts = {record["id"]: record["prompt"] for record in found.problems(_named(sizes))}
    rows = []
    for line in sizes.to_dict("records"):
        typical = [" ".join(texts[name].split())[:110] for name in line["representatives"][:3]]
        rows.append(
            [
                _name(line["cluster"]),
                line["n"],
                line["similarity"],
                line["pass_rate"],
                f"{line['source'] or '(none)'} ({100 * line['source_share']:.0f} %)",
                " · ".join(typical),
            ]
        )
    columns = [
        Column("Cluster", "id"),
        Column("Problems", "integer"),
        Column("Cosine with centre", "number"),
        Column("Pass rate", "percent"),
        Column("Mostly"),
        Column("Typical problems"),
    ]
    blocks: list[Figure | Table] = [
        _map(found, frame),
        Table("clusters-table", "What each cluster is", columns, rows),
    ]
    if found.rounds:
        picked = composition.picks_over_time(found.store, found.pool, "cluster", frame)
        blocks.append(_picks(picked, "cluster", "cluster"))
    lead = "Problems whose gradients point the same way teach the policy the same thing (k-means on unit sketches)."
    return Section("clusters", "Clusters", lead, blocks)


def _map(found: Findings, frame: pd.DataFrame) -> Figure:
    shown = frame
    if len(frame) > MOST_POINTS:
        keep = np.random.default_rng(found.seed).choice(len(frame), MOST_POINTS, replace=False)
        shown = frame.iloc[np.sort(keep)]
    texts = {record["id"]: record["prompt"] for record in found.problems(shown["id"].tolist())}
    series = []
    for number, members in shown.groupby("cluster"):
        hover = [
            f"{line.id} · {line.source} · pass rate {100 * line.pass_rate:.0f} % · "
            f"{' '.join(texts[line.id].split())[:90]}"
            for line in members.itertuples()
        ]
        x, y = (np.round(members[axis], 4).tolist() for axis in ("x", "y"))
        series.append(Series(_name(number), x, y, hover=hover))
    drawn = "" if len(shown) == len(frame) else f" {len(shown)} of {len(frame)} problems are drawn."
    return Figure(
        "map",
        "Map of the gradients",
        "Each point is a problem; near points have gradients that point the same way, as far as two principal "
        f"components can show. Point at one to read it.{drawn}",
        "points",
        series,
        "First principal component",
        "Second principal component",
        with_table=False,
    )


def _named(sizes: pd.DataFrame) -> list[str]:
    return [name for names in sizes["representatives"] for name in names]


def _name(cluster: int) -> str:
    return "no cluster" if cluster == clusters.NOISE else f"cluster {cluster}"
