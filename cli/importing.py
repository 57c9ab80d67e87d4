"""`import`: problems and sketches from files, or the run folder of another program, into a store."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gradstore.cli.app import app, command, opt
from gradstore.cli.help import Group
from gradstore.cli.query import Json, StorePath
from gradstore.cli.show import print_json, print_line, warn
from gradstore.errors import RequestError

FILES = "files"
"""The command that a line without the name of a format means: `gradstore import STORE COLLECTION --problems FILE`."""


class FilesByDefault(Group):
    """A first argument that is the name of no format is the store of `files`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else [FILES, *args])


importing = typer.Typer(
    cls=FilesByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"ignore_unknown_options": True},
    help="Add problems, sketches made elsewhere, or the run folder of another program.",
)
app.add_typer(importing, name="import", rich_help_panel="Measure")


@command(
    FILES,
    importing,
    example="gradstore import store pool --problems pool.jsonl --sketches sketches.parquet --step 0",
    needs=dict.fromkeys(("step", "fingerprint", "dtype"), "sketches"),
)
def files(
    store: StorePath,
    collection: Annotated[str, typer.Argument(help="Collection to add to.")],
    problems: Annotated[Path | None, opt("Problem records, JSONL or Parquet, flat or verl's.")] = None,
    sketches: Annotated[Path | None, opt("Parquet with id, sketch, and maybe norm, pass_rate, n_rollouts.")] = None,
    step: Annotated[int | None, opt("Step of the sketches.")] = None,
    fingerprint: Annotated[
        Path | None, opt("JSON object saying how the sketches were made; needed to create a store.")
    ] = None,
    dtype: Annotated[
        str | None, opt("int8, int4, 1bit, fp16 or fp32, of a store that is created [default: int8].")
    ] = None,
    json: Json = False,
) -> None:
    """Add problems, or sketches made elsewhere; the word `files` may be left out."""
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


@command("gradalign", importing, example="gradstore import gradalign runs/NAME --store store")
def gradalign(
    run: Annotated[Path, typer.Argument(help="Run folder: ckpt_root/experiment_name, with chunks/ and selected/.")],
    store: Annotated[Path, opt("Store to add to; created if there is none.")],
    collection: Annotated[str, opt("Name of the pool.")] = "pool",
    benchmark: Annotated[str, opt("Name of the validation problems.")] = "validation",
    problems: Annotated[Path | None, opt("The whole data set of the run, where its chunks lack problems.")] = None,
    mode: Annotated[str | None, opt("The picks to take, where a round has those of several modes.")] = None,
    steps: Annotated[int | None, opt("Training steps of a round (iters_per_select); default: by the folders.")] = None,
    json: Json = False,
) -> None:
    """Add a run of GradAlign: its problems, and its rounds with candidates, similarities, pass rates and picks."""
    from dataclasses import asdict

    from gradstore.importing_rounds import import_gradalign

    found = import_gradalign(run, store, collection, benchmark, problems=problems, mode=mode, steps=steps)
    if json:
        print_json(asdict(found))
        return
    for note in found.notes:
        warn(note)
    print_line(
        f"{found.problems} problems and {found.rounds} rounds added to {collection} ({found.known} rounds were there), "
        f"{found.validation} problems to {benchmark}"
    )
