"""The arrays as other Zarr readers see them: zarr-python alone and tensorstore open all of them, with equal numbers."""

from collections.abc import Callable

import numpy as np
import pytest

import gradstore
from gradstore.header import read_header
from gradstore.snapshot import open_snapshot
from gradstore.stored_rows import StoredRows
from tests.readers import by_tensorstore, by_zarr

ARRAYS = ("codes", "scale", "norm", "step", "problem", "state", "pass_rate", "n_rollouts", "reason")


@pytest.mark.parametrize("read", [by_zarr, by_tensorstore])
@pytest.mark.parametrize("dtype", ["int8", "int4", "1bit", "fp16", "fp32"])
def test_other_readers_open_every_array(new_store: Callable, tools: dict, dtype: str, read: Callable) -> None:
    """Metadata outside the core of Zarr v3 would be refused by one of them, or a chunk's bytes read another way."""
    store = new_store(n=30, dtype=dtype, dim=23)
    tools["append"](store, 4, list(range(30)))
    with store.writer("pool", step=-0) as writer:
        writer.append(
            ["p3", "p4"], np.ones((2, 23)), state=[2, 0], reason=["broken", None], pass_rate=0.5, n_rollouts=7
        )
    snapshot = open_snapshot(read_header(store.path), store.path / "collections/pool")
    folder = store.path / "collections/pool/g0"
    got = {name: read(folder / name) for name in ARRAYS}
    assert {array.name for array in read_header(store.path).arrays} == set(ARRAYS)
    for name in ARRAYS[1:]:
        assert np.array_equal(got[name], snapshot.column(name), equal_nan=name == "pass_rate"), name
        assert got[name].dtype == snapshot.column(name).dtype.newbyteorder("=")
    chunks = np.concatenate([snapshot.codes.chunk(chunk) for chunk in range(4)])
    assert np.array_equal(got["codes"], chunks)
    codes = _unpacked(got["codes"], dtype)[:, :23]
    rows = np.arange(32)
    assert np.allclose(codes * got["scale"][:, None], StoredRows(snapshot, rows).unit_rows(rows), atol=1e-6)


def _unpacked(codes: np.ndarray, dtype: str) -> np.ndarray:
    """By the words of the format: int4 low four bits first, in two's complement; 1bit lowest bit first."""
    if dtype == "1bit":
        return 2.0 * ((codes[:, :, None] >> np.arange(8)) & 1).reshape(len(codes), -1) - 1
    if dtype != "int4":
        return codes.astype(np.float32)
    pairs = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1).astype(np.int16)
    return np.where(pairs > 7, pairs - 16, pairs)


def test_shapes_follow_when_a_writer_closes(new_store: Callable) -> None:
    """A shape ahead of the rows would show zeros as rows; one behind shows fewer until the writer closes."""
    store = new_store()
    folder = store.path / "collections/pool/g0"
    with store.writer("pool", step=0) as writer:
        writer.append(["p1", "p2"], np.ones((2, 24)))
        assert by_zarr(folder / "codes").shape == (0, 24)
        writer.publish()
        assert by_zarr(folder / "norm").shape == (0,)
        writer.append(["p3"], np.ones((1, 24)))
    assert by_zarr(folder / "codes").shape == (3, 24)
    assert by_zarr(folder / "norm").shape == (3,)


def test_the_whole_is_a_zarr_group(new_store: Callable) -> None:
    """A person who knows Zarr finds their way without this package."""
    import zarr

    store = new_store()
    root = zarr.open_group(store.path, mode="r")
    assert dict(root.attrs)["gradstore"]["dim"] == 24
    assert root["collections/pool/g0/codes"].dtype == np.int8
    assert isinstance(root["collections/pool"], zarr.Group)
    assert gradstore.open(store.path).verify().ok
