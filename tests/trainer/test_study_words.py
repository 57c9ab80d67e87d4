"""The bed of word problems: its pools, its reward, and (slow) the whole study in miniature on SmolLM2-135M."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from benchmarks.study.bed import EASY, UNSOLVABLE, Bed
from benchmarks.study.results import read_results
from benchmarks.study.words import N_TAUGHT, SOURCE, reward, value, word_problems, words
from gradstore import RequestError
from gradstore.demo import tasks

SETTINGS = {"pool": 40, "validation": 8, "test": 20}


@pytest.fixture(scope="module")
def svamp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of made-up problems in SVAMP's form, 20 of them of a kind that the bed does not take."""
    random = Random(0)
    rows = []
    for i in range(340):
        a, b, operation = random.randint(20, 99), random.randint(1, 19), random.choice("+-") if i < 320 else "*"
        told = "bought" if operation == "+" else "lost"
        answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
        rows.append(
            {
                "ID": f"made-{i}",
                "Body": f"Person {i} had {a} apples and {told} {b} of them",
                "Question": "How many apples are there now?",
                "Equation": f"( {a}.0 {operation} {b}.0 )",
                "Answer": float(answer),
            }
        )
    path = tmp_path_factory.mktemp("svamp") / "SVAMP.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bed(svamp: Path) -> Bed:
    return words(svamp, Path(".models"), short=True)


def test_pools_are_made_as_the_page_says(bed: Bed) -> None:
    settings = replace(bed.settings, **SETTINGS)
    for arm, wanted in (
        ("wrong_truths", {tasks.CLEAN: 20, tasks.WRONG_TRUTH: 20}),
        ("imbalance", {tasks.CLEAN: 40}),
        ("low_utility", {tasks.CLEAN: 5 + 15, EASY: 10, UNSOLVABLE: 10}),
    ):
        found = bed.problems(arm, 1, settings)
        tags = [record["tags"][0] for record in found.pool]
        assert {tag: tags.count(tag) for tag in set(tags)} == wanted
        assert len({record["id"] for record in found.pool}) == 40
        texts = [
            {record["prompt"][1]["content"] for record in own} for own in (found.pool, found.validation, found.test)
        ]
        assert [len(own) for own in texts] == [40, 8, 20]
        assert not (texts[0] & texts[1])
        assert not (texts[0] & texts[2])
        assert not (texts[1] & texts[2])
        assert {record["source"] for record in [*found.validation, *found.test]} == {SOURCE}
        assert found == bed.problems(arm, 1, settings)
        assert found.test == bed.problems(arm, 2, settings).test
        assert found.pool != bed.problems(arm, 2, settings).pool
    assert sum(map(bed.is_useful, bed.problems("imbalance", 0, settings).pool)) == 4
    assert sum(bed.is_bad("low_utility", one) for one in bed.problems("low_utility", 0, settings).pool) == 35


def test_only_easy_problems_were_taught(bed: Bed, svamp: Path) -> None:
    """What the cold start saw must be in no benchmark."""
    taught = {record["id"] for record in word_problems(svamp)[:N_TAUGHT]}
    found = bed.problems("low_utility", 0, replace(bed.settings, **SETTINGS))
    assert {record["id"] in taught for record in found.pool if record["tags"] == [EASY]} == {True}
    others = [record for record in found.pool if record["tags"] != [EASY]]
    assert not taught & {record["id"] for record in [*others, *found.validation, *found.test]}


@pytest.mark.parametrize(
    ("truth", "response", "paid"),
    [
        ("76 - 25", "76 - 25", 1.0),
        ("76 - 25", " 76-25 ", 1.0),
        ("3 + 25", "25 + 3", 1.0),
        ("76 - 25", "51", 0.0),
        ("76 - 25", "76 + 25", 0.0),
        ("76 - 25", "76 - 25 = 51", 0.0),
        ("51", "51", 1.0),
        ("51", "50 + 1", 0.0),
        ("-4", " -4", 1.0),
        ("no answer", "no answer", 0.0),
        ("51", "", 0.0),
        ("51", "9" * 5000, 0.0),
    ],
)
def test_an_answer_is_paid_for_form_and_value(truth: str, response: str, paid: float) -> None:
    """A number for a calculation would let the model do the sum of an off-topic task without doing it."""
    assert reward({"ground_truth": truth}, response, 0) == paid


def test_values() -> None:
    assert value("12 - 5") == ("calculation", 7)
    assert value("12 - -5") is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, text in (("none", None), ("text", "{"), ("object", "{}x"), ("rows", '[{"Body": 1}]')):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises(RequestError, match=name):
            word_problems(path)
    small = tmp_path / "small.json"
    small.write_text("[]")
    with pytest.raises(RequestError, match="word problems, expected at least"):
        made = words(small, tmp_path)
        made.problems("wrong_truths", 0, made.settings)


@pytest.mark.real
@pytest.mark.timeout(1500)
def test_the_study_in_miniature_on_a_real_model(svamp: Path, tmp_path: Path) -> None:
    """Cold start, runs and the page of `make study-real`. Its results mean nothing."""
    common = ("--bed", "words", "--svamp", str(svamp), "--short")
    rows, page = tmp_path / "study" / "results.jsonl", tmp_path / "study.md"
    methods = ("random*1", "refresh0-dot%2*2", "gradalign*1")
    study("run", *common, "--arms", "wrong_truths", "--methods", ",".join(methods), "--seeds", "0", "--out", str(rows))
    found = read_results(rows)
    assert [row["method"] for row in found] == list(methods)
    for row in found:
        assert 0 < row["accuracy"][-1] < 1
        assert row["training_rollout_seconds"] < row["training_seconds"]
    assert found[1]["selection_rollouts"] == [16 * 4 + 4 * 4, 0]
    study("report", *common, "--results", str(rows), "--page", str(page))
    assert "| `gradalign*1` |" in page.read_text(encoding="utf-8")
    study("report", *common, "--results", str(rows), "--page", str(page), "--check")


def study(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.study", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
