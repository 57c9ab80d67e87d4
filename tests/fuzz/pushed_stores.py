"""Target: pushed stores (state, segments, files) that somebody else wrote, half of them with right checksums.

`pull`, `open` and a push onto one read it rightly or refuse it in one line; a copy that was there stays as it was.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gradstore
from gradstore.durable import canonical_json, crc32c
from gradstore.travel.cache import FOLDER
from gradstore.travel.state import STATE, object_of
from tests.fuzz import edits
from tests.fuzz.room import read_tree, write_tree
from tests.fuzz.stores import honest_store
from tests.fuzz.trial import Trial

FORKS = True
COMMANDS = ("pull", "pull again", "query", "info", "push")
_QUERY = ("--against", "bench", "--pool", "pool", "-k", "5", "--json", "--quiet")


@dataclass
class Honest:
    """A store, the same pushed, and the answer to a query."""

    store: dict[str, bytes]
    pushed: dict[str, bytes]
    hits: list[Any]


def prepare(folder: Path) -> Honest:
    """Make the store, push it, and do everything once, which imports what it takes."""
    store = honest_store(folder / "store")
    gradstore.push(store, f"file://{folder}/pushed")
    honest = Honest(read_tree(store), read_tree(folder / "pushed"), [])
    from tests.fuzz.room import Room

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        trial = Trial(Room(folder.parent / "first"), 1000.0, nowhere)
        for name in (*COMMANDS, "query"):
            trial.room.clear()
            write_tree(trial.folder / "store", honest.pushed)
            hits = _do(trial, name, honest)
            if trial.failures or trial.outcomes[-1] != "ok":
                raise RuntimeError(f"{name} fails on an honest store: {trial.failures}")
    return Honest(honest.store, honest.pushed, hits)


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """One to three edits, and two commands."""
    files = sorted(honest.pushed)
    return {
        "edits": [_edit(random, honest, files) for _ in range(random.choice((1, 1, 1, 2, 3)))],
        "sealed": random.random() < 0.5,
        "commands": random.sample(COMMANDS, 2),
    }


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Make the pushed store and run the commands on it."""
    for name in case["commands"]:
        trial.room.clear()
        pushed = trial.folder / "store"
        write_tree(pushed, honest.pushed)
        edits.apply(case["edits"], pushed, trial.outside, _sealed if case["sealed"] else lambda path, text: text)
        if case["sealed"]:
            _seal_files(pushed)
        hits = _do(trial, name, honest)
        if hits is not None and not case["sealed"] and hits != honest.hits:
            trial.wrong(name, f"{hits}, expected {honest.hits}")


def _do(trial: Trial, name: str, honest: Honest) -> list[Any] | None:
    """Run one command; the hits of a query."""
    pushed, copy, url = trial.folder / "store", trial.folder / "out" / "copy", f"file://{trial.folder}/store"
    os.environ[FOLDER] = str(trial.folder / "out" / "cache")
    if name == "push":
        write_tree(trial.folder / "inputs" / "store", honest.store)
        trial.command("push", trial.folder / "inputs" / "store", url, store=trial.folder / "inputs" / "store")
        return None
    if name == "info":
        trial.command("info", url, store=pushed)
        return None
    if name == "query":
        status, output, _ = trial.command("query", url, *_QUERY, store=pushed)
        return _hits(output) if status == 0 else None
    if name == "pull again":
        write_tree(copy, honest.store)
    status, _, _ = trial.command("pull", url, copy, "--quiet", store=pushed)
    if status != 0 and name == "pull":
        return None
    asked, output, _ = trial.command("query", copy, *_QUERY, store=copy)
    found = _hits(output) if asked == 0 else None
    if status != 0 and found != honest.hits:
        trial.wrong("pull: a refresh that failed spoilt the copy", output)
    return found if status == 0 else None


def _hits(output: str) -> list[Any]:
    return [[hit["id"], round(hit["score"], 5)] for hit in json.loads(output)["hits"]]


def _edit(random: Random, honest: Honest, files: list[str]) -> edits.Edit:
    kind = random.randrange(12)
    if kind <= 3:
        edit = edits.json_edit(random, STATE, json.loads(honest.pushed[STATE])["state"])
        return edit | {"at": ["state", *edit["at"]]}
    if kind == 4:
        return edits.text_edit(random, STATE, honest.pushed[STATE])
    if kind <= 6:
        file = random.choice([name for name in files if name.endswith(".json") and name != STATE])
        value = json.loads(honest.pushed[file])
        if not isinstance(value, dict | list) or random.random() < 0.2:
            return edits.text_edit(random, file, honest.pushed[file])
        return edits.json_edit(random, file, value)
    if kind <= 9:
        file = random.choice([name for name in files if "/rows-" in name or random.random() < 0.2])
        return edits.bytes_edit(random, file, honest.pushed[file])
    return edits.file_edit(random, random.choice(files), files)


_BODIES = ("manifest", "inventory")
"""Members of JSON files beside whose checksum they stand."""


def _sealed(path: Path, text: bytes) -> bytes:
    """A JSON document with its own checksum made right."""
    value = json.loads(text)
    if not isinstance(value, dict):
        return text
    if path.name == STATE:
        body = canonical_json(value.get("state"))
        return b'{"crc32c":"%08x","state":%s}\n' % (crc32c(body), body)
    for name in _BODIES:
        if name in value:
            body = canonical_json(value[name])
            return b'{"crc32c":"%08x","%s":%s}\n' % (crc32c(body), name.encode(), body)
    with suppress(KeyError, TypeError):
        own = value["attributes"]["gradstore"]
        own.pop("crc32c")
        own["crc32c"] = f"{crc32c(canonical_json(own)):08x}"
    return json.dumps(value).encode()


def _seal_files(pushed: Path) -> None:
    """Make the state name the files as they are now: sizes, checksums, and the objects that have these names."""
    file = pushed / STATE
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > 1 << 24:
            return
        value = json.loads(file.read_bytes())
        state = value["state"]
        for path, (size, crc) in list(state["files"].items()):
            there = pushed / object_of(path, int(crc, 16))
            if not _plain(pushed, there):
                continue
            data = there.read_bytes()
            if (size, crc) != (len(data), f"{crc32c(data):08x}"):
                state["files"][path] = [len(data), f"{crc32c(data):08x}"]
                there.rename(pushed / object_of(path, crc32c(data)))
        file.write_bytes(_sealed(file, json.dumps(value).encode()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # not such a document any more


def _plain(folder: Path, file: Path) -> bool:
    """Whether a file is a small one of the folder's own, reached through no link."""
    return (
        file.resolve().is_relative_to(folder.resolve())
        and not file.is_symlink()
        and (file.is_file() and file.stat().st_size < 1 << 24)
    )
