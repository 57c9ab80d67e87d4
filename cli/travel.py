"""`push`, `pull`, `open`: stores in object storage and dataset repositories (docs/remote.md)."""

from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli.app import command, opt
from gradstore.cli.query import Json, StorePath
from gradstore.cli.show import print_json, print_line, progress, say
from gradstore.cli.stores import info
from gradstore.errors import RequestError
from gradstore.wording import size

Url = Annotated[
    str,
    typer.Argument(metavar="URL", help="s3://, gs://, az://, file:// or hf://datasets/USER/NAME; https:// to read."),
]


@command(example="gradstore push store hf://datasets/USER/NAME")
def push(store: StorePath, url: Url, json: Json = False) -> None:
    """Bring the store at a URL up to date: only what is new is sent, compressed; readers see whole states."""
    import gradstore
    from gradstore.durable import folder_bytes

    with progress("push (bytes)", folder_bytes(store)) as advance:
        report = gradstore.push(store, url, progress=advance)
    if json:
        print_json(report.describe())
        return
    if not report.changed:
        print_line(f"{report.url}: is up to date")
        return
    rows = ", ".join(f"{name}: {n} rows" for name, n in report.new_rows.items())
    print_line(f"{report.url}: sent {size(report.bytes)} in {report.objects} objects ({rows})")


@command(example="gradstore pull hf://datasets/USER/NAME store")
def pull(
    url: Url,
    store: StorePath,
    collection: Annotated[list[str] | None, opt("Only this one; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Bring a local copy of the store at a URL up to date; every checksum is checked."""
    from gradstore.travel.places import place_at
    from gradstore.travel.pulling import pull_from

    _, report = pull_from(place_at(url), Path(store), collection or None)
    if json:
        print_json(report.describe())
        return
    print_line(f"{report.path}: " + ", ".join(f"{name}: {n} rows" for name, n in report.rows.items()))


@command("open", example="gradstore open s3://BUCKET/store")
def open_store(url: Url, json: Json = False) -> None:
    """Open the store at a URL in place and show what it holds; query, select and info take the URL too."""
    import gradstore

    if "://" not in url:
        raise RequestError(f"{url}: is no URL; `gradstore info` shows a store on this machine")
    info(url, json)
    say(f"kept in {gradstore.open(url).path}; read it with: gradstore query {url} --against BENCHMARK")
