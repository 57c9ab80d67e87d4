"""The explorer as a Dash app: three views, each with its own address, and one theme for all."""

from functools import partial
from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, dcc, html
from flask import Response, request

from gradstore.analysis.explorer import comparison, problem, ranking
from gradstore.analysis.explorer.access import MOST_BODY, Access, guard
from gradstore.analysis.explorer.catalogue import Catalogue
from gradstore.analysis.explorer.elements import note
from gradstore.analysis.explorer.misfits import refuse_misfits
from gradstore.analysis.explorer.turns import Answers, BusyError, busy
from gradstore.analysis.report.colouring import Colours
from gradstore.errors import GradstoreError

_VIEWS = (("/", "Rank"), ("/problem", "Problem"), ("/compare", "Compare"))


def make_app(catalogue: Catalogue, access: Access | None = None) -> Dash:
    """Make the app for a catalogue. access: who may ask; default: everybody who asks by a loopback name.

    The pages load nothing from other servers.
    """
    app = Dash(
        "gradstore-explorer",
        title="gradstore",
        update_title="",
        serve_locally=True,
        suppress_callback_exceptions=True,
        assets_folder=_assets(),
    )
    app.index_string = app.index_string.replace("<html>", '<html lang="en">')
    app.server.config["MAX_CONTENT_LENGTH"] = MOST_BODY
    app.server.register_error_handler(BusyError, busy)
    answers = Answers(app.server.wsgi_app, catalogue.version, catalogue.turns)
    app.server.wsgi_app = guard(answers, access or Access())
    app.layout = html.Div(
        [
            dcc.Location(id="address"),
            dcc.Store(id="theme", data="light"),
            html.A("Skip to the content", href="#main", className="skip"),
            html.Header(
                [
                    html.Div(
                        [
                            html.H1("gradstore"),
                            html.P(f"{catalogue.store.path.resolve().name} · {catalogue.pool}", className="subtitle"),
                        ]
                    ),
                    html.Nav(
                        [dcc.Link(name, href=path, id=f"to-{name.lower()}") for path, name in _VIEWS],
                        **{"aria-label": "Views"},
                    ),
                    html.Button("Dark", id="toggle", type="button"),
                ],
                className="top",
            ),
            html.Main(id="main", tabIndex=-1),
        ]
    )

    @app.callback(
        Output("main", "children"),
        *(Output(f"to-{name.lower()}", "className") for _, name in _VIEWS),
        Input("address", "pathname"),
        Input("address", "search"),
    )
    def route(path: str | None, search: str | None) -> tuple[Any, ...]:
        layouts = {"/": ranking.layout, "/problem": problem.layout, "/compare": comparison.layout}
        make = layouts.get(path or "/")
        view = html.Div([note(f"There is no page {path} here.")]) if make is None else make(catalogue, search or "")
        return view, *("here" if path == there else "" for there, _ in _VIEWS)

    app.clientside_callback(
        ClientsideFunction("explorer", "theme"),
        Output("theme", "data"),
        Output("toggle", "children"),
        Input("toggle", "n_clicks"),
    )
    colours = Colours()
    colours.learn("source", (name or "(none)" for name in catalogue.sources()))
    colours.learn("collection", catalogue.benchmarks)
    ranking.register(app, catalogue)
    problem.register(app, catalogue, colours)
    comparison.register(app, catalogue, colours)
    app.server.after_request(partial(_not_found, catalogue))
    refuse_misfits(app.server)
    return app


def _not_found(catalogue: Catalogue, response: Response) -> Response:
    """Status 404 for the page of a problem or a view that does not exist; the page itself says so in words."""
    if response.mimetype != "text/html" or response.status_code != 200:
        return response
    try:
        if request.path == "/problem" and request.args.get("id"):
            catalogue.record(request.args["id"])
        elif request.path not in dict(_VIEWS):
            response.status_code = 404
    except GradstoreError:
        response.status_code = 404
    return response


def _assets() -> str:
    from pathlib import Path

    return str(Path(__file__).parent / "assets")
