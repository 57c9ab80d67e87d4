"""Load a data set's rows, from the hub or from local files of the same schema, as problem records.

A row without a usable question or answer is left out and counted. A row without one of the schema's columns is an
error.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from gradstore.engine.gradients.model_folder import HUB_S
from gradstore.errors import GradstoreError, RequestError, first_line, near_miss
from gradstore.reading.opening import read_records
from gradstore.trainer.data.answers import plain
from gradstore.trainer.data.catalogue import PLACE, DataSet, half_of

log = logging.getLogger(__name__)

BATCH = 1000
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".gz", ".zst")
"""Ends of the names of files of rows."""


@dataclass
class Loaded:
    """A loaded data set: its problems, and counts of the rows left out."""

    records: list[dict[str, Any]]
    """Canonical problem records in the data set's order; each question occurs once."""
    rows: int = 0
    duplicates: int = 0
    """Rows whose question is identical to an earlier one; some data sets repeat each question a hundred times."""
    contradicting: int = 0
    """Those among the duplicates with another ground truth than the first, which is kept."""
    shared_ids: int = 0
    """Problems whose own id is not theirs alone, so that a hash of the question follows it."""
    not_kept: int = 0
    """Rows excluded by the data set's definition (another year, a question about a picture)."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows without a usable question or answer, by reason."""


def load(
    source: DataSet,
    *,
    split: str | None = None,
    local: Path | None = None,
    instruction: str | None = None,
    solutions: bool = False,
) -> Loaded:
    """Load a data set's problems.

    split: None: the default split. local: a file, or a folder of files, with the data set's columns, to read instead of
    the hub. instruction: text after the question in the prompt; None: the data set's own; "": nothing.
    solutions: keep each problem's reference solution in its `extra`.
    Raises RequestError for a split or file that does not exist or has other columns; GradstoreError when the hub cannot
    be reached.
    """
    if solutions and not source.solution:
        raise RequestError(f"{source.name}: its answers are no solutions, so none can be kept: leave --solutions out")
    split = split or source.split
    rows = _hub_rows(source, split) if local is None else _local_rows(source, local)
    if source.half is not None:
        rows = list(rows)
        rows = [rows[number] for number in half_of(len(rows), source.half)]
    loaded = Loaded([])
    read: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        loaded.rows += 1
        missing = [name for name in source.columns if name not in row]
        if missing:
            raise RequestError(
                f"{where}: no column {missing[0]!r}; found {', '.join(map(str, row))}"
                f"{near_miss(missing[0], map(str, row))}"
            )
        if source.keep is not None and not source.keep(row):
            loaded.not_kept += 1
            continue
        try:
            digest, record = _record(source, row, split, source.instruction if instruction is None else instruction)
            if solutions:
                record["extra"]["solution"] = plain(row[source.answer])
        except ValueError as error:
            loaded.unusable[str(error)] += 1
            continue
        first = read.setdefault(digest, record)
        loaded.duplicates += first is not record
        loaded.contradicting += first["ground_truth"] != record["ground_truth"]
    # use the data set's own ids; append a hash where an id is not unique
    uses = Counter(record["id"] for record in read.values())
    for digest, record in read.items():
        if uses[record["id"]] > 1:
            record["id"] = f"{record['id']}-{digest}"
            loaded.shared_ids += 1
        loaded.records.append(record)
    return loaded


def _record(source: DataSet, row: Mapping[str, Any], split: str, instruction: str) -> tuple[str, dict[str, Any]]:
    value = row[source.question]
    question = source.read_question(value) if source.read_question else value
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    question = question.strip()
    if source.options:
        question += "\n" + "\n".join(_options(row[source.options]))
    truth = source.read_answer(row[source.answer])
    digest = hashlib.blake2b(question.encode(), digest_size=8).hexdigest()
    own = None if source.id is None else row[source.id]
    extra = {"reward": source.reward, "split": split}
    if source.reward == "judge":  # a judge needs the question, and verl does not pass the prompt to reward functions
        extra["question"] = question
    topic = "" if source.topic is None or row[source.topic] is None else str(row[source.topic])
    named = None if source.source is None else row[source.source]
    prompt = "\n\n".join(filter(None, (question, instruction)))
    if source.template is not None:
        prompt = re.sub(PLACE, lambda place: _cell(row, place[1]), source.template)
    return digest, {
        "id": f"{source.name}-{digest if own is None or own == '' else own}",
        "source": source.name if named is None or named == "" else str(named),
        "prompt": [{"role": "user", "content": prompt}],
        "ground_truth": truth,
        "tags": [source.ability, *([topic] if topic and topic != source.ability else [])],
        "extra": extra,
    }


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A column's text for a template."""
    if row[column] is None:
        raise ValueError(f"column {column!r} is empty")
    return str(row[column]).strip()


def _options(options: Any) -> Iterator[str]:
    if not isinstance(options, list | tuple) or not 2 <= len(options) <= 26:
        raise ValueError("the options are not a list of 2 to 26")
    for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False):
        yield f"{letter}. {str(option).strip()}"


def _local_rows(source: DataSet, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise RequestError(f"{path}: no file for {source.name} in this folder ({', '.join(SUFFIXES)})")
    for file in files:
        yield from read_records(file, source.columns, "row")


def _hub_rows(source: DataSet, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise RequestError(
            f"{source.name}: the hub is read with the package datasets: pip install 'gradstore[data]', or give a local "
            f"copy: --from {source.name}=PATH"
        ) from None
    for config in source.configs or (None,):
        name = f"{source.hub}{f' ({config})' if config else ''}"
        try:
            with _asked_once(source.hub):
                table = datasets.load_dataset(source.hub, config, split=split)
        except OSError as error:
            raise GradstoreError(
                f"{source.name}: {name} cannot be had from the hub: {first_line(error)}. Without one, give a local "
                f"copy with the columns {', '.join(source.columns)}: --from {source.name}=PATH (parquet or jsonl)"
            ) from None
        except ValueError as error:
            raise RequestError(f"{source.name}: {name} has no such data: {first_line(error)}") from None
        present = [column for column in source.columns if column in table.column_names]
        if len(present) < len(source.columns):
            lacking = next(column for column in source.columns if column not in present)
            near = near_miss(lacking, table.column_names)
            raise RequestError(f"{name}: no column {lacking!r}; found {', '.join(table.column_names)}{near}")
        number = 0
        # Arrow format: pictures are not decoded, and columns that are not needed are not read
        for batch in table.select_columns(present).with_format("arrow").iter(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", row


@contextmanager
def _asked_once(name: str) -> Iterator[None]:
    """Where the hub does not answer, the cache is read at once; by itself `datasets` would try for half a minute.

    That the cache has served is a warning.
    """
    import datasets
    import huggingface_hub as hub

    kept = hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    silence = None if kept[0] else _silence(name)
    if silence is not None:
        hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = kept
    if silence is not None:
        log.warning("%s: the copy in the cache serves; the hub cannot be asked: %s", name, silence)


@cache
def _silence(name: str) -> str | None:
    """Why the hub says nothing about a data set; None if it answers, be it that there is none."""
    import huggingface_hub as hub

    try:
        hub.HfApi().dataset_info(name, timeout=HUB_S)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
        pass  # `datasets` says what of that matters
    except Exception as error:  # noqa: BLE001 (errors of the network are those of whatever library the hub's uses)
        return first_line(error)
    return None
