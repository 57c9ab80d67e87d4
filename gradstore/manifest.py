"""Manifest: the file that lists which rows of a collection exist, with the checksums of their bytes.

A writer publishes by replacing this file. Its content is `{"crc32c":"xxxxxxxx","manifest":BODY}` and a newline. The
checksum is over BODY, which is canonical JSON, so any changed byte of the file is detected.
"""

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from gradstore.durable import canonical_json, crc32c, reading, replace_file
from gradstore.errors import DamagedError, NotAStoreError
from gradstore.layout import FORMAT, FORMAT_OF_BASES, MANIFEST, PROBLEMS, generation_name

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
        """Parse a manifest; DamagedError if any byte changed, NotAStoreError for a newer format."""
        body = raw[_HEAD_BYTES : -len(_TAIL)]
        if raw[:_HEAD_BYTES] != _HEAD % crc32c(body) or raw[-len(_TAIL) :] != _TAIL:
            raise DamagedError(f"{file}: damaged: the manifest does not match its checksum")
        value = json.loads(body)
        if value["format"] != (FORMAT_OF_BASES if "bases" in value else FORMAT):
            raise NotAStoreError(
                f"{file}: written in store format {value['format']}, this version reads up to {FORMAT_OF_BASES}: "
                "upgrade gradstore"
            )
        return cls(
            commit=value["commit"],
            generation=int(value["generation"][1:]),
            rows=value["rows"],
            chunks={name: tuple(int(crc, 16) for crc in crcs) for name, crcs in value["chunks"].items()},
            parts=tuple(Part(name, rows, size, int(crc, 16)) for name, rows, size, crc in value["problems"]),
            tombstones=dict(value["tombstones"]),
            reasons=tuple(value["reasons"]),
            bases=tuple((row, basis) for row, basis in value.get("bases", ())),
        )


def read_manifest(collection: Path) -> Manifest:
    """Read the newest published manifest of a collection's folder."""
    file = collection / MANIFEST
    with reading(file):
        raw = file.read_bytes()
    return Manifest.from_bytes(raw, file)


def publish_manifest(collection: Path, manifest: Manifest, beside: AbstractContextManager[None] | None = None) -> None:
    """Publish a manifest: it and everything it names become the collection's content.

    beside: context manager; at its exit everything that the manifest names must be on disk (see `replace_file`).
    """
    replace_file(collection / MANIFEST, manifest.to_bytes(), beside)
