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
