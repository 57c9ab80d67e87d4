"""Stores that somebody else wrote: a small honest store, and edits of it with right checksums.

`mutated(store, random)` changes one or two things anywhere in a store and says what. About half of the changes are
signed anew, as an attacker would: a checksum tells that bytes are those that were written, not who wrote them.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

import gradstore
from gradstore.durable import canonical_json, crc32c
from gradstore.inventory import INVENTORY, OF_COLLECTION, OF_STORE, take_inventory
from gradstore.layout import row_arrays
from gradstore.projection_digest import projection_digest

DIM = 12
LAYOUT = [["a", 0, 5], ["b", 5, DIM]]
SECOND: Any = [("a", 0, 6), ("b", 6, DIM)]
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 255, 65536, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -1.5, 1e308,
    "", "x", "../../../outside", "/etc/passwd", "a/b", "\x00", "\n", "g1", "g99999999999", "00000000", "🙂" * 50,
    [], {}, [[]], [0], ["x"], [[0, 0]], [[-1, -1]], [[2**40, 2**40]], {"x": 1}, {"": {}}, "x" * 10000,
)  # fmt: skip


def honest_store(path: Path) -> Path:
    """A store with two collections of 12 and 4 problems, two bases, tombstones, reasons, rounds, probes, coverage."""
    random = np.random.default_rng(0)
    (first, first_file), (second, second_file) = _projection(LAYOUT), _projection(SECOND)
    coverage = {"parameters": 0.9, "gradient": 0.8, "n_groups": 4, "lookups": 0.0, "left_out": []}
    store = gradstore.create(
        path,
        dim=DIM,
        fingerprint={"layout": LAYOUT, "model": "m", "projection": {"kind": "fitted", "basis": first}},
        chunk_rows=8,
        column_rows=16,
        attachments={f"projection-{first}.safetensors": first_file, "coverage.json": canonical_json(coverage)},
    )
    for name, n in (("pool", 12), ("bench", 4)):
        ids = [f"{name}{i}" for i in range(n)]
        store.add_problems(name, [_record(problem_id, i) for i, problem_id in enumerate(ids)])
        store.add_problems(name, [_record(f"{name}-more", 99)])
        with store.writer(name, step=0) as writer:
            states = [2 if i == 3 else 0 for i in range(n)]
            reasons = ["broken" if state else "" for state in states]
            rates = np.linspace(0, 1, n)
            writer.append(ids, random.normal(size=(n, DIM)), state=states, reason=reasons, pass_rate=rates)
    store.add_basis(second, SECOND, {"step": 1}, {f"projection-{second}.safetensors": second_file})
    with store.writer("pool", step=1) as writer:
        writer.append([f"pool{i}" for i in range(8)], random.normal(size=(8, DIM)), basis=1)
    store.delete("pool", ["pool5"])
    ids = [f"pool{i}" for i in range(4)]
    for step in range(2):
        store.rounds("pool").add({"step": step, "selector": "rand", "counts": {"live": 4}}, round_of(ids))
        four = [np.ones(4, np.float32)] * 4
        store.probes("pool").add(ids, four, four, [np.ones(4, np.int32)] * 4, step=step, target="bench")
    return path


def _projection(layout: list) -> tuple[str, bytes]:
    """(digest, file) of a projection of this layout that keeps no matrix."""
    about = json.dumps({"layout": layout, "layers": []})
    digest = projection_digest([(name, start, stop) for name, start, stop in layout], [], None)
    return digest, save({"x": np.zeros(1, np.float32)}, {"projection": about})


def _list_again(folder: Path) -> None:
    """Write the inventory of the files that are in a folder now, as whoever edits a store would."""
    file = folder / INVENTORY
    if file.is_file() and not file.is_symlink():
        try:
            commit = json.loads(file.read_bytes())["inventory"]["commit"]
        except (ValueError, LookupError, TypeError):
            return
        store = folder.parent.parent if folder.parent.name == "collections" else folder
        take_inventory(folder, store, OF_STORE if folder == store else OF_COLLECTION, commit)


def _record(problem_id: str, i: int) -> dict:
    prompt = f"what is {i}?" if i % 2 else [{"role": "user", "content": f"what is {i}?"}]
    return {"id": problem_id, "prompt": prompt, "tags": ["even"] * (1 - i % 2), "extra": {"number": i}}


def round_of(ids: list[str]) -> pa.Table:
    """The table of a round that picked these problems."""
    n = len(ids)
    columns = {name: [0.5] * n for name in ("score", "low", "high", "pass_rate", "weight")}
    columns |= {"id": ids, "state": ["live"] * n, "step": [0] * n, "rolled_out": [True] * n}
    return pa.table(columns | {"picked": list(range(n)), "rollouts": [4] * n})


# Signed edits: each writes what it is given, with the checksum that belongs to it.


def edit_manifest(collection: Path, change: Callable[[dict], Any]) -> None:
    """Change the body of a manifest in place, or replace it by what `change` returns; bytes are taken as they are."""
    file = collection / "manifest.json"
    body = json.loads(_bytes(file))["manifest"]
    found = change(body)
    text = found if isinstance(found, bytes) else canonical_json(body if found is None else found)
    file.write_bytes(b'{"crc32c":"%08x","manifest":%s}\n' % (crc32c(text), text))


def edit_header(store: Path, change: Callable[[dict], Any]) -> None:
    """The same with the root's attributes."""
    file = store / "zarr.json"
    root = json.loads(_bytes(file))
    body = root["attributes"]["gradstore"]
    body.pop("crc32c")
    found = change(body)
    if isinstance(found, bytes):
        crc = 0
        with suppress(ValueError, RecursionError):
            crc = crc32c(canonical_json(json.loads(found)))
        body = b'%s,"crc32c":"%08x"}' % (found[:-1], crc)
        file.write_bytes(b'{"zarr_format":3,"node_type":"group","attributes":{"gradstore":%s}}\n' % body)
        return
    body = body if found is None else found
    if isinstance(body, dict):
        body["crc32c"] = f"{crc32c(canonical_json(body)):08x}"
    root["attributes"]["gradstore"] = body
    file.write_text(json.dumps(root, indent=2) + "\n")


def edit_attachment(store: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of an attachment."""
    (file,) = (store / "attachments").glob(f"{name}.*")
    data = change(_bytes(file))
    file.unlink()
    (store / "attachments" / f"{name}.{crc32c(data):08x}").write_bytes(data)
    _list_again(store)


def edit_json(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """As a change of bytes: of the JSON value in them."""

    def changed(raw: bytes) -> bytes:
        value = json.loads(raw)
        found = change(value)
        return found if isinstance(found, bytes) else canonical_json(value if found is None else found)

    return changed


def edit_column(store: Path, collection: str, array: str, change: Callable[[np.ndarray], None]) -> None:
    """Change the published entries of an array in place."""
    found = next(one for one in row_arrays(DIM, "int8", (), 8, 16) if one.name == array)

    def sign(body: dict) -> None:
        for chunk in range(found.chunks(body["rows"])):
            file = store / "collections" / collection / body["generation"] / array / found.chunk_file(chunk)
            whole = bytearray(_bytes(file))
            used = found.rows_in(chunk, body["rows"]) * found.row_bytes
            entries = np.frombuffer(bytes(whole[:used]), found.dtype).copy()
            change(entries)
            whole[:used] = entries.tobytes()
            file.write_bytes(whole)
            body["chunks"][array][chunk] = f"{crc32c(bytes(whole[:used])):08x}"

    edit_manifest(store / "collections" / collection, sign)


def edit_problems(collection: Path, change: Callable[[pa.Table], pa.Table | bytes]) -> None:
    """Replace the first part of the problems by another table or other bytes; its rows are told as they were."""

    def sign(body: dict) -> None:
        part = body["problems"][0]
        file = collection / body["generation"] / "problems" / part[0]
        found = change(pq.read_table(pa.BufferReader(_bytes(file))))
        data = found if isinstance(found, bytes) else parquet(found)
        file.write_bytes(data)
        part[2:] = [len(data), f"{crc32c(data):08x}"]

    edit_manifest(collection, sign)


def edit_addition(folder: Path, change: Callable[[pa.Table], pa.Table | bytes], number: int = 0) -> None:
    """Replace a part of `probes` or `rounds`."""
    (file,) = folder.glob(f"part-{number:06d}-*.parquet")
    found = change(pq.read_table(pa.BufferReader(_bytes(file))))
    data = found if isinstance(found, bytes) else parquet(found)
    file.unlink()
    (folder / f"part-{number:06d}-{crc32c(data):08x}.parquet").write_bytes(data)
    _list_again(folder.parent)


def _bytes(file: Path) -> bytes:
    """Bytes of a file that an earlier edit may have replaced; OSError for what would take for ever to read."""
    if not file.is_file() or file.stat().st_size > 1 << 24:
        raise OSError(f"{file}: no small file")
    return file.read_bytes()


def parquet(table: pa.Table, **options: Any) -> bytes:
    """A Parquet file as bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", "write_page_checksum": True, **options})
    return bytes(sink.getvalue())


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """A table with other values, or another type, in a column; metadata stays."""
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    changed = table.set_column(table.column_names.index(name), name, column)
    return changed.replace_schema_metadata(table.schema.metadata)


# Random edits.


def mutated(store: Path, random: Random) -> str:
    """Change one or two things anywhere in the store; returns what was done. The same `random` does the same."""
    return "; ".join(random.choice(_KINDS)(store, random) for _ in range(random.choice((1, 1, 2))))


def _mutated_value(value: Any, random: Random) -> Any:
    """A JSON value with one part replaced, removed, repeated or added."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        name = random.choice(sorted(value))
        what = random.random()
        if what < 0.1:
            return {key: part for key, part in value.items() if key != name}
        if what < 0.2:
            return {**value, random.choice(("x", "../x", "crc32c", name + " ", "")): random.choice(NASTY)}
        return {**value, name: _mutated_value(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        what = random.random()
        if what < 0.1:
            return value[:place] + value[place + 1 :]
        if what < 0.2:
            return [*value, value[place]]
        if what < 0.25:
            return value[::-1]
        return [*value[:place], _mutated_value(value[place], random), *value[place + 1 :]]
    if isinstance(value, int) and random.random() < 0.4:
        return value + random.choice((-1, 1, 7, -1000, 10**6, 2**40))
    if isinstance(value, str) and random.random() < 0.4:
        return random.choice((value[1:], value + "0", value.upper(), value[::-1], f"../{value}", f"{value}\n"))
    return random.choice(NASTY)


def _mutated_text(value: Any, random: Random) -> Any:
    """A changed JSON value, or sometimes a text that a strict parser refuses, as bytes."""
    what = random.random()
    if what > 0.15:
        return _mutated_value(value, random)
    text = canonical_json(value)
    deep = 10 ** random.randrange(1, 6)
    return random.choice(
        (
            text.replace(b'{"', b'{"rows":1,"', 1),
            text[:-1] + b',"x":NaN}',
            text[:-1] + b',"x":' + b"[" * deep + b"]" * deep + b"}",
            text[:-1] + b',"x":' + b"9" * deep + b"}",
            text + b"\xff",
            b"[" * deep,
            b"",
        )
    )


def _manifest(store: Path, random: Random) -> str:
    collection = store / "collections" / random.choice(("pool", "bench"))
    with _unless_gone():
        edit_manifest(collection, lambda body: _mutated_text(body, random))
    return f"signed manifest of {collection.name}"


def _header(store: Path, random: Random) -> str:
    with _unless_gone():
        edit_header(store, lambda body: _mutated_text(body, random))
    return "signed header"


def _attachment(store: Path, random: Random) -> str:
    name = random.choice(("basis-000001.json", "coverage.json"))
    with _unless_gone():
        edit_attachment(store, name, edit_json(lambda value: _mutated_text(value, random)))
    return f"signed {name}"


def _column(store: Path, random: Random) -> str:
    arrays = ("scale", "norm", "step", "problem", "state", "pass_rate", "n_rollouts", "reason")
    array, seed = random.choice(arrays), random.randrange(2**32)

    def change(entries: np.ndarray) -> None:
        noise = np.random.default_rng(seed).bytes(entries.dtype.itemsize)
        place = seed % len(entries)
        if entries.dtype.kind == "f":
            entries[place] = (np.nan, np.inf, -1, 1e38, 0, np.frombuffer(noise, entries.dtype)[0])[seed % 6]
        else:
            limits = np.iinfo(entries.dtype)
            entries[place] = (limits.min, limits.max, 1, 200, np.frombuffer(noise, entries.dtype)[0])[seed % 5]

    with _unless_gone():
        edit_column(store, random.choice(("pool", "bench")), array, change)
    return f"signed {array}"


def _table(store: Path, random: Random) -> str:
    folder = random.choice(("problems", "rounds", "probes"))

    def change(table: pa.Table) -> pa.Table | bytes:
        name = random.choice(table.column_names)
        values = table[name].to_pylist()
        what = random.randrange(8)
        if what == 0:
            return table.drop_columns([name])
        if what == 1:
            return table.slice(0, random.randrange(table.num_rows))
        if what == 2:
            return pa.concat_tables([table, table])
        if what == 3:
            return set_column(table, name, [random.choice((None, 1, 2**40)) for _ in values])
        if what == 4:
            return table.replace_schema_metadata({random.choice(("gradstore.round", "x")): random.choice(_TEXTS)})
        if what == 5:
            data = bytearray(parquet(table, write_page_checksum=random.random() < 0.5))
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            return bytes(data)
        if isinstance(values[0], str):
            values[random.randrange(len(values))] = random.choice(_TEXTS)
        else:
            values[random.randrange(len(values))] = None
        return set_column(table, name, values)

    with _unless_gone():
        if folder == "problems":
            edit_problems(store / "collections" / random.choice(("pool", "bench")), change)
        else:
            edit_addition(store / "collections/pool" / folder, change, random.randrange(2))
    return f"signed table of {folder}"


_TEXTS = ("", "{", "[]", "{}", "null", '{"step": "x"}', '{"step": -1}', '[{"role": 1}]', "[" * 5000, "pool0", "\x1b[2J")


def _file(store: Path, random: Random) -> str:
    """A file or folder that is replaced by something else; not signed."""
    path = random.choice(sorted(path for path in store.rglob("*") if not path.is_symlink()))
    what = random.choice(("gone", "link out", "link in", "dangling", "loop", "pipe", "folder", "cut", "flip", "huge"))
    if what in ("cut", "flip", "huge") and not (path.is_file() and path.stat().st_size):
        what = "link out"
    name = path.relative_to(store).as_posix()
    if what == "cut":
        os.truncate(path, random.randrange(path.stat().st_size))
    elif what == "huge":
        os.truncate(path, 1 << 40)
    elif what == "flip":
        data = bytearray(path.read_bytes())
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
    else:
        moved = store.parent / "moved" / name.replace("/", "+")
        moved.parent.mkdir(exist_ok=True)
        shutil.rmtree(moved, ignore_errors=True)
        moved.unlink(missing_ok=True)
        path.rename(moved)
        put = {
            "gone": lambda: None,
            "link out": lambda: path.symlink_to(moved),
            "link in": lambda: path.symlink_to(store / random.choice(("zarr.json", "collections", "attachments"))),
            "dangling": lambda: path.symlink_to(store.parent / "nowhere"),
            "loop": lambda: path.symlink_to(path),
            "pipe": lambda: os.mkfifo(path),
            "folder": path.mkdir,
        }
        put[what]()
    return f"{what}: {name}"


def _more(store: Path, random: Random) -> str:
    """Another file or folder among those of the store."""
    names = (
        "collections/pool/g5", "collections/pool/g99999999999",
        "collections/pool/rounds/part-999999999-00000000.parquet",
        "collections/pool/rounds/part-000000-00000000.parquet", "attachments/basis-000009.json.00000000",
        "attachments/basis-000001.json.00000000", "collections/a b", "collections/.x",
        "collections/pool/.tmp-manifest.json",
        "collections/pool/g0/codes/c.9.0", "collections/pool/g0/problems/part-000009.parquet", "attachments/x",
        "collections/pool/indexes", "collections/pool/LOCK", "collections/pool/g0/.tmp-zarr.json",
    )  # fmt: skip
    path = store / random.choice(names)
    with _unless_gone():
        if path.is_dir() or not path.parent.is_dir() or any(parent.is_symlink() for parent in path.parents):
            return "nothing"
        path.unlink(missing_ok=True)
        what = random.choice(("file", "link", "folder", "pipe", "lock"))
        if what == "file":
            path.write_bytes(random.randbytes(random.randrange(100)))
        elif what == "link":
            (store.parent / "moved").mkdir(exist_ok=True)
            path.symlink_to(store.parent / "moved")
        elif what == "folder":
            path.mkdir()
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.write_text(json.dumps({"pid": random.choice(NASTY), "host": "x", "started": "", "program": ""}))
    return f"more: {path.relative_to(store)}"


def _unless_gone() -> Any:
    """An earlier edit may have taken away, or broken, what this one changes."""
    return suppress(OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, pa.ArrowException)


_KINDS = (_manifest, _manifest, _header, _attachment, _column, _column, _table, _table, _file, _file, _file, _more)
