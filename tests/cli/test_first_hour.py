"""What a new user runs into: other files, mistyped names, rankings that mislead; each is said, with the way on.

Case of the first hour -> what tests it, here if no other file is named:

    01  prompts without the chat template       test_plain_prompts_of_a_chat_model
    02  rows of other weights in one store       test_rows_of_other_weights_at_a_step_are_said
    04  a target older than the rows             test_what_misleads_is_said
    05  tables lose rank and score               test_tables_fit
    07  README's questions on one store          test_the_pool_need_not_be_named; tests/walk_readme.py
    08  all scores below zero                    test_what_misleads_is_said
    11  tracebacks                               test_collect_refuses, test_wrong_requests.py
    14  missing fields                           test_wrong_requests.py
    16  halves as benchmarks                     test_halves_are_no_benchmarks
    17  defaults eaten by markup                 test_defaults_in_help_are_shown
    18  dir(engine)                              tests/test_layers.py: test_names_complete
    19  names in Python                          test_names_do_in_python
    20  a hint that cannot be pasted             test_a_hint_can_be_pasted
    21  extras and torch's CUDA build            test_a_plain_installation_has_no_torch, test_without_models.py
    25  files of other kinds                     test_files_of_other_kinds_are_read, test_files_that_cannot_be_read...
    26  no network, no such folder               test_without_a_network, test_a_folder_that_is_not_there
    27  a signature in the docs                  test_signatures_in_the_docs
    28  own data                                 test_own_data_in_one_command
    29  colours and overflow                     tests/analysis: test_a_colour_means_one_thing, test_nothing_is_cut
    30  slow beside another job                  test_threads.py; python -m benchmarks.neighbours
"""

import csv
import gzip
import inspect
import io
import json
import re
import shutil
import socket
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import gradstore
from gradstore import RequestError, engine
from gradstore.cli.show import started_as
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts import read_rollouts
from gradstore.engine.searching.where import Where
from gradstore.reading.opening import open_rows
from tests.layers import ROOT

ROWS = [{"id": f"p{i}", "prompt": f'say "{i}",\nplease', "ground_truth": str(i)} for i in range(5)]


def _made(path: Path, rows: list[dict]) -> Path:
    """A file of the kind that its name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8")
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.name.endswith(".json.gz"):
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif path.suffix == ".zst":
        import pyarrow as pa

        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines.encode())
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl.gz", "p.json.gz", "p.jsonl.zst", "p.json"])
def test_files_of_other_kinds_are_read(tmp_path: Path, name: str) -> None:
    """Rows come as from JSON Lines, in order, and again by their places."""
    file = open_rows(_made(tmp_path / name, ROWS))
    found = list(file.scan())
    assert [row.value for row in found] == ROWS
    back = found[::-2]
    assert file.fetch([row.place for row in back], [row.size for row in back]) == ROWS[::-2]
    assert [record["id"] for record in gradstore.read_problems(tmp_path / name)] == [row["id"] for row in ROWS]


UNREADABLE = {
    "u.jsonl": ('{"id": "a"}'.encode("utf-16"), "UTF-16"),
    "a.gz": (gzip.compress(b"hello", mtime=0), "gzip of something else"),
    "cut.jsonl.gz": (gzip.compress(b'{"id": "a"}\n' * 99, mtime=0)[:30], "cannot be unpacked"),
    "heading.csv": (b"id,prompt\n", "no rows"),
    "twice.csv": (b"id,id\n1,2\n", "twice"),
    "blank.csv": (b"\nid,prompt\n1,2\n", "the first line is empty"),
    "heading-bytes.csv": (b"id,pr\xffmpt\n1,2\n", "is not UTF-8 text"),
    "long.csv": (b"id," + b"x" * 200_000 + b"\n1,2\n", "the heading cannot be read: field larger"),
    "ragged.csv": (b"id,prompt\n1,2,3\n", "not a CSV file"),
    "bytes.csv": (b"id,prompt\n1,\xff\n", "is not UTF-8 text"),
    "a.txt": (b"id prompt\n", "neither JSON Lines"),
}


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"{" + bytes(200 << 20)))
    with pytest.raises(RequestError, match="unpacks to more than"):
        open_rows(tmp_path / "bomb.jsonl.gz")


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str) -> None:
    data, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=message) as caught:
        list(open_rows(tmp_path / name).scan())
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "gpu"], "expected cpu, cuda"),
        (["--device", "cuda:99"], "torch sees"),
        (["--modules", "[["], "not a regular expression"),
        (["--fit-problems", "0"], "--fit-problems"),
    ],
)
def test_collect_refuses(cli, tmp_path, model_folder, rollout_files, options: list[str], message: str) -> None:
    """One line and status 2, and no store is made."""
    status, _, err = cli(
        "collect", tmp_path / "new", "pool", rollout_files["pool"], "--model", model_folder, "--quiet", *options
    )
    assert status == 2
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there(cli, tmp_path, model_folder) -> None:
    problems = model_folder / "problems.jsonl"
    status, _, err = cli(
        "rollout", problems, "--model", "./modle", "--reward", "math", "--out", tmp_path / "r.jsonl", "--quiet"
    )
    assert (status, err) == (2, "gradstore: ./modle: there is no such folder\n")


def _store(path: Path, sign: float = 1.0, step: int = 0, target_step: int = 0) -> gradstore.Store:
    """A pool along the first axis (times `sign`), a benchmark along it, a smaller one, and halves."""
    store = gradstore.create(path, dim=4, fingerprint={"model": "m", "layout": [["all", 0, 4]]})
    sizes = {"pool": 8, "pool.even": 8, "pool.odd": 8, "bench": 4, "other": 3}
    for name, n in sizes.items():
        ids = [f"{name}{i}" for i in range(n)]
        store.add_problems(name, [{"id": one, "prompt": one, "ground_truth": "1", "source": "sums"} for one in ids])
        rows = np.tile([sign if name == "pool" else 1.0, 0.1, 0, 0], (n, 1)).astype(np.float32)
        with store.writer(name, step=step if name.startswith("pool") else target_step) as writer:
            writer.append(ids, rows)
    return gradstore.open(path)


@pytest.mark.parametrize("command", ["query", "select"])
def test_what_misleads_is_said(cli, tmp_path, command: str) -> None:
    """A target much older than the rows, and scores that are all below zero: as warnings, and in the JSON."""
    _store(tmp_path / "store", sign=-1.0, step=42)
    more, again = [["-n", "2", "--out", tmp_path / name] if command == "select" else [] for name in ("one", "two")]
    status, _, err = cli(command, tmp_path / "store", "--against", "bench", *more)
    assert status == 0
    assert "42 steps older" in err
    assert "all scores are below 0" in err
    notices = json.loads(cli(command, tmp_path / "store", "--against", "bench", *again, "--json")[1])["notices"]
    assert len(notices) == 2
    _store(tmp_path / "fine")
    more = ["-n", "2", "--out", tmp_path / "three"] if command == "select" else []
    assert "warning" not in cli(command, tmp_path / "fine", "--against", "bench", *more)[2]


def test_the_pool_need_not_be_named(cli, tmp_path) -> None:
    """The collection twice as large as any other is the pool; halves are neither pool nor benchmark."""
    store = _store(tmp_path / "store")
    assert cli("query", store.path, "--against", "bench", "--json")[0] == 0
    status, _, err = cli("query", store.path, "--against", "pool")
    assert status == 2
    assert "--pool" in err


def test_halves_are_no_benchmarks(tmp_path) -> None:
    from gradstore.analysis.report.findings import find

    found = find(_store(tmp_path / "store"))
    assert (found.pool, found.benchmarks) == ("pool", ("bench", "other"))


def test_a_filter_that_fits_nothing_names_what_there_is(cli, tmp_path) -> None:
    store = _store(tmp_path / "store")
    status, _, err = cli("query", store.path, "--against", "bench", "--where", "source=sum")
    assert status == 2
    assert "'sums'" in err


@pytest.mark.parametrize("width", [40, 60, 80, 120, 160])
def test_tables_fit(cli, tmp_path, monkeypatch, width: int) -> None:
    """Rank, id and score stay; what goes is said; no line is wider than the terminal."""
    import sys

    store = _store(tmp_path / "store")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    status, out, _ = cli("query", store.path, "--against", "bench", "--top", "3", "--layers", "1")
    assert status == 0
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", out).rstrip().splitlines()
    assert "pool against bench" in title
    table = [line for line in lines if not line.startswith("left out")]
    assert all(len(line) <= width for line in table)
    assert {"rank", "id", "score"} <= set(table[0].split())
    assert "pool0" in out
    columns = {"pass rate", "age", "source", "layers"}
    gone = next((line for line in lines if line.startswith("left out")), "")
    assert all((name in gone) != (name in table[0]) for name in columns)


def test_csv(cli, tmp_path) -> None:
    store = _store(tmp_path / "store")
    status, out, _ = cli("query", store.path, "--against", "bench", "--top", "3", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["id"] == "pool0"


def test_names_do_in_python(tmp_path) -> None:
    """A benchmark's name, a filter's terms and a method's name are taken where objects are."""
    store = _store(tmp_path / "store")
    view, goal = store.view("pool"), engine.target(store, "bench")
    whole = engine.search(view, goal, 3)
    assert list(engine.search(view, "bench", 3)) == list(whole)
    assert engine.search(view, goal, 3, where="source=sums").ids.tolist() == whole.ids.tolist()
    assert engine.search(view, goal, 3, where=Where(sources="sums")).ids.tolist() == whole.ids.tolist()
    assert engine.select(store, "pool", "bench", 3).ids == engine.select(store, "pool", goal, 3).ids
    assert len(engine.select(store, "pool", "bench", 3, diversity="mmr")) == 3
    assert whole.to_pandas()["id"].tolist() == whole.ids.tolist()
    assert view.to_pandas()["state"].tolist() == ["live"] * 8
    assert engine.select(store, "pool", goal, 3).to_pandas()["id"].tolist() == whole.ids.tolist()
    for one in (view, whole, engine.select(store, "pool", goal, 3)):
        with pytest.raises(RequestError, match="pip install 'polars'"):
            one.to_polars()
    assert "pool" in store._repr_html_()
    assert "bench" in repr(goal)
    assert "3 of 8" in repr(whole)
    for wrong in ({"where": {"source": "sums"}}, {"where": 7}):
        with pytest.raises(RequestError):
            engine.search(view, goal, 3, **wrong)
    with pytest.raises(RequestError, match="expected a Target"):
        engine.search(view, object(), 3)
    assert gradstore.__version__


def test_defaults_in_help_are_shown(cli) -> None:
    for command in ("collect", "query", "report"):
        assert "[default: " in cli(command, "--help")[1]


OWN = [
    {"question": "What is 1+1?", "answer": "We add. #### 2", "topic": "sums", "key": "a1"},
    {"question": "What is 7-4?", "answer": "#### 3", "topic": "differences", "key": "a2"},
]


@pytest.mark.parametrize("name", ["own.csv", "own.jsonl.gz", "own.json"])
def test_own_data_in_one_command(cli, tmp_path, name: str) -> None:
    """Columns are named; the first record is shown; the result is a pool."""
    options = ["--prompt", "question", "--truth", "answer", "--truth-after", "####", "--id", "key", "--source", "topic"]
    out = tmp_path / "pool.jsonl"
    status, _, err = cli("data", _made(tmp_path / name, OWN), *options, "--out", out)
    assert (status, "What is 1+1?" in err) == (0, True)
    records = gradstore.read_problems(out)
    assert [record["ground_truth"] for record in records] == ["2", "3"]
    assert [record["source"] for record in records] == ["sums", "differences"]
    assert [record["id"] for record in records] == ["own-a1", "own-a2"]
    assert records[0]["prompt"] == [{"role": "user", "content": "What is 1+1?"}]


def test_own_prompts_by_a_template(cli, tmp_path) -> None:
    options = ["--prompt", "question", "--truth", "key", "--template", "Of {topic}: {question} Be brief."]
    status, _, _ = cli("data", _made(tmp_path / "own.csv", OWN), *options, "--out", tmp_path / "pool.jsonl")
    assert status == 0
    first = gradstore.read_problems(tmp_path / "pool.jsonl")[0]
    assert first["prompt"][0]["content"] == "Of sums: What is 1+1? Be brief."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "qestion", "--truth", "answer"], "found question, answer, topic, key"),
        (["--prompt", "question"], "--truth"),
        (["--id", "key"], "--prompt"),
        (["--prompt", "question", "--truth", "answer", "--template", "{nothing}"], "no column 'nothing'"),
        ([], "'id' is missing"),
    ],
)
def test_own_data_is_refused(cli, tmp_path, options: list[str], message: str) -> None:
    status, _, err = cli("data", _made(tmp_path / "own.csv", OWN), *options, "--out", tmp_path / "pool.jsonl")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "pool.jsonl").exists()


def test_rows_of_other_weights_at_a_step_are_said(cli, tmp_path, model_folder, rollout_files, accepted) -> None:
    def collected(name: str, model: Path, *options: object) -> str:
        status, _, err = cli("collect", tmp_path / "st", name, rollout_files["pool"], "--model", model, *options)
        assert status == 0, err
        return err

    collected("pool", model_folder, *accepted)
    assert "other weights" not in collected("again", model_folder)
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert "the rows of step 0 were made with other weights" in collected("moved", other)
    assert "other weights" not in collected("moved", other, "--step", 1)


def test_a_model_that_is_nowhere(monkeypatch) -> None:
    """The hub is asked once, not for a minute."""
    asked = []

    def unreachable(self: Any, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for load in (load_tokenizer, load_model):
        with pytest.raises(RequestError, match="no such folder and no model of this name in the cache; the hub cannot"):
            load("nobody/has-this")
    with pytest.raises(RequestError, match="no name of a model"):
        load_tokenizer("not a name!")
    assert {name for name, _ in asked} <= {"nobody/has-this", "not a name!"}
    assert len(asked) <= 3


def test_without_a_network(cli, monkeypatch, tmp_path, write_lines) -> None:
    """A hub model that is not here: one line, after a question or two and no wait between them. No name resolves."""
    tried: list[Any] = []

    def no_network(*asked: Any, **_: Any) -> None:
        tried.append(asked)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("time.sleep", lambda seconds: tried.append(seconds))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    problems = write_lines(tmp_path / "pool.jsonl", ROWS)
    line = ["rollout", problems, "--reward", "math", "--out", tmp_path / "r.jsonl", "--quiet", "--as-text"]
    status, _, err = cli(*line, "--model", "nobody/has-this-model")
    assert status == 2
    assert err.count("\n") == 1
    assert "nobody/has-this-model: there is no such folder" in err
    assert "the hub cannot be asked" in err
    assert len(tried) <= 4
    assert not (tmp_path / "r.jsonl").exists()


def test_plain_prompts_of_a_chat_model(cli, write_lines, tmp_path, model_folder) -> None:
    """Sampled as they stand, they are other tokens than those that training has: it is said, unless it was decided."""
    problems = write_lines(tmp_path / "pool.jsonl", [{"id": "a", "prompt": "1+1=", "ground_truth": "2"}])
    sizes = ["--reward", "math", "--max-new-tokens", 2, "-n", 2]
    for number, (decided, warned) in enumerate([([], True), (["--as-chat"], False), (["--as-text"], False)]):
        out = tmp_path / f"{number}.jsonl"
        status, _, err = cli("rollout", problems, "--model", model_folder, *sizes, *decided, "--out", out)
        assert status == 0, err
        assert ("1 of 1 prompts are plain text" in err) == warned


@pytest.mark.parametrize("on_path", [False, True])
def test_a_hint_can_be_pasted(monkeypatch, tmp_path, on_path: bool) -> None:
    """The program by its path where a shell does not find its name."""
    program = tmp_path / "gradstore"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path) if on_path else "/nowhere")
    assert started_as() == ("gradstore" if on_path else str(program))


def test_signatures_in_the_docs() -> None:
    """`read_rollouts` as docs/rollouts.md prints it, with its defaults."""
    text = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8")
    printed = re.search(r"source = read_rollouts\((.*?)\)", text, re.DOTALL)
    assert printed is not None
    told = [str(one).split(":")[0] for one in inspect.signature(read_rollouts).parameters.values()]
    defaults = inspect.signature(read_rollouts).parameters
    names = [re.split(r"[=*]", one.strip())[0] for one in printed[1].split(",") if one.strip() != "*"]
    assert names == told
    assert ("*" in printed[1]) == any(one.kind is one.KEYWORD_ONLY for one in defaults.values())
    for one in printed[1].split(","):
        name, equals, value = one.strip().partition("=")
        assert not equals or eval(value) == defaults[name].default


def test_a_plain_installation_has_no_torch() -> None:
    """Without extras nothing pulls torch, whose default build brings CUDA; the extras are those that README names."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, readme = about["optional-dependencies"], (ROOT / "README.md").read_text(encoding="utf-8")
    assert not any("torch" in one or "transformers" in one for one in [*about["dependencies"], *extras["cpu"]])
    named = {name for line in re.findall(r"^\| (`[^|]+) \|", readme, re.M) for name in re.findall(r"`([a-z]+)`", line)}
    assert set(extras) - {"dev", "models", "report"} <= named
    assert extras["models"] == ["gradstore[sketch]"]
    assert extras["report"] == ["gradstore[plots]"]
