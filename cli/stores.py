"""`info`, `verify`, `compact`: what a store holds, whether it is whole, and rewriting it smaller."""

from typing import Annotated, Literal, cast

import typer

from gradstore.cli.app import command, opt
from gradstore.cli.completion import collections
from gradstore.cli.query import Json, StoreOrUrl, StorePath
from gradstore.cli.show import print_json, print_line, print_table, say
from gradstore.errors import check_known
from gradstore.wording import size


@command(example="gradstore info store")
def info(store: StoreOrUrl, json: Json = False) -> None:
    """What a store holds: collections, steps, states, bytes, fingerprint."""
    import gradstore
    from gradstore.layout import DERIVED

    facts = gradstore.open(store).info()
    if json:
        print_json(facts)
        return
    print_table(
        f"{store}: {facts['dim']} dimensions as {facts['dtype']}",
        ["collection", "problems", "rows", "live", "no signal", "failed", "steps", "commit", "size"],
        [
            [
                name,
                str(about["problems"]),
                str(about["rows"]),
                *(str(about["states"][state]) for state in ("live", "no_signal", "failed")),
                _steps(about["steps"]),
                str(about["commit"]),
                size(about["bytes"]),
            ]
            for name, about in facts["collections"].items()
            if not name.endswith(DERIVED)
        ],
        right=["problems", "rows", "live", "no signal", "failed", "commit", "size"],
        spare=["commit", "failed", "no signal", "rows"],
    )
    if derived := [name for name in facts["collections"] if name.endswith(DERIVED)]:
        say(f"made from these, never ranked: {', '.join(derived)}")
    for key, value in facts["fingerprint"].items():
        if key != "layout" and value is not None:
            say(f"{key}: {_words(value)}")


@command(example="gradstore verify store")
def verify(store: StorePath, json: Json = False) -> None:
    """Check every stored byte against its checksum; exit status 1 if one is wrong."""
    import gradstore

    report = gradstore.open(store).verify()
    if json:
        print_json(
            {
                "ok": report.ok,
                "findings": [
                    {"file": str(found.file), "chunk": found.chunk, "message": found.message}
                    for found in report.findings
                ],
                "notes": report.notes,
                "chunks": report.chunks_checked,
                "bytes": report.bytes_checked,
            }
        )
    else:
        for note in report.notes:
            say(f"note: {note}")
        for found in report.findings:
            chunk = "" if found.chunk is None else f", chunk {found.chunk}"
            print_line(f"{found.file}{chunk}: {found.message}")
        if report.ok:
            print_line(f"ok: {report.chunks_checked} chunks, {size(report.bytes_checked)}")
    if not report.ok:
        raise typer.Exit(1)


@command(example="gradstore compact store --keep newest")
def compact(
    store: StorePath,
    collection: Annotated[str | None, opt("Only this collection.", autocompletion=collections)] = None,
    keep: Annotated[str, opt("all rows, or only the newest of each problem.")] = "all",
    json: Json = False,
) -> None:
    """Rewrite collections without deleted (and, with --keep newest, superseded) rows."""
    import gradstore

    check_known("keep", keep, ("all", "newest"))
    report = gradstore.open(store, mode="a").compact(collection, keep=cast(Literal["all", "newest"], keep))
    if json:
        print_json(report.describe())
    else:
        for name, (before, after) in report.rows.items():
            print_line(f"{name}: {before} rows before, {after} after")


def _words(value: object) -> str:
    """A value of the fingerprint: `yes`, `no`, or `name value, name value` without what is not set."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items() if part is not None)
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _steps(steps: dict) -> str:
    numbers = sorted(int(step) for step in steps)
    if len(numbers) > 4:
        return f"{numbers[0]} … {numbers[-1]} ({len(numbers)})"
    return " ".join(str(number) for number in numbers)
