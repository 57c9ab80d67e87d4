"""Target: stores that somebody else wrote, changed or damaged, on disk and behind `mirror` (edits: stores.py).

A store is read rightly or refused in one line. Nothing beside it is touched, and reading changes nothing in it. Where
no checksum was made right, what a query answers is what the honest store answers.
"""

import asyncio
import base64
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gradstore
from gradstore.errors import GradstoreError
from tests.fuzz import edits
from tests.fuzz.room import Picture, picture, read_tree, write_tree
from tests.fuzz.stores import honest_store, mutated
from tests.fuzz.trial import Trial

FORKS = True
_MOVED = "{outside}/moved"
_QUERY = ("query", "--against", "bench", "--pool", "pool", "-k", "5", "--json", "--quiet")
COMMANDS: dict[str, int] = {
    "info": 3, "verify": 4, "query": 6, "select": 3, "rounds": 2, "probes": 2, "mirror": 3, "mirror memory": 3,
    "open_remote": 1, "import": 3,
    "sketches": 2, "delete": 2, "compact": 2, "merge": 3, "index": 1, "report": 1,
}  # fmt: skip
"""What is done with a store, and how often."""


@dataclass
class Honest:
    """A store and the answer to a query of it."""

    files: dict[str, bytes]
    hits: list[Any]


def prepare(folder: Path) -> Honest:
    """Make the store, and do everything once, which imports what it takes."""
    store = honest_store(folder)
    files = read_tree(store)
    from tests.fuzz.room import Room

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        trial = Trial(Room(folder.parent / "first"), 1000.0, nowhere)
        for name in (*COMMANDS, "query"):
            write_tree(trial.folder / "store", files)
            found = _do(trial, name, trial.folder / "store", Honest(files, []))
            trial.room.clear()
            if trial.failures:
                raise RuntimeError(f"{name} fails on an honest store: {trial.failures}")
    return Honest(files, found)


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """What is different from the honest store, and two or three commands."""
    names, often = list(COMMANDS), list(COMMANDS.values())
    commands = random.choices(names, often, k=random.choice((2, 2, 3)))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        store = Path(folder) / "store"
        write_tree(store, honest.files)
        before = picture(store)
        try:
            what = mutated(store, random)
        except (GradstoreError, RecursionError) as error:  # an edit of a store that another one broke
            what = f"signed: {error}"
        found = _differences(store, before, Path(folder) / "moved")
        planted = (
            _planted(Path(folder) / "moved") if any(edit.get("to", "").startswith(_MOVED) for edit in found) else {}
        )
    return {"what": what, "edits": found, "moved": planted, "commands": commands, "refresh": random.random() < 0.5}


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Make the store and run the commands on it."""
    for name, data in case["moved"].items():
        trial.room.plant(f"moved/{name}", edits.payload(data))
    signed = "signed" in case["what"] or "more:" in case["what"]
    for number, name in enumerate(case["commands"]):
        store = trial.folder / "store"
        if (
            number == 0
            or name in ("import", "sketches", "delete", "compact", "index")
            or case["commands"][number - 1] in ("import", "sketches", "delete", "compact")
        ):
            shutil.rmtree(store, ignore_errors=True)
            write_tree(store, honest.files)
            edits.apply(case["edits"], store, trial.outside, lambda path, text: text)
        hits = _do(trial, name, store, honest, refresh=case["refresh"])
        if name in ("query", "index") and not signed and hits is not None and hits != honest.hits:
            trial.wrong(f"{name}: {_kind(case['what'])}", f"{case['what']}: {hits}, expected {honest.hits}")


def _do(trial: Trial, name: str, store: Path, honest: Honest, refresh: bool = False) -> Any:
    """Run one command; the hits of a query."""
    out, inputs = trial.folder / "out", trial.folder / "inputs"
    if name in ("query", "index"):
        more = ("--index", "flat") if name == "index" else ()
        status, output, _ = trial.command(_QUERY[0], store, *_QUERY[1:], *more, store=store)
        return _hits(output) if status == 0 else None
    if name in ("info", "verify"):
        trial.command(name, store, *(("--quiet",) if name == "info" else ()), store=store)
    elif name == "select":
        trial.command(
            "select",
            store,
            "-n",
            "3",
            "--against",
            "bench",
            "--pool",
            "pool",
            "--out",
            out / "selected",
            "--allow-fewer",
            "--quiet",
            store=store,
        )
        shutil.rmtree(out / "selected", ignore_errors=True)
    elif name == "report":
        trial.command(
            "report",
            store,
            "--against",
            "bench",
            "--pool",
            "pool",
            "--out",
            out / "report.html",
            "--quiet",
            store=store,
        )
    elif name in ("rounds", "probes"):
        trial.call(name, _recorded, store, name, store=store)
    elif name == "import":
        (inputs / "more.jsonl").write_text('{"id": "new", "prompt": "What is new?"}\n', encoding="utf-8")
        trial.command("import", store, "pool", "--problems", inputs / "more.jsonl", "--quiet", store=store, reads=False)
    elif name == "compact":
        trial.command("compact", store, "--collection", "pool", "--keep", "newest", "--quiet", store=store, reads=False)
    elif name == "merge":
        write_tree(inputs / "honest", honest.files)
        trial.command("merge", store, inputs / "honest", "--out", out / "merged", "--quiet", store=store)
        for left in (inputs / "honest", out / "merged", out / "merged.unfinished"):
            shutil.rmtree(left, ignore_errors=True)
    elif name in ("delete", "sketches"):
        trial.call(name, _deleted if name == "delete" else _appended, store, store=store, reads=False)
    else:
        _copy(trial, name, store, out / "copy", honest, refresh)
    return None


def _copy(trial: Trial, name: str, store: Path, copy: Path, honest: Honest, refresh: bool) -> None:
    """Copy the store as if it were remote; refresh: over a copy that is there."""
    import zarr.storage

    shutil.rmtree(copy, ignore_errors=True)
    if refresh and name != "open_remote":
        write_tree(copy, honest.files)
    source = _in_memory(store) if name == "mirror memory" else zarr.storage.LocalStore(store, read_only=True)
    function: Callable = gradstore.open_remote if name == "open_remote" else gradstore.mirror
    copied = trial.call(name, function, source, copy)
    if copied is None and not (refresh and name != "open_remote"):
        return
    status, output, _ = trial.command(_QUERY[0], copy, *_QUERY[1:], store=copy)
    if copied is None and (status != 0 or _hits(output) != honest.hits):
        trial.wrong(f"{name}: a refresh that failed spoilt the copy", output)


def _hits(output: str) -> list[Any]:
    """The hits of a query's JSON, rounded."""
    return [[hit["id"], round(hit["score"], 5)] for hit in json.loads(output)["hits"]]


def _in_memory(store: Path) -> Any:
    """The regular files of a store in zarr's store in memory."""
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync
    from zarr.storage import MemoryStore

    make = default_buffer_prototype().buffer.from_bytes
    memory = MemoryStore()

    async def fill() -> None:
        for name, (kind, _) in picture(store).items():
            if stat.S_ISREG(kind) and (store / name).stat().st_size < 1 << 24:
                await memory.set(name, make((store / name).read_bytes()))
        await asyncio.sleep(0)

    sync(fill())
    return memory


def _recorded(store: Path, kind: str) -> int:
    opened = gradstore.open(store)
    if kind == "rounds":
        return sum(len(round.picks) for round in opened.rounds("pool"))
    return len(opened.probes("pool").table())


def _deleted(store: Path) -> None:
    gradstore.open(store, mode="a").delete("pool", ["pool1"])


def _appended(store: Path) -> None:
    import numpy as np

    opened = gradstore.open(store, mode="a")
    with opened.writer("pool", step=2) as writer:
        writer.append(["pool1"], np.ones((1, opened.dim), np.float32))


def _kind(what: str) -> str:
    """A description without names and numbers."""
    words, _, name = what.partition(": ")
    return f"{words}: {name.rpartition('/')[2].strip('0123456789')}"


def _differences(store: Path, before: Picture, moved: Path) -> list[edits.Edit]:
    """Edits that make of the honest store what it is now."""
    found: list[edits.Edit] = []
    after = picture(store)
    for name in sorted(before.keys() - after.keys()):
        if not any(name.startswith(f"{edit['file']}/") for edit in found):
            found.append({"op": "remove", "file": name})
    for name in sorted(after):
        if after[name] == before.get(name):
            continue
        kind, target = after[name]
        path = store / name
        if stat.S_ISLNK(kind):
            to = target.replace(str(moved), _MOVED).replace(str(store.parent), "{outside}")
            found.append({"op": "link", "file": name, "to": to})
        elif stat.S_ISFIFO(kind):
            found.append({"op": "fifo", "file": name})
        elif stat.S_ISDIR(kind):
            found.append({"op": "folder", "file": name})
        elif path.stat().st_size > 1 << 24:
            found.append({"op": "size", "file": name, "size": path.stat().st_size})
        else:
            found.append(
                {"op": "write", "file": name, "data": {"base64": base64.b64encode(path.read_bytes()).decode()}}
            )
    return found


def _planted(moved: Path) -> dict[str, Any]:
    """What links of the store point at."""
    return (
        {name: {"base64": base64.b64encode(data).decode()} for name, data in read_tree(moved).items()}
        if moved.is_dir()
        else {}
    )
