"""Packed rows are plain Zarr for other readers, and no byte of theirs is believed here."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore import DamagedError
from gradstore.durable import crc32c
from gradstore.layout import RowArray, row_arrays
from gradstore.travel.packing import Packed
from tests.readers import by_tensorstore, by_zarr


def packed_array(packed: Packed, rows: np.ndarray, folder: Path) -> Path:
    """The rows as files."""
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(packed.zarr_json())
    for shard in range(packed.shards):
        part = rows[shard * packed.shard_rows : (shard + 1) * packed.shard_rows]
        (folder / packed.shard_file(shard)).write_bytes(packed.encode_shard(part))
    return folder


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
@pytest.mark.parametrize("dtype", ["int8", "int4", "1bit", "fp16", "fp32"])
def test_other_readers_open_packed_arrays(monkeypatch, tmp_path: Path, dtype: str, read) -> None:
    """A codec outside the core of Zarr v3, or an index in another place, would lock the rows into this project."""
    monkeypatch.setattr("gradstore.travel.packing.SHARD_BYTES", 500)
    random = np.random.default_rng(0)
    for array in row_arrays(37, dtype, ("ess",), chunk_rows=8, column_rows=12):
        for n in (1, 5, 8, 100, 203):
            rows = random.integers(0, 100, array.shape(n)).astype(array.dtype)
            path = packed_array(Packed(array, n), rows, tmp_path / f"{array.name}-{n}")
            assert np.array_equal(read(path), rows), (array.name, n)
            assert {codec["name"] for codec in json.loads((path / "zarr.json").read_text())["codecs"]} == {
                "sharding_indexed"
            }
    assert len(list((tmp_path / "codes-203").glob("c.*"))) > 1


@given(n=st.integers(1, 300), chunk=st.integers(1, 50), seed=st.integers(0, 5))
def test_what_is_decoded_is_what_was_encoded(n: int, chunk: int, seed: int) -> None:
    """Chunks at the ends of shards and arrays are the ones that go wrong."""
    array = RowArray("codes", np.dtype("int8"), 3, chunk)
    packed = Packed(array, n)
    rows = np.random.default_rng(seed).integers(-128, 128, (n, 3)).astype(np.int8)
    found = []
    for shard in range(packed.shards):
        data = packed.encode_shard(rows[shard * packed.shard_rows : (shard + 1) * packed.shard_rows])
        assert len(data) <= packed.most_bytes
        for offset, size in packed.read_index(data, "here"):
            if offset >= 0:
                found.append(packed.decode_chunk(data[offset : offset + size], "here"))
    assert np.array_equal(np.concatenate(found)[:n], rows)


def test_what_the_bytes_claim_takes_no_memory() -> None:
    """Right checksums over a chunk that says it has 2 GB, or over an index that points anywhere."""
    packed = Packed(RowArray("codes", np.dtype("int8"), 3, 4), 4)
    data = packed.encode_shard(np.ones((4, 3), np.int8))
    ((offset, size),) = packed.read_index(data, "here")
    chunk = bytearray(data[offset : offset + size])
    chunk[4:8] = (2**31 - 1).to_bytes(4, "little")
    chunk[-4:] = crc32c(bytes(chunk[:-4])).to_bytes(4, "little")
    with pytest.raises(DamagedError, match="a chunk of 2147483647 bytes, expected 12"):
        packed.decode_chunk(bytes(chunk), "here")
    index = np.array([0, 2**60], "<u8").tobytes()
    with pytest.raises(DamagedError, match="its index has a chunk"):
        packed.read_index(index + crc32c(index).to_bytes(4, "little"), "here")
    for cut in range(size):
        with pytest.raises(DamagedError):
            packed.decode_chunk(data[offset : offset + size][:cut], "here")
