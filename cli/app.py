"""The command line's application, to which each file of this folder adds its commands."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer

from gradstore.cli.ranks import as_rank
from gradstore.cli.show import NOTICE, show_from

app = typer.Typer(
    name="gradstore",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(
    name: str | None = None, of: typer.Typer = app, *, divided: bool = False, **settings: Any
) -> Callable[[Callable], Callable]:
    """`app.command`, with the options that every command has, --verbose and --quiet. of: a command with its own.

    divided: the command divides its work over the ranks that torchrun starts.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def told(*args: Any, verbose: bool, quiet: bool, **others: Any) -> Any:
            show_from(logging.WARNING if quiet else logging.INFO if verbose else NOTICE)
            with as_rank(name or function.__name__, divided=divided):
                return function(*args, **others)

        own = inspect.signature(function)
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
            for name, hint in _TOLD.items()
        ]
        told.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
        told.__annotations__ = {**function.__annotations__, **_TOLD}
        panel = _PANEL.get(name or function.__name__) if of is app else None
        of.command(name, rich_help_panel=panel, **settings)(told)
        return function

    return register


_PANEL = {
    name: panel
    for panel, names in {
        "Measure": ("data", "rollout", "plan", "collect", "probe", "import"),
        "Ask": ("query", "select", "selectors", "fidelity", "report", "serve"),
        "Train": ("train", "demo"),
        "Keep": ("info", "verify", "merge", "compact", "push", "pull", "open"),
    }.items()
    for name in names
}
"""Command -> its heading in the help, in the order of work."""


def in_order_of_work() -> typer.Typer:
    """The application with its commands in the order of `_PANEL`, whatever file was imported first."""
    order = list(_PANEL)
    app.registered_commands.sort(key=lambda one: order.index(str(one.name or getattr(one.callback, "__name__", ""))))
    return app


_TOLD = {
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is done.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="No commentary and no progress bars, only warnings.")],
}


def opt(help: str, *names: str, **settings: Any) -> Any:
    """`typer.Option` with its help first; brackets in it are text, not markup."""
    return typer.Option(*names, help=help.replace("[", "\\["), **settings)


def given(context: typer.Context) -> dict[str, Any]:
    """The parameters that stand on the command line, with their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, own in sources.items() if own and own.name == "COMMANDLINE"}


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("gradstore"))
        raise typer.Exit


@app.callback()
def options(
    asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Sketches of problems' policy gradients: collect, search, select."""
    show_from(NOTICE)
