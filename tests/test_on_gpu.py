"""benchmarks/on_gpu.sh without a GPU: what it would run exists, and a failure does not get lost."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "on_gpu.sh"


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_a_dry_run_prints_commands_that_exist() -> None:
    """The machine is paid for by the minute: a benchmark that was renamed must be noticed here."""
    printed = run(SCRIPT, "--dry-run", "some wheels")
    assert printed.returncode == 0, printed.stderr
    modules = re.findall(r"-m (benchmarks\.\w+)", printed.stdout)
    assert {"benchmarks.sketch", "benchmarks.fidelity", "benchmarks.overhead", "benchmarks.indexes"} <= set(modules)
    assert all(importlib.util.find_spec(module) for module in modules)
    assert sum(map(int, re.findall(r"^timeout (\d+)", printed.stdout, re.MULTILINE))) <= 20 * 60


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    """A folder without wheels would fail at the last minute instead of the first."""
    assert run(SCRIPT).returncode == 2
    refused = run(SCRIPT, str(tmp_path))
    assert refused.returncode == 2
    assert "no wheels" in refused.stderr


def test_every_step_is_run_and_a_failure_shows(tmp_path: Path) -> None:
    """One step that fails must not take the others' figures with it, nor be reported as success."""
    script, wheels = tmp_path / "benchmarks" / "on_gpu.sh", tmp_path / "wheels"
    for folder in (script.parent, wheels):
        folder.mkdir()
    shutil.copy(SCRIPT, script)
    (wheels / "x.whl").touch()
    found = run(script, str(wheels), PYTHON="false")  # no environment: nothing can be run in it
    assert found.returncode == 1
    *_, table = found.stdout.split("step  ")
    assert [line.split()[0] for line in table.splitlines()[1:]][:3] == ["environment", "install", "install-this"]
    assert len(table.splitlines()) == 1 + run(SCRIPT, "--dry-run", "w").stdout.count("timeout ")
    assert all(line.split()[2] != "0" for line in table.splitlines()[1:])
