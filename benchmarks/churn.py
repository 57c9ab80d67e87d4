"""A collection under constant change with known rows: expected content after each change, and a check of it.

`changes(seed, content)` is a pure sequence of (change, content after it). So a killed process and the one that checks
afterwards agree on the changes. The row with number `serial` (counting all appended rows) is cos(serial * (1, 2, ...)).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import gradstore

DIM = 24
N_PROBLEMS = 40
CHUNK_ROWS = 16
COLUMN_ROWS = 24


@dataclass(frozen=True)
class Content:
    """Content that a reader must see."""

    newest: dict[str, tuple[int, int]] = field(default_factory=dict)
    """id -> (step, serial) of the newest row."""
    known: frozenset[str] = frozenset(f"p{i}" for i in range(N_PROBLEMS))
    """Ids in the problem table."""
    deleted: frozenset[str] = frozenset()
    """Ids of these that the next compaction drops."""
    added: int = N_PROBLEMS
    serial: int = 0
    step: int = 0


def sketch(serial: np.ndarray) -> np.ndarray:
    """The rows of some serial numbers, float64 [n, DIM]."""
    return np.cos(np.multiply.outer(serial, np.arange(1.0, DIM + 1)))


def records(first: int, stop: int) -> list[dict]:
    return [{"id": f"p{i}", "prompt": f"What is {i}?"} for i in range(first, stop)]


def create(path: Path) -> gradstore.Store:
    """A store with the problems and no rows."""
    fingerprint = {"made": "up"}
    store = gradstore.create(path, dim=DIM, fingerprint=fingerprint, chunk_rows=CHUNK_ROWS, column_rows=COLUMN_ROWS)
    store.add_problems("pool", records(0, N_PROBLEMS))
    return store


def changes(seed: int, content: Content, compactions: float = 0.15) -> Iterator[tuple[tuple, Content]]:
    """Endless changes: appended rows, a few new problems, deletions, compactions."""
    random = np.random.default_rng(seed)
    while True:
        draw = random.random()
        if draw < compactions:
            content = replace(content, known=content.known - content.deleted, deleted=frozenset())
            yield ("compact", str(random.choice(["all", "newest"]))), content
        elif draw < compactions + 0.1 and len(content.newest) > 9:
            ids = [str(name) for name in random.choice(sorted(content.newest), 3, replace=False)]
            newest = {name: row for name, row in content.newest.items() if name not in ids}
            content = replace(content, newest=newest, deleted=content.deleted | set(ids))
            yield ("delete", ids), content
        elif draw < compactions + 0.2:
            first, stop = content.added, content.added + int(random.integers(1, 4))
            new = {f"p{i}" for i in range(first, stop)}
            content = replace(content, known=content.known | new, added=stop)
            yield ("add", first, stop), content
        else:
            n = int(random.integers(1, min(30, len(content.known))))
            ids = [str(name) for name in random.choice(sorted(content.known), n, replace=False)]
            serial = np.arange(content.serial, content.serial + n)
            step = content.step + int(random.integers(0, 2))
            rows = {name: (step, int(number)) for name, number in zip(ids, serial, strict=True)}
            content = replace(
                content,
                newest=content.newest | rows,
                deleted=content.deleted - set(ids),
                serial=content.serial + n,
                step=step,
            )
            yield ("append", step, ids, serial), content


def do(store: gradstore.Store, change: tuple) -> None:
    """Make one change to the store."""
    kind, *rest = change
    if kind == "compact":
        store.compact("pool", keep=rest[0])
    elif kind == "delete":
        store.delete("pool", rest[0])
    elif kind == "add":
        store.add_problems("pool", records(*rest))
    else:
        step, ids, serial = rest
        with store.writer("pool", step=step) as writer:
            half = len(ids) // 2
            for part in (slice(0, half), slice(half, None)):
                writer.append(ids[part], sketch(serial[part]), n_rollouts=serial[part])


def content_of(store: gradstore.Store) -> dict[str, tuple[int, int]]:
    """The store's visible content, id -> (step, serial); ValueError if a row does not match its serial number."""
    view = store.view("pool")
    rows = sketch(view.n_rollouts)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.allclose(view.rows(np.arange(len(view))), units, atol=0.02):
        raise ValueError("a row is not the one that was appended")
    return dict(zip(view.ids.tolist(), zip(view.steps.tolist(), view.n_rollouts.tolist(), strict=True), strict=True))


def check(path: Path, allowed: list[Content]) -> Content:
    """Verify a store, write to it, verify it again; returns which of the allowed contents it has.

    Raises ValueError that says what is lost or wrong.
    """
    store = gradstore.open(path, mode="a")
    report = store.verify()
    if not report.ok:
        raise ValueError(f"verify: {report.findings[:3]}")
    shown, known = content_of(store), len(store.problems("pool"))
    fitting = [content for content in allowed if content.newest == shown and len(content.known) == known]
    if not fitting:
        raise ValueError(f"{len(shown)} of {known} problems shown: none of {len(allowed)} contents that it may have")
    return fitting[-1]


def write_more(path: Path, content: Content) -> Content:
    """Write once more; returns the new content. ValueError if the writer cannot continue or leaves files behind."""
    store = gradstore.open(path, mode="a")
    name = min(content.known)
    serial, step = np.array([content.serial]), content.step + 1
    with store.writer("pool", step=step) as writer:
        writer.append([name], sketch(serial), n_rollouts=serial)
    report = store.verify()
    if not report.ok or report.notes:
        raise ValueError(f"after the next writer: {report.findings[:3]} {report.notes[:3]}")
    newest = content.newest | {name: (step, content.serial)}
    if content_of(store) != newest:
        raise ValueError("after the next writer: other rows are shown")
    deleted = content.deleted - {name}
    return replace(content, newest=newest, deleted=deleted, serial=content.serial + 1, step=step)
