"""Render a page as one self-contained HTML file, or as Markdown."""

import json
import math
from pathlib import Path
from typing import Any

from gradstore.analysis.report.colouring import Colours
from gradstore.analysis.report.interactive import drawn
from gradstore.analysis.report.pieces import RIGHT, Figure, Page, Table, written

_PAGE = Path(__file__).parent / "page"
_ROWS_IN_MARKDOWN = 20


def to_html(page: Page) -> str:
    """The page as HTML, with style, scripts, data and plotly inside; opening it fetches nothing."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=select_autoescape(["html", "j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        page=page,
        css=Markup((_PAGE / "report.css").read_text()),
        js=Markup((_PAGE / "report.js").read_text()),
        plotly=Markup(get_plotlyjs()) if page.figures else "",
        data=Markup(_embedded(page)),
    )


def to_markdown(page: Page, figures: Path | None = None, base: Path | None = None) -> str:
    """The page as GitHub-flavoured Markdown; figures become tables, with a link to KEY.png if `figures` has it.

    base: folder of the Markdown file; links are relative to it.
    """
    lines = [f"# {_inline(page.title)}", "", _inline(page.subtitle), ""]
    lines += [f"- **{result.title}**: {_inline(result.says)}" for result in page.results]
    lines += [""] * bool(page.results)
    lines += [f"- **{name}**: {_inline(value)}" for name, value in page.tiles]
    if page.warnings:
        lines += ["", "**Worth knowing**", "", *(f"- {_inline(warning)}" for warning in page.warnings)]
    for section in page.sections:
        lines += ["", f"## {section.title}"]
        lines += ["", _inline(section.lead)] if section.lead else []
        lines += ["", f"*{_inline(section.missing)}*"] if section.missing else []
        for block in section.blocks:
            lines += ["", f"### {_inline(block.title)}"]
            if isinstance(block, Table):
                lines += ["", _inline(block.says)] if block.says else []
                lines += ["", *_markdown_table(block)]
                continue
            lines += ["", _inline(block.says)]
            if figures is not None:
                path = figures / f"{block.key}.png"
                link = path.relative_to(base) if base is not None and path.is_relative_to(base) else path
                lines += ["", f"![{_inline(block.title)}]({link.as_posix()})"]
            if block.with_table:
                lines += ["", *_markdown_table(block.table())]
    return "\n".join([*lines, "", _inline(page.made), ""])


def _embedded(page: Page) -> str:
    """The figures and tables as JSON, escaped so that it cannot close its script element."""
    figures: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    colours = Colours(page.figures)
    for section in page.sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                figures[block.key] = drawn(block, colours)
                if block.with_table:
                    tables[f"{block.key}-numbers"] = _table(block.table())
            else:
                tables[block.key] = _table(block)
    text = json.dumps(_plain({"figures": figures, "tables": tables}), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": [
            {"name": column.name, "kind": column.kind, "digits": digits}
            for column, digits in zip(table.columns, table.digits(), strict=True)
        ],
        "rows": [list(row) for row in table.rows],
        **({"faint": [table.within_noise(i) for i in range(len(table.rows))]} if table.errors else {}),
        **({"details": list(table.details)} if table.details is not None else {}),
    }


def _plain(value: Any) -> Any:
    """Convert numpy numbers to Python's, round floats to six digits, and replace non-finite values by None."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _markdown_table(table: Table) -> list[str]:
    columns, digits = table.columns, table.digits()
    lines = ["| " + " | ".join(_cell(column.name) for column in columns) + " |"]
    lines.append("|" + "|".join("---:" if column.kind in RIGHT else "---" for column in columns) + "|")
    for row in table.rows[:_ROWS_IN_MARKDOWN]:
        cells = (
            _cell(written(value, column.kind, places))
            for value, column, places in zip(row, columns, digits, strict=True)
        )
        lines.append("| " + " | ".join(cells) + " |")
    if len(table.rows) > _ROWS_IN_MARKDOWN:
        lines += ["", f"The first {_ROWS_IN_MARKDOWN} of {len(table.rows)} rows."]
    return lines


def _cell(text: str) -> str:
    return _inline(" ".join(text.split())).replace("|", "\\|")


def _inline(text: str) -> str:
    """Escape text for Markdown, so that a problem's own markup has no effect."""
    for sign in "\\`*_[]<>#":
        text = text.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return text
