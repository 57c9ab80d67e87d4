"""Bases of a store: the frozen projections that its rows were made with, numbered from 0.

A store begins with one basis, which its fingerprint names. When a projection fits the gradients no longer, a new one is
fitted and added, and later rows are in the new basis. Older rows stay and are scored against targets in their own
basis. A basis is an attachment `basis-NNNNNN.json`, written after the files it needs; it never changes.

A query of a store with B bases of D dimensions is one vector of B * D: one block per basis.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.attachments import ATTACHMENTS, adding, read_attachment, write_attachment
from gradstore.durable import canonical_json
from gradstore.errors import DamagedError
from gradstore.header import LAYOUT, layout_of
from gradstore.inside import names_inside
from gradstore.schema import ANYTHING, Checker, mapping, record, text

_FILE = re.compile(r"(basis-([0-9]{6})\.json)\.[0-9a-f]{8}")
_BODY = Checker(record({"digest": text(), "layout": LAYOUT, "about": mapping(ANYTHING)}))


@dataclass(frozen=True, slots=True)
class Basis:
    """One projection of a store."""

    number: int
    """0 for the basis that the store was created with."""
    digest: str
    """Digest of the projection; empty for the first basis if the fingerprint names none."""
    layout: list[tuple[str, int, int]]
    """(layer, start, stop): each layer's range of dimensions."""
    about: dict[str, Any]
    """When and why the basis was added, JSON-compatible."""


def first_basis(fingerprint: dict, dim: int) -> Basis:
    """Build basis 0 from the fingerprint."""
    projection = fingerprint.get("projection")
    digest = projection.get("basis", "") if isinstance(projection, dict) else ""
    return Basis(0, str(digest), layout_of(fingerprint, dim, "fingerprint"), {})


def count_bases(store: Path) -> int:
    """Number of bases, the first included; reads names alone. DamagedError if one is missing."""
    return 1 + len(_names(store))


def added_bases(store: Path, dim: int) -> list[Basis]:
    """Bases 1, 2, ... in order, of `dim` dimensions; DamagedError if one is missing, changed, or cannot be."""
    bases = []
    for number, name in enumerate(_names(store), start=1):
        file = store / ATTACHMENTS / name
        value = _BODY.parse(read_attachment(store, name), file)
        bases.append(Basis(number, value["digest"], layout_of(value, dim, file), value["about"]))
    return bases


def _names(store: Path) -> list[str]:
    """Names of the attachments that hold the bases 1, 2, ..."""
    folder = store / ATTACHMENTS
    matches = map(_FILE.fullmatch, names_inside(folder, store))
    found = sorted({(int(match[2]), match[1]) for match in matches if match})
    for number, (named, _) in enumerate(found, start=1):
        if named != number:
            raise DamagedError(f"{folder}: basis {number} is missing, basis {named} is there")
    return [name for _, name in found]


def add_basis(
    store: Path,
    dim: int,
    digest: str,
    layout: list[tuple[str, int, int]],
    about: Mapping[str, Any],
    attachments: Mapping[str, bytes],
) -> int:
    """Add a basis and the files it needs, durably; returns its number. A known digest returns the existing number.

    attachments: files by name; the store must not have a name yet, or have it with the same bytes.
    """
    with adding(store):
        bases = added_bases(store, dim)
        for basis in bases:
            if basis.digest == digest:
                return basis.number
        for name, data in attachments.items():
            write_attachment(store, name, data)
        number = len(bases) + 1
        value = {"digest": digest, "layout": [list(segment) for segment in layout], "about": dict(about)}
        write_attachment(store, f"basis-{number:06d}.json", canonical_json(value))
        return number
