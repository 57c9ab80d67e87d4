"""How fast the command line answers: the help of each command, a refused option, a query, a completion.

    python -m benchmarks.start_up [--repeats 5]

Each request runs in fresh processes, with compiled modules as an installed package has them (an environment variable
may forbid them in a checkout). Wall time is what a person waits for; other load on the machine lengthens it, and
processor time (user and system, of all threads) less.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import gradstore
from gradstore.cli import app
from gradstore.cli.show import print_line, print_table

GOALS_S = {"help": 0.25, "refused option": 0.6, "query": 0.7}


def main(repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 5) -> None:
    """Time the command line's answers and print the medians."""
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder) / "store")
        commands = [name for name in app.COMMANDS if name != "import"]
        requests = {
            "refused option": ["query", str(store), "--against", "bench", "--topp", "3"],
            "query": ["query", str(store), "--against", "bench"],
            "completion": ["query", str(store), "--against", "b"],
            "help: gradstore": ["--help"],
            **{f"help: {name}": [name, "--help"] for name in commands},
        }
        compiled = Path(folder) / "compiled"
        times = {name: _times(words, repeats, name == "completion", compiled) for name, words in requests.items()}
    rows = []
    for name, (wall_R, cpu_R) in times.items():
        goal = GOALS_S.get(name.partition(":")[0])
        rows.append(
            [
                name,
                f"{np.median(wall_R):.2f}",
                f"{wall_R.min():.2f}-{wall_R.max():.2f}",
                f"{np.median(cpu_R):.2f}",
                "" if goal is None else f"{goal:.2f}",
            ]
        )
    columns = ["request", "median s", "range", "processor s", "goal s"]
    print_table("Answers of the command line", columns, rows, right=columns[1:])
    print_line(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {repeats} fresh processes each")


def _times(words: list[str], repeats: int, completed: bool, compiled: Path) -> tuple[np.ndarray, np.ndarray]:
    """Wall and processor seconds, both [repeats], after one run that is not counted."""
    environment = dict(os.environ) | {"PYTHONPYCACHEPREFIX": str(compiled)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if completed:
        line = ["gradstore", *words]
        environment |= {
            "_GRADSTORE_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": str(len(line) - 1),
        }
    found = []
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'gradstore'; from gradstore.cli import main; main()"]
    for _ in range(repeats + 1):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([*command, *([] if completed else words)], env=environment, capture_output=True, check=False)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    walls, cpus = np.array(found[1:]).T
    return walls, cpus


def _store(path: Path) -> Path:
    """A pool of 2,000 problems and a benchmark of 60, of 1,024 dimensions as the demo has them."""
    random = np.random.default_rng(0)
    store = gradstore.create(path, dim=1024, fingerprint={"model": "none"})
    for name, n in (("pool", 2000), ("bench", 60)):
        ids = [f"{name}{i}" for i in range(n)]
        store.add_problems(name, [{"id": one, "prompt": one} for one in ids])
        with store.writer(name, step=0) as writer:
            writer.append(ids, random.normal(size=(n, 1024)).astype(np.float32))
    return path


if __name__ == "__main__":
    typer.run(main)
