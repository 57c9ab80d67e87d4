"""The command line's help, completion and interruption: shown at once, about what there is, and in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from gradstore.cli import app, query, stores
from gradstore.cli.help import Command

RUN = "import sys; sys.argv[0] = 'gradstore'; from gradstore.cli import main; main()"


def commands() -> dict[str, Command]:
    """Every command of ours by its name, those of groups too."""
    from gradstore.cli import main  # noqa: F401

    found: dict[str, Command] = {}
    group = typer.main.get_command(app.application([]))
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found |= getattr(command, "commands", {name: command})
    return found


@pytest.fixture(autouse=True)
def registered(cli) -> None:
    """All commands are there after a first request."""
    cli("--help")


def test_panels_name_parameters_that_exist() -> None:
    """A misspelled one would leave its option under another heading without a word."""
    for name, command in commands().items():
        known = {param.name for param in command.params} | {"help", "json", "csv"}
        listed = [one for names in command.panels.values() for one in names.split()]
        assert set(listed) <= known, name
        assert len(listed) == len(set(listed)), name
        assert command.example.startswith("gradstore "), name


def test_needs_name_parameters_that_exist(cli, tmp_path: Path) -> None:
    """An option that has no meaning beside the others is refused, whatever else is wrong."""
    status, _, err = cli("query", tmp_path, "--against", "b", "--damping", "0.2")
    assert (status, "--metric fisher" in err) == (2, True)
    status, _, err = cli("collect", tmp_path, "b", tmp_path, "--model", "m", "--bias-correction")
    assert (status, "--optimizer" in err) == (2, True)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_every_help_fits_the_terminal(cli, monkeypatch, width: int) -> None:
    """Every option is there with its default; no line but the example, to be copied, is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    for name in app.COMMANDS:
        status, out, _ = cli(name, "--help")
        assert status == 0
        assert "Usage" in out
        lines = [line for line in out.splitlines() if "Example:" not in line]
        assert all(len(line) <= width or " " not in line.strip() for line in lines), name
    assert "[default: 20]" in cli("query", "--help")[1]
    assert "--damping" in cli("query", "-h")[1]
    assert cli("qurey", "--help")[0] == 2


HEAVY = ("numpy", "torch", "zarr", "pyarrow", "rich", "pydantic")
UNNEEDED = ("torch", "transformers", "zarr", "pandas", "pyarrow.compute", "scipy", "sklearn", "asyncio", "faiss")
"""What a query does without. pyarrow loads pandas with the first `pyarrow.array`, `Schema.empty_table` or `take`."""
TRAIN = "train --model ./nowhere --pool {store} --benchmark b={store} --out x ratio=0.1 rounds=1 train_batch=1 steps=1"
"""The model is not there, which is said before a model's libraries are imported."""


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        ("--help", HEAVY),
        ("train --help", HEAVY),
        ("query {store} --against bench --topp 3", set(HEAVY) - {"pydantic"}),  # typer checks values by pydantic
        ("query {store} --against bench --pool pool", UNNEEDED),
        ("query {store} --against bench --pool pool --json", (*UNNEEDED, "rich")),
        ("query {store} --against bench --pool pool --metric dot --at 0", UNNEEDED),
        ("info {store}", UNNEEDED),
        ("rollout pool.jsonl --model ./nowhere --reward math --out x.jsonl", ("torch", "transformers")),
        ("collect {store} pool --model ./nowhere", ("torch", "transformers")),
        (TRAIN, ("torch", "transformers")),
        (f"{TRAIN} embeddings=true", ("torch", "transformers")),
    ],
)
def test_nothing_is_loaded_that_an_answer_does_without(small_store, tmp_path: Path, words: str, unneeded) -> None:
    """The command line answers at once because of this: `python -m benchmarks.start_up` measures it."""
    code = f"try:\n    exec({RUN!r})\nexcept SystemExit:\n    pass\nimport sys; print(sorted(sys.modules))"
    line = words.format(store=small_store(tmp_path / "store")).split()
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1]
    assert [name for name in unneeded if f"'{name}'" in loaded] == []


def test_help_into_a_pipe_that_closes() -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m gradstore train --help | true'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("gradstore query {store} --against b", ["bench"]),
        ("gradstore query {store} --against bench --pool p", ["pool"]),
        ("gradstore collect {store} p", ["pool"]),
        ("gradstore query {store}/nothing --against b", []),
        ("gradstore query --against b", []),
        ("gradstore compact {store} --collection be", ["bench"]),
    ],
)
def test_collections_complete(small_store, tmp_path: Path, line: str, names: list[str]) -> None:
    """Names of the store on the line; nothing, and no message, where there is none."""
    text = line.format(store=small_store(tmp_path / "store"))
    environment = {
        **os.environ,
        "_GRADSTORE_COMPLETE": "complete_bash",
        "COMP_WORDS": text,
        "COMP_CWORD": str(len(text.split()) - 1),
    }
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == names
    assert done.stderr == ""


def test_ctrl_c_says_what_is_kept(cli, small_store, tmp_path: Path, monkeypatch) -> None:
    """typer would end without a word."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradstore.open", interrupted)
    status, _, err = cli("info", small_store(tmp_path / "store"))
    assert status == 130
    assert err == "gradstore: interrupted; what was published is kept, the same command goes on from there\n"


def test_files_are_replaced_only_with_overwrite(cli, store: Path, tmp_path: Path) -> None:
    """Each command that writes a file of the user's refuses one that is there, and replaces it when told to."""
    (tmp_path / "own.csv").write_text("question,answer\n1+1?,2\n", encoding="utf-8")
    out = tmp_path / "picked"
    requests = {
        tmp_path / "p.jsonl": ("data", tmp_path / "own.csv", "--prompt", "question", "--truth", "answer", "--out"),
        tmp_path / "r.html": ("report", store, "--out"),
        out / "train.jsonl": ("select", store, "--against", "bench", "-n", 2, "--out"),
    }
    for path, words in requests.items():
        target = out if path.parent == out else path
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine\n", encoding="utf-8")
        status, _, err = cli(*words, target)
        assert (status, err.count("\n")) == (2, 1), err
        assert f"{path}: already there" in err
        assert "--overwrite" in err
        assert path.read_text(encoding="utf-8") == "mine\n"
        status, _, err = cli(*words, target, "--overwrite")
        assert status == 0, err
        assert path.read_text(encoding="utf-8") != "mine\n"
    assert sorted(path.name for path in out.iterdir()) == ["selection.json", "train.jsonl", "train.parquet"]


def test_weights_of_a_mixture_that_do_not_sum_are_said(cli, store: Path, tmp_path: Path) -> None:
    asked = ("select", store, "--against", "bench", "-n", 2, "--selector", "cosine:3+rand:1", "--out", tmp_path / "m")
    status, _, err = cli(*asked)
    assert status == 0
    assert "do not sum to 1: taken as cosine:0.75+rand:0.25" in err


def test_commands_are_registered_once() -> None:
    """Importing a command's file twice under two names would list it twice."""
    app.application([])
    names = [one.name or getattr(one.callback, "__name__", "") for one in app.app.registered_commands]
    assert len(names) == len(set(names))
    assert query.query in (getattr(one.callback, "__wrapped__", None) for one in app.app.registered_commands)
    assert stores.info in (getattr(one.callback, "__wrapped__", None) for one in app.app.registered_commands)
