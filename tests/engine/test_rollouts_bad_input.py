"""Every kind of bad row is refused before anything is computed, in one line that names file, row and field."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore import RequestError
from gradstore.engine.rollouts import Rollout, read_rollouts, write_rollouts

GOOD: dict[str, Any] = {"problem_id": "p", "prompt_ids": [1, 2], "response_ids": [3, 4], "reward": 1.0}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name not in names}


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no id": (_without("problem_id"), "missing field 'problem_id' (found: prompt_ids, response_ids, reward)"),
    "null id": (GOOD | {"problem_id": None}, "missing field 'problem_id'"),
    "empty id": (GOOD | {"problem_id": ""}, "field 'problem_id' is empty"),
    "wrong id": (GOOD | {"problem_id": 1.5}, "field 'problem_id' is a number, expected text or an integer"),
    "true id": (GOOD | {"problem_id": True}, "field 'problem_id' is true or false"),
    "no prompt": (_without("prompt_ids"), "missing field 'prompt' or 'prompt_ids'"),
    "empty prompt": (_without("prompt_ids") | {"prompt": ""}, "field 'prompt' is empty"),
    "no message": (_without("prompt_ids") | {"prompt": []}, "field 'prompt' is an empty list"),
    "bad message": (
        GOOD | {"prompt": [{"role": "user"}]},
        "field 'prompt' message 0 needs 'role', text, and 'content'",
    ),
    "prompt number": (GOOD | {"prompt": 3}, "field 'prompt' is an integer, expected text or a list"),
    "no prompt ids": (GOOD | {"prompt_ids": []}, "field 'prompt_ids' is empty"),
    "no response": (_without("response_ids"), "missing field 'response' or 'response_ids'"),
    "response list": (GOOD | {"response": ["x"]}, "field 'response' is a list, expected text"),
    "text id": (GOOD | {"response_ids": [3, "4"]}, "field 'response_ids' entry 1 is '4', expected integer token ids"),
    "fractional id": (GOOD | {"response_ids": [3, 4.5]}, "field 'response_ids' entry 1 is 4.5, expected integer"),
    "true token": (GOOD | {"response_ids": [True]}, "field 'response_ids' entry 0 is True, expected integer"),
    "null token": (GOOD | {"prompt_ids": [1, None]}, "field 'prompt_ids' entry 1 is None, expected integer"),
    "negative id": (GOOD | {"prompt_ids": [1, -7]}, "field 'prompt_ids' entry 1 is -7, expected a token id of 0"),
    "huge id": (GOOD | {"prompt_ids": [10**30]}, f"field 'prompt_ids' entry 0 is {10**30}, expected a token id"),
    "ids text": (GOOD | {"prompt_ids": "1 2"}, "field 'prompt_ids' is text, expected a list of token ids"),
    "no reward": (_without("reward"), "missing field 'reward'"),
    "reward text": (GOOD | {"reward": "1.0"}, "field 'reward' is text, expected a number"),
    "reward nan": (GOOD | {"reward": float("nan")}, "field 'reward' is nan, expected a finite number"),
    "reward inf": (GOOD | {"reward": float("-inf")}, "field 'reward' is -inf, expected a finite number"),
    "reward huge": (GOOD | {"reward": 10**400}, "field 'reward' is inf, expected a finite number"),
    "logprobs short": (GOOD | {"logprobs": [-1.0]}, "field 'logprobs' has 1 entries, but 'response_ids' has 2"),
    "logprobs nan": (GOOD | {"logprobs": [-1.0, float("nan")]}, "field 'logprobs' entry 1 is nan, expected a finite"),
    "logprobs inf": (GOOD | {"logprobs": [float("-inf"), -1.0]}, "field 'logprobs' entry 0 is -inf"),
    "logprobs positive": (GOOD | {"logprobs": [-1.0, 2.5]}, "field 'logprobs' entry 1 is 2.5, expected a finite"),
    "logprobs text": (GOOD | {"logprobs": [-1.0, "x"]}, "field 'logprobs' entry 1 is text, expected a number"),
    "mask short": (GOOD | {"response_mask": [1]}, "field 'response_mask' has 1 entries, but 'response_ids' has 2"),
    "mask numbers": (GOOD | {"response_mask": [1, 2]}, "field 'response_mask' entry 1 is 2, expected 0 or 1"),
    "mask fractions": (GOOD | {"response_mask": [1.0, 0.0]}, "field 'response_mask' entry 0 is 1.0, expected 0 or 1"),
    "mask null": (GOOD | {"response_mask": [0, None]}, "field 'response_mask' entry 1 is None, expected 0 or 1"),
    "mask text": (GOOD | {"response_mask": "10"}, "field 'response_mask' is text, expected a list of 0 and 1"),
    "mask misspelt": (GOOD | {"responses_mask": [1, 1]}, "field 'responses_mask' is not known; did you mean"),
    "mask of text": (
        _without("response_ids") | {"response": "ab", "response_mask": [1, 1]},
        "field 'response_mask' needs 'response_ids' beside it",
    ),
    "logprobs of own null": (
        GOOD | {"response_mask": [1, 0], "logprobs": [None, None]},
        "field 'logprobs' entry 0 is null, expected a number",
    ),
    "rollout": (GOOD | {"rollout": 1.5}, "field 'rollout' is a number, expected text"),
    "logprobs object": (GOOD | {"logprobs": {"3": -1}}, "field 'logprobs' is an object, expected a list"),
    "logprobs of text": (
        _without("response_ids") | {"response": "ab", "logprobs": [-1, -1]},
        "field 'logprobs' needs 'response_ids' beside it",
    ),
    "tags text": (GOOD | {"tags": "easy"}, "field 'tags' is text, expected a list of texts"),
    "source": (GOOD | {"source": 3}, "field 'source' is an integer, expected text"),
    "extra": (GOOD | {"extra": [1]}, "field 'extra' is a list, expected an object"),
    "extra text": (GOOD | {"extra": "{"}, "field 'extra' is text that is not JSON"),
    "step": (GOOD | {"step": -1}, "field 'step' is -1, expected an integer of 0 or more"),
    "surrogate": (GOOD | {"response": "a\ud800"}, "field 'response' has half a surrogate pair at character 1"),
    "not an object": ([1, 2], "expected an object with the fields of a rollout, found a list"),  # type: ignore[dict-item]
}
IN_PARQUET = """no id, null id, empty id, no prompt, empty prompt, no prompt ids, no response, negative id, no reward,
reward nan, reward text, logprobs short, logprobs nan, tags text, null token""".replace("\n", " ").split(", ")


def _refused(path: Path, **options: Any) -> str:
    """The message of the refusal: one line that begins with the file."""
    with pytest.raises(RequestError) as refused:
        read_rollouts(path, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert refused.value.exit_status == 2
    return message


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_of_json_lines(tmp_path: Path, case: str) -> None:
    """Found after hours of gradients, or worse not found, a bad row costs those hours or a wrong ranking."""
    row, message = BAD_ROWS[case]
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n{json.dumps(GOOD)}\n")
    assert _refused(path).startswith(f"{path}, line 3: {message}")
    path = tmp_path / "r.json"
    path.write_text(json.dumps([GOOD, row, GOOD]))
    assert _refused(path).startswith(f"{path}, entry 2: {message}")


@pytest.mark.parametrize("case", IN_PARQUET)
def test_bad_row_of_parquet(tmp_path: Path, case: str) -> None:
    """Columns of numbers are checked without becoming Python objects: the same rules must hold there."""
    row, message = BAD_ROWS[case]
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([row] * 3), path)
    refused = _refused(path)
    assert re.match(rf"{re.escape(str(path))}, row 1: ", refused)
    assert message.split(" (found")[0] in refused


def test_float_token_ids_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD | {"response_ids": [1.0, 2.0]}]), path)
    assert _refused(path) == f"{path}, row 1: field 'response_ids' entry 0 is 1.0, expected integer token ids"


def test_ids_beyond_the_model(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Ids of another model's vocabulary index past the embedding. The model's own may be more than the tokenizer's."""
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD | {"response_ids": [259, 260], "prompt_ids": [2, 260]}))
    read_rollouts(path)
    source = read_rollouts(path, tokenizer=tiny_tokenizer, vocabulary=261)
    assert next(source.groups()).responses[0].tolist() == [259, 260]
    (record,) = source.records()
    assert record["prompt"] == tiny_tokenizer.decode([2])
    message = _refused(path, tokenizer=tiny_tokenizer, vocabulary=260)
    assert "'prompt_ids' entry 1 is 260, expected a token id below 260, the model's vocabulary" in message


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD | {"prompt": "hello"}) + "\n")
    read_rollouts(path)  # the ids are there
    path.write_text(json.dumps(_without("prompt_ids") | {"prompt": "hello"}) + "\n")
    assert _refused(path) == f"{path}, line 1: field 'prompt' is text: give a tokenizer, or token ids as 'prompt_ids'"
    path.write_text(json.dumps(_without("response_ids") | {"response": "hello"}) + "\n")
    assert "field 'response' is text: give a tokenizer" in _refused(path)
    path.write_text(json.dumps({"input": "a", "output": "b", "score": 1.0}) + "\n")
    assert "field 'input' is text: give a tokenizer" in _refused(path)
    assert "append_eos needs a tokenizer" in _refused(path, append_eos=True)


def test_messages_that_the_template_refuses(tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(_without("prompt_ids") | {"prompt": [{"role": "user", "content": "a"}]}))
    template = tiny_tokenizer.chat_template
    try:
        tiny_tokenizer.chat_template = "{{ raise_exception('no user turns') }}"
        assert f"{path}, line 1: the chat template refuses" in _refused(path, tokenizer=tiny_tokenizer)
        tiny_tokenizer.chat_template = None
        assert "the tokenizer has no chat template" in _refused(path, tokenizer=tiny_tokenizer)
    finally:
        tiny_tokenizer.chat_template = template


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_a_problem_that_disagree(tmp_path: Path, suffix: str) -> None:
    """Two problems under one id would become one group, with a baseline of both."""

    def write(*rows: dict[str, Any]) -> Path:
        path = tmp_path / f"r.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path

    first, third = ("line 1", "line 3") if suffix == "jsonl" else ("row 1", "row 3")
    other = GOOD | {"problem_id": "q", "prompt_ids": [9]}
    path = write(GOOD, other, GOOD | {"prompt_ids": [1, 3]})
    assert _refused(path) == (
        f"{path}, {third}: problem 'p' has another prompt than in {path}, {first}; one problem has one prompt"
    )
    logprobs: dict[str, Any] = {"logprobs": [-1.0, -2.0]}
    path = write(GOOD | logprobs, other | logprobs, GOOD | {"logprobs": None})
    assert _refused(path).startswith(f"{path}, {third}: problem 'p' has no 'logprobs', unlike {path}, {first}")
    path = write(GOOD | {"logprobs": None}, other | logprobs, GOOD | logprobs)
    assert _refused(path).startswith(f"{path}, {third}: problem 'p' has 'logprobs', unlike {path}, {first}")
    assert not read_rollouts(write(GOOD | logprobs, other | {"logprobs": None})).has_logprobs
    reference: dict[str, Any] = {"reference_logprobs": [-1.0, -2.0]}
    path = write(GOOD | reference, other | reference, GOOD | {"reference_logprobs": None})
    assert _refused(path).startswith(f"{path}, {third}: problem 'p' has no 'reference_logprobs', unlike {path}")


def test_torn_files(tmp_path: Path) -> None:
    """A file cut off by a full disk or a kill must not pass for a shorter one."""
    path = tmp_path / "r.jsonl"
    whole = json.dumps(GOOD) + "\n"
    path.write_text(whole + whole[:-20])
    message = _refused(path)
    assert message.startswith(f"{path}, line 2: not valid JSON:")
    assert message.endswith("the file ends here, so the line may have been cut off")
    path.write_text(whole + "{not json}\n" + whole)
    assert _refused(path).startswith(f"{path}, line 2: not valid JSON: Expecting property name")
    path.write_bytes(whole.encode() + b'{"problem_id": "\xff"}\n')
    assert _refused(path) == f"{path}, line 2: not UTF-8 text (byte 16)"
    path.write_text(whole + '{"reward": ' + "1" * 5000 + "}\n")
    assert _refused(path).startswith(f"{path}, line 2: not usable JSON:")

    path = tmp_path / "r.json"
    text = json.dumps([GOOD, GOOD])
    for cut, expected in [
        (len(text) - 1, "entry 2: not valid JSON: expected ',' or ']', found the end of the file"),
        (len(text) - 9, "entry 2: not valid JSON"),
        (len(text) // 2, "entry 2: not valid JSON"),
        (3, "entry 1: not valid JSON"),
    ]:
        path.write_text(text[:cut])
        assert _refused(path).startswith(f"{path}, {expected}")
    path.write_text(text + "x")
    assert _refused(path) == f"{path}: more text after the closing bracket of the list"
    path.write_text("[]")
    assert _refused(path) == f"{path}: no rollouts, expected at least one"
    path.write_text("[" + json.dumps(GOOD) + " " + json.dumps(GOOD) + "]")
    assert "entry 1: not valid JSON: expected ',' or ']', found '{'" in _refused(path)
    path.write_bytes(b'[{"problem_id": "\xff"}]')
    assert _refused(path) == f"{path}, entry 1: not UTF-8 text"

    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 100), path)
    path.write_bytes(path.read_bytes()[:-30])
    assert _refused(path).startswith(f"{path}: not a readable Parquet file:")
    pq.write_table(pa.Table.from_pylist([{"a": 1}]), path)
    assert _refused(path) == f"{path}: none of a rollout's columns is there (found: a)"
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    assert _refused(path) == f"{path}: no rollouts, expected at least one"


def test_files_that_are_not_rollouts(tmp_path: Path) -> None:
    assert _refused(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such file or folder")
    (tmp_path / "folder").mkdir()
    assert _refused(tmp_path / "folder").startswith(f"{tmp_path / 'folder'}: no .jsonl or .parquet file")
    path = tmp_path / "r.jsonl"
    path.write_text(" \n\n")
    assert _refused(path) == f"{path}: the file is empty, expected at least one rollout"
    path.write_text("problem,reward\n")
    assert _refused(path).startswith(f"{path}: neither JSON Lines, nor a JSON list, nor Parquet")
    assert _refused(path, format="csv").startswith("rollout format 'csv' is not one of auto, rollouts, verl")


def test_field_names_are_those_of_the_format(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A message about 'reward' helps nobody whose file says 'score'."""
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"input": "a", "output": "b", "score": "high"}))
    assert "field 'score' is text, expected a number" in _refused(path, tokenizer=tiny_tokenizer)
    path.write_text(json.dumps({"input": "a", "output": "b"}))
    assert "missing field 'score'" in _refused(path, tokenizer=tiny_tokenizer)
    path.write_text(json.dumps({"group_id": 1, "prompt": "a", "response": "b"}))
    assert "missing field 'passed' or 'is_correct'" in _refused(path, tokenizer=tiny_tokenizer)
    path.write_text(json.dumps(GOOD))
    assert "missing field 'input'" in _refused(path, tokenizer=tiny_tokenizer, format="verl")


def test_writer_refusals(tmp_path: Path) -> None:
    rollout = Rollout("p", 1.0, prompt="a", response="b")
    with pytest.raises(RequestError, match=r"the suffix '\.csv' is not one of \.jsonl, \.parquet"):
        write_rollouts(tmp_path / "r.csv").__enter__()
    with pytest.raises(RequestError, match="cannot be written: No such file or directory"):
        write_rollouts(tmp_path / "none" / "r.jsonl").__enter__()
    with pytest.raises(RequestError, match="cannot be written: No such file or directory"):
        write_rollouts(tmp_path / "none" / "r.parquet").__enter__()
    mixed = Rollout("q", 1.0, prompt=[{"role": "user", "content": "a"}], response="b")
    with pytest.raises(RequestError, match="Parquet cannot mix"), write_rollouts(tmp_path / "r.parquet") as writer:
        writer.append([rollout, mixed])
