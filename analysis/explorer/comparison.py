"""Two rankings side by side: two steps, or two benchmarks."""

from typing import Any

import numpy as np
import pandas as pd
from dash import Dash, Input, Output, html

from gradstore.analysis.explorer.catalogue import Catalogue, Comparison
from gradstore.analysis.explorer.elements import (
    NEWEST,
    Asked,
    choice,
    figure,
    keep_in_address,
    labelled,
    note,
    plain_state,
    problem_link,
    step_choice,
    step_of,
    steps_allowed,
    table,
)
from gradstore.analysis.report.colouring import Colours
from gradstore.analysis.report.pieces import Figure, Series, columns_of, written
from gradstore.engine.searching.query import METRICS
from gradstore.errors import GradstoreError
from gradstore.wording import first_words

_LISTED = 20
_MOST_POINTS = 4000


def layout(catalogue: Catalogue, search: str = "") -> Any:
    """Controls for the two rankings above, their comparison below; they start as the address says."""
    if not catalogue.benchmarks:
        return note("No benchmark in this store has a target, so there is nothing to compare.")
    first, steps = catalogue.benchmarks[0], catalogue.steps
    second = catalogue.benchmarks[1] if len(steps) < 2 and len(catalogue.benchmarks) > 1 else first
    start = str(steps[0]) if len(steps) > 1 else NEWEST
    asked, plain, sides = Asked(search), {"compare-metric": "cosine"}, []
    for side, benchmark, step in (("left", first, start), ("right", second, NEWEST)):
        plain |= {f"{side}-benchmark": benchmark, f"{side}-step": step}
        benchmark = asked.one(f"{side}-benchmark", benchmark, catalogue.benchmarks)
        step = asked.one(f"{side}-step", step, steps_allowed(steps))
        sides.append(
            (
                html.Legend(side.capitalize()),
                labelled("Benchmark", choice(f"{side}-benchmark", catalogue.benchmarks, benchmark)),
                labelled("As of", step_choice(f"{side}-step", steps, step)),
            )
        )
    metric = asked.one("compare-metric", "cosine", METRICS)
    both = html.Legend("Both"), labelled("Metric", choice("compare-metric", METRICS, metric))
    controls = html.Div([html.Fieldset(list(parts)) for parts in (*sides, both)], className="controls")
    kept = plain_state("compare", "/compare", plain)
    return html.Div([html.H2("Compare two rankings"), controls, html.Div(id="comparison"), kept])


def register(app: Dash, catalogue: Catalogue, colours: Colours) -> None:
    """Register the view's callbacks."""
    controls = ("left-benchmark", "left-step", "right-benchmark", "right-step", "compare-metric")
    keep_in_address(app, "compare", [(name, "value") for name in controls])

    @app.callback(
        Output("comparison", "children"),
        Input("left-benchmark", "value"),
        Input("left-step", "value"),
        Input("right-benchmark", "value"),
        Input("right-step", "value"),
        Input("compare-metric", "value"),
        Input("theme", "data"),
    )
    def compare(left: str, left_step: str, right: str, right_step: str, metric: str, theme: str) -> Any:
        try:
            found = catalogue.compare((left, step_of(left_step)), (right, step_of(right_step)), metric)
        except GradstoreError as error:
            return note(str(error))
        names = (_name(left, left_step), _name(right, right_step))
        if len(found.frame) < 2:
            return note(f"{names[0]} and {names[1]} have fewer than two ranked problems in common.")
        return _view(catalogue, found, names, metric, theme, colours)


def _name(benchmark: str, step: str) -> str:
    return f"{benchmark}, newest" if step_of(step) is None else f"{benchmark}, step {step}"


def _view(
    catalogue: Catalogue, found: Comparison, names: tuple[str, str], metric: str, theme: str, colours: Colours
) -> list:
    facts = [
        ("Ranked in both", written(len(found.frame), "integer")),
        ("Spearman of the rankings", written(found.spearman, "signed")),
        (f"Jaccard of the best {found.k}", written(found.jaccard, "number")),
        ("Ranked on the left only", written(found.only_left, "integer")),
        ("Ranked on the right only", written(found.only_right, "integer")),
    ]
    tiles = html.Dl([html.Div([html.Dt(name), html.Dd(value)]) for name, value in facts], className="tiles")
    best = [
        html.Div([html.H3(name), _best(found.frame, side)]) for name, side in zip(names, ("left", "right"), strict=True)
    ]
    moved = found.frame.reindex(found.frame["moved"].abs().sort_values(ascending=False, kind="stable").index)
    return [
        tiles,
        _scatter(found.frame, names, metric, theme, colours),
        html.Div(best, className="sides"),
        html.H3("Moved the most"),
        _movers(catalogue, moved.head(_LISTED), names),
    ]


def _scatter(frame: pd.DataFrame, names: tuple[str, str], metric: str, theme: str, colours: Colours) -> Any:
    shown = frame
    if len(frame) > _MOST_POINTS:
        shown = frame.iloc[np.sort(np.random.default_rng(0).choice(len(frame), _MOST_POINTS, replace=False))]
    series = []
    for source, rows in shown.groupby("source"):
        hover = [
            f"{line.id} · {written(line.left, 'signed')} and {written(line.right, 'signed')}"
            for line in rows.itertuples()
        ]
        series.append(Series(str(source) or "(none)", rows["left"].tolist(), rows["right"].tolist(), hover=hover))
    few = series if len(series) <= 9 else [_together(series)]
    drawn = "" if len(shown) == len(frame) else f" {len(shown)} of {len(frame)} are drawn."
    says = f"Each point is a problem that is ranked in both.{drawn}"
    x, y = (f"{metric}: {name}" for name in names)
    named = "source" if few is series else ""
    return figure(Figure("scatter", "Score against score", says, "points", few, x, y, named=named), theme, colours)


def _together(series: list[Series]) -> Series:
    return Series(
        "problems",
        [x for one in series for x in one.x],
        [y for one in series for y in one.y],
        hover=[text for one in series for text in one.hover or ()],
    )


def _best(frame: pd.DataFrame, side: str) -> Any:
    other = "right" if side == "left" else "left"
    best = frame.sort_values(f"{side}_rank").head(_LISTED)
    columns = columns_of("Rank:integer | Problem:id | Score:signed | Rank there:integer")
    rows = [
        [int(line[f"{side}_rank"]), problem_link(line["id"]), line[side], int(line[f"{other}_rank"])]
        for line in best.to_dict("records")
    ]
    return table(f"The best on the {side}, with their rank on the {other}", columns, rows, shown="")


def _movers(catalogue: Catalogue, frame: pd.DataFrame, names: tuple[str, str]) -> Any:
    texts = catalogue.texts(frame["id"].tolist())
    columns = columns_of(
        f"Problem:id | Source | Score, {names[0]}:signed | Score, {names[1]}:signed | Places won:integer | Text"
    )
    rows = [
        [
            problem_link(line.id),
            line.source,
            line.left,
            line.right,
            int(line.moved),
            first_words(texts[line.id], 160),
        ]
        for line in frame.itertuples()
    ]
    return table("Problems whose rank changed most", columns, rows)
