"""The package of docs/selectors.md, installed for real: its selector has a name everywhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gradstore.engine import Selector, select, target
from gradstore.engine.selecting import registry
from gradstore.engine.selecting.registry import Registry
from gradstore.engine.selecting.selectors import ALIASES, GROUP, SELECTORS
from gradstore.errors import RequestError

PAGE = Path(__file__).parents[2] / "docs" / "selectors.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder into which pip installed the files as the page shows them; nothing is downloaded."""
    files = dict(re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert set(files) == {"pyproject.toml", "gradstore_frontier.py"}
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in files.items():
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def gradstore(folder: Path | None, *arguments: object) -> subprocess.CompletedProcess:
    path = {} if folder is None else {"PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "gradstore", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=PAGE.parents[1],
        env={**os.environ, **path},
    )


def test_the_page_is_short() -> None:
    """Twenty lines or so is what writing a selector should cost."""
    code = re.search(r"```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(code[1].splitlines()) <= 20


def test_select_by_name_on_the_command_line(make_store, installed, tmp_path) -> None:
    """By name, and in a mixture; its rollouts are in the record; without the package the name is unknown."""
    store = make_store()
    arguments = ("select", store.path, "--against", "bench", "--pool", "pool", "-n", 8, "--json")
    done = gradstore(installed, *arguments, "--selector", "frontier", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    view = store.view("pool")
    rates = dict(zip(view.ids, view.pass_rates, strict=True))
    every = select(store, "pool", target(store, "bench"), 60, allow_fewer=True)
    assert [p["id"] for p in record["problems"]] == [i for i in every.ids if rates[i] <= 0.5][:8]
    assert all(p["rollouts"] == (32 if rates[p["id"]] < 0.25 else 16) for p in record["problems"])
    done = gradstore(installed, *arguments, "--selector", "frontier:0.75+rand:0.25", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert [p["picked_by"] for p in json.loads(done.stdout)["problems"]] == ["frontier"] * 6 + ["rand"] * 2
    listed = json.loads(gradstore(installed, "selectors", "--json").stdout)
    assert listed[-1]["name"] == "frontier"
    done = gradstore(None, *arguments, "--selector", "frontier", "--out", tmp_path / "c")
    assert done.returncode == 2
    assert "selector 'frontier' is not one of cosine, dot" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


class Entry:
    """An entry point that loads what it is given."""

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.value, self._loaded = name, "package:thing", loaded

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


MINE = Selector("mine", lambda c: np.ones(len(c)), "1")


@pytest.mark.parametrize(
    ("name", "loaded", "message"),
    [
        ("cosine", MINE, "'cosine' of package:thing is already registered"),
        ("sim", MINE, "'sim' of package:thing is already registered"),
        ("a+b", MINE, "are for mixtures"),
        ("mine", ImportError("No module named 'x'"), "package:thing cannot be imported: No module named 'x'"),
        ("mine", print, "expected an engine.Selector"),
        ("other", MINE, "calls itself 'mine'"),
    ],
)
def test_wrong_registrations(monkeypatch, name: str, loaded: object, message: str) -> None:
    """The package at fault is named; built-in selectors work all the same."""
    built_in = list(SELECTORS.values())
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(name, loaded)])
    found = Registry(Selector, built_in, kind="selector", group=GROUP, aliases=ALIASES, forbidden="+:")
    with pytest.raises(RequestError, match=re.escape(message)):
        dict(found)
    assert found["sim"].name == "cosine"
