"""`merge`: stores collected apart, such as shards, into one."""

from pathlib import Path
from typing import Annotated

import typer

from gradstore.cli.app import command, opt
from gradstore.cli.query import Json
from gradstore.cli.show import print_json, print_line, progress, warn


@command(example="gradstore merge store-0 store-1 --out store")
def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Folders of the stores; only read.")],
    out: Annotated[Path, opt("Store to make.")],
    json: Json = False,
) -> None:
    """Unite stores of one fingerprint, such as shards; started again after an interruption, it goes on."""
    import gradstore

    with progress("rows", None) as advance:
        report = gradstore.merge(stores, out, progress=advance)
    if json:
        print_json(report.describe())
        return
    for line in report.left_out:
        warn(f"not in {out}: {line}")
    for name, found in report.collections.items():
        print_line(
            f"{name}: {found.problems} problems and {found.rows} rows from {found.stores} stores; {found.again} rows "
            "were in more than one"
        )
    print_line(f"{out}: {'was merged already' if report.was_there else 'merged'}")
