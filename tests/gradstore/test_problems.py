"""Problem files: every form reads to the same records, verl records come back, wrong lines are named."""

import json
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore
from gradstore import RequestError, read_problems, scan_problems, to_verl

VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"What is {i} + 1?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"split": "train", "index": i, "answer": "…"},
        "agent_name": "tool_agent",
    }
    for i in range(4)
]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_verl_records_come_back(tmp_path: Path, write: Callable) -> None:
    """From verl's file through a store to verl's file nothing is lost and no type changes."""
    records = read_problems(write(tmp_path / "train", VERL))
    assert records[2]["id"] == "2"
    assert records[2]["source"] == "openai/gsm8k"
    assert records[2]["ground_truth"] == "3"
    assert records[2]["tags"] == ["math"]
    assert records[2]["prompt"] == VERL[2]["prompt"]
    assert [to_verl(record) for record in records] == VERL
    store = gradstore.create(tmp_path / "store", dim=1, fingerprint={})
    store.add_problems("pool", records)
    assert store.records("pool") == records
    assert [to_verl(record) for record in store.records("pool")] == VERL
    assert store.problems("pool")["prompt"].to_pylist()[1] == "What is 1 + 1?"
    assert store.add_problems("pool", read_problems(tmp_path / "train")) == 0


def test_verl_tags(tmp_path: Path) -> None:
    """verl has one ability; further tags stand in extra_info, and neither is lost on the way there and back."""
    record = {"id": "a", "prompt": "?", "source": "s", "ground_truth": "1", "tags": ["math", "hard"], "extra": {}}
    verl = to_verl(record)
    assert (verl["ability"], verl["extra_info"]["tags"]) == ("math", ["math", "hard"])
    again = read_problems(write_jsonl(tmp_path / "x.jsonl", [verl, *VERL]))
    assert again[0]["tags"] == ["math", "hard"]
    assert again[1]["tags"] == ["math"]
    assert to_verl(again[0]) == verl
    more = to_verl(again[0] | {"tags": [*again[0]["tags"], "coin_flip"]})
    assert more["extra_info"]["tags"] == ["math", "hard", "coin_flip"]


def test_verl_ids(tmp_path: Path) -> None:
    """The index, else an id; as text, also where pandas made whole numbers floats."""
    base = {
        "data_source": "x",
        "prompt": [{"role": "user", "content": "?"}],
        "reward_model": {"ground_truth": ["1", 2]},
    }
    rows = [
        {**base, "extra_info": {"index": "a", "id": "b"}},
        {**base, "extra_info": {"id": "b"}, "id": "c"},
        {**base, "extra_info": None, "id": "c"},
        {**base, "extra_info": {"index": 7.0}},
        {**base, "problem_id": "e"},
    ]
    records = read_problems(write_jsonl(tmp_path / "x.jsonl", rows))
    assert [record["id"] for record in records] == ["a", "b", "c", "7", "e"]
    assert records[0]["ground_truth"] == '["1", 2]'
    assert to_verl(records[0])["reward_model"] == {"ground_truth": ["1", 2]}
    assert [to_verl(record)["extra_info"]["index"] for record in records] == ["a", "b", "c", 7.0, "e"]
    without = write_jsonl(tmp_path / "y.jsonl", [rows[0], base])
    with pytest.raises(RequestError, match=r"y\.jsonl, line 2: field 'extra_info.index' is missing"):
        read_problems(without)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_flat_records(tmp_path: Path, write: Callable) -> None:
    """Fields that the store does not know are kept in extra."""
    rows = [
        {
            "problem_id": "a",
            "prompt": "1 + 1?",
            "source": "s",
            "ground_truth": "2",
            "tags": ["t"],
            "level": 3,
        },
        {
            "problem_id": "b",
            "prompt": "2 + 2?",
            "source": None,
            "ground_truth": "4",
            "tags": None,
            "level": None,
        },
    ]
    records = read_problems(write(tmp_path / "flat", rows))
    assert records[0] == {
        "id": "a",
        "prompt": "1 + 1?",
        "source": "s",
        "ground_truth": "2",
        "tags": ["t"],
        "extra": {"level": 3},
    }
    assert records[1]["source"] == ""
    assert records[1]["tags"] == []
    verl = to_verl(records[0])
    assert verl == {
        "data_source": "s",
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "ability": "t",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"level": 3, "index": "a"},
    }
    assert read_problems(write_jsonl(tmp_path / "verl.jsonl", [verl]))[0]["id"] == "a"
    shorter = write_jsonl(tmp_path / "id.jsonl", [{"id": 5, "prompt": "x", "ground_truth": 42}])
    assert read_problems(shorter)[0] | {"extra": {}} == {
        "id": "5",
        "prompt": "x",
        "source": "",
        "ground_truth": "42",
        "tags": [],
        "extra": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n\n{"id": "b", "prom', "line 3: not valid JSON: .*the line may have been cut off"),
        ('{"id": "a", "prompt": "x"}\nnonsense\n', "line 2: not valid JSON: "),
        ('{"id": "a", "prompt": "x"}\n[1]\n', "line 2: expected a JSON object, not list"),
        ('{"prompt": "x"}\n', "line 1: field 'id' is missing"),
        ('{"id": "a"}\n', "line 1: problem 'a': field 'prompt' must be"),
        ('{"id": true, "prompt": "x"}\n', "line 1: field 'id' must be a non-empty string or a whole number, not True"),
        ('{"id": 1.5, "prompt": "x"}\n', "line 1: field 'id' must be a non-empty string or a whole number, not 1.5"),
        ('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n',
         "problem id 'a' occurs twice, in line 1 and line 3"),
        ('{"id": "a", "prompt": "x", "extra": 3}\n', "line 1: field 'extra' must be a dict, not int"),
        ('{"id": "a", "prompt": "x", "reward_model": 3}\n', "line 1: field 'reward_model' must be a dict, not int"),
        ('{"id": "a", "prompt": "\xff"}\n'.encode("latin-1"), r"line 1: not UTF-8 text \(byte 23\)"),
        (b"PAR1 and no more", "not a readable Parquet file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_to_the_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    """A person must find the one wrong line among a million."""
    path = tmp_path / "problems.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RequestError, match=f"problems.jsonl.*{message}") as caught:
        read_problems(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_rows_of_a_parquet_file_are_named(tmp_path: Path) -> None:
    """Counted from 1, as lines are."""
    path = write_parquet(tmp_path / "x.parquet", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": None}])
    with pytest.raises(RequestError, match=r"x\.parquet, row 2: problem 'b': field 'prompt'"):
        read_problems(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """And one that is a folder."""
    with pytest.raises(RequestError, match=r"nope\.jsonl: the file does not exist"):
        read_problems(tmp_path / "nope.jsonl")
    with pytest.raises(RequestError, match=r"cannot be read \(Is a directory\)"):
        read_problems(tmp_path)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_objects_as_json_text(tmp_path: Path, write: Callable) -> None:
    """Parquet files often keep free-form objects as text; verl trains on such files."""
    texts = [
        row | {"extra_info": json.dumps(row["extra_info"]), "reward_model": json.dumps(row["reward_model"])}
        for row in VERL
    ]
    assert read_problems(write(tmp_path / "x", texts)) == read_problems(write(tmp_path / "y", VERL))
    flat = [{"id": "a", "prompt": "x", "extra": '{"level": 3}'}]
    assert read_problems(write(tmp_path / "flat", flat))[0]["extra"] == {"level": 3}
    for field in ("extra_info", "reward_model"):
        bad = write(tmp_path / f"bad-{field}", [VERL[0] | {field: "{"}])
        with pytest.raises(RequestError, match=f"1: field '{field}' is text that is not JSON"):
            read_problems(bad)
        listed = write(tmp_path / f"list-{field}", [VERL[0] | {field: "[1]"}])
        with pytest.raises(RequestError, match=f"1: field '{field}' must be a dict, not list"):
            read_problems(listed)


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_scanned_problems_are_those_that_are_read(tmp_path: Path, write: Callable) -> None:
    """One after the other, and in little memory: a pool's file can be larger than what is free."""
    rows = [{"id": f"p{i}", "prompt": f"{i} " * 500} for i in range(20_000)]
    path = write(tmp_path / "pool", rows)
    tracemalloc.start()
    found = sum(len(record["prompt"]) for record in scan_problems(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == sum(len(row["prompt"]) for row in rows)
    assert peak < found / 4
    assert list(islice(scan_problems(path), 10)) == read_problems(path)[:10]


def test_a_scan_names_what_is_wrong(tmp_path: Path) -> None:
    """As a list would; what comes before is there already."""
    path = write_jsonl(tmp_path / "x.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}] * 2)
    records = scan_problems(path)
    assert [next(records)["id"], next(records)["id"]] == ["a", "b"]
    with pytest.raises(RequestError, match="'a' occurs twice, in line 1 and line 3"):
        next(records)
    path.write_text("")
    with pytest.raises(RequestError, match="expected at least one"):
        list(scan_problems(path))
