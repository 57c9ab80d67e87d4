"""The command line's application, to which each file of this folder adds its commands."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from importlib import import_module
from typing import Annotated, Any

import typer

from gradstore.cli.help import Command, Group
from gradstore.cli.ranks import as_rank
from gradstore.cli.show import NOTICE, show_from
from gradstore.errors import GradstoreError, RequestError

app = typer.Typer(
    cls=Group,
    name="gradstore",
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _StoppedError(GradstoreError):
    """Ctrl-C. An error of ours, since typer turns a KeyboardInterrupt into an exit without a word."""

    exit_status = 130

    def __init__(self) -> None:
        super().__init__("interrupted; what was published is kept, the same command goes on from there")


def command(
    name: str | None = None,
    of: typer.Typer = app,
    *,
    divided: bool = False,
    needs: Mapping[str, str] | None = None,
    panels: Mapping[str, str] | None = None,
    example: str = "",
    **settings: Any,
) -> Callable[[Callable], Callable]:
    """`app.command`, with the options that every command has, --verbose and --quiet. of: a command with its own.

    divided: the command divides its work over the ranks that torchrun starts. needs: parameter -> the one without which
    it has no meaning, `name` or `name=value`, several of them with `|`; on a line without that it is refused.
    panels, example: as in help.py.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def told(*args: Any, verbose: bool, quiet: bool, context: typer.Context, **others: Any) -> Any:
            show_from(logging.WARNING if quiet else logging.INFO if verbose else NOTICE)
            _check_meaning(given(context), context.params, needs or {})
            others |= {"context": context} if "context" in own.parameters else {}
            try:
                with as_rank(name or function.__name__, divided=divided):
                    return function(*args, **others)
            except KeyboardInterrupt:  # which typer would make a silent exit of
                raise _StoppedError from None

        own = inspect.signature(function)
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for name, (default, hint) in _TOLD.items()
            if name not in own.parameters
        ]
        told.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
        told.__annotations__ = {**function.__annotations__, **{name: hint for name, (_, hint) in _TOLD.items()}}
        panel = COMMANDS.get(name or function.__name__) if of is app else None
        shown = type("Shown", (Command,), {"panels": {**(panels or {}), **_SAID}, "example": example})
        of.command(name, cls=shown, rich_help_panel=panel, **settings)(told)
        return function

    return register


def _check_meaning(given: Mapping[str, Any], values: Mapping[str, Any], needs: Mapping[str, str]) -> None:
    """RequestError for an option on the line whose other option is not there."""
    for name in given.keys() & needs.keys():
        ways = [way.partition("=") for way in needs[name].split("|")]
        if not any(values[one] == value if equals else values[one] for one, equals, value in ways):
            wanted = " or ".join(f"{as_option(one)}{f' {value}' * bool(equals)}" for one, equals, value in ways)
            raise RequestError(f"{as_option(name)} has a meaning only with {wanted}: leave it out, or give that too")


def check_alone(context: typer.Context, option: str, *beside: str) -> None:
    """RequestError for anything else on the line than this option and the parameters beside it."""
    others = given(context).keys() - {*beside, "verbose", "quiet"}
    if others:
        arguments = {param.name for param in context.command.params if param.param_type_name == "argument"}
        names = [name.upper() if name in arguments else as_option(name) for name in sorted(others)]
        raise RequestError(f"{option} goes alone: leave {', '.join(names)} out")


def as_option(parameter: str) -> str:
    """The option of a parameter: `--top-p` of top_p."""
    return {"n": "-n", "local": "--from"}.get(parameter, f"--{parameter.replace('_', '-')}")


_FILES = {
    "Measure": {
        "data": "data", "rollout": "rollout", "plan": "plan", "collect": "collect", "probe": "probe",
        "import": "importing",
    },
    "Ask": {
        "query": "query", "select": "query", "selectors": "query", "fidelity": "fidelity", "report": "report",
        "serve": "report",
    },
    "Train": {"train": "train", "demo": "demo"},
    "Keep": {
        "info": "stores", "verify": "stores", "merge": "merge", "compact": "stores", "push": "travel", "pull": "travel",
        "open": "travel",
    },
}  # fmt: skip
"""Heading in the help -> command -> the file of this folder that registers it, in the order of work."""
_FILE = {name: file for files in _FILES.values() for name, file in files.items()}
COMMANDS = {name: panel for panel, files in _FILES.items() for name in files}
"""Command -> its heading in the help, in the order of work."""


def application(words: Sequence[str]) -> typer.Typer:
    """The application for a command line: with the command that it begins with alone, which is soon made, or with all.

    All are in the order of `_FILES`, whatever file was imported first.
    """
    for file in {_FILE[words[0]]} if words and words[0] in _FILE else set(_FILE.values()):
        import_module(f"gradstore.cli.{file}")
    order = list(COMMANDS)
    names = {id(one): str(one.name or getattr(one.callback, "__name__", "")) for one in app.registered_commands}
    app.registered_commands.sort(key=lambda one: order.index(names[id(one)]))
    found = copy(app)
    if words and words[0] in COMMANDS:
        found.registered_commands = [one for one in app.registered_commands if names[id(one)] == words[0]]
        found.registered_groups = [one for one in app.registered_groups if one.name == words[0]]
    return found


_TOLD: dict[str, tuple[Any, Any]] = {
    "verbose": (False, Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is done.")]),
    "quiet": (
        False,
        Annotated[bool, typer.Option("--quiet", "-q", help="No commentary and no progress bars, only warnings.")],
    ),
    "context": (inspect.Parameter.empty, typer.Context),
}
"""Parameters that every command has: their defaults and types."""


_SAID = {"What is printed": "json csv verbose quiet help"}
"""The last panel of every command."""


def opt(help: str, *names: str, **settings: Any) -> Any:
    """`typer.Option` with its help first."""
    return typer.Option(*names, help=help, **settings)


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
