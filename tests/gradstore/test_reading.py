"""Files that somebody else wrote: each is taken, or refused in one line that names it, and nothing else happens."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore
from gradstore import RequestError, read_problems
from gradstore.engine.rollouts import read_rollouts
from gradstore.importing import import_problems, import_sketches
from gradstore.keepable import MAX_ROW_BYTES
from gradstore.reading import json_rows
from gradstore.reading.files import read_object
from gradstore.reading.opening import open_rows
from tests.fuzz.inputs import DIM, KINDS, honest, honest_rows, mutated

PROBLEM = honest_rows("problems")[0]
ROLLOUT = honest_rows("rollouts")[0]
READERS: dict[str, Callable[[Path], Any]] = {"problems": read_problems, "rollouts": read_rollouts}
ROWS = {"problems": PROBLEM, "rollouts": ROLLOUT}


def refused(call: Callable[[], Any], *wanted: str) -> str:
    """The message of the refusal, which has every text that is wanted."""
    with pytest.raises(RequestError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    for text in wanted:
        assert text in message, message
    return message


def message_of(call: Callable[[], Any]) -> str | None:
    """The message of the refusal; None if there is none."""
    try:
        call()
    except RequestError as error:
        return str(error)
    return None


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else None for f in folder.rglob("*")}


def _spelled(row: dict, **raw: str) -> str:
    return "{" + ", ".join(f"{json.dumps(k)}: {raw.get(k) or json.dumps(v)}" for k, v in row.items()) + "}"


LINES: dict[str, tuple[Callable[[dict], bytes], str]] = {
    "deep": (lambda row: _spelled(row, tags="[" * 101 + "]" * 101).encode(), "nested more than 100 levels deep"),
    "deep objects": (lambda row: _spelled(row, tags='{"a":' * 300 + "1" + "}" * 300).encode(), "nested more than 100"),
    "endlessly deep": (lambda row: b'{"a": ' + b"[" * 200_000, "not usable JSON"),
    "many parts": (lambda row: _spelled(row, tags=f"[{'[],' * 1_000_001}[]]").encode(), "lists and objects"),
    "a key twice": (lambda row: b'{"prompt": "a", ' + _spelled(row)[1:].encode(), "key 'prompt' occurs twice"),
    "a key twice within": (lambda row: _spelled(row, tags='{"a": 1, "a": 2}').encode(), "key 'a' occurs twice"),
    "a huge integer": (lambda row: _spelled(row, tags="1" * 5000).encode(), "not usable JSON"),
    "half a surrogate pair": (lambda row: _spelled(row, prompt='"a\\ud800"').encode(), "has half a surrogate pair"),
    "not UTF-8": (lambda row: _spelled(row).encode()[:-1] + b', "a": "\xff"}', "not UTF-8 text"),
    "UTF-16": (lambda row: _spelled(row).encode("utf-16"), "is UTF-16 text"),
    "a long line": (lambda row: b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}', "longer than 32 MiB"),
    "a misspelled field": (lambda row: _spelled(row).replace('"tags"', '"tag"').encode(), "did you mean 'tags'?"),
    "capitals": (lambda row: _spelled(row).replace('"source"', '"Source"').encode(), "did you mean 'source'?"),
    "no object": (lambda row: f"{_spelled(row)}\n3\n".encode(), "line 2: expected a"),
    "blank": (lambda row: b" \n\n \n", "the file is empty"),
    "nothing": (lambda row: b"", "the file is empty"),
    "an empty list": (lambda row: b"[]", "at least one"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
@pytest.mark.parametrize("kind", READERS)
def test_hostile_json(tmp_path: Path, kind: str, case: str) -> None:
    """Every reader has the same checks, as there is one."""
    make, message = LINES[case]
    path = tmp_path / "x.jsonl"
    path.write_bytes(make(ROWS[kind]))
    refused(lambda: READERS[kind](path), str(path), message)


@pytest.mark.parametrize("kind", READERS)
def test_honest_files_of_every_spelling(tmp_path: Path, kind: str) -> None:
    """A byte order mark, carriage returns, blank lines and a JSON list are no faults."""
    rows = honest_rows(kind)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for text in (lines, "\ufeff" + lines, lines.replace("\n", "\r\n\r\n"), "\n \n" + lines[:-1], json.dumps(rows)):
        path = tmp_path / "x"
        path.write_bytes(text.encode())
        found = READERS[kind](path)
        assert len(found) == len({row.get("problem_id") or row["id"] for row in rows})
    nested = {**PROBLEM, "extra": {"a": json.loads("[" * 90 + "]" * 90)}, "prompt": r"\frac{1}{2} " * 100}
    (tmp_path / "x").write_text(json.dumps(nested) + "\n", encoding="utf-8")
    assert read_problems(tmp_path / "x")[0]["extra"] == nested["extra"]


COLUMN_TYPES: dict[str, pa.DataType] = {
    "string_view": pa.string_view(),
    "large_string": pa.large_string(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("case", COLUMN_TYPES)
def test_text_columns_of_every_writer(tmp_path: Path, case: str) -> None:
    """Polars writes views, pandas dictionaries: they are read as text, in scan and by place, over row groups."""
    for kind, reader in READERS.items():
        table = pa.Table.from_pylist(
            [row | {"prompt": f"{row['prompt']} long enough for a view"} for row in honest_rows(kind)]
        )
        columns = {
            name: table[name].combine_chunks().cast(COLUMN_TYPES[case])
            if table[name].type == pa.string()
            else table[name]
            for name in table.column_names
        }
        pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=3)
        pq.write_table(table, tmp_path / "plain.parquet")
        found, plain = reader(tmp_path / "x.parquet"), reader(tmp_path / "plain.parquet")
        if kind == "problems":
            assert found == plain
        else:
            assert [vars_of(g) for g in found.rollouts()] == [vars_of(g) for g in plain.rollouts()]


def vars_of(group: list) -> list[dict]:
    return [rollout.row() for rollout in group]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """A pipe without a writer would hang for ever, and one with a writer cannot be read twice."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to(tmp_path / "pipe")
        for name, why in (("pipe", "a pipe"), ("link", "a pipe"), ("socket", "a socket"), ("/dev/zero", "a device")):
            for reader in (read_problems, read_rollouts, read_object, open_rows):
                refused(lambda reader=reader, name=name: reader(tmp_path / name), str(tmp_path / name), why)
    read, write = os.pipe()
    try:
        refused(lambda: read_problems(f"/dev/fd/{read}"), "a pipe", "write it to a file first")
    finally:
        os.close(read)
        os.close(write)
    refused(lambda: read_problems(tmp_path), "Is a directory")
    refused(lambda: read_problems(tmp_path / "none"), "does not exist")
    refused(lambda: read_problems(tmp_path / "a\0b"), "cannot be read")


def test_an_entry_of_a_list_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is read in pieces, and a piece that never becomes an entry has an end too."""
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 3 << 20)
    (tmp_path / "x.json").write_bytes(b'[{"a": "' + b"x" * (12 << 20) + b'"}]')
    refused(lambda: read_problems(tmp_path / "x.json"), "entry 1: longer than 3 MiB")


def _bombs(folder: Path) -> list[Path]:
    """Small Parquet files that stand for gigabytes."""
    long = pa.array(["x" * (1 << 20)])
    zeros = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4000, np.int32)), long)
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), long)
    tables = {
        "repeated": pa.table({"id": [str(i) for i in range(4000)], "prompt": zeros}),
        "listed": pa.table({"id": ["a"], "tags": pa.ListArray.from_arrays([0, 200_000], many)}),
        "zeros": pa.table({"id": ["a"], "prompt": ["y" * (300 << 20)]}),
        "nulls": pa.table({"id": ["a"], "tags": pa.array([np.zeros(9_000_000, np.int8)])}),
        "rows": pa.table({"id": pa.nulls(20_000_000, pa.string())}),
    }
    for name, table in tables.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    return [folder / f"{name}.parquet" for name in tables]


def test_bombs_of_parquet(tmp_path: Path) -> None:
    """A file of some kilobytes must not take the machine's memory."""
    paths = _bombs(tmp_path)
    assert max(path.stat().st_size for path in paths) < 200_000
    code = (
        "import resource, sys; from gradstore import RequestError, read_problems\n"
        "import pyarrow.parquet\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_problems(path)\n"
        "    except RequestError as error: print(error)\n"
        "    else: print('taken')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    )
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    *messages, kilobytes = done.stdout.splitlines()
    assert len(messages) == len(paths)
    for path, message in zip(paths, messages, strict=True):
        assert message.startswith(str(path)), message
    assert int(kilobytes) < 1_000_000


def test_parquet_with_a_footer_that_lies(tmp_path: Path) -> None:
    """A broken statistic in the footer aborts the process where pyarrow's metadata is asked for a column."""
    path = tmp_path / "x.parquet"
    data = honest("verl.parquet")
    for place in range(len(data) - 8, len(data) - 900, -2):
        for bit in (0, 6):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            assert str(path) in (message_of(lambda: read_problems(path)) or str(path))


def test_columns_of_parquet(tmp_path: Path) -> None:
    """Names twice, types that no field has, and texts that are not UTF-8."""
    path = tmp_path / "x.parquet"
    table = pa.Table.from_pylist([PROBLEM])
    pq.write_table(table.append_column("id", table["id"]), path)
    refused(lambda: read_problems(path), "column 'id' occurs twice")
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"id": ["a"], "prompt": bad}), path)
    refused(lambda: read_problems(path), str(path), "row 1 or later: cannot be read")
    pq.write_table(pa.table({"id": ["a"], "prompt": ["q"], "level": [float("nan")]}), path)
    refused(lambda: read_problems(path), "row 1", "field 'level' is nan, which JSON cannot hold")
    pq.write_table(
        pa.Table.from_pylist([{k: v for k, v in ROLLOUT.items() if k != "logprobs"} | {"logprob": [1.0]}]), path
    )
    refused(lambda: read_rollouts(path), "field 'logprob' is not known; did you mean 'logprobs'?")
    pq.write_table(pa.Table.from_pylist([]), path)
    refused(lambda: read_problems(path), str(path))


def _put(folder: Path) -> dict[str, Path]:
    """Honest files to import."""
    files = {kind: folder / kind for kind in ("problems.jsonl", "sketches.parquet", "fingerprint.json")}
    for kind, path in files.items():
        path.write_bytes(honest(kind))
    return files


def _import(store: Path, files: dict[str, Path], collection: str = "pool", step: int = 0) -> tuple[int, int]:
    return import_sketches(
        store, collection, files["sketches.parquet"], step, files["problems.jsonl"], files["fingerprint.json"]
    )


def _sketches(**columns: Any) -> pa.Table:
    rows = honest_rows("sketches")
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        column = values if isinstance(values, pa.Array) else pa.array(values)
        place = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, column) if place is None else table.set_column(place, name, column)
    return table


SIX = range(6)
BAD_SKETCHES: dict[str, tuple[Callable[[], pa.Table], list[str]]] = {
    "dates": (lambda: _sketches(norm=pa.array(SIX, pa.int32()).cast(pa.date32())), ["'norm' is date32", "numbers"]),
    "booleans": (lambda: _sketches(norm=[True] * 6), ["column 'norm' is bool", "expected numbers"]),
    "durations": (lambda: _sketches(pass_rate=pa.array(SIX, pa.duration("s"))), ["'pass_rate' is duration", "numbers"]),
    "texts": (lambda: _sketches(n_rollouts=["4"] * 6), ["column 'n_rollouts' is string", "expected numbers"]),
    "a null norm": (lambda: _sketches(norm=[1.0, None] * 3), ["row 2: norm is null"]),
    "a null sketch": (lambda: _sketches(sketch=[[1.0] * DIM] * 5 + [None]), ["row 6: sketch is null"]),
    "a null within": (lambda: _sketches(sketch=[[1.0] * DIM] * 5 + [[None] * DIM]), ["row 6: sketch is null at dim"]),
    "nan": (lambda: _sketches(sketch=[[1.0] * DIM] * 5 + [[np.nan] * DIM]), ["'p5' is nan at dimension 0"]),
    "infinity": (lambda: _sketches(sketch=[[1.0] * DIM] * 5 + [[np.inf] * DIM]), ["'p5' is inf at dimension 0"]),
    "sketches of text": (lambda: _sketches(sketch=[["1"] * DIM] * 6), ["column 'sketch' is list", "lists of numbers"]),
    "sketches in lists": (lambda: _sketches(sketch=[[[1.0] * DIM]] * 6), ["column 'sketch' is list<"]),
    "no dimension": (lambda: _sketches(sketch=pa.array([[]] * 6, pa.list_(pa.float32()))), ["row 1: sketch is empty"]),
    "other lengths": (lambda: _sketches(sketch=[[1.0] * DIM] * 5 + [[1.0]]), ["row 6: sketch has 1 dimensions"]),
    "a norm of another name": (lambda: _sketches().rename_columns(["id", "sketch", "norms", "pass_rate", "n_rollouts"]),
                               ["'norms' is not known; did you mean 'norm'?"]),
    "a pass rate of another name": (lambda: _sketches().rename_columns(["id", "sketch", "norm", "passrate", "n"]),
                                    ["did you mean 'pass_rate'?"]),
    "a pass rate of 2": (lambda: _sketches(pass_rate=[2.0] * 6), ["pass_rate: value 2"]),
    "whole ids": (lambda: _sketches(id=list(SIX)), ["column 'id' is int64, expected text"]),
    "an unknown id": (lambda: _sketches(id=["p0", "p1", "p2", "p3", "p4", "nobody"]), ["'nobody'"]),
    "an id twice": (lambda: _sketches(id=["p0", "p0", "p2", "p3", "p4", "p5"]), ["'p0' occurs twice"]),
    "no rows": (lambda: _sketches().slice(0, 0), ["has no rows"]),
}  # fmt: skip


@pytest.mark.parametrize("there", [False, True], ids=["new store", "store there"])
@pytest.mark.parametrize("case", BAD_SKETCHES)
def test_a_failed_import_of_sketches_changes_nothing(tmp_path: Path, case: str, there: bool) -> None:
    """No problem is added, no store is made, and the file, the row or column and what was expected are named."""
    files, store = _put(tmp_path), tmp_path / "new/store"
    if there:
        _import(store, files)
        files["problems.jsonl"].write_bytes(honest("problems.jsonl") + b'{"id": "p9", "prompt": "new"}\n')
    make, wanted = BAD_SKETCHES[case]
    pq.write_table(make(), files["sketches.parquet"])
    before = tree(store) if there else None
    for collection in ("pool", "other") if there else ("pool",):
        refused(
            lambda collection=collection: _import(store, files, collection, 1),
            "sketches.parquet" if not there else "",
            *wanted,
        )
        assert (tree(store) if there else None) == before
    assert there or not store.exists()


@pytest.mark.parametrize(
    ("kind", "data", "wanted"),
    [
        ("problems.jsonl", b'{"id": "p0", "prompt": "another"}', ["'p0'"]),
        ("problems.jsonl", b"", ["problems.jsonl: the file is empty"]),
        ("fingerprint.json", b"\xff\xfe", ["fingerprint.json: not UTF-8 text"]),
        ("fingerprint.json", b"[1]", ["fingerprint.json: expected a JSON object"]),
        ("fingerprint.json", b'{"a": 1, "a": 2}', ["fingerprint.json", "key 'a' occurs twice"]),
        ("fingerprint.json", b'{"a": "\\ud800"}', ["fingerprint.json", "half a surrogate pair"]),
        ("fingerprint.json", b'{"a": NaN}', ["fingerprint.json", "is nan"]),
        ("fingerprint.json", b'{"a": ' + b"[" * 5000, ["fingerprint.json"]),
        ("fingerprint.json", b'{"layout": 5}', ["layout"]),
        ("fingerprint.json", b'{"layout": [["a", 0, 3], ["b", 4, 8]]}', ["layout"]),
        ("fingerprint.json", b'{"model": "other"}', [""]),
        ("sketches.parquet", b"PAR1 and no more", ["sketches.parquet: not a readable Parquet file"]),
        ("sketches.parquet", b'{"id": "p0"}', ["sketches.parquet: not a Parquet file"]),
    ],
)  # fmt: skip
def test_other_failed_imports_change_nothing(tmp_path: Path, kind: str, data: bytes, wanted: list[str]) -> None:
    """Into a store that is there, and where none is."""
    files = _put(tmp_path)
    _import(tmp_path / "store", files)
    before = tree(tmp_path / "store")
    files[kind].write_bytes(data)
    refused(
        lambda: _import(tmp_path / "store", files, step=1), *(wanted if "layout" not in wanted else ["fingerprint"])
    )
    assert tree(tmp_path / "store") == before
    if b"other" not in data:
        refused(lambda: _import(tmp_path / "new", files), *(wanted if "'p0'" not in wanted else [""]))
        assert not (tmp_path / "new").exists()


def test_imports_that_fail_late_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no check foresees: an error while rows are written, with new problems already on the disk."""
    files = _put(tmp_path)
    _import(tmp_path / "store", files)
    before = tree(tmp_path / "store")
    files["problems.jsonl"].write_bytes(honest("problems.jsonl") + b'{"id": "p9", "prompt": "new"}\n')

    def broken(*arguments: object, **named: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("gradstore.appender.Appender.write", broken)
    for store, collection in (("store", "pool"), ("store", "other"), ("new", "pool")):
        with pytest.raises(OSError, match="Input/output"):
            _import(tmp_path / store, files, collection, 1)
    monkeypatch.undo()
    assert tree(tmp_path / "store") == before
    assert not (tmp_path / "new").exists()
    assert _import(tmp_path / "store", files, "pool", 1) == (1, 6)
    assert _import(tmp_path / "store", files, "other", 1) == (7, 6)
    store = gradstore.open(tmp_path / "store")
    assert store.verify().ok
    assert store.commit("other") == 2  # the first manifest, and one publication of problems and rows


def test_an_empty_problem_file_makes_no_collection(tmp_path: Path) -> None:
    """It made one, and the next query over it broke."""
    files = _put(tmp_path)
    _import(tmp_path / "store", files)
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    refused(lambda: import_problems(tmp_path / "store", "empty", tmp_path / "empty.jsonl"), "empty.jsonl")
    assert gradstore.open(tmp_path / "store", "a").add_problems("empty", []) == 0
    assert gradstore.open(tmp_path / "store").collections == ["pool"]


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(fast_path: Path, kind: str) -> None:
    """Structured faults by seed: a file is taken, or refused in one line that names a file; stores stay whole."""
    files, path = _put(fast_path), fast_path / kind
    _import(fast_path / "store", files)
    before = tree(fast_path / "store")
    taken = 0

    def read() -> None:
        if kind in files:
            _import(fast_path / "new", {**files, kind: path})
            assert gradstore.open(fast_path / "new").verify().ok
            shutil.rmtree(fast_path / "new")
        elif kind.startswith(("problems", "verl")):
            read_problems(path)
        else:
            list(read_rollouts(path).rollouts())

    for seed in range(50):
        data, what = mutated(kind, Random(f"{kind} {seed}"))
        path.write_bytes(data)
        message = message_of(read)
        taken += message is None
        if message is not None:
            assert "\n" not in message, (seed, what)
            assert any(text in message for text in (str(fast_path), "collection", "fingerprint")), (seed, what, message)
        assert not (fast_path / "new").exists(), (seed, what)
    assert taken or kind == "dump.jsonl"
    assert tree(fast_path / "store") == before
