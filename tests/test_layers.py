"""Imports go one way, and light things stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "gradstore": {"gradstore"},
    "engine": {"gradstore", "engine"},
    "analysis": {"gradstore", "engine", "analysis"},
    "trainer": {"gradstore", "engine", "trainer"},
}
ON_TOP = ("gradstore/cli/", "gradstore/__main__.py", "trainer/demo/")
"""The command line and the demo sit on top of every package."""


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    """gradstore <- engine <- trainer, analysis; the store never imports torch."""
    forbidden = {"torch", "transformers", "faiss"} if package == "gradstore" else set()
    for path in (ROOT / package).rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(ON_TOP):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                assert top not in ALLOWED or top in ALLOWED[package], f"{name} imports {module}"
                assert top not in forbidden, f"{name} imports {module}"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import gradstore", ["torch", "zarr", "pyarrow", "numpy"]),
        ("import gradstore.cli, gradstore.cli.rank, gradstore.cli.make, gradstore.cli.inspect", ["torch", "pyarrow"]),
        ("import gradstore; gradstore.Store", ["torch"]),
        (
            "import engine; engine.search, engine.select, engine.index_for, engine.ProbeBatch, engine.History",
            ["torch", "transformers"],
        ),
    ],
)
def test_light_imports(code: str, absent: list[str]) -> None:
    """Waiting two seconds for torch to print a help text drives people away."""
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
