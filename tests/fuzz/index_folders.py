"""Target: index folders that another program, an accident or an enemy wrote; half of them with right checksums.

An index only proposes candidates, so whatever it holds, a query's scores must be those of the stored rows. A folder
that cannot be read is rebuilt, or the query ends with one line.
"""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from gradstore.durable import canonical_json, crc32c
from gradstore.engine.searching.query import search
from gradstore.engine.searching.targets import target
from tests.fuzz import edits
from tests.fuzz.honest import write_store
from tests.fuzz.room import read_tree, write_tree
from tests.fuzz.trial import Trial

N = 240
TOP = 8
KINDS = ("flat", "turbovec")
METRICS = ("cosine", "dot")
_FOLDER = "collections/pool/indexes"
_RANDOM = re.compile(r"(?<=-)[0-9a-f]{16}\b")
_END = "0123456789abcdef"

FORKS = True


@dataclass
class Honest:
    """A store with four indexes, and the exact answers."""

    files: dict[str, bytes]
    exact: dict[str, dict[str, float]]
    """Metric -> id -> score of every live problem."""


def prepare(folder: Path) -> Honest:
    """Build the store and its indexes."""
    store = write_store(folder, N)
    view, wanted = store.view("pool"), target(store, "bench", None, "mean")
    exact = {}
    for metric in METRICS:
        hits = search(view, wanted, N, metric=metric)
        exact[metric] = dict(zip(map(str, hits.ids), map(float, hits.scores), strict=True))
        for kind in KINDS:
            search(view, wanted, TOP, metric=metric, index=kind)
    return Honest(_named_alike(read_tree(folder)), exact)


def _named_alike(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files under names that are the same in every process: those of an index have random ends."""
    found = {}
    for name, data in files.items():
        if name.startswith(_FOLDER):
            name = _RANDOM.sub(_END, name)
            if name.endswith("index.json"):
                data = _sealed(Path(name), _RANDOM.sub(_END, data.decode()).encode())
        found[name] = data
    return found


def draw(random: Random, honest: Honest) -> dict[str, Any]:
    """One to three edits of one index's folder, and a query that uses it."""
    kind, metric = random.choice(KINDS), random.choice(METRICS)
    folder = f"{_FOLDER}/{kind}-{metric}"
    files = sorted(name for name in honest.files if name.startswith(f"{folder}/"))
    return {
        "kind": kind,
        "metric": metric,
        "edits": [_edit(random, honest, folder, files) for _ in range(random.choice((1, 1, 1, 2, 3)))],
        "sealed": random.random() < 0.5,
        "then": random.choice(("", "", "", "", "append", "verify")),
    }


def attempt(trial: Trial, honest: Honest, case: dict[str, Any]) -> None:
    """Ask twice: whatever the first query makes of the folder, the second meets what it left."""
    store = trial.folder / "store"
    write_tree(store, honest.files)
    folder = store / _FOLDER / f"{case['kind']}-{case['metric']}"
    edits.apply(case["edits"], store, trial.outside, _sealed if case["sealed"] else lambda path, text: text)
    if case["sealed"]:
        _seal_files(folder)
    if case["then"] == "append":
        _append(store)
    for _ in range(2):
        _ask(trial, honest, case, store)
    if case["then"] == "verify":
        trial.command("verify", store, store=store)


def _ask(trial: Trial, honest: Honest, case: dict[str, Any], store: Path) -> None:
    kind, metric = case["kind"], case["metric"]
    status, output, _ = trial.command(
        "query", store, "--against", "bench", "--pool", "pool", "--index", kind, "--metric", metric, "-k", TOP,
        "--json", "--quiet", store=store
    )  # fmt: skip
    if status != 0:
        return
    hits = {hit["id"]: hit["score"] for hit in json.loads(output)["hits"]}
    if case["then"] == "append":
        hits.pop("pool0003", None)
    exact = honest.exact[metric]
    bad = [
        name
        for name, score in hits.items()
        if name not in exact or not np.isclose(score, exact[name], rtol=1e-4, atol=1e-6)
    ]
    if bad:
        trial.wrong(f"query --index {kind}: scores", f"{bad}: {hits}")
    if len(hits) < TOP - (case["then"] == "append"):
        trial.wrong(f"query --index {kind}: {'too few hits' if hits else 'no hits'}", f"{len(hits)} hits of {TOP}")
    if not case["sealed"] and case["then"] != "append":
        best = sorted(exact, key=lambda name: -exact[name])[:TOP]
        if len(set(best) & set(hits)) < TOP * (1 if kind == "flat" else 0.75):
            trial.wrong(f"query --index {kind}: candidates", f"expected {best}, found {list(hits)}")


def _append(store: Path) -> None:
    """One more row, of a problem that was deleted: the index must be extended."""
    import gradstore

    opened = gradstore.open(store, mode="a")
    with opened.writer("pool", step=20) as writer:
        writer.append(["pool0003"], np.ones((1, opened.dim), np.float32))


def _edit(random: Random, honest: Honest, folder: str, files: list[str]) -> edits.Edit:
    index = f"{folder}/index.json"
    kind = random.randrange(12)
    if kind <= 4:
        value = json.loads(honest.files[index])
        edit = edits.json_edit(random, index, value["index"])
        return edit | {"at": ["index", *edit["at"]]}
    if kind == 5:
        return edits.text_edit(random, index, honest.files[index])
    file = random.choice([name for name in files if not name.endswith(("LOCK", "index.json"))])
    if kind <= 7:
        return edits.bytes_edit(random, file, honest.files[file])
    if kind == 8:
        return _array(random, random.choice([name for name in files if "/rows-" in name or "/norms-" in name]))
    if kind == 9:
        return edits.file_edit(
            random, random.choice((folder, _FOLDER, f"{folder}/LOCK", f"{folder}/.tmp-index.json")), files
        )
    if kind == 10:
        others = [name for name in honest.files if name.startswith(_FOLDER) and name != file]
        return {"op": "swap", "file": file, "with": random.choice(others)}
    return edits.file_edit(random, random.choice(files), files)


def _array(random: Random, file: str) -> edits.Edit:
    """Another array in place of an index's rows or norms."""
    draws = np.random.default_rng(random.randrange(1 << 30))
    kind = random.randrange(9)
    array: Any = [
        np.arange(N)[::-1].copy(),
        draws.integers(0, N, N),
        np.full(N, -1),
        np.full(N, random.choice(edits.NUMBERS[:11]), np.float64),
        np.array([2**62] + [0] * (N - 1)),
        np.zeros((N, 2), np.int64),
        np.zeros(random.choice((0, 1, N - 1, N + 1)), random.choice(("int64", "float32", "complex128", "U3", "M8[s]"))),
        np.array([{"a": 1}] * N, object),
        np.full(N, np.nan, np.float32),
    ][kind]
    buffer = io.BytesIO()
    np.save(buffer, array)
    import base64

    return {"op": "write", "file": file, "data": {"base64": base64.b64encode(buffer.getvalue()).decode()}}


def _sealed(path: Path, text: bytes) -> bytes:
    """index.json with its checksum made right."""
    value = json.loads(text)
    if path.name == "index.json" and isinstance(value, dict) and "index" in value:
        value["crc32c"] = crc32c(canonical_json(value["index"]))
    return json.dumps(value).encode()


def _seal_files(folder: Path) -> None:
    """Make the checksums in index.json those of the files it names."""
    path = folder / "index.json"
    try:
        if path.is_symlink() or folder.is_symlink() or folder.parent.is_symlink() or not path.is_file():
            return
        if path.stat().st_size > 1 << 24:
            return
        value = json.loads(path.read_bytes())
        for file in value["index"]["files"].values():
            named = folder / file["name"]
            if named.parent == folder and named.is_file() and not named.is_symlink() and named.stat().st_size < 1 << 24:
                file |= {"bytes": named.stat().st_size, "crc32c": crc32c(named.read_bytes())}
        path.write_bytes(_sealed(path, json.dumps(value).encode()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # not such a document any more
