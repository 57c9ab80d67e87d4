"""Rollouts as verl and GradAlign dump them: groups by text or id, one step at a time, prompts given back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradstore import RequestError
from gradstore.engine.rollouts import read_rollouts, text_id


def _dump(step: int, prompts: list[str]) -> list[dict[str, Any]]:
    """Rows as verl's trainer dumps them: no ids, the reward's extra fields beside the score."""
    return [
        {
            "input": prompt,
            "output": f"answer {j} of step {step}",
            "gts": "2",
            "score": float(j % 2),
            "step": step,
            "acc": bool(j % 2),
        }
        for prompt in prompts
        for j in range(2)
    ]


def test_verl_dump(tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable) -> None:
    """Groups by the hash of the input; rollouts of trainer step t were sampled by policy version t - 1."""
    write_rows(tmp_path / "3.jsonl", _dump(3, ["a", "b"]))
    source = read_rollouts(tmp_path / "3.jsonl", tokenizer=tiny_tokenizer)
    assert (source.format, source.step) == ("verl", 2)
    assert source.problem_ids == [text_id("a"), text_id("b")] == ["text-ca978112ca1bbdca", "text-3e23e8160039594a"]
    first = next(source.groups())
    assert first.rewards.tolist() == [0, 1]
    assert tiny_tokenizer.decode(first.responses[1]) == "answer 1 of step 3"
    assert next(source.records())["ground_truth"] == "2"
    validation = read_rollouts(tmp_path / "3.jsonl", tokenizer=tiny_tokenizer, format="verl-validation")
    assert validation.step == 3


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"index": 12}, "12"),
        ({"problem_id": "x"}, "x"),
        ({"extra_info": {"index": 5}}, "5"),
        ({"index": None, "extra_info": {"index": "q"}}, "q"),
    ],
)
def test_verl_dump_with_ids(
    tmp_path: Path, tiny_tokenizer: Any, fields: dict[str, Any], problem: str, write_rows: Callable
) -> None:
    """Where a reward function returned the index, verl dumps it: then two problems may share their text."""
    rows = [row | fields for row in _dump(1, ["a"])]
    assert read_rollouts(write_rows(tmp_path / "1.jsonl", rows), tokenizer=tiny_tokenizer).problem_ids == [problem]


def test_verl_dump_of_several_steps_needs_a_choice(tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable) -> None:
    """Rollouts of different policies in one group give the gradient of neither."""
    for step in (1, 2, 10):
        write_rows(tmp_path / f"{step}.jsonl", _dump(step, ["a", "b"]))
    with pytest.raises(RequestError, match=r"rollouts of 3 steps \(step 1 to 10\); choose one with step="):
        read_rollouts(tmp_path, tokenizer=tiny_tokenizer)
    source = read_rollouts(tmp_path, tokenizer=tiny_tokenizer, step=10)
    assert (source.step, source.n_rollouts) == (9, 4)
    with pytest.raises(RequestError, match="no file of step 4, found step 1 to 10"):
        read_rollouts(tmp_path, tokenizer=tiny_tokenizer, step=4)

    together = write_rows(tmp_path / "together.jsonl", _dump(1, ["a"]) + _dump(2, ["a"]))
    with pytest.raises(RequestError, match=r"rollouts of 2 steps \(step 1 in .*line 1; step 2 in .*line 3\)"):
        read_rollouts(together, tokenizer=tiny_tokenizer)
    source = read_rollouts(together, tokenizer=tiny_tokenizer, step=2)
    assert [tiny_tokenizer.decode(ids) for group in source.groups() for ids in group.responses] == [
        "answer 0 of step 2",
        "answer 1 of step 2",
    ]
    with pytest.raises(RequestError, match="no rollouts of step 7"):
        read_rollouts(together, tokenizer=tiny_tokenizer, step=7)
    zero = write_rows(tmp_path / "zero.jsonl", _dump(0, ["a"]))
    with pytest.raises(RequestError, match="format='verl-validation'"):
        read_rollouts(zero, tokenizer=tiny_tokenizer)


def test_known_problems_give_a_verl_dump_its_ids_and_prompts_back(
    tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable
) -> None:
    """verl decodes prompts without special tokens: tokenised again they are not what the policy was asked."""
    problems = [
        {"id": f"p{j}", "prompt": [{"role": "user", "content": f"{j}+1="}], "ground_truth": str(j + 1), "tags": ["t"]}
        for j in range(3)
    ]
    ids = [
        tiny_tokenizer.apply_chat_template(p["prompt"], add_generation_prompt=True, return_dict=False) for p in problems
    ]
    inputs = [tiny_tokenizer.decode(prompt, skip_special_tokens=True) for prompt in ids]
    path = write_rows(tmp_path / "1.jsonl", _dump(1, [inputs[2], inputs[0]]))
    source = read_rollouts(path, tokenizer=tiny_tokenizer, problems=problems)
    assert source.problem_ids == ["p2", "p0"]
    assert [group.prompt_ids.tolist() for group in source.groups()] == [ids[2], ids[0]]
    assert list(source.records()) == [problems[2], problems[0]]
    with pytest.raises(RequestError, match=r"line 1: no problem given has this prompt"):
        read_rollouts(path, tokenizer=tiny_tokenizer, problems=problems[:2])
    twins = [*problems, problems[0] | {"id": "twin"}]
    with pytest.raises(RequestError, match="problem 'twin': the same prompt as problem 'p0'"):
        read_rollouts(path, tokenizer=tiny_tokenizer, problems=twins)


@pytest.mark.parametrize("container", ["jsonl", "parquet", "json"])
def test_gradalign_responses(tmp_path: Path, tiny_tokenizer: Any, container: str, write_rows: Callable) -> None:
    """`passed` is the reward, `is_correct` where that is null, as in GradAlign's own analysis."""
    entries = [
        {"group_id": 4, "prompt": "a", "response": "x", "is_correct": False, "passed": True, "expected_answer": "x"},
        {"group_id": 4, "prompt": "a", "response": "y", "is_correct": True, "passed": None, "expected_answer": "x"},
        {"group_id": 4, "prompt": "a", "response": "z", "is_correct": False, "passed": False, "expected_answer": "x"},
        {"group_id": 2, "prompt": "b", "response": "z", "is_correct": False, "passed": False, "expected_answer": "x"},
    ]
    source = read_rollouts(write_rows(tmp_path / f"responses_sorted.{container}", entries), tokenizer=tiny_tokenizer)
    assert source.format == "gradalign"
    assert source.step is None
    assert source.problem_ids == ["4", "2"]
    assert [group.rewards.tolist() for group in source.groups()] == [[1, 1, 0], [0]]
    assert [record["ground_truth"] for record in source.records()] == ["x", "x"]


def test_verl_dump_that_looks_like_several_turns_warns_once(
    tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """verl's dumps hold the text of tools beside the policy's; nothing in them tells the two apart."""
    rows = _dump(3, ["a", "b"])
    read_rollouts(write_rows(tmp_path / "3.jsonl", rows), tokenizer=tiny_tokenizer)
    assert not caplog.records
    for row in rows[1:3]:
        row["output"] = "<tool_call>1+1</tool_call>\nuser\n<tool_response>2</tool_response>\nassistant\nSo 2."
    read_rollouts(write_rows(tmp_path / "3.jsonl", rows), tokenizer=tiny_tokenizer)
    (record,) = caplog.records
    assert "2 responses look like several turns, first in" in record.getMessage()
    assert "line 2; this format does not say which tokens the policy wrote" in record.getMessage()


def test_verl_dump_with_several_outputs_is_refused(tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable) -> None:
    rows = _dump(3, ["a"])
    for row, key in zip(rows, ("u-1_0_0", "u-1_1_0"), strict=True):
        row["uid"] = key
    assert read_rollouts(write_rows(tmp_path / "3.jsonl", rows), tokenizer=tiny_tokenizer).n_rollouts == 2
    rows[1]["uid"] = "u-1_0_1"
    with pytest.raises(RequestError, match="line 2: field 'uid' is 'u-1_0_1', output 1 of its rollout: verl's dumps"):
        read_rollouts(write_rows(tmp_path / "3.jsonl", rows), tokenizer=tiny_tokenizer)


def _trl(*, chat: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Rows as TRL 1.16's `log_completions` writes them after step 5."""
    return [
        {
            "step": 5,
            "prompt": [{"role": "user", "content": prompt}] if chat else prompt,
            "completion": [{"role": "assistant", "content": f"answer {j}"}] if chat else f"answer {j}",
            "accuracy_reward": float(j),
            **more,
            "advantage": 2.0 * j - 1,
        }
        for prompt in ("a", "b")
        for j in range(2)
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_trl_dump(tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable, chat: bool) -> None:
    """The rewards' column is named after the function; problems are known by their prompts alone."""
    path = write_rows(tmp_path / "completions_00005.parquet", _trl(chat=chat))
    source = read_rollouts(path, tokenizer=tiny_tokenizer, append_eos=True)
    assert (source.format, source.step, source.counts.tolist()) == ("trl:accuracy_reward", 4, [2, 2])
    assert chat or source.problem_ids == [text_id("a"), text_id("b")]
    group = next(source.groups())
    assert group.rewards.tolist() == [0, 1]
    assert group.masks is None
    assert tiny_tokenizer.decode(group.responses[1]) == "answer 1<eos>"
    assert tiny_tokenizer.decode(group.prompt_ids).endswith("assistant\n" if chat else "a")


def test_trl_dump_with_several_columns_of_rewards(tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable) -> None:
    """Which columns are rewards, and which were logged beside them, the file does not say."""
    path = write_rows(tmp_path / "completions_00005.parquet", _trl(format_reward=0.25, answer="2", empty=None))
    with pytest.raises(RequestError, match="accuracy_reward, format_reward, answer, empty may be: choose, as in trl:"):
        read_rollouts(path, tokenizer=tiny_tokenizer)
    source = read_rollouts(path, tokenizer=tiny_tokenizer, format="trl:accuracy_reward+format_reward+empty")
    assert next(source.groups()).rewards.tolist() == [0.25, 1.25]
    with pytest.raises(RequestError, match="row 1: field 'answer' is text, expected a number"):
        read_rollouts(path, tokenizer=tiny_tokenizer, format="trl:answer")
    with pytest.raises(RequestError, match="row 1: missing field 'no_such'"):
        read_rollouts(path, tokenizer=tiny_tokenizer, format="trl:no_such")


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ([{"role": "assistant", "content": "x"}, {"role": "tool", "content": "2"}], "2 messages with content, role"),
        ([{"role": "assistant", "content": None, "tool_calls": "f"}], "1 messages with role, tool_calls"),
    ],
)
def test_trl_dump_of_several_turns_is_refused(
    tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable, completion: list, told: str
) -> None:
    """A tool's words must not pass for the policy's."""
    rows = _trl(chat=True)
    rows[2]["completion"] = completion
    path = write_rows(tmp_path / "completions_00005.parquet", rows)
    with pytest.raises(
        RequestError, match=f"row 3: field 'completion' has {told}: TRL's dumps do not say which tokens"
    ):
        read_rollouts(path, tokenizer=tiny_tokenizer)
