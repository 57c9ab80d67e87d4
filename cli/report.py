"""`report`: a page of what a store holds; `serve`: the same functions in the browser, live."""

import sys
from pathlib import Path
from typing import Annotated

from gradstore.cli.app import command, opt
from gradstore.cli.completion import collections
from gradstore.cli.query import Json, Overwrite, Pool, StorePath
from gradstore.cli.rollout import Trust
from gradstore.cli.show import print_json, say, warn
from gradstore.errors import RequestError, check_known
from gradstore.wording import counted, shown

AgainstAny = Annotated[
    list[str] | None,
    opt(
        "Benchmark to look at, the first one closest; may be repeated. Default: all.",
        "--against",
        autocompletion=collections,
    ),
]
Metric = Annotated[str, opt("cosine, dot or fisher.")]
RolloutFiles = Annotated[
    list[Path] | None, opt("Rollout file or folder whose responses are shown; may be repeated.", "--rollouts")
]
Tokenizer = Annotated[str | None, opt("Folder or name of a tokenizer, for responses that are token ids alone.")]


_NEEDS = {"tokenizer": "rollouts", "trust_remote_code": "tokenizer"}


@command(needs=_NEEDS, example="gradstore report store --out report.html")
def report(
    store: StorePath,
    out: Annotated[Path | None, opt("File to write [default: report.html or report.md].")] = None,
    against: AgainstAny = None,
    pool: Pool = None,
    metric: Metric = "cosine",
    format: Annotated[
        str | None,
        opt("html: one page that needs no network; md: Markdown [default: by --out's name, or html]."),
    ] = None,
    figures: Annotated[Path | None, opt("Folder for every figure as SVG and PNG.")] = None,
    rollouts: RolloutFiles = None,
    tokenizer: Tokenizer = None,
    top: Annotated[int, opt("Problems listed from each end of a ranking.")] = 50,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Write a page of what a store holds, how alignment drifted, and what was selected."""
    import gradstore
    from gradstore.analysis.report import write_report

    of_name = None if out is None else _FORMATS.get(out.suffix.lower())
    if out is not None and out.suffix and of_name is None:
        check_known(f"{out}: the suffix", out.suffix, _FORMATS)
    if format is not None and of_name not in (None, format):
        raise RequestError(f"--format {format}: {out} is named as a file of another kind; leave one of them out")
    format = format or of_name or "html"
    path = out or Path(f"report.{format}")
    page = write_report(
        gradstore.open(store),
        path,
        pool=pool,
        benchmarks=against or (),
        metric=metric,
        format=format,
        figures=figures,
        rollouts=rollouts or (),
        tokenizer=_tokenizer(tokenizer, trust_remote_code),
        n_listed=top,
        overwrite=overwrite,
    )
    if json:
        missing = {section.key: section.missing for section in page.sections if section.missing}
        print_json({"path": str(path), "bytes": path.stat().st_size, "warnings": page.warnings, "missing": missing})
        return
    for warning in page.warnings:
        say(f"worth knowing: {warning}")
    size = f"{counted(len(page.sections), 'section')}, {counted(len(page.figures), 'figure')}"
    say(f"{path}: {size}; open it in a browser" if format == "html" else str(path))


_FORMATS = {".html": "html", ".htm": "html", ".md": "md"}
"""Suffix of a report's file -> its format."""


def _tokenizer(name: str | None, trusted: bool) -> object:
    if name is None:
        return None
    from gradstore.engine.gradients.models import load_tokenizer

    return load_tokenizer(name, trust_remote_code=trusted)


@command(needs=_NEEDS, example="gradstore serve store")
def serve(
    store: StorePath,
    against: AgainstAny = None,
    pool: Pool = None,
    rollouts: RolloutFiles = None,
    tokenizer: Tokenizer = None,
    host: Annotated[str, opt("Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, opt("Port; 0 takes a free one.")] = 8050,
    no_token: Annotated[
        bool,
        opt("Ask for no token: every user of this machine can read the problems. On loopback only.", "--no-token"),
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Explore a store in the browser: rank and search, open a problem, compare steps and benchmarks.

    Every request needs the token of the address that is printed.
    """
    import gradstore
    from gradstore.analysis.explorer import serve as run

    def tell(address: str) -> None:
        # Also with --quiet: nobody can guess the token in it.
        print(shown(f"exploring {store} at {address}  (Ctrl-C ends it)"), file=sys.stderr, flush=True)
        if no_token:
            warn("no token: every user of this machine can read the problems while this runs")

    run(
        gradstore.open(store),
        pool=pool,
        benchmarks=against or (),
        rollouts=rollouts or (),
        tokenizer=_tokenizer(tokenizer, trust_remote_code),
        host=host,
        port=port,
        token=not no_token,
        tell=tell,
    )
