"""Sections on the store's content and its history over the steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from gradstore import State
from gradstore.analysis import alignment, figures
from gradstore.analysis.report.findings import Findings
from gradstore.analysis.report.pieces import Figure, Section, Series, Table, columns_of

STATE_WORDS = {"live": "has a gradient", "no_signal": "no signal", "failed": "failed", "unmeasured": "not measured"}
"""Problem state -> its name on the page."""


def holdings(found: Findings) -> Section:
    """Section on the collections and the settings of the sketches."""
    rows = []
    for name, about in found.about["collections"].items():
        steps = about["steps"]
        role = "pool" if name == found.pool else "benchmark" if name in found.benchmarks else ""
        rows.append(
            [
                name,
                role,
                about["problems"],
                sum(about["states"].values()),
                about["states"]["live"],
                about["states"]["no_signal"],
                about["states"]["failed"],
                about["rows"],
                f"{min(steps)} to {max(steps)}" if len(steps) > 1 else ", ".join(map(str, steps)),
                len(found.store.rounds(name)),
                about["bytes"],
            ]
        )
    columns = columns_of(
        "Collection:id | Used as | Problems:integer | Measured:integer | With a gradient:integer | "
        "No signal:integer | Failed:integer | Rows:integer | Steps | Rounds:integer | On disk:bytes"
    )
    collections = Table(
        "collections",
        "Collections",
        columns,
        rows,
        says="States are those of each problem's newest row. A row is one sketch of one problem at one step.",
    )
    made = Table("settings", "How the sketches were made", columns_of("Setting | Value"), _settings(found))
    return Section("holdings", "What the store holds", blocks=[collections, made], folded=True)


def timeline(found: Findings) -> Section:
    """Section on states, alignment and pass rates over steps."""
    blocks: list[Figure | Table] = []
    if found.benchmarks:
        frame = alignment.states(found.alignments[found.main])
        steps = [str(step) for step in found.steps]
        series = [
            Series(words, steps, [_share(frame, step, state) for step in found.steps])
            for state, words in STATE_WORDS.items()
            if frame.loc[frame["state"] == state, "n"].sum()
        ]
        blocks.append(
            Figure(
                "states",
                f"State of the problems of {found.pool}",
                "Share of the pool in each state, seen as of each step. A problem has no signal when its gradient is "
                "zero, mostly because all its rollouts were rewarded alike; it is not ranked.",
                "stacked bars",
                series,
                "Step",
                "Share of problems",
                y_kind="percent",
                y_range=(0, 1),
                categories=True,
                named="state",
            )
        )
        blocks.append(_alignment_figure(found))
    blocks.append(_pass_rates(found))
    lead = "Steps count updates of the policy; step 0 is the model before training."
    if len(found.steps) < 2:
        lead += " The store has one step so far: lines appear when later ones are collected."
    return Section("timeline", "Timeline", lead, blocks)


def _share(frame: pd.DataFrame, step: int, state: str) -> float:
    return float(frame.loc[(frame["step"] == step) & (frame["state"] == state), "share"].sum())


def _alignment_figure(found: Findings) -> Figure:
    return replace(
        figures.alignment({name: found.alignments[name] for name in found.benchmarks}),
        title="Alignment of the pool with each benchmark",
        says=f"Median {found.metric} of the problems with a gradient against the benchmark's target of the same step; "
        "the band spans the 5th to the 95th percentile of the problems.",
        y_label=axis_of(found),
    )


def _pass_rates(found: Findings) -> Figure:
    series = []
    for name in (found.pool, *found.benchmarks):
        steps = sorted(found.store.steps(name))
        series.append(Series(name, steps, [_mean_rate(found, name, step) for step in steps]))
    return Figure(
        "pass-rates",
        "Pass rate",
        "Mean share of right rollouts, over the problems measured at or before each step.",
        "lines",
        series,
        "Step",
        "Pass rate",
        y_kind="percent",
        y_range=(0, 1),
        named="collection",
    )


def _mean_rate(found: Findings, name: str, step: int) -> float:
    view = found.store.view(name, step)
    rates = view.pass_rates[(view.states != State.FAILED) & np.isfinite(view.pass_rates)]
    return float(rates.mean()) if len(rates) else float("nan")


def axis_of(found: Findings) -> str:
    """Axis label for scores of the chosen metric."""
    return {
        "cosine": "Cosine with the target",
        "dot": "Inner product with the target",
        "fisher": "Fisher score against the target",
    }[found.metric]


def _settings(found: Findings) -> list[list[Any]]:
    about = found.about
    rows: list[list[Any]] = [["sketch dimensions", f"{about['dim']}, stored as {about['dtype']}"]]
    rows.append(["bytes per row", str(about["bytes_per_row"])])
    for name, value in sorted(about["fingerprint"].items()):
        rows += [[path, text] for path, text in _flat(name, value)]
    return rows


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for key, part in sorted(value.items()) for pair in _flat(f"{name}.{key}", part)]
    if isinstance(value, list):
        return [(name, f"{len(value)} entries" if len(value) > 6 else ", ".join(map(str, value)))]
    return [(name, "–" if value is None else str(value))]
