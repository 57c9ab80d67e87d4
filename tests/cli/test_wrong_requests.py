"""`wrong_requests.tsv`: what new users ask wrongly. Each answer is a line or two, status 2, and nothing has changed."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradstore
from gradstore.cli import app

TABLE = Path(__file__).with_name("wrong_requests.tsv")


_SPOILT_PROBLEMS: dict[str, dict] = {
    "id-empty": {"id": ""},
    "id-null": {"id": None},
    "id-list": {"id": [1]},
    "id-float": {"id": 1.5},
    "id-surrogate": {"id": "\ud800"},
    "prompt-empty": {"prompt": ""},
    "prompt-list": {"prompt": []},
    "prompt-no-role": {"prompt": [{"content": "x"}]},
    "tags-text": {"tags": "easy"},
    "source-number": {"source": 3},
    "truth-list": {"ground_truth": []},
}
_SPOILT_ROLLOUTS: dict[str, dict] = {
    "reward-nan": {"reward": float("nan")},
    "reward-text": {"reward": "1"},
    "reward-misspelt": {"rewrad": 1.0, "reward": None},
    "no-response": {"response": None},
    "two-prompts": {"prompt": "2+2=", "reward": 0.0},
    "two-steps": {"step": 2, "reward": 0.0},
    "token-too-large": {"prompt_ids": [1], "response_ids": [999999]},
}
"""Of the second of two rows; None: without the field."""
_TABLES = {
    "latin": "question,answer\nçé?,2\n".encode("latin-1"),
    "utf16": "question,answer\n1+1?,2\n".encode("utf-16"),
    "ragged": b"question,answer\n1+1?,2,3\n",
    "short": b"question,answer\n1+1?\n",
    "twice-named": b"question,question,answer\n1,2,3\n",
    "heading": b"question,answer\n",
    "blank": b"question,answer\n1+1?,\n,3\n",
    "quote": b'question,answer\n"1+1?,2\n',
    "semicolons": b"question;answer\n1+1?;2\n",
}


def _rows() -> list[tuple[str, str, int]]:
    """(request, message, exit status) of each row; lines with # are headings."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    fields = [line.split("\t") for line in lines[1:]]
    return [(request, message, int(status)) for request, message, status in fields]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder as a new user has it: a model, problems, rollouts, stores, and files that are something else."""
    from gradstore.engine import Sketcher, SketchSpec, collect, create_store
    from gradstore.engine.gradients.models import load_model, load_tokenizer
    from gradstore.engine.rollouts import read_rollouts

    folder = tmp_path_factory.mktemp("world")
    (folder / "model").symlink_to(model_folder)

    def lines(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    problems = [
        {"id": f"pool{i}", "prompt": f"{i}+{i}=", "ground_truth": str(2 * i), "source": f"source{i % 2}"}
        for i in range(12)
    ]
    lines("problems.jsonl", problems)
    lines("promt.jsonl", [{"id": "a", "promt": "1+1=", "ground_truth": "2"}])
    lines("numbers.jsonl", [{"id": "a", "prompt": 7, "ground_truth": "2"}])
    lines("untrue.jsonl", [{"id": "a", "prompt": "1+1="}])
    lines("twice.jsonl", [*problems[:2], problems[0]])
    lines("own.jsonl", [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}])
    problem = {"id": "a", "prompt": "1+1=", "ground_truth": "2"}
    for name, changed in _SPOILT_PROBLEMS.items():
        lines(f"{name}.jsonl", [{**problem, **changed}])
    row = {"problem_id": "a", "prompt": "1+1=", "response": "2", "reward": 1.0}
    for name, changed in _SPOILT_ROLLOUTS.items():
        lines(f"{name}.jsonl", [row, {key: value for key, value in {**row, **changed}.items() if value is not None}])
    for name, text in _TABLES.items():
        (folder / f"{name}.csv").write_bytes(text)
    lines("messages.jsonl", [{**problem, "prompt": [{"role": "user", "content": "1+1?"}]}])
    (folder / "bad.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00garbage")
    (folder / "archive.zip").write_bytes(b"PK\x03\x04" + bytes(60))
    (folder / "dangling.jsonl").symlink_to("nowhere.jsonl")
    (folder / "own.csv").write_text("question,answer,topic\n1+1?,2,sums\n2+2?,4,sums\n", encoding="utf-8")
    (folder / "broken.jsonl").write_text(json.dumps(problems[0]) + '\n{"id": "b", "prompt": \n', encoding="utf-8")
    for name in ("empty.jsonl", "empty.parquet", "empty.csv", "empty.json", "empty.yaml"):
        (folder / name).touch()
    (folder / "notes.txt").write_text("to do: buy milk\n", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
    (folder / "fake.parquet").write_text("id,prompt\n1,2\n", encoding="utf-8")
    (folder / "list.json").write_text("[1, 2]", encoding="utf-8")
    (folder / "fingerprint.json").write_text('{"model": "m"}', encoding="utf-8")
    (folder / "run.yaml").write_text("modle: model\npool: problems.jsonl\nout: new\n", encoding="utf-8")
    (folder / "list.yaml").write_text("- a\n- b\n", encoding="utf-8")
    for name in ("taken.jsonl", "taken.parquet", "report.html", "taken.html"):
        (folder / name).write_text("mine\n", encoding="utf-8")
    for name in ("folder", "nomodel", "figures", "run"):
        (folder / name).mkdir()
    (folder / "nomodel" / "readme.md").write_text("nothing\n", encoding="utf-8")
    (folder / "figures" / "alignment.svg").write_text("mine\n", encoding="utf-8")
    (folder / "run" / "thesis.tex").write_text("mine\n", encoding="utf-8")
    for name, n in (("pool", 12), ("bench", 4)):
        rollouts = [
            {"problem_id": f"{name}{i}", "prompt": f"{i}+{i}=", "response": str(3 * i + j), "reward": float(j % 2)}
            | {"source": f"source{i % 2}"}
            for i in range(n)
            for j in range(4)
        ]
        lines(f"{name}-rollouts.jsonl", rollouts)
    lines("flat-rollouts.jsonl", [{**row, "reward": 1.0} for row in rollouts])
    rows = np.eye(4, dtype=np.float32).tolist()
    pq.write_table(pa.table({"id": [f"pool{i}" for i in range(4)], "sketch": rows}), folder / "sketches.parquet")
    pq.write_table(pa.table({"id": ["pool0"], "vector": rows[:1]}), folder / "vectors.parquet")

    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
    sketcher = Sketcher(model, SketchSpec(basis="random", rank=4, embeddings=True))
    store = create_store(folder / "store", sketcher)
    for name, step in (("pool", 0), ("bench", 0), ("pool", 5), ("bench", 5)):
        source = read_rollouts(folder / f"{name}-rollouts.jsonl", tokenizer=tokenizer)
        collect(store, name, source, sketcher=sketcher, step=step, measure="never")
    for name, dim, sizes in (("small", 4, {"pool": 8, "bench": 3}), ("two", 4, {"a": 4, "b": 4, "bench": 3})):
        store = gradstore.create(folder / name, dim=dim, fingerprint={"model": name})
        for collection, n in sizes.items():
            ids = [f"{collection}{i}" for i in range(n)]
            store.add_problems(collection, [{"id": one, "prompt": one, "tags": ["easy"]} for one in ids])
            with store.writer(collection, step=3) as writer:
                writer.append(ids, np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32))
    gradstore.create(folder / "bare", dim=4, fingerprint={"model": "m"})
    return folder


def _digest(folder: Path) -> str:
    """Of every name and every byte below the folder."""
    found = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)}\0".encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


@pytest.mark.parametrize(("request_line", "message", "expected"), _rows(), ids=lambda value: str(value)[:60])
def test_a_wrong_request(cli, world: Path, monkeypatch, request_line: str, message: str, expected: int) -> None:
    """The message is that of the table, in which `…` stands for any text; before it there may be one warning."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = _digest(world)
    status, out, err = cli(*shlex.split(request_line))
    assert status == expected, out + err
    assert out == ""
    said = ".*".join(map(re.escape, message.split("…")))
    assert re.fullmatch(rf"(warning: .*\n)?gradstore: {said}\n", err), err
    assert _digest(world) == before


def test_the_table_covers_every_command() -> None:
    """At least two wrong requests for each, and 200 in all."""
    firsts = [request.split()[0] for request, _, _ in _rows()]
    assert len(firsts) >= 200
    assert all(firsts.count(name) >= 2 or name == "selectors" for name in app.COMMANDS)
