"""`gradstore data` as a person or a script meets it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore import read_problems


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with GSM8K and MATH as their publishers have them, and a benchmark; the current folder."""
    gsm = [{"question": f"How much is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(50)]
    math = [{"problem": f"Find ${i}x$.", "level": "Level 1", "type": "Algebra", "solution": f"$\\boxed{{{i}x}}$"}
            for i in range(50)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(gsm), tmp_path / "gsm8k.parquet")
    pq.write_table(pa.Table.from_pylist(math), tmp_path / "math.parquet")
    held = [{"id": "h", "prompt": "How much is 3 and 3?", "ground_truth": "6"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mixed_pool(cli, files) -> None:
    """Two data sets and a task by count, a benchmark held out, half of the truths wrong, in one command."""
    arguments = (
        "data", "gsm8k:20", "math:10", "reasoning-gym:chain_sum:10", "--from", "gsm8k=gsm8k.parquet", "--from",
        "math=math.parquet", "--config", "min_terms=2", "--config", "chain_sum.max_terms=3", "--exclude", "held.jsonl",
        "--corrupt", "wrong_truth=0.5", "--corrupt", "coin_flip@math=0.2", "--seed", "1",
    )  # fmt: skip
    status, out, err = cli(*arguments, "--out", "pool.parquet", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["problems"] == 40
    assert report["sources"] == {"gsm8k": 20, "math": 10, "reasoning-gym/chain_sum": 10}
    assert report["tags"]["wrong_truth"] == 20
    assert report["tags"]["coin_flip"] == 2
    records = read_problems("pool.parquet")
    assert len(records) == 40
    assert not any("3 and 3" in record["prompt"][0]["content"] for record in records)
    about = json.loads(Path("pool.parquet.about.json").read_text(encoding="utf-8"))
    assert about["asked"]["seed"] == 1
    assert about["asked"]["corrupt"] == ["wrong_truth=0.5", "coin_flip@math=0.2"]
    status, _, err = cli(*arguments, "--out", "again.parquet")
    assert status == 0
    assert "gsm8k: 20 problems of 50 rows" in err
    assert "again.parquet: 40 problems" in err
    assert read_problems("again.parquet") == records


def test_a_task_without_network(cli, files) -> None:
    status, _, err = cli("data", "reasoning-gym:chain_sum", "--count", 50, "--seed", 1, "--config", "min_terms=2")
    assert status == 0, err
    assert len(read_problems("problems.parquet")) == 50
    status, _, err = cli("data", "reasoning-gym:chain_sum", "--count", 50)
    assert status == 2
    assert "problems.parquet: already there" in err


def test_imbalance_by_shares(cli, files) -> None:
    status, out, err = cli(
        "data", "gsm8k:0.1", "math:0.9", "--size", 50, "--from", "gsm8k=gsm8k.parquet", "--from", "math=math.parquet",
        "--out", "pool.jsonl", "--form", "flat", "--json",
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["sources"] == {"gsm8k": 5, "math": 45}
    assert {"id", "prompt", "ground_truth", "tags", "source", "extra"} == set(
        json.loads(Path("pool.jsonl").read_text(encoding="utf-8").splitlines()[0])
    )


def test_one_source_whole(cli, files) -> None:
    status, _, err = cli("data", "gsm8k@test", "--from", "gsm8k.parquet", "--out", "b.jsonl", "--instruction", "")
    assert status == 0, err
    records = read_problems("b.jsonl")
    assert [record["prompt"][0]["content"] for record in records[:2]] == [
        "How much is 0 and 0?",
        "How much is 1 and 1?",
    ]
    assert records[0]["extra"]["verl"]["extra_info"]["split"] == "test"
    status, _, err = cli("data", "./b.jsonl:5", "--corrupt", "coin_flip=1", "--out", "c.jsonl")
    assert status == 0, err
    assert [record["tags"][-1] for record in read_problems("c.jsonl")] == ["coin_flip"] * 5


def test_from_data_to_rollouts(cli, files, tiny_model, tiny_tokenizer) -> None:
    """What `data` writes, `rollout` pays: each problem by its own reward, spoiled ones by their coin."""
    tiny_model.save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    status, _, err = cli(
        "data", "gsm8k:4", "reasoning-gym:chain_sum:4", "--from", "gsm8k=gsm8k.parquet", "--instruction", "",
        "--config", "max_terms=2", "--corrupt", "coin_flip=0.5", "--out", "pool.parquet",
    )  # fmt: skip
    assert status == 0, err
    settings = ("--model", "model", "--out", "r.jsonl", "-n", 8, "--max-new-tokens", 4, "--reward", "auto", "--json")
    status, out, err = cli("rollout", "pool.parquet", *settings)
    assert status == 0, err
    assert (json.loads(out)["problems"], json.loads(out)["rollouts"]) == (8, 64)
    rows = [json.loads(line) for line in Path("r.jsonl").read_text(encoding="utf-8").splitlines()]
    flips = [row["reward"] for row in rows if "coin_flip" in row["tags"]]
    assert len(flips) == 32
    assert set(flips) == {0.0, 1.0}


def test_ranges_and_other_names(cli, files) -> None:
    """GradAlign's --ls and --nums: a slice of each source in its own order; its names for the data sets."""
    whole = ("data", "gsm8k", "--from", "gsm8k.parquet", "--form", "flat", "--out", "whole.jsonl")
    assert cli(*whole)[0] == 0
    asked = ("data", "gsm-8k", "--from", "gsm8k.parquet", "--form", "flat", "--range", "gsm-8k=5:25")
    status, _, err = cli(*asked, "--out", "part.jsonl")
    assert status == 0, err
    lines = Path("whole.jsonl").read_text(encoding="utf-8").splitlines()
    assert Path("part.jsonl").read_text(encoding="utf-8").splitlines() == lines[5:25]


def test_known_data_sets(cli) -> None:
    status, out, _ = cli("data", "--list")
    assert status == 0
    for name in (
        "aime24", "aime25", "aime", "math", "metamath", "strategyqa", "webinstruct", "deepscaler", "mmlupro", "gsm8k",
        "theoremqa", "supergpqa", "amc22", "amc23", "math500", "dapo",
    ):  # fmt: skip
        assert f"{name} " in out
    status, out, _ = cli("data", "--list", "--json")
    assert {"name": "gsm8k", "hub": "openai/gsm8k", "configs": ["main"], "split": "train", "columns":
            ["question", "answer"], "reward": "math"} in json.loads(out)["data_sets"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data set named, expected some of aime,"),
        (["gms8k"], "unknown data set 'gms8k', expected one of aime,"),
        (["gsm8k:2x", "--from", "gsm8k.parquet"], "gsm8k:2x: the count is '2x'"),
        (["gsm8k:0.5", "--from", "gsm8k.parquet"], "gsm8k:0.5: a share needs --size"),
        (["gsm8k:51", "--from", "gsm8k.parquet"], "gsm8k: 51 problems asked for, 50 there are"),
        (
            ["gsm8k", "--from", "math.parquet"],
            "math.parquet: none of a row's columns is there (found: problem, level, type, solution; expected",
        ),
        (["gsm8k", "math", "--from", "gsm8k.parquet"], "several data sets are asked for; say which"),
        (["gsm8k", "--from", "none.parquet"], "none.parquet: the file or folder does not exist"),
        (["gsm8k", "--from", "gsm8k.parquet", "--config", "a=1"], "--config a=1: 0 reasoning-gym tasks are asked for"),
        (["reasoning-gym:ab:5", "--config", "a"], "--config a: expected SETTING=VALUE"),
        (
            ["gsm8k", "--from", "gsm8k.parquet", "--corrupt", "wrong_truth"],
            "wrong_truth: expected KIND=SHARE",
        ),
        (["gsm8k", "--from", "gsm8k.parquet", "--corrupt", "noise=0.1"], "corruption 'noise' is not one of"),
        (["gsm8k", "--from", "gsm8k.parquet", "--range", "5:3"], "--range 5:3: expected A:B with 0 <= A < B"),
        (["gsm8k", "--from", "gsm8k.parquet", "--range", "40:60"], "gsm8k: range 40:60 of 50 problems"),
        (["gsm8k", "--from", "gsm8k.parquet", "--range", "math=0:2"], "the name of one source that is asked for"),
        (["reasoning-gym:ab:5", "--range", "0:2"], "reasoning-gym:ab: has no range of rows"),
        (["gsm8k", "--from", "gsm8k.parquet", "--form", "csv"], "form 'csv' is not one of verl, flat"),
        (["gsm8k", "--from", "gsm8k.parquet", "--out", "x.csv"], "the suffix '.csv' is not one of .jsonl, .parquet"),
        (["gsm8k", "--from", "gsm8k.parquet", "--out", "no/x.jsonl"], "the folder no does not exist"),
        (["gsm8k", "--from", "gsm8k.parquet", "--exclude", "none.jsonl"], "none.jsonl: the file does not exist"),
    ],
)
def test_refusals(cli, files, arguments: list[str], message: str) -> None:
    before = sorted(files.iterdir())
    status, out, err = cli("data", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(files.iterdir()) == before


def test_no_hub(cli, files, monkeypatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    status, _, err = cli("data", "gsm8k:10")
    assert status == 1
    assert "cannot be had from the hub" in err
    assert "--from gsm8k=PATH" in err
    assert err.count("\n") == 1
