"""What is installed: each module once, inside one package, whole beside whatever else carries the folders' names."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layers import ROOT, files

pytestmark = pytest.mark.slow
LEFT_OUT = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "tests", "docs")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Our source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=LEFT_OUT)
    build = "from setuptools import build_meta; import sys; build_meta.{}(sys.argv[1])"
    run([sys.executable, "-c", build.format("build_sdist"), str(folder)], tree)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as packed:
        packed.extractall(folder / "source", filter="data")
    (unpacked,) = (folder / "source").iterdir()
    run([sys.executable, "-c", build.format("build_wheel"), str(folder)], unpacked)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_each_module_once(built: tuple[Path, Path]) -> None:
    source, wheel = built
    expected = list(files())
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gradstore"}
    python = [name.removesuffix(".py") for name in names if name.endswith(".py")]
    modules = [name.removesuffix("/__init__").replace("/", ".") for name in python]
    assert sorted(modules) == sorted(expected)
    assert {"gradstore/py.typed", "gradstore/__init__.pyi", "gradstore/engine/__init__.pyi"} <= set(names)
    assert any(name.startswith("gradstore/demo/model/") for name in names)
    for kernel in ("_products", "_moment"):
        assert any(name.startswith(f"gradstore/engine/searching/{kernel}.") and name.endswith(".so") for name in names)
    with tarfile.open(source) as packed:
        members = [name.partition("/")[2] for name in packed.getnames()]
    assert len(members) == len(set(members))
    assert not [name for name in members if name.split("/")[0] in ("engine", "trainer", "analysis", "cli", "demo")]


def test_beside_others_of_the_same_names(
    built: tuple[Path, Path], tmp_path: Path, small_store: Callable[[Path], Path]
) -> None:
    """Another distribution's `trainer`, a user's folder `engine` and script `analysis.py`, and PYTHONPATH=."""
    _, wheel = built
    environment = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], tmp_path)
    python = str(environment / "bin" / "python")
    (site,) = (environment / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check"]
    other = tmp_path / "trainer-9.9-py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as packed:
        for name in ("trainer/__init__.py", "trainer/io.py"):
            packed.writestr(name, "raise ImportError('this is another package')\n")
        packed.writestr("trainer-9.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: trainer\nVersion: 9.9\n")
        packed.writestr("trainer-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr("trainer-9.9.dist-info/RECORD", "".join(f"{name},,\n" for name in packed.namelist()))
    run([*pip, "install", "--no-deps", str(wheel), str(other)], tmp_path)
    user = tmp_path / "user"
    (user / "engine").mkdir(parents=True)
    for name in ("engine/__init__.py", "analysis.py", "demo.py", "cli.py"):
        (user / name).write_text("raise ImportError('this is the user\\'s own')\n")
    small_store(user / "store")
    command = [str(environment / "bin" / "gradstore")]
    for out in ("with", "without"):
        where = run([python, "-c", "import gradstore.trainer as t; print(t.__file__)"], user, PYTHONPATH=".")
        assert where.startswith(str(site))
        assert "select" in run([*command, "--help"], user, PYTHONPATH=".")
        assert "p3" in run([*command, "query", "store", "--pool", "pool", "--against", "bench"], user, PYTHONPATH=".")
        for words in (
            ["verify", "store"],
            ["info", "store"],
            ["selectors"],
            ["report", "store", "--out", f"{out}.html"],
        ):
            run([*command, *words], user, PYTHONPATH=".")
        code = "from gradstore import engine; import gradstore; engine.SketchSpec(), gradstore.Sketcher"
        run([python, "-c", code], user, PYTHONPATH=".")
        run([python, "-m", "gradstore", "data", "reasoning-gym:gcd:3", "--out", f"{out}.jsonl"], user, PYTHONPATH=".")
        if (site / "trainer").exists():
            run([*pip, "uninstall", "--yes", "trainer"], tmp_path)
    assert not (site / "trainer").exists()
