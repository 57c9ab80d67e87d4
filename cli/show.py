"""Tables for people, JSON for scripts, progress bars for terminals."""

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradstore.wording import json_shown, shown

log = logging.getLogger(__name__)

NOTICE = 25
"""Level of running commentary: shown unless `--quiet`; between logging.INFO, which `--verbose` shows, and WARNING."""


def open_streams() -> None:
    """Makes standard output and error lead nowhere where the caller has closed them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process


def take_any_text() -> None:
    """Makes standard output and error escape what their encoding cannot hold, instead of failing half-way."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: object) -> None:
    """One JSON document on standard output, whole; in ASCII where the output's encoding cannot hold its text."""
    text = json_shown(json.dumps(value, indent=2, ensure_ascii=False))
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    sys.stdout.write(f"{text}\n")


_CUT = 24
"""Characters that the last column keeps before other columns are left out."""
_BETWEEN = 2
"""Blanks between two columns."""


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
    signed: str = "",
) -> None:
    """A rich table; the columns named in `right` are right-aligned, the last one is cut to the screen's width.

    spare: columns that a narrow screen leaves out, the first one first; a line under the table names them. The others
    stay, and wrap where even they do not fit. signed: column whose numbers are coloured by their sign.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(Text(_line(title), style="bold"), soft_wrap=True)
    cells = [[shown(cell) for cell in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    kept = list(range(len(columns)))

    def room() -> int:
        """Characters that the last column has."""
        return console.width - sum(widths[i] + _BETWEEN for i in kept[:-1])

    for name in (name for name in spare if name in columns):
        if room() < min(widths[kept[-1]], _CUT):
            kept.remove(list(columns).index(name))
    last = kept[-1]
    fits = room() >= min(widths[last], _CUT)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i in kept:
        table.add_column(
            columns[i],
            justify="right" if columns[i] in right else "left",
            no_wrap=fits,
            overflow="ellipsis" if fits else "fold",
            min_width=widths[i] if fits and i != last else None,
            max_width=room() if fits and i == last else None,
        )
    for row in cells:
        colours = [_colour(row[i]) if columns[i] == signed else "" for i in kept]
        table.add_row(*(Text(row[i], style) for i, style in zip(kept, colours, strict=True)))
    console.print(table)
    if len(kept) < len(columns):
        names = ", ".join(columns[i] for i in range(len(columns)) if i not in kept)
        console.print(Text(f"left out at {console.width} characters: {names}", style="dim"), soft_wrap=True)


def _colour(number: str) -> str:
    """green for a positive number, red for a negative one."""
    return {"+": "green", "-": "red"}.get(number[:1], "")


def print_csv(rows: Sequence[Mapping[str, object]]) -> None:
    """Rows as CSV on standard output, with a heading."""
    import csv

    writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: shown(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    )


def started_as() -> str:
    """How this program was started, to be typed again: its name where a shell finds it, else its path."""
    import shutil

    name = Path(sys.argv[0])
    if name.name == "__main__.py":
        return f"{sys.executable} -m gradstore"
    return name.name if shutil.which(name.name) else str(name)


def print_line(text: str) -> None:
    """A line on standard output; line breaks before it stay."""
    sys.stdout.write(f"{_line(text)}\n")


def print_error(text: str) -> None:
    """The one line that says why a command failed, on standard error."""
    print(shown(f"gradstore: {text}", most=4000), file=sys.stderr)


def _line(text: str) -> str:
    body = text.lstrip("\n")
    return "\n" * (len(text) - len(body)) + shown(body)


class _OnStandardError(logging.Handler):
    """Prints records on standard error, as it is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        print(shown(f"{prefix}{record.getMessage()}", most=4000), file=sys.stderr, flush=True)


def show_from(level: int) -> None:
    """Show what the packages log, from this level on, on standard error."""
    logger = logging.getLogger("gradstore")
    if not any(isinstance(handler, _OnStandardError) for handler in logger.handlers):
        logger.addHandler(_OnStandardError())
    logger.setLevel(level)


def say(text: str) -> None:
    """A line of running commentary, on standard error, out of the way of `--json`."""
    if not logging.getLogger("gradstore").handlers:
        show_from(NOTICE)
    log.log(NOTICE, "%s", text)


def warn(text: str) -> None:
    """A warning, told as those of the packages are."""
    log.warning("%s", text)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on standard error that advances by what it is called with; silent when not a terminal.

    total None: unknown yet; it may be given with the number.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (console.is_terminal and log.isEnabledFor(NOTICE))) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n, total=None, description=None: bar.update(task, advance=n, total=total, description=description)


def duration(seconds: float) -> str:
    """A time in a unit a person reads."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
