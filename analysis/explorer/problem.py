"""View of one problem: its text, its history, its nearest problems, its probes and its rollouts."""

from typing import Any

import numpy as np
from dash import Dash, Input, Output, dcc, html

from gradstore.analysis.explorer.catalogue import Catalogue, Filter, text_of
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
from gradstore.analysis.report.holdings import STATE_WORDS
from gradstore.analysis.report.pieces import Figure, Series, columns_of, written
from gradstore.analysis.report.transcripts import Transcript
from gradstore.engine.searching.query import METRICS
from gradstore.errors import GradstoreError
from gradstore.wording import first_words

MOST_ROLLOUTS = 64
_NEAREST = 10
_OFFERED = 12
"""Ids offered in place of one that does not exist."""


def layout(catalogue: Catalogue, search: str) -> Any:
    """The view for the problem id in the address, with an input to enter another id."""
    asked, which = Asked(search), {NEWEST: "newest step", "all": "all steps"}
    typed = dcc.Input(id="problem-id", type="text", debounce=0.4, value=asked.one("id", ""), list="problem-found")
    step = asked.one("problem-step", NEWEST, steps_allowed(catalogue.steps))
    controls = [
        labelled("Problem id", typed, True),
        labelled("Metric", choice("problem-metric", METRICS, asked.one("problem-metric", "cosine", METRICS))),
        labelled("Nearest as of", step_choice("problem-step", catalogue.steps, step)),
        labelled("Rollouts of", choice("problem-rollouts", which, asked.one("problem-rollouts", NEWEST, which))),
    ]
    plain = {"problem-id": "", "problem-metric": "cosine", "problem-step": NEWEST, "problem-rollouts": NEWEST}
    return html.Div(
        [
            html.H2("One problem"),
            html.Div(controls, className="controls"),
            html.Div(id="problem-view"),
            html.Datalist(id="problem-found"),
            plain_state("problem", "/problem", plain, {"problem-id": "id"}),
        ]
    )


def register(app: Dash, catalogue: Catalogue, colours: Colours) -> None:
    """Register the view's callbacks."""
    controls = ("problem-id", "problem-metric", "problem-step", "problem-rollouts")
    keep_in_address(app, "problem", [(name, "value") for name in controls])

    @app.callback(
        Output("problem-view", "children"),
        Output("problem-found", "children"),
        Input("problem-id", "value"),
        Input("problem-metric", "value"),
        Input("problem-step", "value"),
        Input("problem-rollouts", "value"),
        Input("theme", "data"),
    )
    def show(problem_id: str | None, metric: str, step: str, which: str, theme: str) -> Any:
        if not problem_id:
            return note("Give a problem's id, or choose one in the ranking."), []
        try:
            shown = _view(catalogue, problem_id.strip(), metric, step_of(step), which, theme, colours)
        except GradstoreError as error:
            near = _containing(catalogue, problem_id.strip())
            return _unknown(str(error), near), [html.Option(value=name) for name in near]
        return shown, []

    @app.callback(Output("problem-nearest", "children"), Input("problem-shown", "data"))
    def near(shown: list | None) -> Any:
        """On its own, after the rest is there: it reads every row of the pool."""
        if not shown:
            return []
        problem_id, step = shown
        try:
            return _nearest(catalogue, str(problem_id), step if step is None else int(step))
        except GradstoreError as error:
            return note(str(error))


def _containing(catalogue: Catalogue, words: str) -> list[str]:
    """Ids of the first problems that have the words in their id or text."""
    if not catalogue.benchmarks:
        return []
    frame, found = catalogue.ranking(catalogue.benchmarks[0], None, "cosine", Filter(text=words))
    return [str(name) for name in frame["id"].iloc[found[:_OFFERED]]]


def _unknown(reason: str, near: list[str]) -> list:
    """Why there is nothing, and the problems that have the words."""
    if not near:
        return [note(f"{reason}; no id or text has these words either.")]
    return [
        note(reason),
        html.P("In the id or text of these:"),
        html.Ul([html.Li(problem_link(name)) for name in near]),
    ]


def _view(
    catalogue: Catalogue,
    problem_id: str,
    metric: str,
    step: int | None,
    which: str,
    theme: str,
    colours: Colours | None = None,
) -> list:
    record = catalogue.record(problem_id)
    facts = [("Source", record["source"] or "–"), ("Tags", ", ".join(record["tags"]) or "–")]
    facts.append(("Ground truth", record["ground_truth"] or "–"))
    parts: list[Any] = [
        html.H3(problem_id, className="name"),
        html.Pre(text_of(record), tabIndex=0),
        html.Dl([part for name, value in facts for part in (html.Dt(name), html.Dd(value))], className="facts"),
        *_history(catalogue, problem_id, metric, theme, colours),
        html.H3("Nearest problems by gradient"),
        dcc.Store(id="problem-shown", data=[problem_id, step]),
        html.Div(id="problem-nearest"),
    ]
    probes = catalogue.probes(problem_id)
    if probes:
        parts += [html.H3("Probes"), _probes(probes)]
    return [*parts, html.H3("Rollouts"), *_rollouts(catalogue, problem_id, which)]


def _history(catalogue: Catalogue, problem_id: str, metric: str, theme: str, colours: Colours | None = None) -> list:
    frame = catalogue.history(problem_id, metric)
    if frame.empty:
        return [note("There is no benchmark to score it against.")]
    series = [
        Series(str(name), rows["step"].tolist(), rows["score"].tolist())
        for name, rows in frame.groupby("benchmark", sort=False)
    ]
    rates = frame.drop_duplicates("step")
    says = f"{metric.capitalize()} of the problem's newest row at or before each step; a gap means it had no gradient."
    label = f"{metric.capitalize()} with the target"
    described = Figure(
        "history", "Alignment over steps", says, "lines", series, "Step", label, y_kind="signed", named="collection"
    )
    scores = " | ".join(f"Score, {name}:signed" for name in catalogue.benchmarks)
    columns = columns_of(
        f"Step:integer | State | {scores} | Pass rate:percent | Rollouts:integer | Gradient norm:number | "
        "Age (steps):integer"
    )
    by_step = frame.pivot(index="step", columns="benchmark", values="score")
    rows = [
        [
            line.step,
            STATE_WORDS[line.state],
            *(float(by_step.loc[line.step, name]) for name in catalogue.benchmarks),
            line.pass_rate,
            line.n_rollouts,
            line.norm,
            line.age,
        ]
        for line in rates.itertuples()
    ]
    listed = table(f"History of {problem_id}", columns, rows)
    return [listed] if described.is_one_point else [figure(described, theme, colours), listed]


def _nearest(catalogue: Catalogue, problem_id: str, step: int | None) -> Any:
    frame = catalogue.nearest(problem_id, step, _NEAREST)
    if frame.empty:
        return note("It has no gradient at that step, so nothing is near it.")
    texts = catalogue.texts(frame["id"].tolist())
    columns = columns_of("Problem:id | Source | Cosine:signed | Pass rate:percent | Text")
    rows = [
        [problem_link(line.id), line.source, line.cosine, line.pass_rate, first_words(texts[line.id], 200)]
        for line in frame.itertuples()
    ]
    return table(f"Problems nearest to {problem_id}", columns, rows)


def _probes(probes: list[dict[str, Any]]) -> Any:
    columns = columns_of(
        "Step:integer | Target:id | Rollout:integer | Reward:number | "
        "Derivative along the target:signed | Tokens:integer"
    )
    rows = [
        [probe["step"], probe["target"], place + 1, reward, derivative, int(length)]
        for probe in probes
        for place, (reward, derivative, length) in enumerate(
            zip(probe["rewards"], probe["derivatives"], probe["lengths"], strict=True)
        )
    ]
    return table("Derivative of each rollout's log-probability along the target", columns, rows, shown="")


def _rollouts(catalogue: Catalogue, problem_id: str, which: str) -> list:
    if catalogue.transcripts is None:
        return [note("No rollout file was given: start `gradstore serve` with --rollouts to read responses.")]
    found = catalogue.rollouts(problem_id)
    steps = [one.step for one in found if one.step is not None]
    if which == NEWEST and steps:
        found = [one for one in found if one.step == max(steps)]
    if not found:
        return [note("The rollout files have none of this problem.")]
    parts: list[Any] = [_rollout(one) for one in found[:MOST_ROLLOUTS]]
    if len(found) > MOST_ROLLOUTS:
        parts.append(note(f"The first {MOST_ROLLOUTS} of {len(found)}."))
    mean = float(np.mean([one.reward for one in found]))
    told = f"{len(found)} rollouts, mean reward {written(mean, 'number')}. {_legend(found)}"
    return [html.P(told.strip(), className="lead"), *parts]


def _legend(found: list[Transcript]) -> str:
    if any(one.shares is not None and one.tokens is not None for one in found):
        return "Blue tokens push with the target, red ones against it; the stronger, the more."
    if any(one.logprobs is not None and one.tokens is not None for one in found):
        return "The darker a token, the less likely the policy found it; its probability shows when pointed at."
    return ""


def _rollout(one: Transcript) -> Any:
    head = f"Rollout {one.number + 1}" + ("" if one.step is None else f", step {one.step}")
    head += f", reward {one.reward:g}"
    body: Any = one.marked
    if one.tokens is not None and one.shares is not None:
        body = _shaded(one, _share_colours(one.shares), [written(share, "signed") for share in one.shares])
    elif one.tokens is not None and one.logprobs is not None:
        chances = np.exp(np.minimum(np.array(one.logprobs), 0))
        colours = [f"rgba(217,130,43,{0.75 * (1 - chance):.2f})" for chance in chances]
        body = _shaded(one, colours, [f"probability {chance:.3f}" for chance in chances])
    if one.told and not isinstance(body, str):
        head += f"; {one.told}"
    return html.Div(
        [html.P(head), html.Pre(body, tabIndex=0)], className="rollout paid" if one.reward > 0 else "rollout"
    )


def _share_colours(shares: tuple[float, ...]) -> list[str]:
    largest = max((abs(share) for share in shares), default=0.0) or 1.0
    return [
        f"rgba({'43,116,201' if share > 0 else '179,68,108'},{0.75 * abs(share) / largest:.2f})" for share in shares
    ]


def _shaded(one: Transcript, colours: list[str], titles: list[str]) -> list:
    """The tokens in their colours; those that the policy did not write are plain and in italics."""
    tokens = one.tokens or ()
    own = one.written or (True,) * len(tokens)
    return [
        html.Span(token, title=title, style={"backgroundColor": colour})
        if is_own
        else html.Span(token, title="not written by the policy", style={"fontStyle": "italic", "opacity": 0.7})
        for token, colour, title, is_own in zip(tokens, colours, titles, own, strict=True)
    ]
