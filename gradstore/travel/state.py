"""State of a pushed store: the one object, `gradstore.json`, that says what the store at a URL holds.

A push replaces it last, in one request. It names every other object, and objects of a new state never take the names of
an older one's: a reader that has read a state sees that state alone. It holds the local files (path, size, checksum),
and for the rows of each collection the *segments*: consecutive rows, packed as Zarr arrays (packing.py). The text is
`{"crc32c":"xxxxxxxx","state":BODY}` and a newline, as of a manifest. docs/remote.md has the members.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

from gradstore import additions, attachments
from gradstore.durable import canonical_json, crc32c
from gradstore.errors import DamagedError, NotAStoreError
from gradstore.inside import MOST_BYTES as MOST_FILE_BYTES
from gradstore.layout import COLLECTIONS, ZARR
from gradstore.schema import CRC, Checker, lists, load_json, mapping, record, row, text, whole

STATE = "gradstore.json"
FORMAT = 1
MOST_BYTES = 1 << 27
"""Largest state."""
_BODY = Checker(
    record(
        {
            "format": whole(),
            "push": whole(1),
            "files": mapping(row(whole(0, MOST_FILE_BYTES), CRC)),
            "segments": mapping(lists(row(whole(), whole(1), text("[0-9a-f]{16}")))),
            "retired": mapping(whole()),
        }
    )
)
_HEAD = b'{"crc32c":"%08x","state":'
_HEAD_BYTES = len(_HEAD % 0)
_TAIL = b"}\n"
_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*){0,7}")


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a collection, in all arrays, as one Zarr group."""

    start: int
    stop: int
    digest: str
    """Of what the rows are (`pushing.segment_digest`): 16 hexadecimal digits."""

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def folder(self, collection: str) -> str:
        """Prefix of its objects."""
        return f"{COLLECTIONS}/{collection}/rows-{self.start}-{self.stop}-{self.digest}"


@dataclass(frozen=True, slots=True)
class State:
    """What the store at a URL holds."""

    push: int = 0
    """Counts the pushes that changed something, from 1."""
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Local path -> (bytes, CRC-32C), of every file that is kept as it is: all but those of the row arrays."""
    segments: dict[str, tuple[Segment, ...]] = field(default_factory=dict)
    """Collection -> its rows, in order and without gaps."""
    retired: dict[str, int] = field(default_factory=dict)
    """Object, or prefix of a segment's objects -> time of the push since which no state names it, in Unix seconds."""

    def key(self, path: str) -> str:
        """The object that holds a local file."""
        return object_of(path, self.files[path][1])

    def prefixes(self) -> set[str]:
        """The objects that the state names, and the prefixes of those of segments."""
        segments = {segment.folder(name) for name, them in self.segments.items() for segment in them}
        return {self.key(path) for path in self.files} | segments

    def same_content(self, other: "State") -> bool:
        return (self.files, self.segments) == (other.files, other.segments)

    def to_bytes(self) -> bytes:
        body = canonical_json(
            {
                "format": FORMAT,
                "push": self.push,
                "files": {path: [size, f"{crc:08x}"] for path, (size, crc) in self.files.items()},
                "segments": {
                    name: [[segment.start, segment.stop, segment.digest] for segment in them]
                    for name, them in self.segments.items()
                },
                "retired": self.retired,
            }
        )
        return _HEAD % crc32c(body) + body + _TAIL

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> "State":
        """Parse a state; DamagedError if a byte changed or a field cannot be, NotAStoreError for a newer format."""
        file = f"{where}: {STATE}"
        body = raw[_HEAD_BYTES : -len(_TAIL)]
        if raw[:_HEAD_BYTES] != _HEAD % crc32c(body) or raw[-len(_TAIL) :] != _TAIL:
            raise DamagedError(f"{file}: damaged: the state does not match its checksum")
        value = load_json(body, file)
        if isinstance(value, dict) and isinstance(value.get("format"), int) and value["format"] > FORMAT:
            raise NotAStoreError(
                f"{file}: written in format {value['format']!r:.40}, this version reads up to {FORMAT}: "
                "upgrade gradstore"
            )
        value = _BODY.check(value, file)
        for path in (*value["files"], *value["segments"], *value["retired"]):
            if not _PATH.fullmatch(path) or len(path) > 1000:
                raise DamagedError(f"{file}: damaged: {path!r:.80} is not the name of a file that a store has")
        segments = {name: tuple(Segment(*one) for one in them) for name, them in value["segments"].items()}
        for name, them in segments.items():
            stops = [0, *(one.stop for one in them)]
            if [one.start for one in them] != stops[:-1] or any(a >= b for a, b in pairwise(stops)):
                raise DamagedError(f"{file}: damaged: field segments.{name:.80}: the rows have gaps")
        files = {path: (size, int(crc, 16)) for path, (size, crc) in value["files"].items()}
        return cls(value["push"], files, segments, value["retired"])


def object_of(path: str, crc: int) -> str:
    """The object that holds a local file of this checksum: its path, with the checksum in the name.

    The root's zarr.json never changes and keeps its name. Attachments and additions have their checksum already.
    """
    folder, _, name = path.rpartition("/")
    if path == ZARR or crc in (attachments.checksum_in(name), additions.checksum_in(name)):
        return path
    stem, dot, suffix = name.rpartition(".")
    name = f"{stem or suffix}.{crc:08x}{dot if stem else ''}{suffix if stem else ''}"
    return f"{folder}/{name}" if folder else name
