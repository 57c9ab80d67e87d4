"""What a pool of a million problems costs: one command makes the store once, then measures each use of it.

    python -m benchmarks.million [--problems 1000000] [--steps 10] [--dim 1024] [--folder FOLDER] [--only NAME ...]

The pool has a row of every problem at step 0 and rows of a fifth of them at each later step: 2.8 million rows by
default, with texts of 500 characters. Rows and texts are made at random and written by the store's own writer. The
store stays in the folder, so that a later run with the same sizes measures it again; the default is in the temporary
folder. Every measurement is a new process. "first" is the first call in it, after pyarrow and pandas were
imported; "again" is the same call once more.

Memory is the most anonymous memory that the process had, seen every 5 ms: mapped files do not count. "cpu" is processor
time of all threads, which other load on the machine changes less than wall time. `rounds` are the
budgeted rounds of benchmarks.rounds with a nearly free policy (the own time of a round); ask for them by
`--only rounds`, with a number of candidates of their own.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import gradstore
from gradstore.cli.show import print_table, say

_WORDS = 4096
_AT_ONCE = 20_000

_START = "import time, sys, json, numpy as np, gradstore; path = sys.argv[1]; told = {}\n"
_TIMED = """
def timed(name, job):
    started = time.perf_counter(), time.process_time()
    found = job()
    told[name] = time.perf_counter() - started[0]
    told[f"{name}, cpu"] = time.process_time() - started[1]
    return found
"""
_END = "\nprint(json.dumps(told))"

_SNIPPETS = {
    "start-up": "from gradstore.engine.searching.query import search",
    "scan": """
from gradstore.engine.searching.query import search
view = gradstore.open(path).view("pool")
query = np.random.default_rng(1).normal(size=view.dim).astype(np.float32)
timed("first", lambda: search(view, query, 20))
timed("again", lambda: search(view, query, 20))
""",
    "problems of 20 ids": """
import pyarrow.compute, pyarrow.parquet, pandas
store = gradstore.open(path)
ids = [f"pool-{i:07d}" for i in np.random.default_rng(1).permutation(store.view("pool").__len__())[:40]]
timed("first", lambda: store.records("pool", ids[:20]))
timed("again", lambda: store.records("pool", ids[20:]))
""",
    "positions of 20 ids": """
import pyarrow.compute, pyarrow.parquet, pandas
view = gradstore.open(path).view("pool")
ids = [f"pool-{i:07d}" for i in np.random.default_rng(1).permutation(len(view))[:40]]
timed("first", lambda: view.positions(ids[:20]))
timed("again", lambda: view.positions(ids[20:]))
""",
    "add known problems": """
from benchmarks.million import records
store = gradstore.open(path, mode="a")
n = len(store.view("pool"))
known = [record for start in range(0, n, 20_000) for record in records(start, min(n, start + 20_000))]
told["before"] = anonymous()
timed("first", lambda: store.add_problems("pool", known))
timed("again", lambda: store.add_problems("pool", known))
""",
    "64 rows": """
import tempfile, os
with tempfile.TemporaryDirectory() as folder:
    store = gradstore.create(f"{folder}/s", dim=1024, fingerprint={})
    ids = [f"p{i}" for i in range(64)]
    store.add_problems("few", [{"id": i, "prompt": "?"} for i in ids])
    with store.writer("few", step=0) as writer:
        writer.append(ids, np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32))
    files = [os.stat(os.path.join(at, name)) for at, _, names in os.walk(folder) for name in names]
    told["bytes on disk"] = 512 * sum(file.st_blocks for file in files)
    told["bytes of the files' sizes"] = sum(file.st_size for file in files)
""",
    "explorer": """
from gradstore.analysis.explorer.catalogue import Catalogue, Filter
catalogue = Catalogue(gradstore.open(path), "pool", ("bench",))
wanted = "pool-0000777"
timed("problem page, first", lambda: catalogue.history(wanted, "cosine"))
timed("problem page, again", lambda: catalogue.history("pool-0000778", "cosine"))
timed("ranking, first", lambda: catalogue.ranking("bench", None, "cosine", Filter()))
timed("ranking, again", lambda: catalogue.ranking("bench", None, "cosine", Filter()))
""",
    "256 queries": """
from gradstore.engine.searching.fusion import search_each
view = gradstore.open(path).view("pool")
queries = list(np.random.default_rng(1).normal(size=(256, view.dim)).astype(np.float32))
timed("first", lambda: search_each(view, queries, 20))
timed("again", lambda: search_each(view, queries, 20))
""",
}
_ANONYMOUS = """
def anonymous():
    import re
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
_COMMANDS = {
    "query --top 20": ["query", "{store}", "--against", "bench", "--pool", "pool", "--top", "20", "--json"],
    "query --metric fisher, first": [
        "query", "{store}", "--against", "bench", "--pool", "pool", "--metric", "fisher", "--json",
    ],
    "query --metric fisher, later": [
        "query", "{store}", "--against", "bench", "--pool", "pool", "--metric", "fisher", "--json",
    ],
    "select -n 256": ["select", "{store}", "--against", "bench", "--pool", "pool", "-n", "256", "--out", "{out}"],
    "data": ["data", "{store}.jsonl", "--out", "{out}.parquet"],
    "report": ["report", "{store}", "--out", "{out}.html", "--pool", "pool"],
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Costs of one process."""

    seconds: float
    processor: float
    """Processor seconds of all its threads."""
    anonymous: int
    """Most anonymous memory, bytes."""
    told: dict[str, float]
    """What the snippet timed itself."""


def main(
    problems: Annotated[int, typer.Option(help="Problems of the pool.")] = 1_000_000,
    steps: Annotated[int, typer.Option(help="Steps; a fifth of the pool is measured at each after the first.")] = 10,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 1024,
    folder: Annotated[Path | None, typer.Option(help="Where the store is made or found.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Measure these alone; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Processes of each measurement; the fastest is shown.")] = 3,
    candidates: Annotated[int, typer.Option(help="Of `--only rounds`.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="Of `--only rounds`.")] = 3,
) -> None:
    """Measure a pool of a million problems."""
    if only == ["rounds"]:
        from benchmarks.rounds import main as run_rounds

        run_rounds(candidates, dim, rounds, 0.05)
        return
    place = folder or Path(tempfile.gettempdir()) / "gradstore-million"
    place.mkdir(parents=True, exist_ok=True)
    store = place / f"{problems}x{dim}x{steps}"
    if not (store / "whole").exists():
        started = time.monotonic()
        make(store, problems, steps, dim)
        say(f"made {store} in {time.monotonic() - started:.0f} s")
    lines = []
    for name in only or [*_SNIPPETS, *_COMMANDS]:
        once = name in ("query --metric fisher, first", "add known problems", "report", "256 queries", "explorer")
        found = [measured(name, store) for _ in range(1 if once else repeats)]
        best = min(found, key=lambda own: own.seconds)
        told = ", ".join(f"{what} {value:.4g}" for what, value in best.told.items())
        costs = [f"{best.seconds:.2f}", f"{min(own.processor for own in found):.2f}"]
        lines.append([name, *costs, f"{max(own.anonymous for own in found) / 1e9:.2f}", told])
        say(": ".join(lines[-1]))
    print_table(
        f"{problems} problems x {dim}, {steps} steps; {machine()}", ["what", "s", "cpu s", "GB", "timed"], lines
    )


def machine() -> str:
    """Processor, cores and load."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in facts if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return f"{names[0] if names else platform.processor()}, {cores} cores, load {os.getloadavg()[0]:.1f}"


def measured(name: str, store: Path) -> Measured:
    """Run one measurement in a new process."""
    out = store.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    for written in store.parent.glob("out.*"):
        written.unlink()
    if name == "query --metric fisher, first":
        shutil.rmtree(store / "store" / "collections" / "pool" / "indexes" / "fisher", ignore_errors=True)
    if name in _SNIPPETS:
        code = _START + _TIMED + _ANONYMOUS + _SNIPPETS[name] + _END
        command = [sys.executable, "-c", code, str(store / "store")]
    else:
        filled = [part.format(store=store / "store", out=out) for part in _COMMANDS[name]]
        command = [sys.executable, "-m", "gradstore", *filled]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=answer, stderr=errors)
        most = ended = status = 0
        while not ended:
            most = max(most, _anonymous(process.pid))
            time.sleep(0.005)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{name}: {errors.read()[-2000:].decode()}")
        answer.seek(0)
        told = json.loads(answer.read()) if name in _SNIPPETS else {}
    return Measured(seconds, usage.ru_utime + usage.ru_stime, most, told)


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def make(place: Path, problems: int, steps: int, dim: int) -> None:
    """Make the store and a file of the pool's problems."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    store = gradstore.create(place / "store", dim=dim, fingerprint={"made": "at random"})
    draw = np.random.default_rng(0)
    base_RD = draw.standard_normal((16, dim), dtype=np.float32)

    def rows(n: int) -> np.ndarray:
        shares_PR = draw.standard_normal((n, 16), dtype=np.float32)
        found_PD: np.ndarray = shares_PR @ base_RD + draw.standard_normal((n, dim), dtype=np.float32)
        return found_PD

    with open(place / "store.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, problems, _AT_ONCE * 3):
            some = records(start, min(problems, start + _AT_ONCE * 3))
            store.add_problems("pool", some)
            file.writelines(json.dumps(record) + "\n" for record in some)
    store.add_problems("bench", [{"id": f"bench-{i}", "prompt": f"Problem {i}"} for i in range(64)])
    for step in range(steps):
        numbers = np.arange(problems) if not step else np.sort(draw.permutation(problems)[: problems // 5])
        with store.writer("pool", step=step) as writer:
            for start in range(0, len(numbers), _AT_ONCE):
                ids = [f"pool-{i:07d}" for i in numbers[start : start + _AT_ONCE].tolist()]
                rates = draw.integers(1, 8, len(ids)) / 8
                writer.append(ids, rows(len(ids)), pass_rate=rates.astype(np.float32), n_rollouts=np.full(len(ids), 8))
        with store.writer("bench", step=step) as writer:
            writer.append([f"bench-{i}" for i in range(64)], rows(64) + base_RD[0])
    (place / "whole").touch()


def records(start: int, stop: int) -> list[dict]:
    """Problems with texts of 500 characters, the same at every call."""
    words = np.array(["".join(map(chr, row)) for row in np.random.default_rng(0).integers(97, 123, (_WORDS, 4))])
    found = []
    for number in range(start, stop):
        picked = words[(number * 7919 + np.arange(100) * (number % 4093 + 1)) % _WORDS]
        text = " ".join(picked.tolist())
        found.append(
            {
                "id": f"pool-{number:07d}",
                "source": f"source {number % 7}",
                "prompt": text,
                "ground_truth": str(number),
                "tags": ["made up"],
            }
        )
    return found


if __name__ == "__main__":
    typer.run(main)
