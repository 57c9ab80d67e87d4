"""The first view: the pool ranked against a benchmark, filtered and searched."""

from typing import Any

import numpy as np
import pandas as pd
from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update

from gradstore.analysis.explorer.catalogue import Catalogue, Filter
from gradstore.analysis.explorer.elements import (
    NEWEST,
    Asked,
    choice,
    figure,
    keep_in_address,
    labelled,
    note,
    pages,
    plain_state,
    problem_link,
    step_choice,
    step_of,
    steps_allowed,
    table,
)
from gradstore.analysis.report.holdings import STATE_WORDS
from gradstore.analysis.report.pieces import Figure, Series, columns_of, written
from gradstore.engine.searching.query import METRICS
from gradstore.engine.selecting.export import as_lines, training_records
from gradstore.errors import GradstoreError
from gradstore.wording import first_words

PAGE = 20
MOST_EXPORTED = 100_000
"""Rows of an exported list."""
ORDERS = {
    "largest": "most aligned first", "smallest": "least aligned first", "-pass_rate": "highest pass rate first",
    "pass_rate": "lowest pass rate first", "-age": "oldest rows first", "age": "newest rows first", "id": "by id",
    "-id": "by id, backwards", "source": "by source", "-source": "by source, backwards", "state": "by state",
    "-state": "by state, backwards",
}  # fmt: skip
"""Order -> its name; a minus: the largest first."""
_SORTS = {"Problem": "id", "Source": "source", "Score": "score", "State": "state", "Pass rate": "pass_rate"}
_SORTS |= {"Age (steps)": "age"}
_EXPORTED = ["id", "source", "score", "state", "pass_rate", "norm", "n_rollouts", "age"]
_CONTROLS = ("benchmark", "step", "metric", "order", "text", "sources", "tags", "rates", "states")


def layout(catalogue: Catalogue, search: str = "") -> Any:
    """Controls above, results below; they start as the address says."""
    if not catalogue.benchmarks:
        return note("No benchmark in this store has a target, so nothing can be ranked: collect rollouts of one.")
    asked, first = Asked(search), catalogue.benchmarks[0]
    text = dcc.Input(id="text", type="search", debounce=0.4, value=asked.one("text", ""), list="text-found")
    rates = dcc.RangeSlider(0, 1, 0.05, id="rates", value=_rates(asked), marks={0: "0", 0.5: "0.5", 1: "1"})
    step = asked.one("step", NEWEST, steps_allowed(catalogue.steps))
    controls = [
        labelled(
            "Benchmark",
            choice("benchmark", catalogue.benchmarks, asked.one("benchmark", first, catalogue.benchmarks)),
        ),
        labelled("As of", step_choice("step", catalogue.steps, step)),
        labelled("Metric", choice("metric", METRICS, asked.one("metric", "cosine", METRICS))),
        labelled("Order", choice("order", ORDERS, asked.one("order", "largest", ORDERS))),
        labelled("Search in texts and ids", text, wide=True),
        labelled("Sources", choice("sources", catalogue.sources(), asked.many("sources"), multi=True), wide=True),
        labelled("Tags", choice("tags", catalogue.tags(), asked.many("tags"), multi=True), wide=True),
        labelled("States", choice("states", STATE_WORDS, asked.many("states"), multi=True), wide=True),
        labelled("Pass rate", rates, wide=True),
    ]
    page = asked.one("page", "0")
    plain: dict[str, Any] = {
        "benchmark": first,
        "step": NEWEST,
        "metric": "cosine",
        "order": "largest",
        "text": "",
        "sources": [],
    }
    plain |= {"tags": [], "states": [], "rates": [0, 1], "ranking-page": 0}
    tools = [
        html.Button("Previous", id="ranking-back", type="button"),
        html.Button("Next", id="ranking-on", type="button"),
        html.Span(id="ranking-where", className="where", **{"aria-live": "polite"}),
        html.Button("Export these as CSV", id="ranking-export", type="button"),
        html.Div(
            [
                html.Button("Select these", id="ranking-select", type="button"),
                html.Label(["first ", dcc.Input(id="ranking-n", type="number", min=1, step=1, placeholder="all")]),
            ],
            className="pair",
        ),
    ]
    return html.Div(
        [
            html.H2("Rank the pool"),
            html.Div(controls, className="controls", role="search"),
            html.Div(id="ranking-figure"),
            html.Div(tools, className="tools"),
            html.Div(id="ranking-table"),
            dcc.Store(id="ranking-page", data=int(page) if page.isdecimal() and len(page) < 9 else 0),
            dcc.Download(id="ranking-file"),
            dcc.Download(id="ranking-selected"),
            html.Datalist(id="text-found"),
            plain_state("rank", "/", plain, {"ranking-page": "page"}),
        ]
    )


def _rates(asked: Asked) -> list[float]:
    """The range of pass rates that the address asks for; all if it is not two numbers from 0 to 1."""
    try:
        low, high = map(float, asked.many("rates"))
    except ValueError:
        return [0, 1]
    return [low, high] if 0 <= low <= high <= 1 else [0, 1]


def _in_order(frame: pd.DataFrame, found: np.ndarray, order: str) -> np.ndarray:
    """The positions by a column; ties as they were, unknown values last."""
    if order in ("largest", "smallest") or order not in ORDERS:
        return found
    values = frame[order.lstrip("-")].to_numpy()[found]
    if values.dtype.kind not in "fiu":
        values = pd.factorize(values.astype(str), sort=True)[0]
    return found[np.argsort(-values if order.startswith("-") else values, kind="stable")]


def _filtered(text: str | None, sources: Any, tags: Any, rates: list[float], states: Any) -> Filter:
    sets = [tuple(values or ()) for values in (sources, tags, states)]
    return Filter(sets[0], sets[1], (float(rates[0]), float(rates[1])), sets[2], text or "")


def register(app: Dash, catalogue: Catalogue) -> None:
    """Register the view's callbacks."""
    keep_in_address(app, "rank", [*((name, "value") for name in _CONTROLS), ("ranking-page", "data")])

    @app.callback(
        Output("order", "value"),
        Input({"sort": ALL}, "n_clicks"),
        State("order", "value"),
        prevent_initial_call=True,
    )
    def sort(clicks: list[int | None], order: str) -> Any:
        key = ctx.triggered_id["sort"] if ctx.triggered_id and any(clicks) else None
        if key == "score":
            return "smallest" if order == "largest" else "largest"
        return (
            no_update if f"-{key}" not in ORDERS else key if order == f"-{key}" else f"-{key}" if order == key else key
        )

    @app.callback(
        Output("ranking-file", "data"),
        Input("ranking-export", "n_clicks"),
        *(State(name, "value") for name in _CONTROLS),
        prevent_initial_call=True,
    )
    def export(
        clicks: int | None, benchmark: str, step: str, metric: str, order: str, text: str | None, sources: Any,
        tags: Any, rates: list[float], states: Any,
    ) -> Any:  # fmt: skip
        if not clicks:
            return no_update
        wanted = _filtered(text, sources, tags, rates, states)
        frame, found = catalogue.ranking(benchmark, step_of(step), metric, wanted, largest=order != "smallest")
        rows = frame.iloc[_in_order(frame, found, order)[:MOST_EXPORTED]][_EXPORTED]
        return dcc.send_data_frame(rows.to_csv, f"{catalogue.pool}-{benchmark}-{metric}.csv", index=False)

    @app.callback(
        Output("ranking-selected", "data"),
        Input("ranking-select", "n_clicks"),
        State("ranking-n", "value"),
        *(State(name, "value") for name in _CONTROLS),
        prevent_initial_call=True,
    )
    def select(
        clicks: int | None, n: int | None, benchmark: str, step: str, metric: str, order: str, text: str | None,
        sources: Any, tags: Any, rates: list[float], states: Any,
    ) -> Any:  # fmt: skip
        """train.jsonl of the ranked problems in the list, as `gradstore select` writes it."""
        if not clicks:
            return no_update
        wanted = _filtered(text, sources, tags, rates, states)
        frame, found = catalogue.ranking(benchmark, step_of(step), metric, wanted, largest=order != "smallest")
        found = _in_order(frame, found, order)
        ranked = found[np.isfinite(frame["score"].to_numpy(float)[found])]
        ids = frame["id"].iloc[ranked[: min(n or MOST_EXPORTED, MOST_EXPORTED)]].tolist()
        return dcc.send_string(as_lines(training_records(catalogue.store, catalogue.pool, ids)), "train.jsonl")

    @app.callback(
        Output("ranking-figure", "children"),
        Output("ranking-table", "children"),
        Output("ranking-where", "children"),
        Output("ranking-back", "disabled"),
        Output("ranking-on", "disabled"),
        Output("ranking-page", "data"),
        Output("text-found", "children"),
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
        if ctx.triggered_id not in (None, "theme"):  # else the page is the one that the address asks for
            moves = {"ranking-back": page - 1, "ranking-on": page + 1}
            page = moves.get(str(ctx.triggered_id), 0)
        wanted = _filtered(text, sources, tags, rates, states)
        try:
            frame, found = catalogue.ranking(benchmark, step_of(step), metric, wanted, largest=order != "smallest")
        except GradstoreError as error:
            return note(str(error)), "", "", True, True, 0, []
        found = _in_order(frame, found, order)
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
        key = {"largest": "-score", "smallest": "score"}.get(order, order)
        listed = table(title, columns, rows, empty=_empty(catalogue, wanted), sorts=_SORTS, order=key)
        words = [html.Option(value=name) for name in shown["id"].tolist()[:12]] if text else []
        return _histogram(scores, benchmark, metric, theme), listed, line, first, last, page, words


def _empty(catalogue: Catalogue, wanted: Filter) -> str:
    """Why there is nothing in the list."""
    text = f" has “{wanted.text.strip()}” in its text or id" if wanted.text.strip() else ""
    others = wanted != Filter(text=wanted.text)
    rest = f"{' and' if text else ''} passes the filters" if others else ""
    return f"Nothing to show: no problem of {catalogue.pool}{text}{rest}."


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
