"""`data --solutions` and `collect --solutions`: from a data set's solutions to a ranking by their gradient."""

import json

import pytest

import gradstore

GSM8K = [
    {"question": "What is 1 and 1?", "answer": "Add them: 1+1=<<1+1=2>>2.\n#### 2"},
    {"question": "What is 2 and 3?", "answer": "Add them: 2+3=<<2+3=5>>5.\n#### 5"},
]


def test_from_a_data_set_to_a_ranking(cli, store, model_folder, write_lines, tmp_path) -> None:
    """The store's own projection; a collection of its own; query and select take it like any benchmark."""
    rows = write_lines(tmp_path / "gsm8k.jsonl", GSM8K)
    out, plain = tmp_path / "solved.jsonl", tmp_path / "plain.jsonl"
    line = ("data", "gsm8k", "--from", rows, "--instruction", "")
    status, _, err = cli(*line, "--out", plain)
    assert status == 0, err
    assert "solution" not in json.loads(plain.read_text().splitlines()[0])["extra_info"]
    status, _, err = cli(*line, "--out", out, "--solutions")
    assert status == 0, err
    kept = [json.loads(one)["extra_info"]["solution"] for one in out.read_text().splitlines()]
    assert kept == [row["answer"] for row in GSM8K]
    collect = ("collect", store, "gsm8k", out, "--model", model_folder, "--solutions")
    status, printed, err = cli(*collect, "--json")
    assert status == 0, err
    report = json.loads(printed)
    assert (report["collection"], report["live"], report["skipped"]) == ("gsm8k.solutions", 2, 0)
    assert json.loads(cli(*collect, "--json")[1])["skipped"] == 2  # goes on where it was
    status, printed, err = cli("query", store, "--pool", "pool", "--against", "gsm8k.solutions", "--json")
    assert status == 0, err
    assert gradstore.open(store).verify().ok


def test_refusals(cli, store, model_folder, write_lines, tmp_path, snapshot) -> None:
    """One line, status 2, the store as it was."""
    problems = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "1+1=", "extra": {"solution": "2"}}])
    without = write_lines(tmp_path / "without.jsonl", [{"id": "b", "prompt": "1+1="}])
    rollouts = write_lines(
        tmp_path / "r.jsonl",
        [{"problem_id": "a", "prompt": "1+1=", "response": str(n), "reward": n % 2} for n in (1, 2)],
    )
    before = snapshot(store)
    cases = [
        (store, without, ["--solutions"], ["'b'", "extra.solution", "missing"]),
        (store, problems, ["--solutions", "--objective", "grpo"], ["--objective is for rollouts"]),
        (tmp_path / "none", problems, ["--solutions"], ["no store there"]),
    ]
    for path, file, more, wanted in cases:
        status, out, err = cli("collect", path, "bench", file, "--model", model_folder, *more)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert all(word in err for word in wanted), err
    status, _, err = cli("collect", store, "bench.solutions", rollouts, "--model", model_folder, "--rank", 4)
    assert status == 2
    assert "are the store's own" in err
    assert snapshot(store) == before


@pytest.mark.parametrize("name", ["aime25", "deepscaler"])
def test_data_sets_without_solutions(cli, write_lines, tmp_path, name: str) -> None:
    """An answer alone is no solution."""
    rows = write_lines(tmp_path / "rows.jsonl", [{"id": 1, "problem": "x", "answer": "2"}])
    status, _, err = cli("data", name, "--from", rows, "--out", tmp_path / "o.jsonl", "--solutions")
    assert status == 2
    assert "leave --solutions out" in err
