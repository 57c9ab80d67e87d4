"""Sections on possible problems: layers, conflicting benchmarks, turned problems, suspicious rewards."""

from dataclasses import replace

import pandas as pd

from gradstore.analysis import conflict, figures, layers, suspicion, turning
from gradstore.analysis.report.findings import Findings
from gradstore.analysis.report.pieces import Figure, Section, Table, columns_of, written
from gradstore.errors import RequestError
from gradstore.wording import first_words, short_layer

MOST_LAYERS = 40
_LISTED = 100


def through_layers(found: Findings) -> Section:
    """Section on each layer's share of the score, over steps."""
    if not found.benchmarks:
        return Section("layers", "Layers", missing="No benchmark has a target, so no layer has a share.")
    if len(found.store.layers) < 2:
        return Section("layers", "Layers", missing="The store does not say which dimensions belong to which layer.")
    frame = layers.layers(found.store, found.pool, found.main, found.metric, found.steps, most=1000, seed=found.seed)
    if frame.empty:
        return Section("layers", "Layers", missing="No problem has a gradient and a target at the same step.")
    newest = frame[frame["step"] == frame["step"].max()]
    most = frame["layer"].isin(set(newest.nlargest(MOST_LAYERS, "share")["layer"]))
    top = newest.nlargest(1, "share").iloc[0]
    left = f" The {MOST_LAYERS} largest of {len(newest)} layers." if len(newest) > MOST_LAYERS else ""
    described = figures.layers(frame[most].assign(layer=frame["layer"].map(short_layer)))
    figure = replace(
        described,
        key="layer-shares",
        title=f"Through which layers the pool aligns with {found.main}",
        says=f"{described.says} At step {newest['step'].iloc[0]}, {short_layer(top['layer'])} carries most, "
        f"{100 * top['share']:.0f} %.{left}",
    )
    rows = [
        [short_layer(line["layer"]), line["dims"], line["share"], line["term"], line["energy"]]
        for line in newest.sort_values("share", ascending=False).to_dict("records")
    ]
    columns = columns_of(
        "Layer:id | Sketch dimensions:integer | Share of the score:percent | Mean term:signed | "
        "Share of the gradient:percent"
    )
    says = (
        "Mean term: what the layer adds to the mean score, with its sign. Share of the gradient: of its squared length."
    )
    table = Table("layers-table", f"Layers at step {newest['step'].iloc[0]}", columns, rows, says=says)
    return Section("layers", "Layers", blocks=[figure, table])


def disagreeing(found: Findings) -> Section:
    """Section on cosines between the benchmarks' targets, and problems that help one and harm another."""
    if len(found.benchmarks) < 2:
        return Section("conflicts", "Conflicts", missing="Conflicts need two benchmarks; the store has fewer.")
    frame = conflict.conflict(found.store, found.benchmarks, found.pool, metric=found.metric)
    columns = columns_of(
        "Benchmark:id | and:id | Cosine of targets:signed | Rank correlation:signed | "
        "Help both:percent | Help the first only:percent | Help the second only:percent | "
        "Harm both:percent"
    )
    keys = ["a", "b", "cosine", "rank_correlation", "both_help", "a_only", "b_only", "both_harm"]
    rows = frame[keys].to_numpy(object).tolist()
    blocks: list[Figure | Table] = []
    if len(found.benchmarks) > 2:
        blocks.append(figures.conflict(frame))
    says = "Over the problems with a gradient. Rank correlation: Spearman of the two rankings of the pool."
    blocks.append(Table("conflicts-table", "Pairs of benchmarks", columns, rows, says=says))
    worst = frame.loc[frame["cosine"].idxmin()]
    contested = conflict.contested(found.store, worst["a"], worst["b"], found.pool, metric=found.metric, k=_LISTED)
    if len(contested):
        blocks.append(_contested(found, contested, worst["a"], worst["b"]))
    lead = "Where what helps one benchmark harms another."
    return Section("conflicts", "Conflicts", lead, blocks)


def _contested(found: Findings, frame: pd.DataFrame, a: str, b: str) -> Table:
    columns = columns_of(f"Problem:id | Source | Score, {a}:signed | Score, {b}:signed | Text")
    rows = _with_texts(found, frame, ["source", "score_helped", "score_harmed"])
    return Table("contested", f"Help {a} and harm {b}", columns, rows)


def turned(found: Findings) -> Section:
    """Section on problems whose alignment changed sign during training."""
    missing = "Nothing can have turned: the pool was measured at one step."
    if not found.benchmarks or len(found.store.steps(found.pool)) < 2:
        return Section("turned", "Turned problems", missing=missing)
    try:
        frame = turning.turning(found.store, found.pool, found.main, found.metric)
    except RequestError as error:
        return Section("turned", "Turned problems", missing=f"Nothing to show: {error}")
    if frame.empty:
        return Section("turned", "Turned problems", missing="No problem changed the sign of its alignment.")
    split, sure = int(frame["split"].iloc[0]), int(frame["significant"].sum())
    columns = columns_of(
        f"Problem:id | Source | Turned | Mean before step {split}:signed | "
        f"Mean from step {split}:signed | q-value:number | Text"
    )
    listed = frame[frame["significant"]].head(_LISTED)
    if listed.empty:
        best = written(float(frame["q_value"].min()), "number", 2)
        missing = (
            f"{len(frame)} problems changed the sign of their alignment with {found.main}, none beyond the noise of "
            f"their rollouts (the smallest q-value is {best}; listed from 0.1 down)."
        )
        return Section("turned", "Turned problems", missing=missing)
    rows = _with_texts(found, listed, ["source", "turned", "before", "after", "q_value"])
    says = (
        f"{sure} of the {len(frame)} that changed sign did so beyond the noise of their rollouts (q-value of at most "
        "0.1: about one in ten of those listed is there by chance)."
    )
    table = Table("turned-table", f"Changed sign against {found.main}", columns, rows, says=says)
    lead = "Problems that helped the benchmark early in training and harm it later, or the other way. The surest first."
    return Section("turned", "Turned problems", lead, [table])


def suspects(found: Findings) -> Section:
    """Section on problems whose rewards look broken."""
    try:
        everything = found.suspicious
    except RequestError as error:
        return Section("suspects", "Suspicious rewards", missing=f"Nothing to judge: {error}")
    frame = suspicion.beyond(everything)
    threshold = f"a suspicion of at least {suspicion.THRESHOLD} and a gradient against the rest of its source"
    if frame.empty:
        missing = f"None of {len(everything)} problems is suspicious enough to be listed: that takes {threshold}."
        return Section("suspects", "Suspicious rewards", missing=missing)
    columns = columns_of(
        "Rank:integer | Problem:id | Source | Suspicion:number | Cosine, benchmark:signed | "
        "Pull, own source:signed | Pass rate:percent | Why | Text"
    )
    keys = ["source", "suspicion", "score", "own", "pass_rate", "why"]
    rows = _with_texts(found, frame.head(_LISTED), keys)
    ranked = [[rank, *row] for rank, row in enumerate(rows, 1)]
    says = (
        "Suspicion, from 0 to 1, is the mean percentile of the evidence: pulling against the benchmark and against "
        "the own source, a pass rate near one half, and, where probes are stored, halves of the rollouts that "
        f"disagree. Listed is what has {threshold}: {len(frame)} of {len(everything)}"
        + ("." if len(frame) <= _LISTED else f", of which the first {_LISTED} are shown.")
    )
    table = Table("suspects-table", "Most suspicious", columns, ranked, says=says)
    lead = "Problems whose ground truth may be wrong or whose reward may be noise: read these before training on them."
    return Section("suspects", "Suspicious rewards", lead, [table])


def _with_texts(found: Findings, frame: pd.DataFrame, keys: list[str]) -> list[list]:
    records = found.problems(frame["id"].astype(str).tolist())
    return [
        [record["id"], *(line[key] for key in keys), first_words(record["prompt"], 160)]
        for record, line in zip(records, frame.to_dict("records"), strict=True)
    ]
