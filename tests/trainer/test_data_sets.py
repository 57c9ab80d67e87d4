"""Every known data set, from rows as its publisher has them: questions, ground truths, ids, and what is left out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore import RequestError, read_problems, to_verl
from gradstore.errors import GradstoreError
from gradstore.trainer.data import answers
from gradstore.trainer.data.catalogue import ALIASES, BOXED, DATA_SETS, LETTER, TRUE_FALSE, DataSet
from gradstore.trainer.data.loading import load
from gradstore.trainer.sampling.rewards import load_reward

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
WIKI = "https://artofproblemsolving.com/wiki/index.php/{}_Problems/Problem_1"
AMC = [
    {"id": 0, "problem": "Of $2022$?", "answer": 142.0, "url": WIKI.format("2022_AMC_12A")},
    {"id": 1, "problem": "Of $2023$?", "answer": 7.0, "url": WIKI.format("2023_AMC_12B")},
]

ROWS: dict[str, list[dict[str, Any]]] = {
    "aime24": [{"id": 60, "problem": "Aya walks.", "solution": "\\boxed{204}", "url": WIKI.format("2024_AIME_I")}],
    "aime25": [{"problem": "Sum of bases?", "answer": "70", "id": "0"}],
    "amc": AMC,
    "amc22": AMC,
    "amc23": AMC,
    "dapo": [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO.format("Find $x$."), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        }
    ],
    "deepscaler": [{"problem": "Find $y$.", "answer": "-\\frac{2}{3}", "solution": "So $-\\frac23$."}],
    "gsm8k": [{"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n1024 in all.\n#### 1,024"}],
    "math": [
        {
            "problem": "Compute $\\dbinom{5}{1}$.",
            "level": "Level 1",
            "type": "Counting & Probability",
            "solution": "First $\\boxed{4}$, no: $\\boxed{\\frac{5!}{4!1!}}$.",
        }
    ],
    "math500": [
        {
            "problem": "Convert $(0,3)$.",
            "solution": "We have \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        }
    ],
    "metamath": [
        {
            "type": "GSM_Rephrased",
            "query": "How much pizza?",
            "original_question": "How many slices?",
            "response": "There are 48. The answer is: 12, no.\nThe answer is: 48",
        }
    ],
    "mmlupro": [
        {
            "question_id": 70,
            "question": "Which ring?",
            "options": ["0", "30", "3", "10", "12", "50", "2", "100", "20", "5"],
            "answer": "I",
            "answer_index": 8,
            "cot_content": "",
            "category": "math",
            "src": "cot_lib-abstract_algebra",
        }
    ],
    "strategyqa": [
        {
            "qid": "872bbe94380be50bdabe",
            "term": "Aristotle",
            "description": "philosopher",
            "question": "Did Aristotle use a laptop?",
            "answer": False,
            "facts": ["Laptops are of 1980."],
            "decomposition": ["When was the laptop?"],
        }
    ],
    "supergpqa": [
        {
            "uuid": "b78cb3eefa5146718e8ea6588f2deafa",
            "question": "Which alloy?",
            "options": ["steel", "brass", "bronze"],
            "answer": "brass",
            "answer_letter": "B",
            "discipline": "Engineering",
            "field": "Materials",
            "subfield": "Metals",
            "difficulty": "hard",
            "is_calculation": False,
        }
    ],
    "theoremqa": [
        {"Question": "Is it closed?", "Answer": "True", "Answer_type": "bool", "Picture": None},
        {"Question": "What is drawn?", "Answer": "[1, 2]", "Answer_type": "list of integer",
         "Picture": {"bytes": b"\x89PNG", "path": "a.png"}},
    ],
    "webinstruct": [
        {"task_id": 4, "original_question": "What moves the tide?", "short_answer": "the moon", "category": "Physics"}
    ],
}  # fmt: skip

EXPECTED = {
    "aime24": ("aime24-60", "Aya walks.\n\n" + BOXED, "204", ["math"]),
    "aime25": ("aime25-0", "Sum of bases?\n\n" + BOXED, "70", ["math"]),
    "amc": ("amc-0", "Of $2022$?\n\n" + BOXED, "142", ["math"]),
    "amc22": ("amc22-0", "Of $2022$?\n\n" + BOXED, "142", ["math"]),
    "amc23": ("amc23-1", "Of $2023$?\n\n" + BOXED, "7", ["math"]),
    "dapo": (None, "Find $x$.\n\n" + BOXED, "34", ["math"]),
    "deepscaler": (None, "Find $y$.\n\n" + BOXED, "-\\frac{2}{3}", ["math"]),
    "gsm8k": (None, "How many clips?\n\n" + BOXED, "1024", ["math"]),
    "math": (
        None,
        "Compute $\\dbinom{5}{1}$.\n\n" + BOXED,
        "\\frac{5!}{4!1!}",
        ["math", "Counting & Probability"],
    ),
    "math500": (
        "math500-test/precalculus/807.json",
        "Convert $(0,3)$.\n\n" + BOXED,
        "\\left( 3, \\frac{\\pi}{2} \\right)",
        ["math", "Precalculus"],
    ),
    "metamath": (None, "How much pizza?\n\n" + BOXED, "48", ["math", "GSM_Rephrased"]),
    "mmlupro": (
        "mmlupro-70",
        "Which ring?\nA. 0\nB. 30\nC. 3\nD. 10\nE. 12\nF. 50\nG. 2\nH. 100\nI. 20\nJ. 5\n\n" + LETTER,
        "I",
        ["knowledge", "math"],
    ),
    "strategyqa": (
        "strategyqa-872bbe94380be50bdabe",
        "Did Aristotle use a laptop?\n\n" + TRUE_FALSE,
        "False",
        ["knowledge"],
    ),
    "supergpqa": (
        "supergpqa-b78cb3eefa5146718e8ea6588f2deafa",
        "Which alloy?\nA. steel\nB. brass\nC. bronze\n\n" + LETTER,
        "B",
        ["knowledge", "Engineering"],
    ),
    "theoremqa": (None, "Is it closed?\n\n" + BOXED, "True", ["math", "bool"]),
    "webinstruct": (None, "What moves the tide?\n\n" + BOXED, "the moon", ["knowledge"]),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_published_becomes_a_problem(tmp_path: Path, name: str, suffix: str) -> None:
    """Each data set keeps its answer elsewhere and in another form; a wrong one would reward nonsense for ever."""
    loaded = load(DATA_SETS[name], local=write(tmp_path / f"rows.{suffix}", ROWS[name]))
    assert (loaded.rows, loaded.rows - loaded.not_kept) == (len(ROWS[name]), len(loaded.records))
    record = loaded.records[0]
    own_id, text, truth, tags = EXPECTED[name]
    assert record["prompt"] == [{"role": "user", "content": text}]
    assert record["ground_truth"] == truth
    assert record["tags"] == tags
    assert record["source"] == name
    extra = {"reward": DATA_SETS[name].reward, "split": DATA_SETS[name].split}
    assert record["extra"] == extra | ({"question": text.removesuffix("\n\n" + BOXED)} if name == "webinstruct" else {})
    assert record["id"] == own_id or (own_id is None and record["id"].startswith(f"{name}-"))
    verl = to_verl(record)
    assert verl["data_source"] == name
    assert verl["ability"] == tags[0]
    assert verl["reward_model"] == {"ground_truth": truth, "style": "rule"}
    assert verl["extra_info"]["index"] == record["id"]


@pytest.mark.parametrize("name", [name for name in ROWS if DATA_SETS[name].reward == "math"])
def test_the_named_reward_reads_the_ground_truth(tmp_path: Path, name: str) -> None:
    """A ground truth that its reward cannot read stops a run in its first chunk."""
    record = load(DATA_SETS[name], local=write(tmp_path / "rows.parquet", ROWS[name])).records[0]
    assert load_reward("auto")(record, f"so \\boxed{{{record['ground_truth']}}}", 0) == 1.0
    assert load_reward("auto")(record, "so \\boxed{1234567}", 0) == 0.0


class Hub:
    """Stands for datasets.load_dataset: the same rows for every configuration, the calls kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], error: Exception | None = None):
        self.calls: list[tuple[Any, ...]] = []
        self.rows, self.error = rows, error
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def load(self, hub: str, config: str | None, *, split: str) -> Any:
        from datasets import Dataset

        self.calls.append((hub, config, split))
        if self.error is not None:
            raise self.error
        return Dataset.from_list(self.rows)


@pytest.mark.parametrize("name", ROWS)
def test_the_hub_gives_the_same_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Through `datasets` as from a file; every configuration is read."""
    source = DATA_SETS[name]
    hub = Hub(monkeypatch, ROWS[name])
    loaded = load(source)
    assert hub.calls == [(source.hub, config, source.split) for config in source.configs or (None,)]
    local = load(source, local=write(tmp_path / "rows.parquet", ROWS[name]))
    assert loaded.records == local.records
    assert (loaded.rows, loaded.duplicates) == (local.rows * len(hub.calls), len(hub.calls) - 1)
    assert load(source, split="other").records[0]["extra"]["split"] == hub.calls[-1][2] == "other"


def test_pictures_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """TheoremQA's are a feature that `datasets` opens with a picture library nobody here needs."""
    from datasets import Dataset, Features, Image, Value

    texts = {name: Value("string") for name in ("Question", "Answer", "Answer_type")}
    features = Features(texts | {"Picture": Image()})
    table = Dataset.from_dict({name: [row[name] for row in ROWS["theoremqa"]] for name in features}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: table)
    loaded = load(DATA_SETS["theoremqa"])
    assert [record["ground_truth"] for record in loaded.records] == ["True"]
    assert loaded.not_kept == 1


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing to do then is said: a local copy, and with which columns."""
    Hub(monkeypatch, [], ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (LocalEntryNotFoundError)\nmore"))
    with pytest.raises(
        GradstoreError, match=r"gsm8k: openai/gsm8k \(main\) cannot be had from the hub: Couldn't"
    ) as no:
        load(DATA_SETS["gsm8k"])
    assert "--from gsm8k=PATH" in str(no.value)
    assert "question, answer" in str(no.value)
    assert "\n" not in str(no.value)
    assert no.value.exit_status == 1
    Hub(monkeypatch, [], ValueError("Unknown split \"dev\". Should be one of ['train', 'test']."))
    with pytest.raises(RequestError, match=r"gsm8k: openai/gsm8k .* has no such data: Unknown split"):
        load(DATA_SETS["gsm8k"], split="dev")


@pytest.mark.parametrize("no_hub", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_for_real(tmp_path: Path, no_hub: dict[str, str]) -> None:
    """What the library itself raises where there is no hub is what is caught; it is asked once."""
    code = (
        "from gradstore.trainer.data.loading import load; from gradstore.trainer.data.catalogue import DATA_SETS; "
        "load(DATA_SETS['aime25'])"
    )
    environment = {**no_hub, "HF_HOME": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "GradstoreError: aime25: math-ai/aime25 cannot be had from the hub" in done.stderr
    assert "Retrying" not in done.stderr


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RequestError, match=r"pip install 'gradstore\[data\]', or give a local copy: --from gsm8k=PATH"):
        load(DATA_SETS["gsm8k"])


def test_another_schema_is_an_error(tmp_path: Path) -> None:
    """A file of another data set must not become a pool of nothing."""
    path = write(tmp_path / "rows.jsonl", [{"question": "?", "target": "1"}])
    with pytest.raises(RequestError, match=r"rows\.jsonl, line 1: no column 'answer'; found question, target"):
        load(DATA_SETS["gsm8k"], local=path)
    with pytest.raises(RequestError, match=r"no file for gsm8k in this folder \(\.parquet, \.jsonl"):
        (tmp_path / "empty").mkdir()
        load(DATA_SETS["gsm8k"], local=tmp_path / "empty")


def test_unusable_rows_are_counted(tmp_path: Path) -> None:
    """Left out without a word they would be taken for a smaller data set."""
    rows = [
        {"question": "a", "answer": "#### 1"},
        {"question": " ", "answer": "#### 1"},
        {"question": "b", "answer": "2"},
        {"question": "c", "answer": None},
    ]
    loaded = load(DATA_SETS["gsm8k"], local=write(tmp_path / "rows.jsonl", rows))
    assert [record["ground_truth"] for record in loaded.records] == ["1"]
    assert loaded.rows == 4
    assert dict(loaded.unusable) == {
        "the question is empty": 1,
        "the solution has no #### before its answer": 1,
        "the answer is empty": 1,
    }


def test_ids_do_not_depend_on_place(tmp_path: Path) -> None:
    """An id that is a row's number changes when a row is added, and with it whatever a store knows of the problem."""
    rows = [{"question": f"question {i}", "answer": f"#### {i}"} for i in range(6)]
    records = load(DATA_SETS["gsm8k"], local=write(tmp_path / "a.jsonl", rows)).records
    ids = {record["prompt"][0]["content"]: record["id"] for record in records}
    other = load(DATA_SETS["gsm8k"], local=write(tmp_path / "b.jsonl", rows[::-1][:4])).records
    assert all(ids[record["prompt"][0]["content"]] == record["id"] for record in other)
    assert len(set(ids.values())) == 6
    same = load(DATA_SETS["gsm8k"], local=tmp_path / "b.jsonl", instruction="Be quick.").records
    assert [record["id"] for record in same] == [record["id"] for record in other]


def test_an_id_that_two_questions_share_tells_them_apart(tmp_path: Path) -> None:
    rows = [{"problem": text, "answer": "1", "id": "0"} for text in ("a", "b", "a")] + [
        {"problem": "c", "answer": "1", "id": "1"}
    ]
    ids = [record["id"] for record in load(DATA_SETS["aime25"], local=write(tmp_path / "r.jsonl", rows)).records]
    assert len(set(ids)) == 3
    assert ids[2] == "aime25-1"
    assert all(name.startswith("aime25-0-") for name in ids[:2])


@pytest.mark.parametrize(
    ("read", "value", "truth"),
    [
        (answers.plain, 142.0, "142"),
        (answers.plain, 0.5, "0.5"),
        (answers.plain, True, "True"),
        (answers.plain, " x ", "x"),
        (answers.boxed, "so $\\boxed{1}$ or $\\boxed{\\frac{1}{\\sqrt{2}}}$.", "\\frac{1}{\\sqrt{2}}"),
        (answers.boxed, "$\\fbox{3}$", "3"),
        (answers.boxed, "is $\\boxed 7$.", "7"),
        (answers.boxed, "\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        (answers.boxed_or_plain, "204", "204"),
        (answers.after_hashes, "a #### 1 #### -1,234", "-1234"),
        (answers.after_phrase, "The answer is: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        (answers.ground_truth, {"ground_truth": "34", "style": "rule"}, "34"),
    ],
)
def test_answers(read: Any, value: Any, truth: str) -> None:
    assert read(value) == truth


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (answers.plain, ""),
        (answers.plain, None),
        (answers.plain, float("nan")),
        (answers.boxed, "no box"),
        (answers.boxed, "\\boxed{1"),
        (answers.boxed, "\\boxed{}"),
        (answers.boxed, "\\boxed"),
        (answers.after_hashes, "1"),
        (answers.after_hashes, "####"),
        (answers.after_phrase, "It is 1"),
        (answers.ground_truth, "1"),
        (answers.ground_truth, {"style": "rule"}),
    ],
)
def test_answers_that_are_none(read: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        read(value)


def test_a_data_set_of_ones_own_is_an_entry(tmp_path: Path) -> None:
    mine = DataSet("mine", "me/mine", "train", "q", "a", topic="t", instruction="")
    record = load(mine, local=write(tmp_path / "r.jsonl", [{"q": "1+1?", "a": 2, "t": "sums"}])).records[0]
    assert record["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert (record["ground_truth"], record["tags"]) == ("2", ["math", "sums"])
    path = write(tmp_path / "verl.jsonl", [to_verl(record)])
    again = read_problems(path)[0]
    assert (again["id"], again["tags"]) == (record["id"], ["math", "sums"])


def test_every_data_set_is_tried(tmp_path: Path) -> None:
    """Those with rows of their own above, the others as parts of one of them."""
    parts = {"theoremqa_train", "theoremqa_test", "supergpqa_train", "supergpqa_test", "mmlupro-math"}
    assert set(DATA_SETS) == {*ROWS, *parts}
    assert all(name in DATA_SETS for name in ALIASES.values())


@pytest.mark.parametrize("n", [40, 41])
@pytest.mark.parametrize("name", ["theoremqa", "supergpqa"])
def test_halves_are_gradaligns(tmp_path: Path, name: str, n: int) -> None:
    """Its halves of a data set that has one split: the order is that of `datasets` with seed 42. Another order would
    put benchmark problems of a published run into the pool."""
    from datasets import Dataset

    question, identity = DATA_SETS[name].question, DATA_SETS[name].id
    rows = [{**ROWS[name][0], question: f"Question {i}?"} | ({identity: f"u{i}"} if identity else {}) for i in range(n)]
    path = write(tmp_path / "rows.jsonl", rows)
    asked = [row[question] for row in Dataset.from_list(rows).shuffle(seed=42)]
    halves = []
    for half in ("train", "test"):
        records = load(DATA_SETS[f"{name}_{half}"], local=path, instruction="").records
        halves += [record["prompt"][0]["content"].splitlines()[0] for record in records]
        assert len(records) == (n // 2 if half == "train" else n - n // 2)
        assert {record["source"] for record in records} == {f"{name}_{half}"}
    assert halves == asked


def test_mathematics_of_mmlupro(tmp_path: Path) -> None:
    """One category alone."""
    rows = [{**ROWS["mmlupro"][0], "question": f"{i}?", "category": "math" if i % 3 else "law"} for i in range(9)]
    loaded = load(DATA_SETS["mmlupro-math"], local=write(tmp_path / "rows.jsonl", rows))
    assert (len(loaded.records), loaded.not_kept) == (6, 3)
