"""The explorer as a Dash app: three views, each with its own address, and one theme for all."""

from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, dcc, html

from gradstore.analysis.explorer import comparison, problem, ranking
from gradstore.analysis.explorer.access import MOST_BODY, Access, guard
from gradstore.analysis.explorer.catalogue import Catalogue
from gradstore.analysis.explorer.misfits import refuse_misfits
from gradstore.analysis.explorer.turns import Answers, BusyError, busy

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
        here = path if path in dict(_VIEWS) else "/"
        if here == "/problem":
            view = problem.layout(catalogue, search or "")
        else:
            view = ranking.layout(catalogue) if here == "/" else comparison.layout(catalogue)
        return view, *("here" if path == here else "" for path, _ in _VIEWS)

    app.clientside_callback(
        ClientsideFunction("explorer", "theme"),
        Output("theme", "data"),
        Output("toggle", "children"),
        Input("toggle", "n_clicks"),
    )
    ranking.register(app, catalogue)
    problem.register(app, catalogue)
    comparison.register(app, catalogue)
    refuse_misfits(app.server)
    return app


def _assets() -> str:
    from pathlib import Path

    return str(Path(__file__).parent / "assets")
