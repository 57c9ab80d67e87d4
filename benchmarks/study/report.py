"""Write the study's page from its rows: tables, figures and findings."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.study.bed import Bed, StudySettings
from benchmarks.study.figures import draw_curves, draw_picks
from benchmarks.study.findings import findings, signed
from benchmarks.study.intervention import section
from benchmarks.study.methods import ROUNDS, method
from benchmarks.study.results import read_results
from benchmarks.study.statistics import (
    Estimate,
    accuracy_within,
    estimate,
    final_accuracy,
    of,
    overhead,
    selection_rollouts,
    selection_seconds,
    share,
    steady,
)
from gradstore.errors import RequestError

NOTES = "notes.md"
"""File next to the figures with what was learnt, written by hand; the page begins with it."""
INTERVENTIONS = "interventions.jsonl"
"""File next to the figures with the measurements of intervention.py, if there are any."""


def write_page(bed: Bed, rows: Sequence[dict[str, Any]], page: Path, settings: StudySettings) -> None:
    """Write the page, and its figures in the folder of the same name: the parts for which there are rows.

    RequestError if there are neither runs nor measurements of interventions."""
    folder = page.with_suffix("")
    interventions = read_results(folder / INTERVENTIONS)
    if not (rows or interventions):
        raise RequestError("no results of these settings: run the study first (python -m benchmarks.study run)")
    folder.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    arms = [arm for arm in bed.arms if any(row["arm"] == arm for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    notes = folder / NOTES
    parts = [
        bed.head.format(
            runs=len(rows),
            seeds=("seeds " if len(seeds) > 1 else "seed ") + ", ".join(map(str, seeds)) if seeds else "no seed yet",
            folder=folder.name,
        ),
        *([notes.read_text(encoding="utf-8")] if notes.exists() else []),
    ]
    if rows:
        draw_curves(bed, rows, arms, folder / "accuracy.svg")
        draw_picks(bed, rows, arms, methods, folder / "picks.svg")
        wanted = "\n".join(f"- {line}" for line in findings(rows, arms))
        parts += [
            f"## Accuracy\n\n![Accuracy by training step]({folder.name}/accuracy.svg)\n",
            f"![Bad picks]({folder.name}/picks.svg)\n",
            *([f"## What was wanted, what came\n\n{wanted}\n"] if wanted else []),
            _equal_totals(bed, rows, arms, methods),
            "## After all steps\n",
            *(_arm_table(bed, rows, arm, methods) for arm in arms),
            _cost_table(rows, arms, methods),
            *_steady_table(rows, methods),
        ]
    if interventions:
        parts.append(section(interventions))
    parts.append(
        COMPARED.format(
            bed=bed.name,
            settings="\n".join(f"| `{name}` | {value} |" for name, value in asdict(settings).items()),
            methods="\n".join(f"| `{name}` | {method(name, settings.budgeted).title} |" for name in methods),
            arms="\n".join(f"| `{arm}` | {bed.arms[arm].title} |" for arm in arms),
        )
    )
    page.write_text("\n".join(parts), encoding="utf-8")


def differing(bed: Bed, rows: Sequence[dict[str, Any]], page: Path, settings: StudySettings) -> list[str]:
    """Names of the page and figures that differ from what the rows give now, by the bytes."""
    folder = page.with_suffix("")
    with TemporaryDirectory() as temporary:
        anew = Path(temporary) / page.name
        anew.with_suffix("").mkdir()
        for name in (NOTES, INTERVENTIONS):
            if (folder / name).exists():
                shutil.copy(folder / name, anew.with_suffix("") / name)
        write_page(bed, rows, anew, settings)
        made = [anew, *sorted(anew.with_suffix("").glob("*.svg"))]
        theirs = [page, *(folder / path.name for path in made[1:])]
        return [
            str(own) for own, new in zip(theirs, made, strict=True)
            if not own.exists() or own.read_bytes() != new.read_bytes()
        ]  # fmt: skip


def _equal_totals(bed: Bed, rows: Sequence[dict[str, Any]], arms: Sequence[str], methods: Sequence[str]) -> str:
    """Accuracy against the rollouts spent; once more on the seeds that all methods have, where they differ in seeds."""
    parts = [
        "## Accuracy against rollouts spent\n",
        "Rollouts of selection and of training together. A cell is the accuracy after the last round that ends within "
        "that many; it is empty where the runs of a method end a round or more before. `METHOD*N` has N rounds.\n",
    ]
    for arm in arms:
        seeds_of = [{row["seed"] for row in of(rows, arm, name)} for name in methods if of(rows, arm, name)]
        shared = set.intersection(*seeds_of)
        parts.append(f"### {arm} by rollouts\n\n" + _totals_table(bed, rows, arm, methods))
        if shared and shared != set.union(*seeds_of):
            those = [row for row in rows if row["seed"] in shared]
            named = ("seed " if len(shared) == 1 else "seeds ") + ", ".join(map(str, sorted(shared)))
            parts.append(f"On {named} alone, which all methods have:\n\n" + _totals_table(bed, those, arm, methods))
    for name in ("random", "gradalign"):
        parts += _differences(rows, arms, methods, name, bed.compared_at)
    return "\n".join(parts)


def _totals_table(bed: Bed, rows: Sequence[dict[str, Any]], arm: str, methods: Sequence[str]) -> str:
    lines = [
        "| method | " + " | ".join(f"{total:,}" for total in bed.totals) + " | seeds |",
        "| --- |" + " --- |" * len(bed.totals) + " ---: |",
    ]
    for name in methods:
        own = of(rows, arm, name)
        if own:
            found = [[accuracy_within(row, total) for row in own] for total in bed.totals]
            cells = [
                "" if any(value is None for value in values) else _interval(estimate(values), 3)  # type: ignore[arg-type]
                for values in found
            ]
            lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {len(own)} |")
    return "\n".join(lines) + "\n"


def _differences(
    rows: Sequence[dict[str, Any]], arms: Sequence[str], methods: Sequence[str], name: str, total: int
) -> list[str]:
    """Accuracy at a total of rollouts, less that of the longest runs of a method, seed by seed; a row per method."""
    theirs = max(
        (own for own in methods if own.partition(ROUNDS)[0] == name), key=lambda own: ROUNDS in own, default=None
    )
    if theirs is None:
        return []
    lines = [
        f"### Less `{theirs}`, at {total:,} rollouts, seed by seed\n",
        "| method | " + " | ".join(arms) + " |",
        "| --- |" + " --- |" * len(arms),
    ]
    for own in methods:
        found = [difference_at(of(rows, arm, own), of(rows, arm, theirs), total) for arm in arms if own != theirs]
        if any(found):
            lines.append(f"| `{own}` | " + " | ".join(found) + " |")
    return ["\n".join(lines) + "\n"]


def difference_at(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], total: int) -> str:
    """Mean difference of accuracy within a total of rollouts, seed by seed, as text; "" without a common seed."""
    of_seed = {row["seed"]: accuracy_within(row, total) for row in theirs}
    pairs = [(accuracy_within(row, total), of_seed.get(row["seed"])) for row in ours]
    gains = [own - other for own, other in pairs if own is not None and other is not None]
    return f"{signed(estimate(gains))}, n = {len(gains)}" if gains else ""


def _arm_table(bed: Bed, rows: Sequence[dict[str, Any]], arm: str, methods: Sequence[str]) -> str:
    lines = [
        f"### {arm}: {bed.arms[arm].title}\n",
        "| method | accuracy after its last step | bad picks | useful picks | selection rollouts | seeds |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    start = np.mean([row["accuracy"][0] for row in rows if row["arm"] == arm])
    for name in methods:
        own = of(rows, arm, name)
        if own:
            n_rollouts = np.mean([selection_rollouts(row) for row in own])
            cells = (
                _interval(final_accuracy(own), 3),
                _interval(share(own, "bad"), 2),
                _interval(share(own, "useful"), 2),
                f"{n_rollouts:,.0f}",
                str(len(own)),
            )
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nBefore training: {start:.3f}.\n"


def _cost_table(rows: Sequence[dict[str, Any]], arms: Sequence[str], methods: Sequence[str]) -> str:
    """Table of seconds and rollouts over all arms; medians, because other load on the machine slows some runs."""
    reference = [selection_rollouts(row) for row in rows if row["method"].partition(ROUNDS)[0] == "gradalign"]
    lines = [
        "## What selection costs\n",
        "Medians over all runs, on one thread. Overhead: selection without rollouts, as a share of the training of the "
        "same rounds (rollouts and updates).\n",
        "| method | selection rollouts | of `gradalign`'s | selection s | without rollouts s | training s | overhead |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in methods:
        own = [row for row in rows if row["method"] == name]
        n_rollouts = float(np.median([selection_rollouts(row) for row in own]))
        relative = f"{100 * n_rollouts / np.median(reference):.1f} %" if reference else "-"
        cells = (
            f"{n_rollouts:,.0f}",
            relative,
            f"{np.median([sum(row['selection_seconds']) for row in own]):.1f}",
            f"{np.median([selection_seconds(row) for row in own]):.1f}",
            f"{np.median([row['training_seconds'] for row in own]):.1f}",
            f"{100 * np.median([overhead(row) for row in own]):.0f} %",
        )
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _steady_table(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[str]:
    """Table of what a round after the first costs, where rows say how long training's rollouts took; else nothing."""
    told = [row for row in rows if "training_rollout_seconds" in row and len(row["selection_rollouts"]) > 1]
    if not told:
        return []
    lines = [
        "### Rounds after the first\n",
        "Selection, of the training of its round; medians over runs. `fit`: seconds of the first round's fit.\n",
        "| method | seconds, of the updates', all rollouts left out | seconds with rollouts | rollouts | fit s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in methods:
        own = [row for row in told if row["method"] == name]
        if any(selection_rollouts(row) for row in own):
            each = [steady(row) for row in own]
            shares = [
                np.median([getattr(one, what) for one in each])
                for what in ("seconds", "seconds_with_rollouts", "rollouts")
            ]
            fits = [row["stage_seconds"][0]["fit"] for row in own if "fit" in (row["stage_seconds"] or [{}])[0]]
            cells = [f"{100 * value:.0f} %" for value in shares] + [f"{np.median(fits):.0f}" if fits else "-"]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return ["\n".join(lines) + "\n"]


def _interval(value: Estimate, digits: int) -> str:
    if np.isnan(value.half):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


COMPARED = """## What was compared

| arm | pool |
| --- | --- |
{arms}

| method | picks |
| --- | --- |
{methods}

`benchmarks/study/{bed}.py` says what is in the pools. A pick is useful if the oracle could have picked it, and bad if
its reward is wrong or random, it can teach nothing, or, in the last two arms, it is of another source.

| setting | |
| --- | --- |
{settings}
"""
