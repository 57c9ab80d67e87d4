"""Write problem records to a file for trainers, and a note about how it was made next to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gradstore import to_verl
from gradstore.durable import check_parent, whole_file, write_text_file
from gradstore.errors import RequestError, check_known, first_line
from gradstore.outputs import check_free, check_output

FORMS = ("verl", "flat")


def about_path(path: Path) -> Path:
    """Path of the note about how a file was made."""
    return path.with_name(path.name + ".about.json")


def check_out(path: Path, form: str, overwrite: bool = False) -> None:
    """RequestError for an unknown form or suffix, a missing folder, or a file that is there and may not be replaced."""
    check_known("form", form, FORMS)
    if path.is_dir():
        raise RequestError(f"{path}: is a folder, expected the name of a file, .jsonl or .parquet")
    check_known(f"{path}: the suffix", path.suffix, (".jsonl", ".parquet"))
    check_output(path)
    check_parent(path)
    check_free((path, about_path(path)), overwrite)


def write_problems(
    path: Path, records: Sequence[Mapping[str, Any]], about: Mapping[str, Any], form: str, overwrite: bool = False
) -> None:
    """Write the records atomically, and `about` as JSON next to them.

    form: "verl" (data_source, prompt, ability, reward_model, extra_info) or "flat" (the canonical fields).
    `gradstore.read_problems` reads both. Raises RequestError as in `check_out`.
    """
    check_out(path, form, overwrite)
    rows = [to_verl(dict(record)) if form == "verl" else dict(record) for record in records]
    with whole_file(path) as unfinished:
        if path.suffix == ".jsonl":
            with unfinished.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            try:
                pq.write_table(pa.Table.from_pylist(rows), unfinished)
            except (pa.ArrowException, OverflowError) as error:
                raise RequestError(f"{path}: these problems fit no table ({first_line(error)}): write .jsonl") from None
        # before the problems appear: a problem file without its note would look finished
        write_text_file(about_path(path), json.dumps(about, indent=1, ensure_ascii=False) + "\n")
