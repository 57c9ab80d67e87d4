"""The bases of a store: the projections its rows were made with, numbered from 0, each frozen.

A store begins with one, which its fingerprint names. When a projection no longer serves, another is fitted and added,
and rows made from then on are in that one; rows of older bases stay, and are scored against targets in their own. A
basis is an attachment `basis-NNNNNN.json`, written after the files it needs; nothing of it ever changes.

A query of a store with B bases of D dimensions is one vector of B * D: one block for each basis.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.attachments import ATTACHMENTS, adding, read_attachment, write_attachment
from gradstore.durable import canonical_json
from gradstore.errors import DamagedError

_FILE = re.compile(r"(basis-([0-9]{6})\.json)\.[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Basis:
    """One projection of a store."""

    number: int
    """0 for the one that the store was made with."""
    digest: str
    """Of the projection; empty for the first basis of a store whose fingerprint names none."""
    layout: list[tuple[str, int, int]]
    """(layer, start, stop) of the dimensions that each layer fills."""
    about: dict[str, Any]
    """When and why it was added, as JSON can hold it."""


def first_basis(fingerprint: dict, dim: int) -> Basis:
    """Basis 0, from the fingerprint."""
    projection = fingerprint.get("projection")
    digest = projection.get("basis", "") if isinstance(projection, dict) else ""
    layout = fingerprint.get("layout", [["all", 0, dim]])
    return Basis(0, str(digest), [(name, start, stop) for name, start, stop in layout], {})


def added_bases(store: Path) -> list[Basis]:
    """Bases 1, 2, ... in order; DamagedError where one is missing or its bytes changed."""
    folder = store / ATTACHMENTS
    if not folder.is_dir():
        return []
    found = sorted({(int(match[2]), match[1]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))})
    bases = []
    for number, (named, name) in enumerate(found, start=1):
        if named != number:
            raise DamagedError(f"{folder}: basis {number} is missing, basis {named} is there")
        value = json.loads(read_attachment(store, name))
        layout = [(layer, start, stop) for layer, start, stop in value["layout"]]
        bases.append(Basis(number, value["digest"], layout, value["about"]))
    return bases


def add_basis(
    store: Path,
    digest: str,
    layout: list[tuple[str, int, int]],
    about: Mapping[str, Any],
    attachments: Mapping[str, bytes],
) -> int:
    """Keep a further basis and the files it needs, durably; returns its number. One that is there is not added again.

    attachments: files by names that the store does not have yet, or has with the same bytes.
    """
    with adding(store):
        bases = added_bases(store)
        for basis in bases:
            if basis.digest == digest:
                return basis.number
        for name, data in attachments.items():
            write_attachment(store, name, data)
        number = len(bases) + 1
        value = {"digest": digest, "layout": [list(segment) for segment in layout], "about": dict(about)}
        write_attachment(store, f"basis-{number:06d}.json", canonical_json(value))
        return number
