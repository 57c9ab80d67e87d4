"""Rollout files become the groups that a slow, obvious parse of them gives, in whatever format, order or container."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore import RequestError
from gradstore.engine.rollouts import Group, Rollout, read_rollouts, write_rollouts
from gradstore.reading import json_rows, parquet_rows

CONTAINERS = ["jsonl", "parquet", "json"]


def _rows(n_problems: int = 7, *, logprobs: bool = True, shuffle: bool = False) -> list[dict[str, Any]]:
    """Rows of unequal groups, with empty responses among them."""
    generator = np.random.default_rng(5)
    rows = []
    for problem in range(n_problems):
        for _ in range(1 + problem % 4):
            length = int(generator.integers(0, 6))
            rows.append(
                {
                    "problem_id": f"p{problem}",
                    "prompt_ids": [3, 4 + problem],
                    "response_ids": generator.integers(0, 50, length).tolist(),
                    "reward": float(generator.integers(0, 2)),
                    "source": "arithmetic",
                    "ground_truth": str(problem),
                    "tags": ["easy", f"family-{problem % 2}"],
                }
            )
            if logprobs:
                rows[-1]["logprobs"] = (-generator.random(length)).tolist()
                rows[-1]["reference_logprobs"] = (-generator.random(length)).tolist()
    if shuffle:
        generator.shuffle(rows)  # type: ignore[arg-type]
    return rows


def _slow_groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups by looking through all rows once for each problem."""
    order = list(dict.fromkeys(row["problem_id"] for row in rows))
    return [
        {
            "problem_id": problem,
            "prompt_ids": next(row["prompt_ids"] for row in rows if row["problem_id"] == problem),
            "responses": [row["response_ids"] for row in rows if row["problem_id"] == problem],
            "rewards": [row["reward"] for row in rows if row["problem_id"] == problem],
            **{
                part: [row[part] for row in rows if row["problem_id"] == problem and part in row]
                for part in ("logprobs", "reference_logprobs")
            },
        }
        for problem in order
    ]


def _check_equal(groups: list[Group], expected: list[dict[str, Any]]) -> None:
    assert [group.problem_id for group in groups] == [slow["problem_id"] for slow in expected]
    for group, slow in zip(groups, expected, strict=True):
        assert group.prompt_ids.dtype == np.int64
        assert group.prompt_ids.tolist() == slow["prompt_ids"]
        assert [ids.dtype for ids in group.responses] == [np.int64] * len(slow["responses"])
        assert [ids.tolist() for ids in group.responses] == slow["responses"]
        assert group.rewards.dtype == np.float64
        assert group.rewards.tolist() == slow["rewards"]
        for part in ("logprobs", "reference_logprobs"):
            given = getattr(group, part)
            if given is None:
                assert slow[part] == []
            else:
                assert [values.tolist() for values in given] == [np.float32(values).tolist() for values in slow[part]]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_groups_equal_a_slow_parse(
    tmp_path: Path, container: str, logprobs: bool, shuffle: bool, write_rows: Callable
) -> None:
    """Without it a row could land in another group, or a group lose its order, and every gradient after is wrong."""
    rows = _rows(logprobs=logprobs, shuffle=shuffle)
    source = read_rollouts(write_rows(tmp_path / f"rollouts.{container}", rows))
    expected = _slow_groups(rows)
    _check_equal(list(source.groups()), expected)
    assert source.problem_ids == [slow["problem_id"] for slow in expected]
    assert len(source) == len(expected)
    assert source.n_rollouts == len(rows)
    assert source.counts.tolist() == [len(slow["rewards"]) for slow in expected]
    assert (source.has_logprobs, source.has_reference) == (logprobs, logprobs)


@pytest.mark.parametrize("container", CONTAINERS)
def test_shuffled_rows_give_the_same_groups(tmp_path: Path, container: str, write_rows: Callable) -> None:
    """Rows in order of completion, as a server writes them, must mean the same as rows in order of problems."""

    def contents(rows: list[dict[str, Any]], name: str) -> dict[str, list[Any]]:
        groups = read_rollouts(write_rows(tmp_path / f"{name}.{container}", rows)).groups()
        return {
            group.problem_id: sorted(
                (ids.tolist(), reward) for ids, reward in zip(group.responses, group.rewards, strict=True)
            )
            for group in groups
        }

    assert contents(_rows(shuffle=True), "shuffled") == contents(_rows(), "ordered")


@pytest.mark.parametrize("container", CONTAINERS)
def test_chosen_problems_come_in_order_of_first_appearance(
    tmp_path: Path, container: str, write_rows: Callable
) -> None:
    """A resumed collection asks for what is missing; another order would change what it writes."""
    rows = _rows(shuffle=True)
    source = read_rollouts(write_rows(tmp_path / f"rollouts.{container}", rows))
    wanted = ["p5", "p1", "p3"]
    expected = [slow for slow in _slow_groups(rows) if slow["problem_id"] in wanted]
    _check_equal(list(source.groups(wanted)), expected)
    with pytest.raises(RequestError, match="problem 'nobody' has no rollouts"):
        source.groups(["p1", "nobody"])


def test_groups_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable) -> None:
    """A pool's rollouts are larger than memory: asking for one group must not read the others."""
    source = read_rollouts(write_rows(tmp_path / "rollouts.jsonl", _rows(40, shuffle=True)))
    fetched = []
    fetch = json_rows.JsonLines.fetch

    def counting(self: json_rows.JsonLines, places: list[int], sizes: list[int]) -> list[Any]:
        fetched.append(len(places))
        return fetch(self, places, sizes)

    monkeypatch.setattr(json_rows.JsonLines, "fetch", counting)
    groups = source.groups()
    assert fetched == []
    first = next(groups)
    assert fetched == [len(first.responses)]


def test_parquet_keeps_a_bounded_number_of_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_rows: Callable
) -> None:
    """With rows in no order every group touches many row groups: keeping them all would be the whole file."""
    rows = _rows(30, shuffle=True)
    path = write_rows(tmp_path / "rollouts.parquet", rows)
    monkeypatch.setattr(parquet_rows, "CACHE_BYTES", 2000)
    source = read_rollouts(path)
    held = 0
    for _ in source.groups():
        file = source._files[0]
        assert isinstance(file, parquet_rows.ParquetRows)
        held = max(held, len(file._cache))
    assert 1 <= held < file._parquet.metadata.num_row_groups / 2
    _check_equal(list(source.groups()), _slow_groups(rows))


def test_long_json_list_is_parsed_entry_by_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that cross the edges of what is read at once, and text of several bytes a letter, keep their place."""
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 7)
    rows = [row | {"prompt": "être 数学 \U0001d54f, [1, {2}]"} for row in _rows(shuffle=True)]
    path = tmp_path / "rollouts.json"
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=2), "\n [\n" + json.dumps(rows)[1:]):
        path.write_text(text, encoding="utf-8")
        _check_equal(list(read_rollouts(path).groups()), _slow_groups(rows))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    _check_equal(list(read_rollouts(path).groups()), _slow_groups(rows))


def test_records_are_those_of_the_first_rollout(tmp_path: Path, write_rows: Callable) -> None:
    """The store takes its problems from here when there is no other list of them."""
    rows = [*_rows(2), {"problem_id": 7, "prompt": "1+1=", "response_ids": [1], "prompt_ids": [9], "reward": 1}]
    rows[0]["extra"] = {"level": 3}
    records = list(read_rollouts(write_rows(tmp_path / "rollouts.jsonl", rows)).records())
    assert records[0] == {
        "id": "p0",
        "source": "arithmetic",
        "prompt": "[token ids] 3 4",
        "ground_truth": "0",
        "tags": ["easy", "family-0"],
        "extra": {"level": 3},
    }
    assert records[2] == {"id": "7", "source": "", "prompt": "1+1=", "ground_truth": "", "tags": [], "extra": {}}


def test_text_is_tokenised_as_documented(tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable) -> None:
    """Plain text as the tokenizer takes it, messages through the template, responses without special tokens."""
    messages = [{"role": "user", "content": "1+1="}]
    rows: list[dict[str, Any]] = [
        {"problem_id": "text", "prompt": "1+1=", "response": "2", "reward": 1},
        {"problem_id": "text", "prompt": "1+1=", "response": "", "reward": 0},
        {"problem_id": "text", "prompt": "1+1=", "response": "22222", "finish_reason": "length", "reward": 0},
        {"problem_id": "text", "prompt": "1+1=", "response": "3<eos>", "reward": 0},
        {"problem_id": "chat", "prompt": messages, "response": "2", "reward": 1},
        {"problem_id": "ids", "prompt": "1+1=", "prompt_ids": [5], "response": "2", "response_ids": [6], "reward": 1},
    ]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    one_plus_one = tiny_tokenizer("1+1=")["input_ids"]
    two, three = tiny_tokenizer("2")["input_ids"], tiny_tokenizer("3")["input_ids"]
    eos = [tiny_tokenizer.eos_token_id]
    chat = tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for append_eos, end in ((False, []), (True, eos)):
        text, chatted, ids = read_rollouts(path, tokenizer=tiny_tokenizer, append_eos=append_eos).groups()
        assert text.prompt_ids.tolist() == one_plus_one
        assert [r.tolist() for r in text.responses] == [two + end, end, two * 5, three + eos]
        assert chatted.prompt_ids.tolist() == chat
        assert (ids.prompt_ids.tolist(), ids.responses[0].tolist()) == ([5], [6])


def test_tokenizers_own_special_tokens_begin_a_text_prompt(
    tmp_path: Path, tiny_tokenizer: Any, write_rows: Callable
) -> None:
    """A model trained with <s> before every text samples from prompts with it, so its gradients need it too."""

    class WithStart:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = tiny_tokenizer(text)["input_ids"]
            return {"input_ids": [77, *ids] if add_special_tokens else ids}

        def __len__(self) -> int:
            return len(tiny_tokenizer)

    path = write_rows(tmp_path / "r.jsonl", [{"problem_id": "p", "prompt": "a", "response": "b", "reward": 1}])
    (group,) = read_rollouts(path, tokenizer=WithStart()).groups()
    assert group.prompt_ids.tolist() == [77, *tiny_tokenizer("a")["input_ids"]]
    assert group.responses[0].tolist() == tiny_tokenizer("b")["input_ids"]


def test_step_of_own_rows(tmp_path: Path, write_rows: Callable) -> None:
    """Rows that `gradstore rollout` wrote state the policy version itself, with nothing taken off."""
    rows = [row | {"step": 5} for row in _rows(2)]
    assert read_rollouts(write_rows(tmp_path / "r.jsonl", rows)).step == 5
    with pytest.raises(RequestError, match=r"rollouts of 2 steps .*step 5 in .*; step None in"):
        read_rollouts(write_rows(tmp_path / "r.jsonl", rows + _rows(1)))


def test_folder_of_shards(tmp_path: Path, write_rows: Callable) -> None:
    """Several workers' files are one source; a problem's rollouts may lie in more than one."""
    rows = _rows(shuffle=True)
    for j in range(3):
        write_rows(tmp_path / f"{j}.jsonl", rows[j * 6 : (j + 1) * 6 if j < 2 else None])
    _check_equal(list(read_rollouts(tmp_path).groups()), _slow_groups(rows))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("prompt", ["1+1=", [{"role": "user", "content": "1+1="}], None])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str, prompt: Any) -> None:
    """The rollout command writes what the collect command reads: nothing may change on the way."""
    generator = np.random.default_rng(0)
    written = [
        Rollout(
            problem_id=f"p{j // 3}",
            prompt=prompt,
            prompt_ids=np.asarray([1, 2]),
            response="être\n2",
            response_ids=generator.integers(0, 50, 20),
            reward=float(generator.random()),
            logprobs=-generator.random(20).astype(np.float32),
            reference_logprobs=-generator.random(20).astype(np.float32),
            source="s",
            ground_truth="2",
            tags=["a"],
            finish_reason="stop",
            extra={"entry": {"numbers": [1, 2], "nothing": None}},
            step=3,
        )
        for j in range(9)
    ]
    path = tmp_path / f"r.{suffix}"
    with write_rollouts(path) as writer:
        writer.append(written[:4])
        writer.append(written[4:])
    read = [rollout for group in read_rollouts(path).rollouts() for rollout in group]
    for before, after in zip(written, read, strict=True):
        for name in Rollout.__slots__:
            a, b = getattr(before, name), getattr(after, name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, name


def test_unfinished_parquet_is_not_left_behind(tmp_path: Path) -> None:
    """Half a Parquet file cannot be read, so it must not have the name of a whole one."""
    with pytest.raises(KeyError), write_rollouts(tmp_path / "r.parquet") as writer:
        writer.append([Rollout("p", 1.0, prompt_ids=np.asarray([1]), response_ids=np.asarray([1]))])
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def _iterate(groups: Iterator[Group]) -> None:
    for _ in groups:
        pass


def test_file_that_changes_after_the_check_is_refused(tmp_path: Path, write_rows: Callable) -> None:
    """Places of rows are bytes of the file that was checked; in another file they point anywhere."""
    path = write_rows(tmp_path / "r.jsonl", _rows())
    source = read_rollouts(path)
    write_rows(path, _rows(shuffle=True) + _rows())
    with pytest.raises(RequestError, match="the file changed while it was being read"):
        _iterate(source.groups())


@pytest.mark.parametrize("kind", [int, bool])
@pytest.mark.parametrize("container", CONTAINERS)
def test_masks_are_read(tmp_path: Path, write_rows: Callable, container: str, kind: type) -> None:
    """Log-probabilities may be missing where the policy did not write; a row without a mask is all its own."""
    rows = _rows()
    generator = np.random.default_rng(3)
    rows[0]["response_mask"] = None
    for row in rows[1:]:
        row["response_mask"] = [kind(generator.integers(2)) for _ in row["response_ids"]]
        for part in ("logprobs", "reference_logprobs"):
            row[part] = [value if own else None for value, own in zip(row[part], row["response_mask"], strict=True)]
    source = read_rollouts(write_rows(tmp_path / f"rollouts.{container}", rows))
    for group in source.groups():
        mine = [row for row in rows if row["problem_id"] == group.problem_id]
        if mine == rows[:1]:
            assert group.masks is None
            continue
        assert group.masks is not None
        for j, row in enumerate(mine):
            assert group.masks[j].dtype == bool
            assert group.masks[j].tolist() == [bool(own) for own in row["response_mask"]]
            for part in ("logprobs", "reference_logprobs"):
                found = getattr(group, part)[j]
                assert group.written(j, found).tolist() == [np.float32(v) for v in row[part] if v is not None]
                assert np.isnan(found[~group.masks[j]]).all()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_masks_and_outputs_are_written_as_they_are_read(tmp_path: Path, suffix: str) -> None:
    mask, nan = np.array([True, False, True]), np.float32("nan")
    rollouts = [
        Rollout(
            "p",
            1.0 - j // 2,
            prompt_ids=np.array([1, 2 + j]),
            response_ids=np.array([3, 4, 5]),
            response_mask=mask if j else None,
            rollout=f"r{j // 2}",
            logprobs=np.array([-1, nan if j else -2, -0.3], np.float32),
        )
        for j in range(4)
    ]
    with write_rollouts(tmp_path / f"r.{suffix}") as writer:
        writer.append(rollouts)
    source = read_rollouts(tmp_path / f"r.{suffix}")
    assert (source.n_rollouts, source.counts.tolist()) == (2, [2])
    (group,) = source.groups()
    assert [m.tolist() for m in group.masks or ()] == [[True] * 3, *[mask.tolist()] * 3]
    assert [prompt.tolist() for prompt in group.prompts or ()] == [[1, 2 + j] for j in range(4)]
    assert group.rollouts.tolist() == [0, 0, 1, 1]
    assert group.rewards.tolist() == [1, 0]
    for given, found in zip(rollouts, group.logprobs or (), strict=True):
        assert np.array_equal(given.logprobs, found, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": 0.5}, r"line 3: field 'reward' is 0.5, but 1 in .*line 1, which is of the same rollout '7'"),
        (
            {"rollout": None},
            r"line 3: problem 'p0' has|line 3: problem 'p0': give 'rollout' in all rows of a problem or in none",
        ),
    ],
)
def test_outputs_that_disagree_are_refused(tmp_path: Path, write_rows: Callable, changes: dict, message: str) -> None:
    row = {"problem_id": "p0", "prompt_ids": [1], "response_ids": [2], "reward": 1.0, "rollout": 7}
    rows = [row, row | {"prompt_ids": [1, 5]}, row | changes]
    with pytest.raises(RequestError, match=message):
        read_rollouts(write_rows(tmp_path / "r.jsonl", rows))
