"""docs/format.md is enough to write a reader from: this one imports nothing of ours."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
import pytest

TYPES = {
    "scale": "<f4",
    "norm": "<f4",
    "step": "<i8",
    "problem": "<i4",
    "state": "u1",
    "pass_rate": "<f4",
    "n_rollouts": "<i4",
    "reason": "<u2",
}
CODES = {"int8": "i1", "int4": "u1", "1bit": "u1", "fp16": "<f2", "fp32": "<f4"}


def read_newest(store: Path, name: str, at: int) -> dict[str, tuple[int, float, str, np.ndarray]]:
    """id -> (step, norm, reason, unit row) of the newest row of every problem, from the words of docs/format.md."""
    root = json.loads((store / "zarr.json").read_text())["attributes"]["gradstore"]
    assert root["format"] == (3 if "column_rows" in root else 1)
    raw = (store / "collections" / name / "manifest.json").read_bytes()
    body = raw[32:-2]
    assert raw == b'{"crc32c":"%08x","manifest":' % google_crc32c.value(body) + body + b"}\n"
    manifest = json.loads(body)
    generation = store / "collections" / name / manifest["generation"]
    n = manifest["rows"]
    width = math.ceil(root["dim"] / {"int4": 2, "1bit": 8}.get(root["dtype"], 1))

    def array(array_name: str, kind: str, *row: int) -> np.ndarray:
        parts = []
        chunk_rows = root["chunk_rows"] if row else root.get("column_rows", root["chunk_rows"])
        for chunk in range(math.ceil(n / chunk_rows)):
            file = generation / array_name / (f"c.{chunk}.0" if row else f"c.{chunk}")
            whole = np.frombuffer(file.read_bytes(), kind).reshape(chunk_rows, *row)
            part = whole[: n - chunk * chunk_rows]
            assert f"{google_crc32c.value(part.tobytes()):08x}" == manifest["chunks"][array_name][chunk]
            assert not whole[len(part) :].any()
            parts.append(part)
        return np.concatenate(parts)

    column = {array_name: array(array_name, kind) for array_name, kind in TYPES.items()}
    codes = array("codes", CODES[root["dtype"]], width)
    if root["dtype"] == "int4":
        pairs = np.stack([codes & 15, codes >> 4], axis=2).reshape(n, -1).astype(int)[:, : root["dim"]]
        codes = np.where(pairs > 7, pairs - 16, pairs)
    if root["dtype"] == "1bit":
        bits = (codes[:, :, None] >> np.arange(8)) & 1
        codes = 2 * bits.reshape(n, -1)[:, : root["dim"]].astype(int) - 1
    rows = codes.astype(np.float32) * column["scale"][:, None]
    ids = []
    for file, part_rows, size, crc in manifest["problems"]:
        data = (generation / "problems" / file).read_bytes()
        assert (len(data), f"{google_crc32c.value(data):08x}") == (size, crc)
        part_ids = pq.read_table(generation / "problems" / file)["id"].to_pylist()
        assert len(part_ids) == part_rows
        ids += part_ids
    dead_before = dict(manifest["tombstones"])
    newest: dict[int, int] = {}
    for row in range(n):
        problem, step = int(column["problem"][row]), int(column["step"][row])
        if row < dead_before.get(problem, 0) or step > at:
            continue
        if problem not in newest or step >= column["step"][newest[problem]]:
            newest[problem] = row
    return {
        ids[problem]: (
            int(column["step"][row]),
            float(column["norm"][row]),
            manifest["reasons"][column["reason"][row]],
            rows[row],
        )
        for problem, row in sorted(newest.items())
    }


@pytest.mark.parametrize("column_rows", [None, 12])
@pytest.mark.parametrize("dtype", list(CODES))
def test_a_reader_written_from_the_page_reads_the_same(
    new_store: Callable, tools: dict, dtype: str, column_rows: int | None
) -> None:
    """A change of the format that the page does not tell breaks this reader; stores of format 1 go on as they were."""
    store = new_store(n=30, dtype=dtype, dim=25, column_rows=column_rows)
    tools["append"](store, 4, list(range(30)))
    tools["append"](store, 2, [1, 2, 3])
    store.add_problems("pool", tools["records"](5, first=30))
    store.delete("pool", ["p7", "p8", "p9"])
    with store.writer("pool", step=6) as writer:
        writer.append(["p8", "p30"], np.ones((2, 25)), state=[0, 2], reason=[None, "broken"])
    for keep in ("nothing yet", "all", "newest"):
        if keep != "nothing yet":
            store.delete("pool", ["p11"])
            store.compact("pool", keep=keep)
            store.add_problems("pool", [{"id": "p11", "prompt": "x"}])
            tools["append"](store, 3, [11])
        for at in (2, 4, 9):
            view = store.view("pool", at=at)
            told = read_newest(store.path, "pool", at)
            assert list(told) == list(view.ids)
            if told:
                steps, norms, reasons, rows = zip(*told.values(), strict=True)
                assert list(steps) == view.steps.tolist()
                assert list(norms) == view.norms.tolist()
                assert list(reasons) == view.reasons
                assert np.allclose(np.stack(rows), view.rows(range(len(view))), atol=1e-6)
    assert len(told) == 29
