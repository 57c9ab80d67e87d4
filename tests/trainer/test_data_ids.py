"""Files whose rows are numbered alike make one pool: ids tell problems apart, and stay where they do so already."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradstore import read_problems, to_verl
from gradstore.trainer.data.pool import Options, Part, build


def _verl(source: str, n: int, **info: Any) -> list[dict[str, Any]]:
    """What verl's own preparation of a data set writes: rows numbered from 0."""
    return [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": f"{source} {i}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i, **info},
        }
        for i in range(n)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_files_that_number_their_rows_alike(tmp_path: Path) -> None:
    """Ids get the source in front, in the written verl records too; which ids does not depend on the counts."""
    one, other = (_write(tmp_path / f"{name}.jsonl", _verl(name, 5)) for name in ("gsm8k", "math"))
    third = _write(tmp_path / "third.jsonl", [{"id": "own", "prompt": "else", "ground_truth": "1"}])
    whole = build([Part(str(path)) for path in (one, other, third)], Options())
    expected = {f"{name}-{i}": f"{name} {i}" for name in ("gsm8k", "math") for i in range(5)} | {"own": "else"}
    shown = {r["id"]: r["prompt"] if isinstance(r["prompt"], str) else r["prompt"][0]["content"] for r in whole.records}
    assert shown == expected
    assert len(whole.notes) == 1
    assert "gsm8k.jsonl" in whole.notes[0]
    assert "third" not in whole.notes[0]
    again = _write(tmp_path / "again.jsonl", [to_verl(record) for record in whole.records])
    assert {record["id"] for record in read_problems(again)} == expected.keys()
    some = build([Part(str(one), 2), Part(str(other), 2)], Options(seed=3))
    assert len(some.records) == 4
    assert {record["id"] for record in some.records} <= expected.keys()
    alone = build([Part(str(one))], Options())
    assert ([record["id"] for record in alone.records], alone.notes) == (["0", "1", "2", "3", "4"], [])


@pytest.mark.parametrize("folders", [False, True])
def test_files_of_one_source(tmp_path: Path, folders: bool) -> None:
    """Where the source does not tell ids apart the file's name does, or its path; problems in both stay once."""
    paths = [tmp_path / "a" / ("train.jsonl" if folders else "one.jsonl"), tmp_path / "b" / "train.jsonl"]
    first, second = _verl("s", 3), _verl("s", 3)
    for row in second[1:]:
        row["prompt"] = [{"role": "user", "content": row["prompt"][0]["content"] + " again"}]
    pool = build([Part(str(_write(path, rows))) for path, rows in zip(paths, (first, second), strict=True)], Options())
    prefixes = (
        [str(path.with_suffix("")).strip("/").replace("/", "-") for path in paths] if folders else ["one", "train"]
    )
    expected = {f"{prefixes[0]}-{i}" for i in range(3)} | {f"{prefixes[1]}-{i}" for i in (1, 2)}
    assert {record["id"] for record in pool.records} == expected


def test_the_same_problems_in_two_files_keep_their_ids(tmp_path: Path) -> None:
    """A larger edition of a pool repeats a smaller one: those are the same problems."""
    small, large = (_write(tmp_path / f"{n}.jsonl", _verl("s", n)) for n in (3, 6))
    pool = build([Part(str(small)), Part(str(large))], Options())
    assert sorted(record["id"] for record in pool.records) == [str(i) for i in range(6)]
    assert pool.notes == []
