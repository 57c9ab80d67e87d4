"""Export of a selection to files for a trainer: verl's train.parquet and train.jsonl, and selection.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradstore import Store, to_verl
from gradstore.durable import whole_file, write_text_file
from gradstore.engine.selecting.selection import Selection
from gradstore.errors import RequestError, first_line
from gradstore.outputs import check_free, check_output_folder

FILES = ("train.parquet", "train.jsonl", "selection.json")


def check_folder(folder: Path, overwrite: bool) -> None:
    """RequestError for a folder that a selection cannot be written into."""
    check_output_folder(folder)
    check_free((folder / name for name in FILES), overwrite)


def training_records(store: Store, collection: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    """verl's records of some problems, in their order."""
    return [to_verl(record) for record in store.records(collection, ids)]


def as_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as JSON Lines, as in train.jsonl."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_selection(store: Store, selection: Selection, folder: Path, overwrite: bool = False) -> list[str]:
    """Write the chosen problems, best first; returns the paths written.

    train.parquet, train.jsonl: verl records; `extra_info.index` is the problem's id. selection.json: settings,
    scores, target and store commit. overwrite: replace these files if they are there; otherwise that is a RequestError.
    """
    check_folder(folder, overwrite)
    records = training_records(store, selection.collection, selection.ids)
    try:
        table = pa.Table.from_pylist(records)
    except (pa.ArrowException, OverflowError) as error:
        raise RequestError(
            f"{folder}: the chosen problems fit no Parquet table, as a field has values of different kinds "
            f"({first_line(error)})"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selection.json").unlink(missing_ok=True)  # written last: without it the others are no selection
    with whole_file(folder / "train.parquet") as unfinished:
        pq.write_table(table, unfinished)
    write_text_file(folder / "train.jsonl", as_lines(records))
    described = json.dumps(selection.describe(), indent=2, ensure_ascii=False)
    write_text_file(folder / "selection.json", f"{described}\n")
    return [str(folder / name) for name in FILES]
