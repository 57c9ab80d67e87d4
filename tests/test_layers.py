"""Imports go one way, and light things stay light."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

from tests.layers import FOLDERS, ROOT, circle, files, graph, imported, rooms

ALLOWED = {
    "gradstore.engine": {"gradstore", "gradstore.engine"},
    "gradstore.analysis": {"gradstore", "gradstore.engine"},
    "gradstore.trainer": {"gradstore", "gradstore.engine", "gradstore.trainer"},
    "gradstore.demo": {"gradstore", "gradstore.engine", "gradstore.analysis", "gradstore.trainer", "gradstore.cli"},
    "gradstore": set(),
}
"""Room, or package of rooms -> packages it may import from; the command line sits on top of all."""


def package(room: str) -> str:
    """The package of a room."""
    return ".".join(room.split(".")[:2])


def test_no_circles() -> None:
    """A newcomer can read any file after those it imports, and any room after the rooms below it."""
    edges = graph(files())
    assert len(edges) > 200
    assert circle(edges) == []
    assert circle(rooms(edges)) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert circle({"a": {"b"}, "b": set()}) == []


def test_imports_go_one_way() -> None:
    """gradstore <- engine <- trainer, analysis <- demo, cli; the store never imports torch."""
    between = rooms(graph(files()))
    assert {package(room) for room in between} == {*ALLOWED, "gradstore.cli"}
    for room, wanted in between.items():
        if room != "gradstore.cli":
            beyond = {package(other) for other in wanted} - ALLOWED[package(room)]
            assert not beyond, f"{room} imports from {beyond}"
    for name, path in files().items():
        tops = {(one.split(".")[0], line) for one, line in imported(path)}
        if name.count(".") < 2 and package(name) not in {f"gradstore.{folder}" for folder in FOLDERS}:
            heavy = {top for top, _ in tops} & {"torch", "transformers", "faiss"}
            assert not heavy, f"{path} imports {heavy}"


def test_bare_names_are_not_imported() -> None:
    """`engine` or `trainer` may be another's package: ours are inside gradstore."""
    outside = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in [*files().values(), *outside]:
        bare = {(one, line) for one, line in imported(path) if one.split(".")[0] in FOLDERS[1:]}
        assert not bare, f"{path} imports {bare}"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import gradstore", ["torch", "zarr", "pyarrow", "numpy"]),
        (
            "from gradstore.cli import query, rollout, stores",
            ["torch", "pyarrow"],
        ),
        ("import gradstore; gradstore.Store", ["torch"]),
        (
            "from gradstore import engine; "
            "engine.search, engine.select, engine.index_for, engine.ProbeBatch, engine.History",
            ["torch", "transformers"],
        ),
    ],
)
def test_light_imports(code: str, absent: list[str]) -> None:
    """Waiting two seconds for torch to print a help text drives people away."""
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["gradstore", "gradstore.engine", "gradstore.trainer"])
def test_public_names_are_no_modules(package: str) -> None:
    """Importing a module puts it where a public name of the same spelling belongs."""
    loaded = importlib.import_module(package)
    inside = {name.removeprefix(f"{package}.").split(".")[0] for name in files() if name.startswith(f"{package}.")}
    folders = {*FOLDERS[1:]} if package == "gradstore" else set()
    assert not (set(loaded.__all__) - folders) & inside
    assert set(loaded.__all__) <= set(dir(loaded))
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


@pytest.mark.parametrize("package", ["gradstore", "gradstore.engine", "gradstore.trainer", "gradstore.analysis"])
def test_names_complete(package: str) -> None:
    """A notebook completes from `dir`, and everyone asks a package for its version."""
    code = f"import {package} as loaded; print(loaded.__version__, *dir(loaded))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    version, *names = done.stdout.split()
    loaded = importlib.import_module(package)
    assert version == importlib.metadata.version("gradstore")
    assert {*loaded.__all__, "__version__"} <= set(names)
    assert all(getattr(loaded, name) is not None for name in names)
