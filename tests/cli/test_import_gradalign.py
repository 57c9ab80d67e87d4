"""`gradstore import gradalign`: run folders as GradAlign writes them, odd ones, and broken ones."""

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore

CHUNKS = ((7, 2, 5, 0), (1, 3, 6, 4))


def problem(index: int, **changes: object) -> dict:
    return {
        "data_source": f"source{index % 2}",
        "prompt": [{"role": "user", "content": f"What is {index}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(index)},
        "extra_info": {"index": index, "split": "train"},
        **changes,
    }


def response(index: int, right: bool, **changes: object) -> dict:
    return {
        "data_source": "amc", "group_id": index, "sample_id": 0, "prompt": f"<user>What is {index}?",
        "msg": problem(index)["prompt"], "expected_answer": str(index), "response": "7", "extracted_answer": "",
        "passed": right, "is_correct": right, "generation_time": 0,
        "original_data": {"group_id": index, "original_entry": problem(index)}, **changes,
    }  # fmt: skip


def similarity(index: int) -> float:
    return 0.0 if index % 3 == 0 else round(index * 0.1 - 0.35, 3)


def lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three rounds of two chunks, ten steps each, mode sim; problems divisible by three are never solved."""
    folder = tmp_path / "run"
    for number, ids in enumerate(CHUNKS):
        lines(folder / f"chunks/chunk_{number}/train.jsonl", [problem(i) for i in ids])
    manifest = {"experiment_name": "e", "seed": 42, "num_chunks": 2, "chunk_size": 4, "total_rows": 9}
    (folder / "chunks/manifest.json").write_text(json.dumps(manifest))
    for number in range(3):
        ids = CHUNKS[number % 2]
        split = folder / f"global_step_{10 * number}/train_split"
        rows = [{"group_id": i, "similarity": similarity(i), "h_sorted": {"a.b": 0.5}, "loss": 0.1} for i in ids]
        lines(split / "part_0/similarity_results_cosine_real.jsonl", rows)
        lines(split / "similarity_results_aggregated.jsonl", rows)
        rates = [{"group_id": i, "total": 4, "correct": 2 if i % 3 else 0, "accuracy": 0.5} for i in sorted(ids)]
        lines(split / "accuracy_by_problem.jsonl", rates)
        best = sorted(ids, key=lambda i: -similarity(i))[:2]
        lines(folder / f"selected/iter_{number}_sim_2/train.jsonl", [problem(i) for i in sorted(best)])
        validation = folder / f"global_step_{10 * number}/val_responses"
        validation.mkdir()
        rows = [response(i, right) for i in (100, 101) for right in (True, True, False)]
        (validation / "responses_sorted.json").write_text(json.dumps(rows))
    return folder


def test_a_run_is_imported_whole(cli, run, tmp_path) -> None:
    """Candidates, similarities, pass rates, picks, steps, sources and validation problems are what the files say."""
    status, out, err = cli("import", "gradalign", run, "--store", tmp_path / "S")
    assert (status, err) == (0, "")
    assert out == "8 problems and 3 rounds added to pool (0 rounds were there), 2 problems to validation\n"
    store = gradstore.open(tmp_path / "S")
    assert store.verify().ok
    rounds = store.rounds("pool")
    for number, found in enumerate(rounds):
        table = {row["id"]: row for row in found.table.to_pylist()}
        assert [int(name) for name in table] == list(CHUNKS[number % 2])
        for name, row in table.items():
            assert row["score"] == similarity(int(name))
            assert row["pass_rate"] == (0.5 if int(name) % 3 else 0.0)
            assert row["state"] == ("live" if int(name) % 3 else "no_signal")
            assert (row["step"], row["rolled_out"], row["weight"]) == (10 * number, True, float(row["picked"] >= 0))
        assert found.picks == sorted(table, key=lambda name: -similarity(int(name)))[:2]
        about = found.about
        assert (about["step"], about["selector"], about["seed"]) == (10 * number, "cosine", 42)
        assert about["pool"] == {"problems": 8, "seen": 4 if number == 0 else 8}
        assert (about["rollouts"], about["target_rollouts"]) == (16, 6)
        assert about["imported"] == {
            "from": "gradalign", "round": number, "mode": "sim", "validation_pass_rate": pytest.approx(2 / 3),
        }  # fmt: skip
        assert about["counts"] == {
            "live": 4 - about["counts"]["no_signal"], "no_signal": 1 + number % 2, "failed": 0, "unmeasured": 0,
        }  # fmt: skip
    records = {record["id"]: record for record in store.records("pool")}
    assert records["7"]["source"] == "source1"
    assert records["7"]["ground_truth"] == "7"
    assert store.records("validation")[0]["prompt"] == problem(100)["prompt"]


def test_the_report_works_on_it(cli, run, tmp_path) -> None:
    """A store with rounds and no rows was refused; now its selections are shown."""
    cli("import", "gradalign", run, "--store", tmp_path / "S")
    for format in ("md", "html"):
        status, _, err = cli("report", tmp_path / "S", "--out", tmp_path / f"r.{format}", "--format", format)
        assert status == 0, err
    page = (tmp_path / "r.md").read_text()
    assert "steps 0 to 20" in page
    assert "| 2 | 20 | cosine | 4 | 100 % | 4 | 2 |" in page


def test_again_adds_what_is_new(cli, run, tmp_path) -> None:
    """A run that goes on, or an import that was interrupted: rounds that are there are compared and kept."""
    later = run / "selected/iter_2_sim_2"
    later.rename(tmp_path / "later")
    assert cli("import", "gradalign", run, "--store", tmp_path / "S")[0] == 0
    (tmp_path / "later").rename(later)
    status, out, _ = cli("import", "gradalign", run, "--store", tmp_path / "S", "--json")
    assert status == 0
    assert {name: json.loads(out)[name] for name in ("rounds", "known", "problems")} == {
        "rounds": 1, "known": 2, "problems": 0,
    }  # fmt: skip
    assert len(gradstore.open(tmp_path / "S").rounds("pool")) == 3


MODES = {
    "dot": lambda s, p: s,
    "norm": lambda s, p: s,
    "align": lambda s, p: s,
    "negsim": lambda s, p: -s,
    "simacc": lambda s, p: 4 * s * p * (1 - p),
    "accgreedy": lambda s, p: -abs(p - 0.5),
    "acc": lambda s, p: math.nan,
    "rand": lambda s, p: math.nan,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_score(cli, run, tmp_path, mode: str) -> None:
    """Higher is better in every mode, so that picks and scores agree; rand picks from outside the chunk too."""
    for number in range(3):
        old = run / f"selected/iter_{number}_sim_2"
        old.rename(run / f"selected/iter_{number}_{mode}_2")
    if mode == "rand":
        lines(run / "selected/iter_0_rand_2/train.jsonl", [problem(3), problem(7)])
    assert cli("import", "gradalign", run, "--store", tmp_path / "S")[0] == 0
    found = gradstore.open(tmp_path / "S").rounds("pool")[0]
    for row in found.table.to_pylist()[:4]:
        index = int(row["id"])
        expected = MODES[mode](similarity(index), 0.5 if index % 3 else 0.0)
        assert row["score"] == pytest.approx(expected, nan_ok=True)
    if mode == "rand":
        assert found.picks == ["3", "7"]
        assert found.table.to_pylist()[4] | {"low": 0, "high": 0, "score": 0, "pass_rate": 0} == {
            "id": "3", "score": 0, "low": 0, "high": 0, "state": "unmeasured", "step": -1, "pass_rate": 0,
            "rolled_out": False, "picked": 0, "weight": 1.0, "rollouts": 0,
        }  # fmt: skip


def _shards(run: Path) -> None:
    """Several machines (--size/--idx): two parts, no merged file; a third part is gone."""
    split = run / "global_step_0/train_split"
    (split / "similarity_results_aggregated.jsonl").unlink()
    lines(split / "part_0/similarity_results_cosine_real.jsonl", [{"group_id": 7, "similarity": 0.35}])
    lines(split / "part_2/similarity_results_cosine_real.jsonl", [{"group_id": 2, "similarity": -0.15}])


def _responses(run: Path) -> None:
    """No accuracies: they are counted from the parts' responses, in either field."""
    split = run / "global_step_0/train_split"
    (split / "accuracy_by_problem.jsonl").unlink()
    rows = [response(7, True), response(7, False), response(2, False, passed=None, is_correct=True), response(2, False)]
    (split / "part_0/responses_sorted.json").write_text(json.dumps(rows))


def _parquet(run: Path) -> None:
    for file in [*run.glob("chunks/*/train.jsonl"), *run.glob("selected/*/train.jsonl")]:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), file.with_suffix(".parquet"))
        file.unlink()


def _without_chunks(run: Path) -> None:
    """The chunks are gone: records come from picks and responses, candidates are what was measured."""
    shutil.rmtree(run / "chunks")
    for number in range(3):
        rows = [response(i, i % 3 > 0) for i in CHUNKS[number % 2]]
        (run / f"global_step_{10 * number}/train_split/part_0/responses_sorted.json").write_text(json.dumps(rows))


def _without_similarities(run: Path) -> None:
    for file in run.glob("global_step_*/train_split/**/similarity*"):
        file.unlink()


def _not_finite(run: Path) -> None:
    split = run / "global_step_0/train_split"
    (split / "similarity_results_aggregated.jsonl").write_text(
        '{"group_id": 7, "similarity": NaN}\n{"group_id": "2", "similarity": 1}\n'
    )


def _unmeasured_step(run: Path) -> None:
    """A step's folder was removed to save space."""
    shutil.rmtree(run / "global_step_10")


def _gap(run: Path) -> None:
    """The picks of a round are gone: the others keep their step."""
    shutil.rmtree(run / "selected/iter_1_sim_2")


ODD = {
    "shards": (_shards, ["part_1 is missing"], {"7": (0.35, 0.5, "live"), "5": (None, 0.5, "live")}),
    "responses": (_responses, [], {"7": (0.35, 0.5, "live"), "0": (0.0, None, "no_signal")}),
    "parquet": (_parquet, [], {"7": (0.35, 0.5, "live")}),
    "without chunks": (_without_chunks, ["no chunks"], {"7": (0.35, 0.5, "live"), "0": (0.0, 0.0, "no_signal")}),
    "without similarities": (_without_similarities, ["no similarities"], {"7": (None, 0.5, "live")}),
    "not finite": (_not_finite, [], {"7": (None, 0.5, "failed"), "2": (1.0, 0.5, "live"), "5": (None, 0.5, "live")}),
    "unmeasured step": (_unmeasured_step, ["round 1: no"], {"7": (0.35, 0.5, "live")}),
    "gap": (_gap, [], {"7": (0.35, 0.5, "live")}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders(cli, run, tmp_path, name: str) -> None:
    """What is missing is said and stays unknown; everything else is read."""
    change, notes, expected = ODD[name]
    change(run)
    status, _, err = cli("import", "gradalign", run, "--store", tmp_path / "S")
    assert status == 0, err
    for note in notes:
        assert note in err
    store = gradstore.open(tmp_path / "S")
    assert len(store.problems("pool")) == 8
    table = {row["id"]: row for row in store.rounds("pool")[0].table.to_pylist()}
    assert set(table) == {"7", "2", "5", "0"}
    for problem_id, (score, rate, state) in expected.items():
        row = table[problem_id]
        assert row["score"] == pytest.approx(math.nan if score is None else score, nan_ok=True)
        assert row["pass_rate"] == pytest.approx(math.nan if rate is None else rate, nan_ok=True)
        assert row["state"] == state
    steps = [found.step for found in store.rounds("pool")]
    assert steps == ([0, 20] if name == "gap" else [0, 10, 20])


SIM, ACC = (
    "global_step_10/train_split/similarity_results_aggregated.jsonl",
    "global_step_10/train_split/accuracy_by_problem.jsonl",
)
PICKS = "selected/iter_1_sim_2/train.jsonl"
BROKEN = {
    "no run": (None, "", ["no picks", "selected/iter_R_MODE_N"]),
    "similarity is text": (SIM, '{"group_id": 1, "similarity": "high"}\n', ["line 1", "similarity", "number"]),
    "no similarity": (SIM, '{"group_id": 1}\n', ["line 1", "similarity", "required"]),
    "no group_id": (SIM, '{"similarity": 0.5}\n', ["line 1", "group_id"]),
    "group_id is a list": (SIM, '{"group_id": [1], "similarity": 0.5}\n', ["line 1", "group_id"]),
    "cut line": (SIM, '{"group_id": 1, "similarity": 0.5}\n{"group_id": 3, "sim', ["line 2", "not valid JSON"]),
    "two values": (
        SIM, '{"group_id": 1, "similarity": 0.5}\n{"group_id": 1, "similarity": 0.4}\n', ["line 2", "twice"]
    ),
    "of another chunk": (SIM, '{"group_id": 7, "similarity": 0.5}\n', ["'7'", "none of round 1's candidates"]),
    "more right than there are": (ACC, '{"group_id": 1, "total": 2, "correct": 3}\n', ["line 1", "'correct' is 3"]),
    "no rollouts": (ACC, '{"group_id": 1, "total": 0, "correct": 0}\n', ["line 1", "total"]),
    "picked elsewhere": (PICKS, json.dumps(problem(7)) + "\n", ["'7'", "none of round 1's candidates"]),
    "nothing picked": (PICKS, "", ["iter_1_sim_2", "empty"]),
    "another problem": (
        PICKS, json.dumps(problem(1, data_source="x")) + "\n", ["'1'", "'source' differs from elsewhere"]
    ),
    "picked twice": (PICKS, (json.dumps(problem(1)) + "\n") * 2, ["'1' occurs twice", "line"]),
    "no id": (PICKS, json.dumps(problem(1, extra_info={})) + "\n", ["line 1", "extra_info.index"]),
    "manifest": ("chunks/manifest.json", '{"num_chunks": "two"}', ["manifest.json", "num_chunks"]),
    "more chunks expected": ("chunks/manifest.json", '{"num_chunks": 3}', ["chunk_2 is missing"]),
    "shared problem": ("chunks/chunk_1/train.jsonl", json.dumps(problem(7)) + "\n", ["'7'", "chunks share none"]),
    "unknown mode": ("selected/iter_3_magic_2/train.jsonl", "{}", ["mode", "magic", "sim"]),
    "two modes": ("selected/iter_1_acc_2/train.jsonl", json.dumps(problem(1)) + "\n", ["round 1", "several", "--mode"]),
    "validation": ("global_step_0/val_responses/responses_sorted.json", '[{"group_id": 1}]', ["entry 1", "'passed'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(cli, run, tmp_path, snapshot, name: str) -> None:
    """One line with file, row and field, status 2, and nothing is left behind or changed."""
    assert cli("import", "gradalign", run, "--store", tmp_path / "there")[0] == 0
    before = snapshot(tmp_path / "there")
    path, text, wanted = BROKEN[name]
    if path is None:
        shutil.rmtree(run / "selected")
    else:
        (run / path).parent.mkdir(exist_ok=True)
        (run / path).write_text(text)
    for store in ("new", "there"):
        status, out, err = cli("import", "gradalign", run, "--store", tmp_path / store)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1
        assert all(part in err for part in (*wanted, str(run))), err
    assert not (tmp_path / "new").exists()
    assert snapshot(tmp_path / "there") == before


def test_steps_that_the_folders_do_not_tell(cli, run, tmp_path) -> None:
    """Without folders of measurements a round's step cannot be known; a wrong one is noticed by its problems."""
    for folder in run.glob("global_step_*"):
        shutil.rmtree(folder)
    status, _, err = cli("import", "gradalign", run, "--store", tmp_path / "S")
    assert status == 2
    assert "--steps (iters_per_select)" in err
    assert cli("import", "gradalign", run, "--store", tmp_path / "S", "--steps", 5)[0] == 0
    assert [found.step for found in gradstore.open(tmp_path / "S").rounds("pool")] == [0, 5, 10]


def test_rounds_of_another_run_are_refused(cli, run, tmp_path, snapshot) -> None:
    """A collection holds one run; two would be one curriculum that never was."""
    assert cli("import", "gradalign", run, "--store", tmp_path / "S")[0] == 0
    before = snapshot(tmp_path / "S")
    rows = [{"group_id": i, "similarity": 0.9 * similarity(i)} for i in CHUNKS[0]]
    lines(run / "global_step_0/train_split/similarity_results_aggregated.jsonl", rows)
    status, _, err = cli("import", "gradalign", run, "--store", tmp_path / "S")
    assert status == 2
    assert "round 0 of 'pool' is there already and is not this run's" in err
    assert snapshot(tmp_path / "S") == before
    assert cli("import", "gradalign", run, "--store", tmp_path / "S", "--collection", "other")[0] == 0
    assert cli("import", "gradalign", run, "--store", tmp_path / "S", "--benchmark", "pool")[0] == 2


def test_sources_of_responses_are_kept(cli, model_folder, run, tmp_path) -> None:
    """`collect` dropped data_source, and --where source=... then found nothing."""
    rows = [response(i, right) for i in (7, 2, 5) for right in (True, False)]
    rows = [{**row, "prompt": "1+1=", "data_source": f"s{row['group_id'] % 2}"} for row in rows]
    (tmp_path / "responses_sorted.json").write_text(json.dumps(rows))
    arguments = ("--model", model_folder, "--rank", 4, "--basis", "random")
    status, _, err = cli("collect", tmp_path / "C", "pool", tmp_path / "responses_sorted.json", *arguments)
    assert status == 0, err
    sources = {record["id"]: record["source"] for record in gradstore.open(tmp_path / "C").records("pool")}
    assert sources == {"7": "s1", "2": "s0", "5": "s1"}


def test_rollouts_first_then_the_run(cli, model_folder, tiny_tokenizer, run, tmp_path) -> None:
    """Rows and rounds in one store, as docs/gradalign.md says: the problems are the run's own in both."""
    rows = []
    for index in CHUNKS[0]:
        text = tiny_tokenizer.apply_chat_template(problem(index)["prompt"], tokenize=False, add_generation_prompt=True)
        rows += [response(index, right, prompt=text) for right in (True, False)]
    part = run / "global_step_0/train_split/part_0/responses_sorted.json"
    part.write_text(json.dumps(rows), encoding="utf-8")
    arguments = ("--problems", run / "chunks/chunk_0/train.jsonl", "--model", model_folder, "--rank", 4, "--step", 0)
    status, _, err = cli("collect", tmp_path / "S", "pool", part, *arguments, "--basis", "random", "--embeddings")
    assert status == 0, err
    status, out, err = cli("import", "gradalign", run, "--store", tmp_path / "S")
    assert status == 0, err
    assert out.startswith("4 problems and 3 rounds added to pool")
    store = gradstore.open(tmp_path / "S")
    assert len(store.view("pool")) == 4
    assert store.rounds("pool")[0].table["id"].to_pylist() == [str(index) for index in CHUNKS[0]]
