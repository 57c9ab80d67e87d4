"""A few problems of many: their ids, pages and digests are used without the rest, and damage never changes an answer.

Each is compared with a plain list of all records.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore import RequestError, kept_ids, new_problems, parquet_pages, problem_table, row_digests
from gradstore.problem_rows import plain_columns, to_table
from gradstore.problem_table import ProblemTable
from gradstore.problems import canonical

CHAT = [{"role": "system", "content": "Dénke."}, {"role": "user", "content": "1 + 1?"}]


def record(i: int) -> dict[str, Any]:
    return canonical(
        {
            "id": f"{'äß🙂x'[i % 4] * (i % 3)}-{i}",
            "prompt": CHAT if i % 7 == 0 else f"Problem {i} 🙂" * (i % 5 + 1),
            "source": f"s{i % 2}",
            "ground_truth": str(i),
            "tags": ["a", "ü"] * (i % 4),
            "extra": {"n": i} if i % 5 == 0 else {},
        },
        "",
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 4 rows, groups of a few pages, parts of 50 rows, digests of 8, files of ids for parts of 10 and more."""
    monkeypatch.setattr(parquet_pages, "PAGE_ROWS", 4)
    monkeypatch.setattr(problem_table, "PAGE_ROWS", 4)
    monkeypatch.setattr(problem_table, "PART_ROWS", 50)
    monkeypatch.setattr(problem_table, "GROUP_BYTES", 4000)
    monkeypatch.setattr(kept_ids, "LEAST_ROWS", 10)
    monkeypatch.setattr(problem_table, "LEAST_ROWS", 10)
    for module in (row_digests, problem_table):
        monkeypatch.setattr(module, "DIGEST_ROWS", 8)
    parquet_pages.paged.cache_clear()
    yield
    parquet_pages.paged.cache_clear()


@pytest.fixture
def made(tmp_path: Path, small: None) -> tuple[Path, list[dict]]:
    records = [record(i) for i in range(230)]
    store = gradstore.create(tmp_path / "store", dim=2, fingerprint={})
    for start, stop in ((0, 60), (60, 62), (62, 200), (200, 230)):
        store.add_problems("pool", records[start:stop])
    return tmp_path / "store", records


def table_of(path: Path) -> ProblemTable:
    return gradstore.open(path)._collection("pool").snapshot().problems


def damage(path: Path, seed: int) -> None:
    """Change one byte, or cut the file."""
    draw, data = random.Random(seed), bytearray(path.read_bytes())
    if seed % 5 == 0:
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def test_records_are_read_by_pages_as_in_a_list(made: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with repetitions, at the ends of pages, groups and parts; no row group is read for it."""
    path, records = made
    monkeypatch.setattr(ProblemTable, "_read", lambda *_: pytest.fail("a row group was read"))
    for seed in range(20):
        rows = np.random.default_rng(seed).integers(0, 230, 12)
        rows[:4] = 0, 229, 59, 60
        store = gradstore.open(path)
        assert store.records("pool", [records[row]["id"] for row in rows]) == [records[row] for row in rows]
        assert table_of(path).ids_at(rows).tolist() == [records[row]["id"] for row in rows]
        texts = table_of(path).take(rows, ["prompt", "tags"])
        assert texts.equals(to_table([records[row] for row in rows]).select(["prompt", "tags"]))


@pytest.mark.parametrize("options", [{}, {"row_group_size": 7}, {"write_page_index": True, "data_page_size": 100}])
def test_parts_of_other_writers_are_read_by_groups(
    made: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch, options: dict, tmp_path: Path
) -> None:
    """Earlier parts have no index, and others' pages have as many rows as they like."""
    records = made[1]
    monkeypatch.setattr(problem_table, "paged", dict)
    before = problem_table.table_bytes
    monkeypatch.setattr(problem_table, "table_bytes", lambda table, **given: before(table, **{**given, **options}))
    store = gradstore.create(tmp_path / "other", dim=2, fingerprint={})
    store.add_problems("pool", records)
    for seed in range(5):
        some = np.random.default_rng(seed).integers(0, 230, 9).tolist()
        again = gradstore.open(tmp_path / "other")
        assert again.records("pool", [records[row]["id"] for row in some]) == [records[row] for row in some]


def test_a_few_ids_are_found_without_the_others(made: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, records = made
    with monkeypatch.context() as patched:
        patched.setattr(ProblemTable, "lookup", property(lambda _: pytest.fail("all ids were read")))
        for seed in range(10):
            rows = np.random.default_rng(seed).integers(0, 230, 6)
            assert table_of(path).find([records[row]["id"] for row in rows]).tolist() == rows.tolist()
    for asked in (["no such id"], [records[3]["id"], "no such id", ""], [None, records[3]["id"]], []):
        expected = [next((i for i, own in enumerate(records) if own["id"] == name), -1) for name in asked]
        assert table_of(path).find(asked).tolist() == expected


@pytest.mark.parametrize("mask", [0, 7])
def test_ids_with_equal_hashes_are_told_apart(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    for module in (kept_ids, problem_table):
        before = module.hashes_of
        monkeypatch.setattr(module, "hashes_of", lambda ids, own=before: own(ids) & np.uint64(mask))
    records = [record(i) for i in range(120)]
    store = gradstore.create(tmp_path / "store", dim=2, fingerprint={})
    store.add_problems("pool", records)
    for row in range(0, 120, 11):
        assert table_of(tmp_path / "store").find([records[row]["id"]]).tolist() == [row]


def test_a_damaged_lookup_costs_time_and_changes_nothing(made: tuple[Path, list[dict]]) -> None:
    """Whatever byte changed, however the file was cut, or if it is gone or another part's."""
    path, records = made
    files = sorted((path / "collections/pool/indexes/ids").iterdir())
    assert len(files) > 2
    whole = {file: file.read_bytes() for file in files}
    names = [own["id"] for own in records]
    for seed in range(40):
        damage(files[seed % len(files)], seed)
        rows = np.random.default_rng(seed).integers(0, 230, 4)
        found = table_of(path).find([*(names[row] for row in rows), "unknown"])
        assert found.tolist() == [*rows.tolist(), -1]
        for row in rows.tolist():
            assert table_of(path).find([names[row]]).tolist() == [row]
        if seed % 10 == 9:
            assert any("ids/" in note for note in gradstore.open(path).verify().notes)
        for file, data in whole.items():
            file.write_bytes(data)
    assert gradstore.open(path).verify().ok
    same = [file for file in files if len(whole[file]) == len(whole[files[0]])]
    assert len(same) > 1
    same[0].write_bytes(whole[same[1]])
    assert [table_of(path).find([name])[0] for name in names] == list(range(230))
    for file in files:
        file.unlink()
    assert table_of(path).find(names[5:9]).tolist() == [5, 6, 7, 8]


def test_lookups_of_parts_that_are_gone_go_too(made: tuple[Path, list[dict]]) -> None:
    path, records = made
    store = gradstore.open(path, mode="a")
    with store.writer("pool", step=0) as writer:
        writer.append([own["id"] for own in records], np.ones((230, 2)))
    store.delete("pool", [records[0]["id"]])
    store.compact("pool")
    manifest = store._collection("pool").snapshot().manifest
    names = {
        f"{part.file.removesuffix('.parquet')}-{part.crc32c:08x}.ids" for part in manifest.parts if part.rows >= 10
    }
    assert {file.name for file in (path / "collections/pool/indexes/ids").iterdir()} == names
    assert store.records("pool", [records[7]["id"]]) == [records[7]]


def test_digests_of_rows_and_of_records_are_the_same(small: None) -> None:
    for seed in range(20):
        some = [record(i) for i in np.random.default_rng(seed).integers(0, 400, 8).tolist()]
        metadata = row_digests.digests_of(pa.concat_tables([to_table([record(1)] * 8), to_table(some)]).slice(8))
        columns = plain_columns(some)
        assert columns is not None
        assert row_digests.stored_digests(metadata, 8) == [row_digests.digest_of(columns)]
        for field, value in (("prompt", "other"), ("tags", ["aü"]), ("extra", {"m": 1}), ("source", ""), ("id", "x")):
            changed = [{**some[0], field: value}, *some[1:]]
            columns = plain_columns(changed)
            assert columns is not None
            assert row_digests.stored_digests(metadata, 8) != [row_digests.digest_of(columns)]


def test_records_given_again_are_known_by_their_digests(
    made: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stored text is read. Shorter spellings and generators too."""
    path, records = made
    compared: list[int] = []
    before = new_problems._stored_as_given
    monkeypatch.setattr(
        new_problems, "_stored_as_given", lambda known, block: compared.append(len(block)) or before(known, block)
    )
    store = gradstore.open(path, mode="a")
    assert store.add_problems("pool", records) == 0
    assert store.add_problems("pool", ({k: v for k, v in own.items() if v not in ({}, [])} for own in records)) == 0
    assert compared == []
    assert store.add_problems("pool", records[3:100]) == 0  # begins within a block: compared up to its end
    assert sum(compared) < 50 or len(compared) == 1
    assert store.add_problems("pool", list(reversed(records))) == 0


def test_what_changed_is_found_among_known_problems(made: tuple[Path, list[dict]]) -> None:
    path, records = made
    store = gradstore.open(path, mode="a")
    for place in (0, 7, 8, 61, 229):
        for field in ("prompt", "ground_truth", "source"):
            changed = [*records[:place], {**records[place], field: "changed"}, *records[place + 1 :]]
            with pytest.raises(RequestError, match=f"is stored with another {field!r}"):
                store.add_problems("pool", changed)
    for twice in (5, 100):
        for rest in ([records[twice]], records[:60], [{**records[twice], "id": "new"}, records[twice]]):
            with pytest.raises(RequestError, match="occurs 2 times"):
                store.add_problems("pool", [*records, *rest])
    assert store.add_problems("pool", [*records, record(1000)]) == 1
    assert store.records("pool")[-1] == record(1000)


def test_a_changed_byte_is_refused_or_was_not_read(tmp_path: Path) -> None:
    """Never another text, and never another error: column names, page headers, statistics and texts alike."""
    ids = [f"p{i}" for i in range(30)]
    store = gradstore.create(tmp_path / "store", dim=4, fingerprint={})
    store.add_problems("pool", [{"id": one, "prompt": f"What is {one}?", "source": "s", "tags": ["t"]} for one in ids])
    (part,) = (tmp_path / "store").glob("collections/pool/g0/problems/part-*")
    whole, right = part.read_bytes(), gradstore.open(tmp_path / "store").records("pool", ids[3:23])
    refused = 0
    for place in range(0, len(whole), 5):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = gradstore.open(tmp_path / "store").records("pool", ids[3:23])
        except gradstore.DamagedError:
            refused += 1
        else:
            assert found == right, place
    assert refused > len(whole) // 5 // 3
