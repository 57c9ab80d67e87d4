"""What the commands print and write: whole, whatever the terminal's encoding and however full the disk."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import gradstore
from gradstore import GradstoreError, RequestError
from gradstore.durable import whole_file, write_text_file


def _run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gradstore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment})


ACCENTED = "é-∂-😀"


@pytest.fixture
def accented(store: Path, tmp_path: Path, cli, model_folder: Path, write_lines: Callable) -> Path:
    """A store whose pool has ids and prompts beyond ASCII and Latin-1."""
    rows = [
        {"problem_id": f"{ACCENTED}{i}", "prompt": f"{ACCENTED} {i}=", "response": str(j), "reward": float(j)}
        for i in range(3)
        for j in range(2)
    ]
    path = write_lines(tmp_path / "accented.jsonl", rows)
    status, _, err = cli("collect", store, "other", path, "--model", model_folder, "--rank", 4)
    assert status == 0, err
    return store


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-8"])
def test_output_of_any_encoding(accented: Path, encoding: str) -> None:
    """Characters the terminal lacks are escaped; a JSON document is whole and says the same."""
    for command in (("query", "--against", "bench", "--pool", "other"), ("info",), ("verify",)):
        for json_wanted in (False, True):
            arguments = [command[0], accented, *command[1:], *(["--json"] if json_wanted else [])]
            done = _run(*arguments, PYTHONIOENCODING=encoding)
            assert done.returncode == 0, done.stderr
            assert b"Traceback" not in done.stderr
            text = done.stdout.decode(encoding.partition(":")[0])
            if json_wanted:
                found = json.loads(text)
                if command[0] == "query":
                    assert {hit["id"] for hit in found["hits"]} == {f"{ACCENTED}{i}" for i in range(3)}
            elif command[0] == "query":
                shown = ACCENTED.encode(encoding.partition(":")[0], "backslashreplace").decode(
                    encoding.partition(":")[0]
                )
                assert shown in text


def test_errors_of_any_encoding(accented: Path) -> None:
    """A message names what was given, also a path that is no UTF-8."""
    for name in (f"{ACCENTED}", os.fsdecode(b"\xff")):
        done = _run("query", accented, "--against", "bench", "--pool", name, PYTHONIOENCODING="ascii:strict")
        assert done.returncode == 2, done.stderr
        assert done.stderr.count(b"\n") == 1
        assert done.stderr.startswith(b"gradstore: ")


def test_files_are_utf_8_in_any_locale(accented: Path, tmp_path: Path) -> None:
    """In a C locale without Python's UTF-8 mode `open` writes ASCII: the files must not depend on that."""
    bare = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    chosen = tmp_path / "chosen"
    asked = ("-n", 2, "--against", "bench", "--pool", "other", "--out", chosen)
    done = _run("select", accented, *asked, **bare)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (chosen / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["extra_info"]["index"].startswith(ACCENTED) for row in rows)
    done = _run("data", chosen / "train.jsonl", "--out", tmp_path / "again.jsonl", **bare)
    assert done.returncode == 0, done.stderr
    assert {row["id"] for row in gradstore.read_problems(tmp_path / "again.jsonl")} == {
        row["extra_info"]["index"] for row in rows
    }


@contextmanager
def _full_after(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: what a full disk does, without a disk of one's own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["report.html", "report.md", "figures", "data.jsonl", "data.parquet", "select"])
def test_a_full_disk_leaves_no_cut_file(cli, store: Path, tmp_path: Path, write_lines: Callable, name: str) -> None:
    """A page that is half there under its final name would be opened as if it were whole."""
    folder = tmp_path / "out"
    folder.mkdir()
    problems = write_lines(
        tmp_path / "problems.jsonl",
        [{"id": f"p{i}", "prompt": f"{i} " + "x" * 90, "ground_truth": "1"} for i in range(99)],
    )
    commands = {
        "report.html": ("report", store, "--out", folder / "report.html"),
        "report.md": ("report", store, "--format", "md", "--out", folder / "report.md"),
        "figures": ("report", store, "--out", tmp_path / "r.html", "--figures", folder),
        "data.jsonl": ("data", problems, "--out", folder / "data.jsonl"),
        "data.parquet": ("data", problems, "--out", folder / "data.parquet"),
        "select": ("select", store, "-n", 3, "--against", "bench", "--pool", "pool", "--out", folder),
    }
    if name in ("report.html", "figures"):
        pytest.importorskip("plotly")
    with _full_after(500):
        status, _, err = cli(*commands[name])
    assert status == 1, err
    assert str(folder) in err
    assert err.count("\n") == 1
    assert ".tmp-" not in err
    assert list(folder.iterdir()) == []
    status, _, err = cli(*commands[name])
    assert status == 0, err


def test_whole_file(tmp_path: Path) -> None:
    """What was there stays until the new content is whole; links lead to their file; a device is written in place."""
    path = tmp_path / "page"
    write_text_file(path, "old")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ZeroDivisionError), whole_file(path) as unfinished:
        unfinished.write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "old"
    write_text_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert path.read_text(encoding="utf-8") == "new"
    write_text_file(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "page"]
    with pytest.raises(RequestError, match="is a folder"):
        write_text_file(tmp_path, "x")
    with pytest.raises(RequestError, match=r"the folder .*/none does not exist"):
        write_text_file(tmp_path / "none" / "page", "x")
    with _full_after(10), pytest.raises(GradstoreError, match=f"{path}: "):
        write_text_file(path, "x" * 100)
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_and_verbose(store: Path, model_folder: Path, tmp_path: Path, cli, write_lines, quiet: bool) -> None:
    """Commentary goes with --quiet, warnings and results stay; --verbose and the default show it."""
    rows = [
        {"problem_id": f"x{i}", "prompt": f"{i}=", "response": str(j), "reward": float(j)}
        for i in range(3)
        for j in range(2)
    ]
    path = write_lines(tmp_path / "x.jsonl", rows)
    words = ("collect", store, "x", path, "--model", model_folder, "--rank", 4)
    status, _, err = cli(*words, "-q" if quiet else "-v")
    assert status == 0
    assert ("problems collected" in err) != quiet
    status, out, err = cli("query", store, "--pool", "x", "--against", "bench", "-q", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)
