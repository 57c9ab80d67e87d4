"""What no file can hold is refused by file, row and field, wherever in a record it stands."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore
from gradstore import RequestError, read_problems
from gradstore.engine.rollouts import read_rollouts
from gradstore.keepable import check_keepable, fault

HALF = "a\ud83d"
PROBLEM: dict[str, Any] = {"id": "x", "prompt": "q", "ground_truth": "1"}
ROLLOUT: dict[str, Any] = {"problem_id": "x", "prompt_ids": [1], "response_ids": [2], "reward": 1.0}
VERL: dict[str, Any] = {"data_source": "s", "prompt": [{"role": "user", "content": "q"}], "extra_info": {"index": 1}}
BAD = {
    "id": (PROBLEM | {"id": HALF}, "field 'id' has half a surrogate pair at character 1"),
    "prompt": (PROBLEM | {"prompt": HALF}, "field 'prompt' has half"),
    "message": (PROBLEM | {"prompt": [{"role": "user", "content": HALF}]}, "field 'prompt[0].content' has half"),
    "message's name": (PROBLEM | {"prompt": [{"role": "user", "content": "q", HALF: 1}]}, "field 'prompt[0]' has a"),
    "ground truth": (PROBLEM | {"ground_truth": HALF}, "field 'ground_truth' has half"),
    "ground truth list": (PROBLEM | {"ground_truth": ["b", HALF]}, "field 'ground_truth[1]' has half"),
    "tag": (PROBLEM | {"tags": ["b", HALF]}, "field 'tags[1]' has half"),
    "extra": (PROBLEM | {"extra": {"a": {"b": ["c", HALF]}}}, "field 'extra.a.b[1]' has half"),
    "extra's name": (PROBLEM | {"extra": {"a": {HALF: 1}}}, "field 'extra.a' has a name with half a surrogate pair"),
    "extra as text": (PROBLEM | {"extra": json.dumps({"a": HALF})}, "field 'extra.a' has half"),
    "another field": (PROBLEM | {"level": HALF}, "field 'level' has half"),
    "verl source": (VERL | {"data_source": HALF}, "field 'data_source' has half"),
    "verl info": (VERL | {"extra_info": {"index": 1, "a": HALF}}, "field 'extra_info.a' has half"),
    "verl info as text": (VERL | {"extra_info": json.dumps({"index": 1, "a": HALF})}, "field 'extra_info.a' has half"),
    "verl truth": (VERL | {"reward_model": {"ground_truth": HALF}}, "field 'reward_model.ground_truth' has half"),
}


@pytest.mark.parametrize("name", BAD)
def test_half_a_surrogate_pair_in_a_problem(tmp_path: Path, name: str) -> None:
    """A traceback of some encoder would not say which of a million rows has it."""
    bad, message = BAD[name]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PROBLEM | {"id": "first"}, bad)), encoding="utf-8")
    with pytest.raises(RequestError, match=r"p\.jsonl, line 2: ") as refused:
        read_problems(path)
    assert message in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_id": HALF}, "field 'problem_id' has half"),
        ({"extra": {"a": [HALF]}}, "field 'extra.a[0]' has half"),
        ({"extra": {HALF: 1}}, "field 'extra' has a name with half"),
        ({"ground_truth": {"a": HALF}}, "field 'ground_truth' has half"),
        ({"tags": [HALF]}, "field 'tags' has half"),
        ({"prompt": [{"role": "user", "content": "q", "name": HALF}]}, "has half"),
        ({"prompt": [{"role": "user", "content": "q", HALF: "b"}]}, "half a surrogate pair"),
    ],
)
def test_half_a_surrogate_pair_in_a_rollout(tmp_path: Path, changes: dict, message: str) -> None:
    """Found by the first pass over the file, not by the store hours later."""
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(ROLLOUT | changes) + "\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"r\.jsonl, line 1: ") as refused:
        read_rollouts(path)
    assert message in str(refused.value)


def test_records_from_python_are_checked_too(tmp_path: Path) -> None:
    """The store must stay as it was."""
    store = gradstore.create(tmp_path / "s", dim=2, fingerprint={})
    with pytest.raises(RequestError, match=r"record 1: problem 'x': field 'extra\.a' has half a surrogate pair"):
        store.add_problems("pool", [PROBLEM | {"id": "y"}, PROBLEM | {"extra": {"a": HALF}}])
    assert "pool" not in store.collections or not len(store.view("pool"))


@pytest.mark.parametrize("verl", [True, False])
def test_columns_that_are_no_text_are_named(tmp_path: Path, verl: bool) -> None:
    """Pictures come as bytes deep inside a column: the person can leave out only what has a name."""
    row = (VERL if verl else PROBLEM) | {"images": [{"path": None, "bytes": b"\xff"}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    with pytest.raises(RequestError, match=r"x\.parquet, row 1: field 'images\[0\]\.bytes' is bytes.*leave its column"):
        read_problems(tmp_path / "x.parquet")


def test_fault_agrees_with_the_encoder() -> None:
    """A fault is named exactly where JSON and UTF-8 refuse."""
    values: list[Any] = [None, 1, 1.5, True, "é", "\U0001f600", [], {}, {"a": [{"b": "c"}]}, {1: 2}, HALF, b"", {1j: 2}]
    values += [{"a": {1, 2}}, [HALF], {HALF: 1}, ("x", b""), {"a": object()}]
    for value in values:
        try:
            json.dumps(value, ensure_ascii=False).encode()
            keepable = True
        except (TypeError, ValueError):
            keepable = False
        assert (fault(value, "f") is None) == keepable, value
        if not keepable:
            with pytest.raises(RequestError, match="here: field 'f"):
                check_keepable(value, "here", "f")
