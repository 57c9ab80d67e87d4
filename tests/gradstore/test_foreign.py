"""A store from elsewhere: whatever its names, numbers and links say, it is read rightly or refused in one line."""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore import GradstoreError
from gradstore.attachments import read_coverage
from gradstore.durable import canonical_json

stores: Any = pytest.importorskip("tests.fuzz.stores")

N_RANDOM = int(os.environ.get("GRADSTORE_FOREIGN_STORES", "300"))
LIMIT_S, HANGS_S = 5.0, 60.0
"""Seconds of the processor that a reader may take, and seconds after which it counts as hung on a busy machine."""


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.honest_store(tmp_path_factory.mktemp("honest") / "store")


@pytest.fixture
def store(honest: Path, fast_path: Path) -> Path:
    """A copy to change, in a folder of its own, so that what lies beside it can be watched."""
    shutil.copytree(honest, fast_path / "place/store", symlinks=True)
    return fast_path / "place/store"


def picture(folder: Path) -> dict[str, Any]:
    """Kind, size and bytes of everything in a folder; of a link where it points."""
    found: dict[str, Any] = {}
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                size = path.stat().st_size
                found[str(path)] = (size, path.read_bytes() if size < 1 << 24 else b"")
            else:
                found[str(path)] = path.stat().st_mode
    return found


def everything(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way to read a store."""
    yield "open", lambda: gradstore.open(path)
    opened: list[gradstore.Store] = []
    yield "open again", lambda: opened.append(gradstore.open(path))
    if not opened:
        return
    (store,) = opened
    yield "info", store.info
    yield "verify", store.verify
    yield "layers", lambda: store.layers
    yield "coverage", lambda: read_coverage(path)
    names: list[str] = []
    yield "collections", lambda: names.extend(store.collections)
    for name in {"pool", "bench", *names[:4]}:
        yield "problems", lambda name=name: store.problems(name).to_pylist()
        yield "records", lambda name=name: store.records(name)
        yield "history", lambda name=name: store.history(name).to_pylist()
        yield "deleted", lambda name=name: store.deleted(name)
        yield "rounds", lambda name=name: [one.picks for one in store.rounds(name)]
        yield "probes", lambda name=name: store.probes(name).table().to_pylist()
        yield "view", lambda name=name: use_view(store, name)
    yield "mirror", lambda: mirrored(path)


def use_view(store: gradstore.Store, name: str) -> None:
    view = store.view(name)
    columns = (
        view.ids,
        view.steps,
        view.norms,
        view.states,
        view.pass_rates,
        view.n_rollouts,
        view.reasons,
        view.bases,
    )
    assert all(len(column) == len(view) for column in columns)
    assert view.states.max(initial=0) <= 2
    assert not len(view) or set(view.positions(list(view.ids)).tolist()) == set(range(len(view)))
    for basis in view.live_bases:
        of_one = store.view(name, basis=basis)
        rows = of_one.rows(np.arange(len(of_one)))
        assert rows.shape == (len(of_one), view.dim)


def mirrored(path: Path) -> None:
    from zarr.storage import LocalStore

    target = path.parent / "copy"
    shutil.rmtree(target, ignore_errors=True)
    try:
        copy = gradstore.mirror(LocalStore(path), target)
        for name in copy.collections:
            use_view(copy, name)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def tried(path: Path) -> list[str]:
    """Read the store in every way; returns the errors. They must be GradstoreErrors of one line, and come soon."""
    before = picture(path.parent)
    errors = []
    for what, read in everything(path):
        started, busy = time.monotonic(), time.process_time()
        try:
            read()
        except GradstoreError as error:
            errors.append(str(error))
        assert time.process_time() - busy < LIMIT_S, what
        assert time.monotonic() - started < HANGS_S, what
    assert not [error for error in errors if "\n" in error or len(error) > 2000]
    assert picture(path.parent) == before
    return errors


def changes(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each way to change a store."""
    opened: list[gradstore.Store] = []
    yield "open", lambda: opened.append(gradstore.open(path, mode="a"))
    if not opened:
        return
    (store,) = opened
    yield "problems", lambda: store.add_problems("pool", [{"id": "new", "prompt": "?"}])
    yield "rows", lambda: append(store)
    yield "delete", lambda: store.delete("bench", ["bench1"])
    yield "rounds", lambda: store.rounds("pool").add({"step": 9}, stores.round_of(["pool1"]))
    yield "compact", lambda: store.compact(keep="newest")
    yield "new", lambda: store.add_problems("third", [{"id": "a", "prompt": "?"}])


def append(store: gradstore.Store) -> None:
    with store.writer("pool", step=2) as writer:
        writer.append(["pool0", "pool1"], np.ones((2, stores.DIM)), basis=1)


def changed(path: Path) -> None:
    """Change the store in every way: GradstoreErrors alone, and nothing beside its folder may change."""
    before = {name: one for name, one in picture(path.parent).items() if not name.startswith(f"{path}/")}
    for what, change in changes(path):
        busy = time.process_time()
        try:
            change()
        except GradstoreError as error:
            assert "\n" not in str(error), (what, str(error))  # noqa: PT017
        assert time.process_time() - busy < LIMIT_S, what
    assert {name: one for name, one in picture(path.parent).items() if not name.startswith(f"{path}/")} == before


def test_an_honest_store_is_read(store: Path) -> None:
    """The edits below start from this one, so it must give no error by itself."""
    assert tried(store) == []
    report = gradstore.open(store).verify()
    assert report.ok, report.findings


@pytest.mark.parametrize("seed", range(0, N_RANDOM, 20))
def test_random_edits(honest: Path, fast_path: Path, seed: int) -> None:
    """Twenty stores each, half of them with right checksums: a right answer or one line, nothing else."""
    for one in range(seed, seed + 20):
        path = fast_path / f"{one}/store"
        shutil.copytree(honest, path, symlinks=True)
        what = stores.mutated(path, Random(one))
        try:
            tried(path)
            changed(path)
        except Exception as error:
            raise AssertionError(f"store {one}: {what}: {type(error).__name__}: {error}") from error
        shutil.rmtree(path.parent)


# Edits by hand: (what is refused, the edit, a part of the error).

Edit = Callable[[Path], Any]


def manifest(change: Callable[[dict], Any]) -> Edit:
    return lambda store: stores.edit_manifest(store / "collections/pool", change)


def header(change: Callable[[dict], Any]) -> Edit:
    return lambda store: stores.edit_header(store, change)


def sets(*path: Any, to: Any) -> Callable[[Any], None]:
    """A change of a JSON value: the member at the end of the path gets another value."""

    def change(value: Any) -> None:
        for name in path[:-1]:
            value = value[name]
        value[path[-1]] = to

    return change


def attached(name: str, change: Callable[[Any], Any]) -> Edit:
    return lambda store: stores.edit_attachment(store, name, stores.edit_json(change))


def column(array: str, value: Any, place: int = 2) -> Edit:
    def change(entries: np.ndarray) -> None:
        if place < len(entries):
            entries[place] = value

    return lambda store: stores.edit_column(store, "pool", array, change)


def problems(change: Callable[[pa.Table], pa.Table | bytes]) -> Edit:
    return lambda store: stores.edit_problems(store / "collections/pool", change)


def addition(kind: str, change: Callable[[pa.Table], pa.Table | bytes]) -> Edit:
    return lambda store: stores.edit_addition(store / "collections/pool" / kind, change)


def values(name: str, to: Any, place: int = 0) -> Callable[[pa.Table], pa.Table]:
    """A change of a table: another value in a column."""

    def change(table: pa.Table) -> pa.Table:
        found = table[name].to_pylist()
        found[place] = to
        return stores.set_column(table, name, pa.array(found, table.schema.field(name).type))

    return change


def about(text: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({"gradstore.round": text})


def link(name: str, to: str = "../outside") -> Edit:
    """Replaces a file or folder of the store by a link to a copy of it outside."""

    def edit(store: Path) -> None:
        path, outside = store / name, store.parent / "outside"
        if path.exists():
            path.rename(outside)
        else:
            outside.mkdir()
        path.symlink_to(outside)

    return edit


def pipe(name: str) -> Edit:
    def edit(store: Path) -> None:
        (store / name).unlink(missing_ok=True)
        os.mkfifo(store / name)

    return edit


def folder(name: str) -> Edit:
    def edit(store: Path) -> None:
        (store / name).unlink()
        (store / name).mkdir()

    return edit


def put(name: str, data: bytes = b"") -> Edit:
    return lambda store: (store / name).write_bytes(data)


def renamed(pattern: str, name: str) -> Edit:
    """Gives the file that matches another name in its folder."""

    def edit(store: Path) -> None:
        (file,) = store.glob(pattern)
        file.rename(file.with_name(name))

    return edit


def bomb(table: pa.Table) -> bytes:
    """The table with a prompt of 1 MB in every row, once in the file."""
    prompts = pa.DictionaryArray.from_arrays(pa.array([0] * table.num_rows, pa.int32()), ["x" * 10**6])
    return bytes(stores.parquet(stores.set_column(table, "prompt", prompts), store_schema=False))


def bombed(store: Path) -> None:
    """Problems of a gigabyte and more in a few kilobytes, and a manifest that tells their number."""
    stores.edit_manifest(store / POOL, lambda body: sets("problems", 0, 1, to=400 * body["problems"][0][1])(body))
    stores.edit_problems(store / POOL, lambda table: bomb(pa.concat_tables([table] * 400)))


def wide(table: pa.Table) -> bytes:
    """A hundred megabytes of zeros in a column of lists, in some kilobytes."""
    zeros = pa.array(np.zeros(1 << 25, np.float32))
    offsets = [0, *[len(zeros)] * table.num_rows]
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), zeros)
    return bytes(stores.parquet(stores.set_column(table, "derivatives", lists)))


POOL, G0 = "collections/pool", "collections/pool/g0"
REFUSED: list[tuple[str, Edit, str]] = [
    ("rows beyond the files", manifest(sets("rows", to=2**40)), "field chunks"),
    ("rows beyond the files, with checksums", manifest(lambda body: grown(body)), "shorter|missing"),
    ("negative rows", manifest(sets("rows", to=-1)), "field rows"),
    ("rows as text", manifest(sets("rows", to="19")), "field rows"),
    ("rows as true", manifest(sets("rows", to=True)), "field rows"),
    ("rows as a float", manifest(sets("rows", to=19.0)), "field rows"),
    ("rows of many digits", manifest(sets("rows", to=10**30)), "field rows"),
    (
        "rows twice",
        manifest(lambda body: canonical_json(body).replace(b'"rows":', b'"rows":1,"rows":')),
        "occurs twice",
    ),
    ("NaN", manifest(lambda body: canonical_json(body).replace(b'"commit":', b'"x":NaN,"commit":')), "not usable JSON"),
    ("deep nesting", manifest(lambda body: b"[" * 10**5 + b"]" * 10**5), "not usable JSON"),
    ("not UTF-8", manifest(lambda body: b'{"\xff":1}'), "not usable JSON"),
    ("half a surrogate pair", manifest(lambda body: canonical_json({**body, "reasons": ["", "\ud800"]})), "not usable"),
    ("a list for a manifest", manifest(lambda body: []), "field"),
    ("a number for a manifest", manifest(lambda body: b"7"), "field"),
    ("another member", manifest(sets("more", to=1)), "field more"),
    ("a member missing", manifest(lambda body: body.pop("reasons") and None), "field reasons"),
    ("another format", manifest(sets("format", to=9)), "upgrade gradstore"),
    ("format as text", manifest(sets("format", to="2")), "upgrade gradstore"),
    ("commit below 0", manifest(sets("commit", to=-1)), "field commit"),
    ("generation outside", manifest(sets("generation", to="../../../outside")), "field generation"),
    ("generation elsewhere", manifest(sets("generation", to="g0/../g0")), "field generation"),
    ("generation g00", manifest(sets("generation", to="g00")), "field generation"),
    ("generation of many digits", manifest(sets("generation", to="g" + "9" * 5000)), "field generation"),
    ("generation with a newline", manifest(sets("generation", to="g0\n")), "field generation"),
    ("no such generation", manifest(sets("generation", to="g7")), "missing"),
    ("an array less", manifest(lambda body: body["chunks"].pop("norm") and None), "field chunks.norm"),
    ("an array more", manifest(sets("chunks", "../x", to=[])), r"field chunks\.\.\./x"),
    ("a checksum less", manifest(lambda body: body["chunks"]["step"].pop() and None), "field chunks.step"),
    ("a checksum more", manifest(lambda body: body["chunks"]["codes"].append("00000000")), "field chunks.codes"),
    ("a checksum of letters", manifest(sets("chunks", "step", 0, to="zzzzzzzz")), "field chunks.step.0"),
    ("a checksum with a sign", manifest(sets("chunks", "step", 0, to="-0000001")), "field chunks.step.0"),
    ("a part outside", manifest(sets("problems", 0, 0, to="../../../../outside.parquet")), "field problems.0.0"),
    ("a part of the root", manifest(sets("problems", 0, 0, to="/etc/passwd")), "field problems.0.0"),
    ("a part of another kind", manifest(sets("problems", 0, 0, to="part-000000.txt")), "field problems.0.0"),
    ("a part twice", manifest(lambda body: body["problems"].append(body["problems"][0])), "field problems"),
    ("a part of no rows", manifest(sets("problems", 0, 1, to=0)), "field problems.0.1"),
    ("a part of too many rows", manifest(sets("problems", 0, 1, to=2**31 - 1)), "field problems"),
    ("a part of more rows than it has", manifest(sets("problems", 0, 1, to=5000)), "rows instead of 5000"),
    ("a part of fewer bytes", manifest(sets("problems", 0, 2, to=700)), "bytes"),
    ("a part with a short entry", manifest(lambda body: body["problems"][0].pop() and None), "field problems.0"),
    ("no problems", manifest(sets("problems", to=[])), "rows of no problem"),
    ("a tombstone of no problem", manifest(sets("tombstones", to=[[99, 0]])), "field tombstones"),
    ("a tombstone below 0", manifest(sets("tombstones", to=[[-1, 5]])), "field tombstones.0.0"),
    ("a tombstone after the last row", manifest(sets("tombstones", to=[[1, 999]])), "field tombstones"),
    ("tombstones out of order", manifest(sets("tombstones", to=[[2, 1], [1, 1]])), "field tombstones"),
    ("a tombstone twice", manifest(sets("tombstones", to=[[1, 1], [1, 2]])), "field tombstones"),
    ("no reasons", manifest(sets("reasons", to=[])), "field reasons"),
    ("a first reason", manifest(sets("reasons", to=["x"])), "field reasons"),
    ("a reason that is no text", manifest(sets("reasons", to=["", 5])), "field reasons.1"),
    ("more reasons than uint16 counts", manifest(sets("reasons", to=[""] * 65537)), "field reasons"),
    ("fewer reasons than rows use", manifest(sets("reasons", to=[""])), "row 3 has reason 1, expected a reason from 0"),
    ("an unknown basis", manifest(sets("bases", to=[[12, 7]])), "field bases: basis 7"),
    ("bases out of order", manifest(sets("bases", to=[[12, 1], [3, 0]])), "field bases"),
    ("a basis after the last row", manifest(sets("bases", to=[[999, 1]])), "field bases"),
    ("a basis that uint16 does not hold", manifest(sets("bases", to=[[12, 65536]])), "field bases.0.1"),
    ("no bases, as a list", manifest(sets("bases", to=[])), "field bases"),
    ("dim 0", header(sets("dim", to=0)), "field dim"),
    ("dim without end", header(sets("dim", to=2**40)), "field dim"),
    ("another dim", header(sets("dim", to=11)), "layout"),
    ("dim as a float", header(sets("dim", to=12.0)), "field dim"),
    ("another dtype", header(sets("dtype", to="int3")), "field dtype"),
    ("chunk_rows 0", header(sets("chunk_rows", to=0)), "field chunk_rows"),
    ("chunk_rows without end", header(sets("chunk_rows", to=2**60)), "field chunk_rows"),
    ("column_rows null", header(sets("column_rows", to=None)), "field column_rows"),
    ("column_rows below 0", header(sets("column_rows", to=-5)), "field column_rows"),
    ("a format that does not fit", header(sets("format", to=1)), "field format"),
    ("a format as text", header(sets("format", to="3")), "field format"),
    ("an unknown column", header(sets("columns", to=["x"])), "upgrade gradstore"),
    ("columns as text", header(sets("columns", to="ess")), "field columns"),
    ("a fingerprint that is no object", header(sets("fingerprint", to=[])), "field fingerprint"),
    ("a layout that is no list", header(sets("fingerprint", "layout", to={})), "layout"),
    ("a layout with a short entry", header(sets("fingerprint", "layout", to=[["a", 0]])), "layout"),
    ("a layout with a gap", header(sets("fingerprint", "layout", to=[["a", 0, 4], ["b", 5, 12]])), "layout"),
    ("a layout beyond dim", header(sets("fingerprint", "layout", to=[["a", 0, 13]])), "layout"),
    ("a layout backwards", header(sets("fingerprint", "layout", to=[["a", 0, 12], ["b", 12, 3]])), "layout"),
    ("a header twice", header(lambda body: canonical_json(body).replace(b'"dim":', b'"dim":9,"dim":')), "twice"),
    ("a deep fingerprint", header(lambda body: deep(body)), "not usable JSON"),
    ("a header that is a list", header(lambda body: []), "not the text that was written"),
    ("a basis without a digest", attached("basis-000001.json", lambda value: value.pop("digest") and None), "digest"),
    ("a basis of other dimensions", attached("basis-000001.json", sets("layout", to=[["a", 0, 5]])), "layout"),
    ("a basis about nothing", attached("basis-000001.json", sets("about", to=None)), "field about"),
    ("a basis missing", renamed("attachments/basis-000001*", "basis-000002.json.00000000"), "basis 1 is missing"),
    ("a basis twice", put("attachments/basis-000001.json.00000000"), "2 attachments have the name"),
    ("coverage without end", attached("coverage.json", sets("gradient", to="x")), "field gradient"),
    ("a step below 0", column("step", -1), "row 2 has step -1, expected a step"),
    ("a problem beyond the table", column("problem", 99), "row 2 has problem 99, expected a problem from 0 to 12"),
    ("a problem below 0", column("problem", -1), "row 2 has problem -1"),
    ("an unknown state", column("state", 9), "row 2 has state 9, expected a state from 0 to 2"),
    ("a norm that is not finite", column("norm", np.inf), "row 2 has norm inf"),
    ("a norm below 0", column("norm", -1), "row 2 has norm -1"),
    ("a scale that is nan", column("scale", np.nan), "row 2 has scale nan"),
    ("a scale without end", column("scale", 1e30), "row 2 has scale"),
    ("a pass rate above 1", column("pass_rate", 1.5), "row 2 has pass_rate 1.5"),
    ("rollouts below 0", column("n_rollouts", -4), "row 2 has n_rollouts -4"),
    ("a reason beyond the list", column("reason", 60000), "row 2 has reason 60000"),
    ("an id twice", problems(values("id", "pool1")), "'pool1' occurs more than once"),
    ("an id that is null", problems(lambda t: stores.set_column(t, "id", pa.nulls(len(t), pa.string()))), "nulls"),
    ("ids as numbers", problems(lambda t: stores.set_column(t, "id", list(range(len(t))))), "column id is int64"),
    ("a column missing", problems(lambda t: t.drop_columns(["tags"])), "columns id, source"),
    ("a column more", problems(lambda t: t.append_column("x", t["id"])), "columns id, source"),
    ("rows missing", problems(lambda t: t.slice(1)), "rows instead of"),
    ("extra that is no JSON", problems(values("extra", "{")), "'pool0', extra: damaged: not usable JSON"),
    ("extra that is a list", problems(values("extra", "[]")), "'pool0', extra: damaged"),
    ("extra that is deep", problems(values("extra", "[" * 5000 + "]" * 5000)), "'pool0', extra"),
    ("messages that are no list", problems(values("messages", "{}")), "'pool0', messages"),
    ("messages without roles", problems(values("messages", '[{"content": "x"}]')), "field 0.role"),
    ("messages that are numbers", problems(values("messages", "[1]")), "'pool0', messages"),
    ("problems that are no Parquet", problems(lambda t: b"PAR1" * 300), "damaged"),
    ("text that is not UTF-8", problems(lambda t: bytes(broken_text(t))), "damaged"),
    ("a dictionary that is a bomb", bombed, "bytes of columns"),
    ("a round about nothing", addition("rounds", about("")), "not usable JSON"),
    ("a round without metadata", addition("rounds", lambda t: t.replace_schema_metadata(None)), "is no round"),
    ("a round at step -1", addition("rounds", about('{"step": -1}')), "field step"),
    ("a round with counts as text", addition("rounds", about('{"step": 1, "counts": {"live": "x"}}')), "counts.live"),
    ("a deep round", addition("rounds", about('{"step": 1, "x": ' + "[" * 5000 + "]" * 5000 + "}")), "not usable JSON"),
    ("a round of an unknown state", addition("rounds", values("state", "x")), "state: not one of"),
    ("a round that picks twice", addition("rounds", values("picked", 1)), "picked: does not count"),
    ("a round with an id twice", addition("rounds", values("id", "pool1")), "id: one occurs twice"),
    ("a round without scores", addition("rounds", lambda t: t.drop_columns(["score"])), "columns id, low"),
    ("probes with a reward less", addition("probes", values("rewards", [1.0])), "row 0: rewards: not one for each"),
    ("probes with a nan for a reward", addition("probes", values("rewards", [np.nan] * 4)), "one is not finite"),
    ("probes at step -1", addition("probes", values("step", -1)), "row 0: step: negative"),
    ("probes with a broken objective", addition("probes", values("objective", "[]")), "objective"),
    ("probes that are a bomb", addition("probes", wide), "bytes of columns in a file"),
    (
        "a round numbered a million",
        renamed(f"{POOL}/rounds/part-000001*", "part-999999999-00000000.parquet"),
        "missing",
    ),
    ("a round twice", put(f"{POOL}/rounds/part-000001-00000000.parquet"), "occurs twice"),
    ("a linked root", link("zarr.json"), "zarr.json: is a symbolic link"),
    ("linked collections", link("collections"), "collections: is a symbolic link"),
    ("linked attachments", link("attachments"), "attachments: is a symbolic link"),
    ("a linked collection", link(POOL), "pool: is a symbolic link"),
    ("a linked manifest", link(f"{POOL}/manifest.json"), "manifest.json: is a symbolic link"),
    ("a linked generation", link(G0), "g0: is a symbolic link"),
    ("a linked array", link(f"{G0}/step"), "step: is a symbolic link"),
    ("a linked chunk", link(f"{G0}/step/c.0"), r"c\.0: is a symbolic link"),
    ("linked codes", link(f"{G0}/codes/c.0.0"), r"c\.0\.0: is a symbolic link"),
    ("linked problems", link(f"{G0}/problems"), "problems: is a symbolic link"),
    ("linked rounds", link(f"{POOL}/rounds"), "rounds: is a symbolic link"),
    ("linked probes", link(f"{POOL}/probes"), "probes: is a symbolic link"),
    ("a linked lock", link(f"{POOL}/LOCK"), "LOCK: is a symbolic link"),
    ("a linked lease", link(f"{G0}/IN-USE"), "IN-USE: is a symbolic link"),
    ("a pipe for a manifest", pipe(f"{POOL}/manifest.json"), "no ordinary file"),
    ("a pipe for the root", pipe("zarr.json"), "no ordinary file"),
    ("a pipe for a chunk", pipe(f"{G0}/step/c.0"), "no ordinary file"),
    ("a pipe for codes", pipe(f"{G0}/codes/c.0.0"), "no ordinary file"),
    ("a pipe for problems", pipe(f"{G0}/problems/part-000001.parquet"), "no ordinary file"),
    ("a pipe for the lease", pipe(f"{G0}/IN-USE"), "no ordinary file"),
    ("a folder for a manifest", folder(f"{POOL}/manifest.json"), "no ordinary file"),
]


def grown(body: dict) -> None:
    """Ten billion rows, each chunk with a checksum, where the files have nineteen."""
    body["rows"] = 1 << 16
    for name, crcs in body["chunks"].items():
        crcs.extend(["00000000"] * ((1 << 16) // (8 if name == "codes" else 16) - len(crcs)))


def deep(body: dict) -> bytes:
    text = bytes(canonical_json({**body, "fingerprint": {"x": 0}}))
    return text.replace(b'{"x":0}', b'{"x":' + b"[" * 900 + b"]" * 900 + b"}")


def broken_text(table: pa.Table) -> bytes:
    """A part whose first id is not UTF-8, uncompressed so that its bytes can be found."""
    plain = stores.parquet(table, compression="none", write_page_checksum=False, use_dictionary=False)
    return bytes(plain.replace(b"pool11", b"pool\xff\xfe"))


@pytest.mark.parametrize(("edit", "message"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_edits_by_hand(store: Path, edit: Edit, message: str) -> None:
    """Each is refused in a line that names what is wrong; nothing is changed, and nothing beside the store."""
    edit(store)
    errors = tried(store)
    assert [error for error in errors if re.search(message, error)], errors
    changed(store)


def in_memory(store: Path, more: dict[str, bytes] | None = None) -> Any:
    """The store's files as a zarr store in memory, with more keys."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    files = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    make = default_buffer_prototype().buffer.from_bytes
    return MemoryStore({key: make(data) for key, data in {**files, **(more or {})}.items()})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("attachments/evil", "is not the name of a file"),
        ("attachments/a b.00000000", "is not the name of a file"),
        ("attachments/x.0000000g", "is not the name of a file"),
        (f"{POOL}/rounds/evil.parquet", "is not the name of a file"),
        (f"{POOL}/rounds/part-1-00000000.parquet", "is not the name of a file"),
        (f"{POOL}/probes/part-000000-00000000.parquet\n", "is not the name of a file"),
        (f"{POOL}/probes/part-000009-00000000.parquet", "do not match their checksum"),
        ("collections/a b/manifest.json", "collection name 'a b' is not possible"),
        (f"collections/{'x' * 300}/manifest.json", "is not possible"),
    ],
)
def test_names_of_a_remote_store(store: Path, key: str, message: str) -> None:
    """A name from elsewhere is joined to a path on this machine."""
    before = picture(store.parent)
    with pytest.raises(GradstoreError, match=message):
        gradstore.mirror(in_memory(store, {key: b"evil"}), store.parent / "copy")
    after = picture(store.parent)
    assert {name: one for name, one in after.items() if not name.startswith(f"{store.parent}/copy")} == before


@pytest.mark.parametrize(
    "key", [f"{POOL}/rounds/../../../evil", f"{POOL}/../../evil", "../evil", "attachments/../evil"]
)
def test_keys_with_dots(store: Path, key: str) -> None:
    """An object store has keys that are no paths."""
    gradstore.mirror(in_memory(store, {key: b"evil"}), store.parent / "copy")
    assert not list(store.parent.rglob("*evil*"))


def test_a_mirror_stays_in_its_folder(store: Path) -> None:
    """A part of the problems named as a file outside overwrote that file."""
    outside = store.parent / "outside.parquet"
    outside.write_bytes(b"mine")
    name = "../" * 5 + "outside.parquet"
    stores.edit_manifest(store / POOL, sets("problems", 0, 0, to=name))
    part = next((store / POOL / "g0/problems").glob("part-*"))
    source = in_memory(store, {f"{POOL}/g0/problems/{name}": part.read_bytes()})
    for target in (store.parent / "copy", store.parent / "deep/er/copy"):
        with pytest.raises(GradstoreError, match=r"manifest.json: damaged: field problems.0.0"):
            gradstore.mirror(source, target)
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "name", ["collections", "attachments", POOL, f"{POOL}/g0", f"{POOL}/g0/step", f"{POOL}/rounds"]
)
def test_links_in_a_copy(store: Path, name: str) -> None:
    """A copy that somebody prepared with a link must not be written through."""
    source, copy = in_memory(store), store.parent / "copy"
    gradstore.mirror(source, copy)
    with gradstore.open(store, mode="a").writer("pool", step=3) as writer:
        writer.append(["pool0"], np.ones((1, stores.DIM)), basis=1)
    gradstore.open(store, mode="a").rounds("pool").add({"step": 9}, stores.round_of(["pool1"]))
    link(name)(copy)
    before = picture(store.parent / "outside")
    with pytest.raises(GradstoreError, match="is a symbolic link"):
        gradstore.mirror(in_memory(store), copy)
    assert picture(store.parent / "outside") == before


def test_an_object_larger_than_it_may_be(store: Path) -> None:
    """What a manifest does not name is not fetched: of a chunk its published bytes alone."""
    with (store / POOL / "g0/codes/c.0.0").open("ab") as file:
        file.write(bytes(10 << 20))
    copy = gradstore.mirror(in_memory(store), store.parent / "copy")
    assert (copy.path / POOL / "g0/codes/c.0.0").stat().st_size == 8 * stores.DIM
    with pytest.raises(GradstoreError, match=r"zarr.json"):
        gradstore.mirror(in_memory(store, {"zarr.json": b"{" + bytes(100)}), store.parent / "other")
    assert not (store.parent / "other").exists()


def test_a_temporary_file_that_is_a_link(store: Path) -> None:
    """Every file is written under a temporary name first; a link of that name was written through."""
    mine = store.parent / "mine"
    mine.write_bytes(b"mine")
    for name in (".tmp-manifest.json", "g0/step/.tmp-zarr.json", "rounds/.tmp-part-000002"):
        (store / POOL / name).symlink_to(mine)
    opened = gradstore.open(store, mode="a")
    opened.delete("pool", ["pool0"])
    append(opened)
    opened.compact("pool")
    assert mine.read_bytes() == b"mine"
    assert opened.verify().ok


def test_removing_stops_at_links(store: Path) -> None:
    """A writer removes what an interrupted one left; a link among it may point anywhere."""
    mine = store.parent / "mine"
    mine.mkdir()
    (mine / ".tmp-x").write_bytes(b"mine")
    (mine / "IN-USE").write_bytes(b"")
    (store / POOL / "LOCK").write_text("an interrupted writer")
    (store / POOL / "strange").symlink_to(mine)
    (store / POOL / "keep.txt").write_text("mine too")
    (store / POOL / "g0/problems/notes.txt").write_text("mine too")
    (store / POOL / ".tmp-link").symlink_to(mine / ".tmp-x")
    gradstore.open(store, mode="a").delete("pool", ["pool0"])
    assert sorted(path.name for path in mine.iterdir()) == [".tmp-x", "IN-USE"]
    assert not (store / POOL / ".tmp-link").is_symlink()
    assert (store / POOL / "keep.txt").exists()
    assert (store / POOL / "g0/problems/notes.txt").exists()
    (store / POOL / "g7").symlink_to(mine)
    with pytest.raises(GradstoreError, match="g7: is a symbolic link"):
        gradstore.open(store, mode="a").delete("pool", ["pool1"])
    assert sorted(path.name for path in mine.iterdir()) == [".tmp-x", "IN-USE"]


def test_the_root_may_be_a_link(store: Path) -> None:
    """The path that the user gives is the user's own."""
    (store.parent / "here").symlink_to(store)
    opened = gradstore.open(store.parent / "here", mode="a")
    use_view(opened, "pool")
    append(opened)
    assert opened.verify().ok


def test_verify_sees_rows_that_are_no_unit_rows(store: Path) -> None:
    column("scale", 0.5)(store)
    report = gradstore.open(store).verify()
    assert [str(finding) for finding in report.findings if "row 2 is no unit row" in str(finding)]


def test_a_pipe_behind_fsspec_is_refused(store: Path, tmp_path: Path) -> None:
    """Opening it would wait for its other end; fsspec opens whatever is there."""
    fsspec_store = pytest.importorskip("zarr.storage").FsspecStore
    pytest.importorskip("fsspec")
    manifest = store / "collections/pool/manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(GradstoreError, match=r"manifest\.json"):
        gradstore.mirror(fsspec_store.from_url(f"file://{store}", read_only=True), tmp_path / "copy")
