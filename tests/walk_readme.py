"""Walk README's own-data story: from a bare wheel in an empty environment to an answer, on a CSV of 50 own problems.

    python -m tests.walk_readme [--keep FOLDER]

Builds the wheel, makes an environment with nothing but pip, writes two CSV files of sums, and runs each line of
README's block as it is printed, in a terminal of 80 columns, with the demo's model as $MODEL. Prints what a user would
see, then seconds and keystrokes of each line. Exit status 1 for a line that fails, prints a traceback, or is wider than
the terminal. It needs a package index and some minutes, so it is no part of `make test`.
"""

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.layers import ROOT

HEADING = "**Your own problems, from two CSV files to an answer.**"
WIDTH = 80


def main() -> int:
    """Run the walk; returns the exit status."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", type=Path, help="Folder to work in, which stays.")
    kept = arguments.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return walk(folder)


def walk(folder: Path) -> int:
    """Walk in an empty folder."""
    _build(folder / "wheels")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "environment")], check=True)
    work = folder / "work"
    work.mkdir()
    _write_sums(work / "own.csv", 50, 0)
    _write_sums(work / "exam.csv", 20, 1)
    # pip asks nothing of PyPI that it does not have: the package is not published yet.
    links = f"{folder / 'wheels'} {os.environ.get('PIP_FIND_LINKS', '')}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    environment |= {
        "PATH": f"{folder / 'environment' / 'bin'}:{os.environ['PATH']}",
        "MODEL": str(ROOT / "demo" / "model"),
        "PIP_FIND_LINKS": links.strip(),
        "COLUMNS": str(WIDTH),
        "TERM": "xterm",
    }
    rows, failed = [], 0
    for line in story():
        print(f"\n$ {line}", flush=True)
        started = time.perf_counter()
        status, text = _in_terminal(line, work, environment)
        seconds = time.perf_counter() - started
        wide = [one for one in plain(text).splitlines() if len(one) > WIDTH and not line.startswith("pip")]
        wrong = bool(status) or "Traceback" in text or any(one.startswith(("rank", " ")) for one in wide)
        failed += wrong
        print(plain(text) if not line.startswith("pip") else f"[{len(text.splitlines())} lines]", flush=True)
        rows.append((seconds, len(line), status, "WRONG" if wrong else ""))
    print("\nseconds  keys  status")
    for seconds, keys, status, mark in rows:
        print(f"{seconds:7.1f}  {keys:4d}  {status:6d}  {mark}")
    print(f"{sum(row[0] for row in rows) / 60:.1f} minutes, {sum(row[1] for row in rows)} keystrokes, {failed} wrong")
    return int(failed > 0)


def story() -> list[str]:
    """The lines of README's block below the heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split(HEADING)[1].split("```\n")[1].splitlines()


def plain(text: str) -> str:
    """The text without a terminal's colours and redrawn lines."""
    return re.sub(r"[^\n]*\r(?!\n)", "", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)).replace("\r", "")


def _in_terminal(line: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output of a line that a shell runs with a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", f"stty cols {WIDTH}; {line}"],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    pieces = []
    try:
        while piece := os.read(ours, 65536):
            pieces.append(piece)
    except OSError:  # the terminal closes with its last process
        pass
    os.close(ours)
    return process.wait(), b"".join(pieces).decode(errors="replace").replace("\r\n", "\n")


def _build(wheels: Path) -> None:
    """The wheel of this checkout."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "tests", "docs")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
        code = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
        wheels.mkdir(parents=True)
        subprocess.run([sys.executable, "-c", code, str(wheels)], cwd=tree, check=True, capture_output=True)


def _write_sums(path: Path, n: int, seed: int) -> None:
    """A CSV of sums in the words that the demo's model was made on."""
    random = Random(seed)
    lines = ["question,answer"]
    for _ in range(n):
        a, b = random.randint(11, 89), random.randint(2, 99)
        lines.append(f"? Calculate {a} + {b}.,{a + b}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
