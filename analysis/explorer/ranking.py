"""The first view: the pool ranked against a benchmark, filtered and searched."""

from typing import Any

import numpy as np
from dash import Dash, Input, Output, State, ctx, dcc, html

from gradstore.analysis.explorer.catalogue import Catalogue, Filter
from gradstore.analysis.explorer.elements import (
    PERSISTENT,
    choice,
    figure,
    labelled,
    note,
    pages,
    problem_link,
    step_choice,
    step_of,
    table,
)
from gradstore.analysis.report.holdings import STATE_WORDS
from gradstore.analysis.report.pieces import Figure, Series, columns_of, written
from gradstore.engine.searching.query import METRICS
from gradstore.errors import GradstoreError
from gradstore.wording import first_words

PAGE = 20
_CONTROLS = ("benchmark", "step", "metric", "order", "text", "sources", "tags", "rates", "states")


def layout(catalogue: Catalogue) -> Any:
    """Controls above, results below."""
    if not catalogue.benchmarks:
        return note("No benchmark in this store has a target, so nothing can be ranked: collect rollouts of one.")
    orders = {"largest": "most aligned first", "smallest": "least aligned first"}
    search = dcc.Input(id="text", type="search", debounce=0.4, value="", **PERSISTENT)
    rates = dcc.RangeSlider(0, 1, 0.05, id="rates", value=[0, 1], marks={0: "0", 0.5: "0.5", 1: "1"}, **PERSISTENT)
    controls = [
        labelled("Benchmark", choice("benchmark", catalogue.benchmarks, catalogue.benchmarks[0])),
        labelled("As of", step_choice("step", catalogue.steps)),
        labelled("Metric", choice("metric", METRICS, "cosine")),
        labelled("Order", choice("order", orders, "largest")),
        labelled("Search in texts and ids", search, wide=True),
        labelled("Sources", choice("sources", catalogue.sources(), [], multi=True), wide=True),
        labelled("Tags", choice("tags", catalogue.tags(), [], multi=True), wide=True),
        labelled("States", choice("states", STATE_WORDS, [], multi=True), wide=True),
        labelled("Pass rate", rates, wide=True),
    ]
    tools = [
        html.Button("Previous", id="ranking-back", type="button"),
        html.Button("Next", id="ranking-on", type="button"),
        html.Span(id="ranking-where", className="where", **{"aria-live": "polite"}),
    ]
    return html.Div(
        [
            html.H2("Rank the pool"),
            html.Div(controls, className="controls", role="search"),
            html.Div(id="ranking-figure"),
            html.Div(tools, className="tools"),
            html.Div(id="ranking-table"),
            dcc.Store(id="ranking-page", data=0),
        ]
    )


def register(app: Dash, catalogue: Catalogue) -> None:
    """Register the view's callback."""

    @app.callback(
        Output("ranking-figure", "children"),
        Output("ranking-table", "children"),
        Output("ranking-where", "children"),
        Output("ranking-back", "disabled"),
        Output("ranking-on", "disabled"),
        Output("ranking-page", "data"),
        *(Input(name, "value") for name in _CONTROLS),
        Input("ranking-back", "n_clicks"),
        Input("ranking-on", "n_clicks"),
        Input("theme", "data"),
        State("ranking-page", "data"),
    )
    def rank(
        benchmark: str,
        step: str,
        metric: str,
        order: str,
        text: str | None,
        sources: list[str] | None,
        tags: list[str] | None,
        rates: list[float],
        states: list[str] | None,
        back: int | None,
        on: int | None,
        theme: str,
        page: int,
    ) -> tuple:
        page = page - 1 if ctx.triggered_id == "ranking-back" else page + 1 if ctx.triggered_id == "ranking-on" else 0
        wanted = Filter(
            tuple(sources or ()), tuple(tags or ()), (float(rates[0]), float(rates[1])), tuple(states or ()), text or ""
        )
        try:
            frame, found = catalogue.ranking(benchmark, step_of(step), metric, wanted, largest=order == "largest")
        except GradstoreError as error:
            return note(str(error)), "", "", True, True, 0
        page, line, first, last = pages(len(found), page, PAGE)
        shown = frame.iloc[found[page * PAGE : (page + 1) * PAGE]]
        texts = catalogue.texts(shown["id"].tolist())
        rows = [
            [
                page * PAGE + place + 1 if np.isfinite(score) else None,
                problem_link(problem_id),
                source,
                score,
                STATE_WORDS[state],
                rate,
                age,
                first_words(texts[problem_id], 200),
            ]
            for place, (problem_id, source, score, state, rate, age) in enumerate(
                shown[["id", "source", "score", "state", "pass_rate", "age"]].itertuples(index=False, name=None)
            )
        ]
        columns = columns_of(
            "Rank:integer | Problem:id | Source | Score:signed | State | Pass rate:percent | Age (steps):integer | Text"
        )
        title = f"Problems of {catalogue.pool} against {benchmark}, {metric}"
        scores = frame["score"].to_numpy(float)[found]
        scores = scores[~np.isnan(scores)]
        line = f"{line} problems, {written(len(scores), 'integer')} of them ranked"
        return _histogram(scores, benchmark, metric, theme), table(title, columns, rows), line, first, last, page


def _histogram(scores: np.ndarray, benchmark: str, metric: str, theme: str) -> Any:
    if len(scores) < 2:
        return note("Fewer than two of these problems have a gradient.")
    counts, edges = np.histogram(scores, bins=min(40, max(8, round(np.sqrt(len(scores))))))
    middles = np.round((edges[1:] + edges[:-1]) / 2, 6).tolist()
    hover = [
        f"{count} problems from {written(low, 'signed')} to {written(high, 'signed')}"
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    says = (
        f"How the scores of the ranked problems spread: median {written(float(np.median(scores)), 'signed')}, "
        f"{100 * float((scores > 0).mean()):.0f} % above 0."
    )
    series, against = [Series("problems", middles, counts.tolist(), hover=hover)], f"{metric} against {benchmark}"
    return figure(Figure("scores", "Scores", says, "bars", series, against, "Problems", y_kind="integer"), theme)
