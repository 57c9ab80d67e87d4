"""Help pages as plain text: options in panels, one example for each command, nothing parsed and no library loaded.

typer's own pages need rich, markdown and pydantic, which take longer to load than all commands; and brackets in a text,
such as `[default: 0.1]`, are markup there.
"""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gradstore.errors import RequestError

WIDEST = 100
"""Most characters of a line; a narrower terminal has its own width."""
_NARROWEST = 40
_KIND = re.compile(r"<(?:list\[)?(\w+)\]?>")
_LEFT = 30
"""Most characters of a name beside its text; longer ones stand above it."""
_MAY_REPEAT = {"weight"}
"""Options of which two values may be the same."""
_MAY_BE_EMPTY = {"instruction"}
"""Options whose empty text has a meaning."""


class Command(TyperCommand):
    """A command whose help has panels and an example, and which refuses an option given twice or empty."""

    panels: Mapping[str, str] = {}
    """Heading -> parameters under it, with blanks between them; the others are under "Options", before the last one."""
    example = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """RequestError for an option that stands twice, of which one would be ignored, and for an empty one."""
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            is_option, value = param.param_type_name == "option", values.get(param.name)
            name = "/".join([*param.opts[:1], *param.secondary_opts]) if is_option else param.name.upper()
            several: list[str] = list(value or ()) if is_option and param.multiple else []
            flag = getattr(param, "is_flag", False) and not param.secondary_opts
            if order.count(param) > 1 and is_option and not (param.multiple or flag):
                raise RequestError(f"{name} is given twice: give it once")
            for one in several:
                if several.count(one) > 1 and param.name not in _MAY_REPEAT:
                    raise RequestError(f"{name} {one} is given twice: give it once")
            if (value == "" or "" in several) and param.name not in _MAY_BE_EMPTY:
                raise RequestError(f"{name} is empty: give it a value, or leave it out")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, text, example, then one panel after the other."""
        _begin(self, ctx, formatter)
        if self.example:
            formatter.write(f"\n  {bold('Example')}: {self.example}\n")
        panel_of = {name: panel for panel, names in self.panels.items() for name in names.split()}
        *own, last = self.panels or ["Options"]
        found: dict[str, list[tuple[str, str]]] = {panel: [] for panel in ("Arguments", *own, "Options", last)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                is_argument = param.param_type_name == "argument"
                found["Arguments" if is_argument else panel_of.get(param.name, "Options")].append(record)
        for panel, records in found.items():
            _panel(formatter, panel, records)


class Group(TyperGroup):
    """Commands under the headings of their panels, in the order in which they are registered."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, text, options, then the commands."""
        _begin(self, ctx, formatter)
        records = [param.get_help_record(ctx) for param in self.get_params(ctx)]
        _panel(formatter, "Options", [record for record in records if record is not None])
        found: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            text = " ".join((command.help or "").split("\n\n")[0].split())
            found.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append((name, text))
        for panel, rows in found.items():
            _panel(formatter, panel, rows)


def page(app: typer.Typer, words: Sequence[str]) -> str | None:
    """The help that a command line asks for; None if it asks for none, or for that of an unknown command."""
    asked = next((place for place, word in enumerate(words) if word in ("-h", "--help")), None)
    if asked is None or "--" in words[:asked]:
        return None
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name=_program(), **command.context_settings)
    for word in words[:asked]:
        below = getattr(command, "commands", None)
        if below is None:
            break
        if word not in below:
            return None
        command = below[word]
        context = typer.Context(command, info_name=word, parent=context, **command.context_settings)
    return str(command.get_help(context))


def _program() -> str:
    name = sys.argv[0].rpartition("/")[2]
    return "gradstore" if name == "__main__.py" else name


def bold(text: str) -> str:
    """The text in bold where standard output is a terminal."""
    return f"\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else text


def _begin(command: Any, ctx: Any, formatter: Any) -> None:
    formatter.width = max(_NARROWEST, min(shutil.get_terminal_size().columns, WIDEST))
    command.format_usage(ctx, formatter)
    command.format_help_text(ctx, formatter)


def _panel(formatter: Any, heading: str, records: Sequence[tuple[str, str]]) -> None:
    if records:
        formatter.write(f"\n{bold(heading)}\n")
        formatter.indent()
        formatter.write_dl([(_KIND.sub(r"<\1>", name), text) for name, text in records], col_max=_LEFT)
        formatter.dedent()
