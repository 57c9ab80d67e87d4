"""Stores in a dataset repository, against a fake of the hub in memory: commits with a parent, files of one commit.

The fake checks the arguments against the signatures of the installed huggingface_hub. The hub itself is not asked.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

import gradstore
from gradstore import GradstoreError
from gradstore.travel import places, pushing

URL = "hf://datasets/someone/rows/pool.gs"
REAL = {name: getattr(huggingface_hub, name) for name in ("HfApi", "HfFileSystem")}


class _RefusedError(Exception):
    response = SimpleNamespace(status_code=412)


class Hub:
    """A repository as the hub shows it; it stands for `HfApi()` and for `HfFileSystem()`."""

    def __init__(self) -> None:
        self.commits: list[dict[str, bytes]] = [{"README.md": b"of another"}]
        self.before_commit: Callable[[], None] = lambda: None

    def create_commit(self, *arguments: Any, **named: Any) -> Any:
        asked = inspect.signature(REAL["HfApi"].create_commit).bind(None, *arguments, **named).arguments
        assert (asked["repo_id"], asked["repo_type"]) == ("someone/rows", "dataset")
        self.before_commit()
        if asked["parent_commit"] != f"c{len(self.commits) - 1}":
            raise _RefusedError
        files = dict(self.commits[-1])
        for operation in asked["operations"]:
            if isinstance(operation, CommitOperationAdd):
                assert isinstance(operation.path_or_fileobj, bytes)
                files[operation.path_in_repo] = operation.path_or_fileobj
            else:
                assert isinstance(operation, CommitOperationDelete)
                del files[operation.path_in_repo]
        self.commits.append(files)
        return SimpleNamespace(oid=f"c{len(self.commits) - 1}")

    def repo_info(self, *arguments: Any, **named: Any) -> Any:
        inspect.signature(REAL["HfApi"].repo_info).bind(None, *arguments, **named)
        siblings = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in self.commits[-1].items()]
        return SimpleNamespace(sha=f"c{len(self.commits) - 1}", siblings=siblings)

    def cat_file(self, *arguments: Any, **named: Any) -> bytes:
        asked = inspect.signature(REAL["HfFileSystem"].cat_file).bind(None, *arguments, **named).arguments
        repository, _, rest = asked["path"].partition("@")
        assert repository == "datasets/someone/rows"
        commit, _, name = rest.partition("/")
        files = self.commits[int(commit[1:])]
        if name not in files:
            raise FileNotFoundError(name)
        return files[name][asked["start"] : asked["end"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    one = Hub()
    for name in REAL:
        monkeypatch.setattr(huggingface_hub, name, lambda: one)
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    return one


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pulled_store_is_the_pushed_one(hub: Hub, new_store: Callable, tools: dict, tmp_path: Path) -> None:
    store = new_store(n=20)
    for change in (
        lambda: tools["append"](store, 0, list(range(20))),
        lambda: tools["append"](store, 1, [3, 4]),
        lambda: store.compact("pool", keep="newest"),
    ):
        change()
        gradstore.push(store.path, URL)
        copy = gradstore.pull(URL, tmp_path / "copy")
        assert _files(copy.path) == _files(store.path)
        del copy
    view, own = gradstore.open(URL).view("pool"), store.view("pool")
    np.testing.assert_array_equal(view.rows(np.arange(20)), own.rows(np.arange(20)))
    n_commits = len(hub.commits)
    assert not gradstore.push(store.path, URL).changed
    assert len(hub.commits) == n_commits
    assert hub.commits[-1]["README.md"] == b"of another"


def test_no_state_before_its_objects(
    hub: Hub, new_store: Callable, tools: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push in several commits, stopped after any of them: readers see the old rows; the next push completes."""
    monkeypatch.setattr(places, "_COMMIT_BYTES", 2000)
    store = new_store(n=20)
    tools["append"](store, 0, list(range(12)))
    gradstore.push(store.path, URL)
    before = _files(gradstore.pull(URL, tmp_path / "before").path)
    tools["append"](store, 1, list(range(12)))
    left = 2

    def stop() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError("the line is dead")

    hub.before_commit = stop
    with pytest.raises(GradstoreError, match=r"cannot be written \(the line is dead\)"):
        gradstore.push(store.path, URL)
    assert _files(gradstore.pull(URL, tmp_path / "now").path) == before
    hub.before_commit = lambda: None
    gradstore.push(store.path, URL)
    assert _files(gradstore.pull(URL, tmp_path / "now").path) == _files(store.path)


def test_of_two_pushes_at_once_one_is_refused(hub: Hub, new_store: Callable, tools: dict) -> None:
    store = new_store(n=20)
    tools["append"](store, 0, list(range(12)))
    gradstore.push(store.path, URL)
    tools["append"](store, 1, [1])

    def other() -> None:
        hub.before_commit = lambda: None
        hub.commits.append(dict(hub.commits[-1], other=b"1"))

    hub.before_commit = other
    with pytest.raises(GradstoreError, match="another push changed it"):
        gradstore.push(store.path, URL)
    assert gradstore.push(store.path, URL).changed


def test_old_objects_are_removed(hub: Hub, new_store: Callable, tools: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest commit forgets them; past commits keep them."""
    monkeypatch.setattr(pushing, "GRACE", 0)
    store = new_store(n=20)
    for step in range(4):
        tools["append"](store, step, list(range(12)))
        gradstore.push(store.path, URL)
    assert len([name for name in hub.commits[-1] if "manifest." in name]) <= 2
    assert any(len([name for name in files if "manifest." in name]) for files in hub.commits)
