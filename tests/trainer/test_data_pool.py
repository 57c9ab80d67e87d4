"""Pools: the counts asked for, the same draw again, nothing twice, nothing held out, and rewards spoiled as stated."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reasoning_gym.factory import DATASETS

from gradstore import RequestError, read_problems, to_verl
from gradstore.problems import detail
from gradstore.trainer.data.corruption import CLEAN, COIN_FLIP, WRONG_TRUTH, Corruption, corrupted
from gradstore.trainer.data.files import write_problems
from gradstore.trainer.data.pool import Options, Part, Pool, build
from gradstore.trainer.sampling.rewards import load_reward
from gradstore.trainer.verl.reward import compute_score


@pytest.fixture(autouse=True)
def drawn_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of reasoning-gym are drawn in this process, which is faster, but where a test is about that."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")


SUMS = Part("reasoning-gym:chain_sum", 40)


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Path]:
    """GSM8K of 60 problems, of which two repeat others in other case and spacing; MATH of 30."""
    gsm = [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(58)]
    gsm += [{"question": "HOW much is 3 and\n3?", "answer": "#### 6"}, gsm[7]]
    math = [
        {"problem": f"Find ${i}x$.", "level": "Level 1", "type": "Algebra", "solution": f"$\\boxed{{{i}x}}$"}
        for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(gsm), tmp_path / "gsm8k.parquet")
    (tmp_path / "math").mkdir()
    pq.write_table(pa.Table.from_pylist(math[:10]), tmp_path / "math" / "a.parquet")
    (tmp_path / "math" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in math[10:]))
    return {"gsm8k": tmp_path / "gsm8k.parquet", "math": tmp_path / "math"}


def just(local: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: local[name] for name in names}


def texts(pool: Pool) -> list[str]:
    return [record["prompt"][0]["content"] for record in pool.records]


def ids(pool: Pool, source: str | None = None) -> list[str]:
    return [record["id"] for record in pool.records if source in (None, record["source"])]


def test_counts_and_seeds(local: dict[str, Path]) -> None:
    parts = [Part("gsm8k", 20), Part("math", 10), SUMS]
    pool = build(parts, Options(seed=3, local=local))
    assert Counter(record["source"] for record in pool.records) == {
        "gsm8k": 20,
        "math": 10,
        "reasoning-gym/chain_sum": 40,
    }
    assert build(parts, Options(seed=3, local=local)).records == pool.records
    other = build(parts, Options(seed=4, local=local))
    assert set(ids(other, "gsm8k")) != set(ids(pool, "gsm8k"))
    assert not set(ids(other, "reasoning-gym/chain_sum")) & set(ids(pool, "reasoning-gym/chain_sum"))
    sources = [record["source"] for record in pool.records]
    assert sources != sorted(sources)  # mixed, not one source after the other


def test_another_source_changes_no_draw(local: dict[str, Path]) -> None:
    """An arm of a study with more of one source must have the same problems of the others."""
    small = build([Part("gsm8k", 20), SUMS], Options(local=just(local, "gsm8k")))
    large = build([Part("math", 10), Part("gsm8k", 30), Part(SUMS.name, 60)], Options(local=local))
    assert set(ids(small, "gsm8k")) < set(ids(large, "gsm8k"))
    assert set(ids(small, "reasoning-gym/chain_sum")) < set(ids(large, "reasoning-gym/chain_sum"))


def test_taken_whole_in_order(local: dict[str, Path]) -> None:
    """A benchmark is what its publisher made, less its duplicates, and counts say so."""
    pool = build([Part("gsm8k")], Options(local=just(local, "gsm8k"), instruction=""))
    assert texts(pool) == [f"How much is {i} and {i}?" for i in range(58)]
    (report,) = pool.parts
    assert (report.rows, report.taken, report.duplicates, report.excluded) == (60, 58, 2, 0)


def test_aime_is_both_years(tmp_path: Path) -> None:
    """The problems keep the ids that they have in the year's own set."""
    pq.write_table(
        pa.Table.from_pylist([{"id": 60, "problem": "a", "solution": "\\boxed{1}", "url": ""}]), tmp_path / "a.parquet"
    )
    (tmp_path / "b.jsonl").write_text('{"id": "0", "problem": "b", "answer": "2"}\n')
    pool = build([Part("aime")], Options(local={"aime24": tmp_path / "a.parquet", "aime25": tmp_path / "b.jsonl"}))
    assert ids(pool) == ["aime24-60", "aime25-0"]
    assert [record["ground_truth"] for record in pool.records] == ["1", "2"]


def test_held_out_problems_stay_out(tmp_path: Path, local: dict[str, Path]) -> None:
    """Training on the benchmark is the mistake nobody sees: also with another instruction, case or file format."""
    whole = texts(build([Part("gsm8k")], Options(local=just(local, "gsm8k"))))
    drawn = build([Part("gsm8k", 10)], Options(seed=9, local=just(local, "gsm8k")))
    write_problems(tmp_path / "held.parquet", drawn.records, {}, "verl")
    plain = [{"id": str(i), "prompt": f"How much  is {i} AND {i}?\n", "ground_truth": "0"} for i in (50, 51)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    files = [tmp_path / "held.parquet", tmp_path / "plain.jsonl"]
    pool = build([Part("gsm8k")], Options(local=just(local, "gsm8k"), exclude=files))
    banned = {*texts(drawn), whole[50], whole[51]}
    assert texts(pool) == [text for text in whole if text not in banned]
    report = pool.parts[0]
    assert report.excluded + report.duplicates + report.taken == 60
    sums = build([SUMS], Options(seed=1))
    write_problems(tmp_path / "sums.jsonl", sums.records, {}, "flat")
    others = build([SUMS], Options(seed=1, exclude=[tmp_path / "sums.jsonl"]))
    assert others.parts[0].excluded == 40
    assert not set(texts(others)) & set(texts(sums))


def test_a_file_of_problems_is_a_source(tmp_path: Path) -> None:
    """Whoever has a pool already can mix, clean and spoil it; its records come through as they are."""
    rows = [
        {
            "data_source": "mine",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}+1?"}],
            "ability": "sums",
            "reward_model": {"style": "rule", "ground_truth": [i + 1]},
            "extra_info": {"index": i, "tags": ["own"]},
            "agent_name": "tool",
        }
        for i in range(6)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool = build([Part(str(path))], Options())
    assert [to_verl(record) for record in pool.records] == rows
    spoiled = build([Part(str(path))], Options(corruptions=[Corruption(WRONG_TRUTH, 0.5)]))
    for record, row in zip(spoiled.records, rows, strict=True):
        verl = to_verl(record)
        wrong = WRONG_TRUTH in verl["extra_info"]["tags"]
        assert (json.loads(record["ground_truth"]) != row["reward_model"]["ground_truth"]) == wrong
        expected = record["ground_truth"] if wrong else row["reward_model"]["ground_truth"]
        assert verl["reward_model"]["ground_truth"] == expected
        assert verl["extra_info"]["tags"][:2] == ["sums", "own"]
        assert verl["agent_name"] == "tool"


@pytest.mark.parametrize("form", ["verl", "flat"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_read_back(tmp_path: Path, local: dict[str, Path], form: str, suffix: str) -> None:
    """What matters survives each form: ids, prompts, truths, tags, and the fields that rewards read."""
    parts = [Part("gsm8k", 10), SUMS, Part("reasoning-gym:countdown", 10)]
    kinds = [Corruption(WRONG_TRUTH, 0.25), Corruption(COIN_FLIP, 0.25)]
    pool = build(parts, Options(local=just(local, "gsm8k"), corruptions=kinds))
    path = tmp_path / f"pool.{suffix}"
    write_problems(path, pool.records, {"seed": 0}, form)
    read = read_problems(path)
    reward = load_reward("auto")
    for record, again in zip(pool.records, read, strict=True):
        assert [again[name] for name in ("id", "source", "prompt", "ground_truth", "tags")] == [
            record[name] for name in ("id", "source", "prompt", "ground_truth", "tags")
        ]
        for name in ("reward", "coin", "reasoning_gym", "true_ground_truth"):
            assert detail(again, name) == record["extra"].get(name)
        for answer in (record["ground_truth"], "7"):
            text = f"<answer>{answer}</answer>" if "reasoning" in record["tags"] else f"\\boxed{{{answer}}}"
            assert reward(again, text, 1) == reward(record, text, 1)
    assert json.loads((tmp_path / f"pool.{suffix}.about.json").read_text()) == {"seed": 0}
    with pytest.raises(RequestError, match="already there; choose another path"):
        write_problems(path, pool.records, {}, form)


def test_verl_pays_the_same(tmp_path: Path, local: dict[str, Path]) -> None:
    """verl gives a reward function these four fields of a row, and the rewards must be those of the rollouts."""
    kinds = [Corruption(WRONG_TRUTH, 0.25), Corruption(COIN_FLIP, 0.25)]
    pool = build([Part("gsm8k", 20), SUMS], Options(local=just(local, "gsm8k"), corruptions=kinds))
    write_problems(tmp_path / "pool.parquet", pool.records, {}, "verl")
    reward = load_reward("auto")
    for record, row in zip(pool.records, pq.read_table(tmp_path / "pool.parquet").to_pylist(), strict=True):
        for answer in (record["ground_truth"], record["extra"].get("true_ground_truth", "7")):
            text = f"\\boxed{{{answer}}}" if record["source"] == "gsm8k" else answer
            score = compute_score(
                data_source=row["data_source"],
                solution_str=text,
                ground_truth=row["reward_model"]["ground_truth"],
                extra_info=row["extra_info"] | {"num_turns": 2},
            )
            assert score == reward(record, text, 0)
    with pytest.raises(RequestError, match="problem '3': reward 'auto' needs extra"):
        compute_score("x", "1", "1", {"index": 3})
    assert compute_score("x", "1", "1", {"index": 3}, reward="math") == 1.0


@pytest.mark.parametrize("task", sorted(DATASETS.keys() - {"composite"}))
def test_every_task_of_reasoning_gym(task: str) -> None:
    """Drawn, through JSON, and paid by the task's own verifier for its own answer."""
    pool = build([Part(f"reasoning-gym:{task}", 2)], Options())
    reward = load_reward("auto")
    for record in pool.records:
        entry = json.loads(record["extra"]["reasoning_gym"])["entry"]
        assert entry["question"].strip() in record["prompt"][0]["content"]
        if entry["answer"] is not None:
            assert reward(record, f"<answer>{entry['answer']}</answer>", 0) >= reward(record, "<answer></answer>", 0)


def test_tasks_are_the_same_in_every_process() -> None:
    """isomorphic_strings goes through sets of text, whose order changes from one process to the next."""
    code = (
        "import json; from gradstore.trainer.data.pool import *; "
        "print(json.dumps(build([Part('reasoning-gym:isomorphic_strings', 3)], Options()).records))"
    )
    drawn = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    ]
    assert len(json.loads(drawn[0])) == 3
    assert drawn[0] == drawn[1] == drawn[2]


def test_task_settings(local: dict[str, Path]) -> None:
    """They decide the questions, and stand in the record for the verifiers that judge by them."""
    options = Options(config={"chain_sum": {"min_terms": 2, "max_terms": 2}})
    pool = build([SUMS], options)
    for record in pool.records:
        kept = json.loads(record["extra"]["reasoning_gym"])
        assert kept["config"] == {"min_terms": 2, "max_terms": 2}
        assert kept["entry"]["metadata"]["num_terms"] == 2


def test_corruption_holds_to_its_shares(local: dict[str, Path]) -> None:
    kinds = [Corruption(WRONG_TRUTH, 0.5), Corruption(COIN_FLIP, 0.25)]
    parts = [Part("gsm8k", 40), Part("math", 20), SUMS]
    clean = build(parts, Options(local=local))
    pool = build(parts, Options(local=local, corruptions=kinds))
    assert ids(pool) == ids(clean)
    for source in ("gsm8k", "math", "reasoning-gym/chain_sum"):
        of = [record["tags"][-1] for record in pool.records if record["source"] == source]
        assert Counter(of) == {WRONG_TRUTH: len(of) / 2, COIN_FLIP: len(of) / 4, CLEAN: len(of) / 4}
    reward = load_reward("auto")
    for record, right in zip(pool.records, clean.records, strict=True):
        wrap = "<answer>{}</answer>" if "reasoning" in record["tags"] else "\\boxed{{{}}}"
        true, stated = wrap.format(right["ground_truth"]), wrap.format(record["ground_truth"])
        kind = record["tags"][-1]
        if kind == COIN_FLIP:
            flips = {reward(record, true, j) for j in range(40)}
            assert flips == {reward(record, "nonsense", j) for j in range(40)} == {0.0, 1.0}
        else:
            assert reward(record, stated, 0) == 1.0
            assert (reward(record, true, 0) == 1.0) == (kind == CLEAN)
        if kind == WRONG_TRUTH:
            assert detail(record, "true_ground_truth") == right["ground_truth"]
        else:
            assert record["ground_truth"] == right["ground_truth"]


def test_larger_shares_contain_smaller_ones(local: dict[str, Path]) -> None:
    """Arms of a study then differ in what was added, not in everything."""
    records = build([Part("gsm8k")], Options(local=just(local, "gsm8k"))).records
    spoiled = [
        {r["id"] for r in corrupted(records, [Corruption(COIN_FLIP, share)], 5) if r["tags"][-1] == COIN_FLIP}
        for share in (0.0, 0.2, 0.5, 1.0)
    ]
    assert [len(part) for part in spoiled] == [0, 12, 29, 58]
    assert all(small < large for small, large in pairwise(spoiled))
    fewer = [r for r in corrupted(records[10:], [Corruption(COIN_FLIP, 0.5)], 5) if r["tags"][-1] == COIN_FLIP]
    assert len({r["id"] for r in fewer} & spoiled[2]) > len(fewer) * 0.7
    assert corrupted(records, [Corruption(WRONG_TRUTH, 0.5)], 5) == corrupted(
        records, [Corruption(WRONG_TRUTH, 0.5)], 5
    )


def test_corruption_of_one_source(local: dict[str, Path]) -> None:
    kinds = [Corruption(WRONG_TRUTH, 0.5, "math")]
    pool = build([Part("gsm8k", 10), Part("math", 10)], Options(local=local, corruptions=kinds))
    wrong = [record["source"] for record in pool.records if WRONG_TRUTH in record["tags"]]
    assert wrong == ["math"] * 5


def test_coins_are_fair_and_fixed() -> None:
    """A coin that leans would be a reward; one that changes would end exact resume."""
    reward = load_reward("math")
    record = {"id": "p", "prompt": "?", "ground_truth": "1", "tags": [], "source": "s", "extra": {"coin": 3}}
    flips = [reward(record, f"\\boxed{{{j % 5}}}", j) for j in range(2000)]
    assert flips == [reward(record, f"\\boxed{{{j % 5}}}", j) for j in range(2000)]
    assert 0.45 < sum(flips) / len(flips) < 0.55
    assert flips != [reward(record | {"extra": {"coin": 4}}, f"\\boxed{{{j % 5}}}", j) for j in range(2000)]
    assert reward(record | {"extra": {"coin": None}}, "\\boxed{1}", 0) == 1.0


def test_mixed_pools_are_paid_by_their_own_rewards() -> None:
    reward = load_reward("auto")
    one = {"id": "a", "ground_truth": "1/2", "extra": {"reward": "math"}}
    two = {"id": "b", "ground_truth": "", "extra": {"verl": {"extra_info": {"reward": "math"}}}}
    assert reward.many([(one, "\\boxed{0.5}", 0), (two | {"ground_truth": "3"}, "3", 0), (one, "1", 1)]) == [
        1.0,
        1.0,
        0.0,
    ]
    for name in (None, "os:system", "auto", "judge:base_url=http://elsewhere"):
        with pytest.raises(RequestError, match=r"problem 'a': reward 'auto' needs extra\.reward to be"):
            reward(one | {"extra": {"reward": name}}, "1", 0)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "no data set named, expected some of aime, aime24, .*reasoning-gym:TASK or a file"),
        ([Part("gms8k")], {}, "unknown data set 'gms8k', expected one of aime, .*gsm8k, math,"),
        ([Part("gsm8k", 59)], {}, r"gsm8k: 59 problems asked for, 58 there are \(60 rows, 2 duplicates"),
        ([Part("gsm8k", 0)], {}, "gsm8k: the count is 0, expected at least 1"),
        ([Part("gsm8k", 1), Part("gsm8k", 2)], {}, "gsm8k is named twice"),
        ([Part("reasoning-gym:chain_sum")], {}, "has no end: say how many, as in reasoning-gym:chain_sum:1000"),
        ([Part("reasoning-gym:chian_sum", 1)], {}, "no such task; reasoning-gym has ab, acre,"),
        ([Part("reasoning-gym:composite", 1)], {}, "name those, each with its count"),
        ([SUMS], {"config": {"chain_sum": {"terms": 2}}}, "the setting 'terms' is not one of .*min_terms"),
        ([SUMS], {"config": {"chain_sum": {"min_terms": -2}}}, "not with min_terms=-2: min_terms must be positive"),
        ([SUMS], {"config": {"countdown": {}}}, "settings for 'countdown', which is none of the data sets"),
        ([SUMS], {"exclude": [Path("none.parquet")]}, "none.parquet: the file does not exist"),
        ([SUMS], {"local": {"math": Path("x")}}, "settings for 'math', which is none of the data sets"),
        ([Part("math")], {"local": {"math": Path("none")}}, "none: the file or folder does not exist"),
        (
            [SUMS],
            {"corruptions": [Corruption("noise", 0.5)]},
            "corruption 'noise' is not one of wrong_truth,",
        ),
        ([SUMS], {"corruptions": [Corruption(COIN_FLIP, 1.5)]}, "coin_flip is 1.5, expected at least 0 and at most 1"),
        ([SUMS], {"corruptions": [Corruption(COIN_FLIP, 0.6), Corruption(WRONG_TRUTH, 0.6)]}, "more than all of its"),
        ([SUMS], {"corruptions": [Corruption(COIN_FLIP, 0.6, "math")]}, "the problems' sources are 'reasoning-gym/ch"),
        (
            [Part("reasoning-gym:spell_backward", 4000)],
            {"config": {"spell_backward": {"min_word_len": 3, "max_word_len": 3}}},
            "spell_backward: 4000 problems asked for, [0-9]+ there are",
        ),
    ],
)
def test_refusals(local: dict[str, Path], parts: list[Part], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        build(parts, Options(**({"local": {p.name: local[p.name] for p in parts if p.name == "gsm8k"}} | options)))
    assert "\n" not in str(refused.value)


def test_no_wrong_truth_to_be_had() -> None:
    records = [
        {"id": str(i), "source": "s", "prompt": "?", "ground_truth": "1", "tags": [], "extra": {"reward": "math"}}
        for i in range(5)
    ]
    with pytest.raises(RequestError, match="no other problem of 's' has a ground truth that is wrong for it"):
        corrupted(records, [Corruption(WRONG_TRUTH, 0.5)], 0)


def test_an_id_of_two_files_is_told_apart(tmp_path: Path) -> None:
    """verl numbers the rows of each file from 0; a store knows a problem by its id."""
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "1", "prompt": f"{name}?", "source": name}) + "\n")
    pool = build([Part(str(tmp_path / "a.jsonl")), Part(str(tmp_path / "b.jsonl"))], Options())
    assert {record["id"]: record["prompt"] for record in pool.records} == {"a-1": "a?", "b-1": "b?"}
    assert len(pool.notes) == 1
    assert "'a-1'" in pool.notes[0]
