"""How rows lie in object storage: some consecutive rows of an array as a Zarr array, compressed, its chunks in shards.

A shard is one object: the index (offset and size of each chunk, then its checksum) and then the chunks, as the Zarr
codec `sharding_indexed` has it. A chunk holds the rows of one local chunk file, compressed by `blosc` (zstd, bits
shuffled) with a CRC-32C after it. All are core codecs of Zarr v3, so any reader opens the array. Which codecs, and how
large shards are, is measured in docs/benchmarks.md (`python -m benchmarks.compression`).
"""

import json
import struct
from dataclasses import dataclass

import numpy as np

from gradstore.durable import crc32c
from gradstore.errors import DamagedError
from gradstore.layout import RowArray

SHARD_BYTES = 32 << 20
"""Rows of a shard have at most so many bytes, unless one chunk has more: few requests, and little is lost by a kill."""
MOST_CHUNKS = 64
"""Most chunks of a shard."""
_LEVEL = 5
_SHUFFLES = ("noshuffle", "shuffle")
"""Of bytes, and of wider numbers: the best of those measured (`python -m benchmarks.compression`)."""
_ENTRY = np.dtype("<u8")
_EMPTY = 2**64 - 1
_CRC_BYTES = 4
_BLOSC_SIZES = struct.Struct("<3I")
"""In blosc's header, from its fifth byte on: sizes decompressed, of a block, compressed."""
_OVERHEAD = 64
"""More bytes than blosc and the checksum add to a chunk that does not compress."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The rows of one segment in one array: sizes of its chunks and shards, and their bytes."""

    array: RowArray
    rows: int
    """Number of rows of the segment."""

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk: those of a local chunk file, fewer in a smaller segment."""
        return min(self.array.chunk_rows, self.rows)

    @property
    def shard_chunks(self) -> int:
        """Chunks of a shard."""
        fitting = max(1, min(MOST_CHUNKS, SHARD_BYTES // (self.chunk_rows * self.array.row_bytes)))
        return min(fitting, -(-self.rows // self.chunk_rows))

    @property
    def shard_rows(self) -> int:
        return self.chunk_rows * self.shard_chunks

    @property
    def shards(self) -> int:
        """Number of shards of the segment."""
        return -(-self.rows // self.shard_rows)

    def shard_file(self, shard: int) -> str:
        return self.array.chunk_file(shard)

    @property
    def index_bytes(self) -> int:
        """Bytes of a shard's index, at its beginning."""
        return 16 * self.shard_chunks + _CRC_BYTES

    @property
    def most_bytes(self) -> int:
        """Most bytes that a shard can have."""
        return self.index_bytes + self.shard_chunks * self._most_chunk_bytes

    @property
    def _most_chunk_bytes(self) -> int:
        return self.chunk_rows * self.array.row_bytes + _OVERHEAD

    def zarr_json(self) -> bytes:
        """The bytes of the Zarr array's zarr.json."""
        array = self.array
        bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = {
            "chunk_shape": list(array.shape(self.chunk_rows)),
            "codecs": [bytes_codec, blosc_codec(array), {"name": "crc32c"}],
            "index_codecs": [bytes_codec, {"name": "crc32c"}],
            "index_location": "start",
        }
        about = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(array.shape(self.rows)),
            "data_type": array.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.shape(self.shard_rows))}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0 if array.dtype.kind in "iu" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            "attributes": {},
            "storage_transformers": [],
        }
        return json.dumps(about, separators=(",", ":")).encode()

    def encode_shard(self, rows: np.ndarray) -> bytes:
        """One shard from its rows: [at most shard_rows] or [at most shard_rows, width]."""
        entries, chunks, offset = [], [], self.index_bytes
        for start in range(0, len(rows), self.chunk_rows):
            part = np.ascontiguousarray(rows[start : start + self.chunk_rows])
            if len(part) < self.chunk_rows:  # A chunk is always whole for Zarr; zeros compress to nothing.
                part = np.concatenate([part, np.zeros(self.array.shape(self.chunk_rows - len(part)), part.dtype)])
            data = _compressed(part)
            chunks.append(data + crc32c(data).to_bytes(_CRC_BYTES, "little"))
            entries += [offset, len(chunks[-1])]
            offset += len(chunks[-1])
        entries += [_EMPTY] * (2 * self.shard_chunks - len(entries))
        index = np.array(entries, _ENTRY).tobytes()
        return b"".join([index, crc32c(index).to_bytes(_CRC_BYTES, "little"), *chunks])

    def read_index(self, data: bytes, where: str) -> list[tuple[int, int]]:
        """(offset, size) of each chunk, (-1, 0) where there is none, from a shard's first `index_bytes`.

        DamagedError for an index that cannot be.
        """
        index = data[: self.index_bytes - _CRC_BYTES]
        if len(data) < self.index_bytes or _crc_after(data[: self.index_bytes]) != crc32c(index):
            raise DamagedError(f"{where}: damaged: the index of its chunks does not match its checksum")
        found = np.frombuffer(index, _ENTRY).reshape(-1, 2).tolist()
        for offset, size in found:
            if offset != _EMPTY and not (size <= self._most_chunk_bytes and offset <= self.most_bytes):
                raise DamagedError(f"{where}: damaged: its index has a chunk of {size} bytes at {offset}")
        return [(-1, 0) if offset == _EMPTY else (offset, size) for offset, size in found]

    def decode_chunk(self, data: bytes, where: str) -> np.ndarray:
        """The rows of a chunk [chunk_rows] or [chunk_rows, width]; DamagedError for bytes that are none."""
        from numcodecs import Blosc

        body, expected = data[:-_CRC_BYTES], self.chunk_rows * self.array.row_bytes
        if len(data) < 16 + _CRC_BYTES or _crc_after(data) != crc32c(body):
            raise DamagedError(f"{where}: damaged: a chunk does not match its checksum")
        size, _, compressed = _BLOSC_SIZES.unpack_from(body, 4)
        if (size, compressed) != (expected, len(body)):  # Before memory is taken for as much as the bytes claim.
            raise DamagedError(f"{where}: damaged: a chunk of {size} bytes, expected {expected}")
        try:
            decoded = Blosc().decode(body)
        except (RuntimeError, ValueError) as error:
            raise DamagedError(f"{where}: damaged: a chunk cannot be decompressed") from error
        return np.frombuffer(decoded, self.array.dtype).reshape(self.array.shape(self.chunk_rows))


def blosc_codec(array: RowArray) -> dict:
    """The Zarr codec that compresses the chunks of an array."""
    return {
        "name": "blosc",
        "configuration": {
            "cname": "zstd",
            "clevel": _LEVEL,
            "shuffle": _SHUFFLES[array.dtype.itemsize > 1],
            "typesize": array.dtype.itemsize,
            "blocksize": 0,
        },
    }


def _compressed(part: np.ndarray) -> bytes:
    from numcodecs import Blosc

    return bytes(Blosc("zstd", _LEVEL, Blosc.SHUFFLE if part.itemsize > 1 else Blosc.NOSHUFFLE).encode(part))


def _crc_after(data: bytes) -> int:
    return int.from_bytes(data[-_CRC_BYTES:], "little")
