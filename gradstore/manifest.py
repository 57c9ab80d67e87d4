"""Manifest: the file that lists which rows of a collection exist, with the checksums of their bytes.

A writer publishes by replacing this file. Its content is `{"crc32c":"xxxxxxxx","manifest":BODY}` and a newline. The
checksum is over BODY, which is canonical JSON, so any changed byte of the file is detected.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gradstore.durable import canonical_json, crc32c, replace_file
from gradstore.errors import DamagedError, GradstoreError, NotAStoreError
from gradstore.inside import read_inside
from gradstore.layout import (
    FORMAT,
    FORMAT_OF_BASES,
    MANIFEST,
    PROBLEM_PART,
    PROBLEMS,
    RowArray,
    generation_name,
    store_of,
)
from gradstore.schema import CRC, Checker, lists, load_json, mapping, record, row, text, whole

MOST_BYTES = 1 << 27
"""Largest manifest: with the deletions of some seven million problems."""
_MOST_ROWS = 1 << 48
_MOST_PROBLEMS = (1 << 31) - 1
"""The array `problem` is int32."""
_PROBLEMS_PER_BYTE = 4
"""Most problems that a byte of a Parquet file can hold. Each has an id of its own, which takes more than two bits."""
_BODY = Checker(
    record(
        {
            "format": whole(),
            "commit": whole(),
            "generation": text("g(0|[1-9][0-9]{0,8})"),
            "rows": whole(most=_MOST_ROWS),
            "chunks": mapping(lists(CRC)),
            "problems": lists(row(text(PROBLEM_PART), whole(1, _MOST_PROBLEMS), whole(1, 1 << 32), CRC)),
            "tombstones": lists(row(whole(), whole())),
            "reasons": lists(text(), least=1, most=1 << 16),
        },
        {"bases": lists(row(whole(), whole(most=(1 << 16) - 1)), least=1)},
    )
)

_HEAD = b'{"crc32c":"%08x","manifest":'
_HEAD_BYTES = len(_HEAD % 0)
_TAIL = b"}\n"


@dataclass(frozen=True, slots=True)
class Part:
    """Entry of a Parquet file with consecutive problems."""

    file: str
    rows: int
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Manifest:
    """Published state of a collection at one commit."""

    commit: int = 0
    """Number of publications so far; 0 before the first."""
    generation: int = 0
    """The folder `g<generation>` holds the arrays and the problems."""
    rows: int = 0
    """Number of published rows; bytes after them have no meaning."""
    chunks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Array name -> CRC-32C of the published bytes of each chunk."""
    parts: tuple[Part, ...] = ()
    tombstones: dict[int, int] = field(default_factory=dict)
    """problem -> row number; all rows of the problem before it are deleted."""
    reasons: tuple[str, ...] = ("",)
    """Texts of failure reasons; the array `reason` holds indices into them."""
    bases: tuple[tuple[int, int], ...] = ()
    """(row, basis): rows from this one up to the next entry are in this basis; rows before the first are in basis 0."""

    @property
    def folder(self) -> str:
        return generation_name(self.generation)

    def problems_folder(self, collection: Path) -> Path:
        """The folder of `parts`."""
        return collection / self.folder / PROBLEMS

    @property
    def n_problems(self) -> int:
        return sum(part.rows for part in self.parts)

    def to_bytes(self) -> bytes:
        body = canonical_json(
            {
                "format": FORMAT_OF_BASES if self.bases else FORMAT,
                **({"bases": self.bases} if self.bases else {}),
                "commit": self.commit,
                "generation": self.folder,
                "rows": self.rows,
                "chunks": {name: [f"{crc:08x}" for crc in crcs] for name, crcs in self.chunks.items()},
                "problems": [[part.file, part.rows, part.bytes, f"{part.crc32c:08x}"] for part in self.parts],
                "tombstones": sorted(self.tombstones.items()),
                "reasons": self.reasons,
            }
        )
        return _HEAD % crc32c(body) + body + _TAIL

    @classmethod
    def from_bytes(cls, raw: bytes, file: Path) -> "Manifest":
        """Parse a manifest; DamagedError if any byte changed or a field cannot be, NotAStoreError for a newer format.

        Whoever wrote the file may have written the right checksum to it, so every field is checked.
        """
        body = raw[_HEAD_BYTES : -len(_TAIL)]
        if raw[:_HEAD_BYTES] != _HEAD % crc32c(body) or raw[-len(_TAIL) :] != _TAIL:
            raise DamagedError(f"{file}: damaged: the manifest does not match its checksum")
        value = load_json(body, file)
        if isinstance(value, dict) and value.get("format") != (FORMAT_OF_BASES if "bases" in value else FORMAT):
            raise NotAStoreError(
                f"{file}: written in store format {value.get('format')!r:.40}, this version reads up to "
                f"{FORMAT_OF_BASES}: upgrade gradstore"
            )
        value = _BODY.check(value, file)
        for fault in _faults(value):
            raise DamagedError(f"{file}: damaged: field {fault}")
        return cls(
            commit=value["commit"],
            generation=int(value["generation"][1:]),
            rows=value["rows"],
            chunks={name: tuple(int(crc, 16) for crc in crcs) for name, crcs in value["chunks"].items()},
            parts=tuple(Part(name, rows, size, int(crc, 16)) for name, rows, size, crc in value["problems"]),
            tombstones=dict(value["tombstones"]),
            reasons=tuple(value["reasons"]),
            bases=tuple(value.get("bases", ())),
        )

    def check_arrays(self, arrays: Iterable[RowArray], file: Path) -> None:
        """DamagedError unless the checksums are those of these arrays, one for each chunk."""
        expected = {array.name: array.chunks(self.rows) for array in arrays}
        found = {name: len(crcs) for name, crcs in self.chunks.items()}
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise DamagedError(
                    f"{file}: damaged: field chunks.{name:.80}: checksums of {found.get(name, 'no')} chunks, expected "
                    f"{expected.get(name, 'no such array')} for {self.rows} rows"
                )


def _faults(body: dict[str, Any]) -> Iterator[str]:
    """Members that contradict each other, in words."""
    rows, parts = body["rows"], body["problems"]
    n_problems = sum(part[1] for part in parts)
    if n_problems > _MOST_PROBLEMS:
        yield f"problems: {n_problems} problems, expected at most {_MOST_PROBLEMS}"
    for name, n, size, _ in parts:
        if n > _PROBLEMS_PER_BYTE * size:
            yield f"problems: {name} has {n} problems in {size} bytes"
    for (one, *_), (two, *_) in pairwise(parts):
        if part_number(one) >= part_number(two):
            yield f"problems: {two} after {one}, expected ascending numbers"
    if rows and not n_problems:
        yield f"rows: {rows} rows of no problem"
    for (one, _), (two, _) in pairwise(body["tombstones"]):
        if one >= two:
            yield f"tombstones: problem {two} after {one}, expected ascending numbers"
    for problem, before in body["tombstones"]:
        if problem >= n_problems or before > rows:
            yield f"tombstones: [{problem}, {before}], of {n_problems} problems and {rows} rows"
    if body["reasons"][0]:
        yield "reasons: the first is not empty"
    for (one, _), (two, _) in pairwise(body.get("bases", ())):
        if one > two:
            yield f"bases: row {two} after {one}, expected ascending numbers"
    if body.get("bases") and body["bases"][-1][0] > rows:
        yield f"bases: row {body['bases'][-1][0]} of {rows} rows"


def part_number(file: str) -> int:
    """Number in the name of a part of the problems."""
    return int(file.removeprefix("part-").removesuffix(".parquet"))


def read_manifest(collection: Path) -> Manifest:
    """Read the newest published manifest of a collection's folder."""
    file = collection / MANIFEST
    return Manifest.from_bytes(read_inside(file, store_of(collection), MOST_BYTES), file)


def publish_manifest(collection: Path, manifest: Manifest, beside: AbstractContextManager[None] | None = None) -> None:
    """Publish a manifest: it and everything it names become the collection's content.

    beside: context manager; at its exit everything that the manifest names must be on disk (see `replace_file`).
    """
    file, data = collection / MANIFEST, manifest.to_bytes()
    if len(data) > MOST_BYTES:
        raise GradstoreError(
            f"{file}: would have {len(data)} bytes, more than the {MOST_BYTES} that readers take; nothing was "
            "published: compact the collection first"
        )
    try:
        Manifest.from_bytes(data, file)
    except DamagedError as error:
        reason = str(error).removeprefix(f"{file}: damaged: ")
        raise GradstoreError(f"{file}: nothing was published, for it could not be read again: {reason}") from None
    replace_file(file, data, beside)
