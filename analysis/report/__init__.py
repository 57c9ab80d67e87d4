"""Report page about a store's content and history: `write_report(store, "report.html")`.

findings.py computes the frames of `analysis`. holdings, movement, listing, makeup, concerns and choices turn them into
page sections, made of the plain values of pieces.py. rendering.py, interactive.py and printed.py write these out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.durable import check_parent, write_text_file
from gradstore.errors import check_known, check_number, needing
from gradstore.outputs import check_free, check_output, check_output_folder

if TYPE_CHECKING:
    from gradstore import Store
    from gradstore.analysis.report.pieces import Page

FORMATS = ("html", "md")


def check_installed() -> None:
    """RequestError, with the name of the extra, if a package that the report needs is not installed."""
    with needing("the report", "gradstore[plots]"):
        import jinja2  # noqa: F401
        import plotly  # noqa: F401


def write_report(
    store: "Store",
    out: str | Path,
    *,
    pool: str | None = None,
    benchmarks: Sequence[str] = (),
    metric: str = "cosine",
    format: str = "html",
    figures: str | Path | None = None,
    rollouts: Sequence[str | Path] = (),
    tokenizer: Any = None,
    n_listed: int = 50,
    overwrite: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> "Page":
    """Write the report of a store to `out`; returns the page as plain values.

    pool: None: the collection with rounds, else the largest. benchmarks: empty: all other collections. format: html or
    md. figures: folder for every figure as SVG and PNG. rollouts: rollout files whose responses are shown with the
    problems. tokenizer: needed for responses stored only as token ids. n_listed: problems listed from each end of a
    ranking. overwrite: whether files that are there may be replaced. RequestError for missing data or files, for an
    output inside a store, and if a required package is not installed.
    """
    check_known("report format", format, FORMATS)
    check_number("number of problems to list", n_listed, least=1)
    check_output(Path(out), rollouts)
    check_parent(Path(out))
    check_free([Path(out)], overwrite)
    check_output_folder(None if figures is None else Path(figures))
    check_installed()
    from gradstore.analysis.report.assembly import assemble
    from gradstore.analysis.report.findings import find
    from gradstore.analysis.report.rendering import to_html, to_markdown
    from gradstore.analysis.report.transcripts import Transcripts

    out, folder = Path(out), None if figures is None else Path(figures)
    store.check_files()
    found = find(store, pool, benchmarks, metric, n_listed)
    page = assemble(found, Transcripts(rollouts, tokenizer) if rollouts else None, tell)
    if folder is not None:
        tell("figures")
        from gradstore.analysis.report.printed import FORMATS as DRAWN
        from gradstore.analysis.report.printed import print_figures

        check_free((folder / f"{figure.key}.{form}" for figure in page.figures for form in DRAWN), overwrite)
        print_figures(page.figures, folder)
    text = to_html(page) if format == "html" else to_markdown(page, folder, out.parent)
    write_text_file(out, text)
    return page
