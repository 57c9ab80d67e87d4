"""`info`, `verify`, `compact`, `import`: what a store holds, whether it is whole, and putting things into it."""

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from gradstore.cli.app import command, opt
from gradstore.cli.query import Json, StorePath
from gradstore.cli.show import print_json, print_line, print_table, say
from gradstore.errors import RequestError, check_known
from gradstore.wording import size


@command()
def info(store: StorePath, json: Json = False) -> None:
    """What a store holds: collections, steps, states, bytes, fingerprint."""
    import gradstore

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
        ],
        right=["problems", "rows", "live", "no signal", "failed", "commit", "size"],
    )
    for key, value in facts["fingerprint"].items():
        if key != "layout":
            say(f"{key}: {value}")


@command()
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


@command()
def compact(
    store: StorePath,
    collection: Annotated[str | None, opt("Only this collection.")] = None,
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


@command("import")
def import_(
    store: StorePath,
    collection: Annotated[str, typer.Argument(help="Collection to add to.")],
    problems: Annotated[Path | None, opt("Problem records, JSONL or Parquet, flat or verl's.")] = None,
    sketches: Annotated[Path | None, opt("Parquet with id, sketch, and maybe norm, pass_rate, n_rollouts.")] = None,
    step: Annotated[int | None, opt("Step of the sketches.")] = None,
    fingerprint: Annotated[
        Path | None, opt("JSON object saying how the sketches were made; needed to create a store.")
    ] = None,
    dtype: Annotated[str, opt("int8, int4, fp16 or fp32; only when the store is created.")] = "int8",
    json: Json = False,
) -> None:
    """Add problems, or sketches made elsewhere."""
    from gradstore.importing import import_problems, import_sketches

    if problems is None and sketches is None:
        raise RequestError("import needs --problems FILE, --sketches FILE or both")
    if sketches is not None and step is None:
        raise RequestError("--sketches needs --step")
    added = rows = 0
    if sketches is not None:
        added, rows = import_sketches(store, collection, sketches, step or 0, problems, fingerprint, dtype)
    elif problems is not None:
        added = import_problems(store, collection, problems)
    if json:
        print_json({"problems_added": added, "rows_added": rows})
    else:
        print_line(f"{added} problems and {rows} rows added to {collection}")


def _steps(steps: dict) -> str:
    numbers = sorted(int(step) for step in steps)
    if len(numbers) > 4:
        return f"{numbers[0]} … {numbers[-1]} ({len(numbers)})"
    return " ".join(str(number) for number in numbers)
