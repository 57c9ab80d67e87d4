"""Fuzzing of everything that others may have written: `python -m tests.fuzz.run --minutes 10`.

First every case of the corpus, then new cases of seeds SEED, SEED + 1, ... for each target in turn. Tries run in worker
processes; one that hangs or dies is replaced. Every new kind of failure is written to a file that `--replay` repeats.
"""

import argparse
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS, corpus
from tests.fuzz.trial import ROOT

START_S = 180
"""Seconds that a worker may take to prepare."""
FRESH = 1000
"""Tries after which a worker is started anew: its memory grows by some 70 kB a try."""
TRY_S = 120
"""Seconds after which a worker that does not end by itself is killed."""


class Worker:
    """A worker process of one target, started anew whenever it ended."""

    def __init__(self, target: str, patience: float = 1.0) -> None:
        self.target = target
        self.patience = patience
        """Factor of the time limits, for machines that do other work."""
        self.folder = Path(
            tempfile.mkdtemp(prefix=f"fuzz-{target}-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._tries = 0

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Make one try; a failure of kind hang or died if the worker did not come back."""
        self._tries += 1
        if self._tries % FRESH == 0:
            self.stop()
        process = self.start()
        if process.stdin is None:
            raise RuntimeError("the worker has no pipe")
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()
        answer = self._line(process, TRY_S)
        if answer is not None and "ended" not in answer:
            return answer
        killed = answer is None
        if answer is None:
            self.stop()
            stacks = self.folder / "hung"
            hung = stacks.read_text(errors="replace") if stacks.exists() else ""
            answer = {"ended": process.returncode, "hung": hung}
        status, hung = answer["ended"], answer["hung"]
        kind = "hang" if hung or (killed and status == -signal.SIGKILL) else "died"
        where = _hung_in(hung) if kind == "hang" else f"status {status}"
        text = hung[-3000:] or (self.folder / "log").read_text(errors="replace")[-3000:]
        case = json.loads((self.folder / "case").read_text(encoding="utf-8"))
        return {"outcomes": [kind], "failures": [{"kind": kind, "where": where, "text": text}], "case": case}

    def start(self) -> subprocess.Popen[bytes]:
        """The process, started and prepared."""
        return self._process or self._start()

    def stop(self) -> None:
        """End the process and what it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", self.target, str(self.folder), str(self.patience)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        if self._line(self._process, START_S) is None:
            raise RuntimeError(f"{self.target}: the worker did not start: {(self.folder / 'log').read_text()[-3000:]}")
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """The worker's next line; None if it ended or took longer."""
        pipe = process.stdout
        if pipe is None or not select.select([pipe], [], [], seconds)[0]:
            return None
        line = pipe.readline()
        if not line:
            process.wait()
            return None
        found: dict[str, Any] = json.loads(line)
        return found


def _hung_in(stacks: str) -> str:
    """The innermost place in the repository that the main thread was in; its stack is the last one."""
    for line in stacks.rpartition("Thread 0x")[2].splitlines():
        name = line.strip().removeprefix('File "')
        path = name.partition('"')[0]
        inside = os.path.relpath(os.path.realpath(path), ROOT) if path.startswith("/") else ".."
        if not inside.startswith(("..", ".venv", "tests")):
            return f"{inside}:{line.rpartition(' in ')[2]}"
    return "no place in the repository"


@dataclass
class Result:
    """What the tries of one target came to."""

    target: str
    tries: int = 0
    seconds: float = 0.0
    outcomes: Counter = field(default_factory=Counter)
    """What each step came to -> steps."""
    failures: Counter = field(default_factory=Counter)
    """(kind, where) -> tries."""
    first: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """(kind, where) -> the first such failure, with its seed and case."""

    def add(self, asked: dict[str, Any], answer: dict[str, Any]) -> None:
        """Count one try."""
        self.tries += 1
        self.outcomes.update(answer["outcomes"])
        for failure in answer["failures"]:
            key = (failure["kind"], failure["where"])
            self.failures[key] += 1
            if key not in self.first:
                self.first[key] = {"target": self.target, **asked, **failure, "case": answer["case"]}

    def kinds(self) -> dict[str, int]:
        """Kind -> failures."""
        found: Counter = Counter()
        for (kind, _), count in self.failures.items():
            found[kind] += count
        return dict(sorted(found.items()))


def fuzz(
    target: str,
    seeds: Iterator[int],
    *,
    seconds: float | None,
    tries: int | None,
    jobs: int = 1,
    patience: float = 1.0,
    heard: Callable[[Result], None] | None = None,
) -> Result:
    """Make the tries of the corpus, then of seeds, until the time or the number of tries is reached.

    heard: called after every try.
    """
    result, lock = Result(target), threading.Lock()
    kept = iter([{"corpus": path.name, "case": case} for path, case in corpus(target)])
    begun = time.monotonic()
    left = itertools.count(1) if tries is None else iter(range(tries))

    def work() -> None:
        with Worker(target, patience) as worker:
            worker.start()
            nonlocal begun
            with lock:
                begun = begun if result.tries else time.monotonic()
            while True:
                with lock:
                    asked = next(kept, None)
                    if asked is None:
                        if next(left, None) is None or (seconds is not None and time.monotonic() - begun > seconds):
                            return
                        asked = {"seed": next(seeds)}
                answer = worker.ask(asked)
                with lock:
                    result.add(asked, answer)
                    if heard is not None:
                        heard(result)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.seconds = time.monotonic() - begun
    return result


def replay(path: Path, patience: float = 1.0) -> Result:
    """Repeat the case of a file that a run wrote, or of the corpus, in a new worker."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    name = kept.get("target") or path.parent.name
    asked = {"case": kept["case"]} if kept.get("case") else {"seed": kept["seed"]}
    result = Result(name)
    with Worker(name, patience) as worker:
        result.add(asked, worker.ask(asked))
    return result


def write_failures(result: Result, folder: Path) -> list[Path]:
    """Write the first failure of each kind and place to a file of its own."""
    written = []
    for number, failure in enumerate(result.first.values()):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{result.target}-{failure.get('seed', 'corpus')}-{failure['kind']}-{number}.json"
        path.write_text(json.dumps(failure, indent=1), encoding="utf-8")
        written.append(path)
    return written


def _tell(result: Result) -> None:
    """A line of what was done so far, on a terminal."""
    if sys.stderr.isatty():
        print(
            f"\r{result.target}: {result.tries} tries, {sum(result.failures.values())} failures ",
            end="",
            file=sys.stderr,
        )


def show(results: list[Result]) -> None:
    """Print the table, and under it every kind of failure."""
    print(f"{'target':<15}{'tries':>8}{'tries/s':>9}{'ok':>8}{'refused':>9}{'failures':>9}  kinds")
    for result in results:
        refused = sum(result.outcomes[name] for name in ("1", "2", "error"))
        kinds = ", ".join(f"{kind} {count}" for kind, count in result.kinds().items())
        rate = result.tries / max(result.seconds, 1e-9)
        numbers = (
            f"{result.tries:>8}{rate:>9.1f}{result.outcomes['ok']:>8}{refused:>9}{sum(result.failures.values()):>9}"
        )
        print(f"{result.target:<15}{numbers}  {kinds}")
    for result in results:
        for (kind, where), count in result.failures.most_common():
            first = result.first[kind, where]
            print(f"{result.target} {kind} x{count}: {where} (seed {first.get('seed', first.get('corpus'))})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time of all targets together [10]")
    parser.add_argument("--tries", type=int, help="tries of each target, instead of a time")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="which [all]")
    parser.add_argument("--seed", type=int, help="first seed [from the clock, so that every run tries something new]")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes [1]")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of the time limits, on a busy machine [1]")
    parser.add_argument(
        "--failures", type=Path, default=ROOT / "build" / "fuzz", help="folder of failures [build/fuzz]"
    )
    parser.add_argument("--replay", type=Path, nargs="+", help="repeat the cases of these files")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    if asked.replay:
        results = [replay(path, asked.patience) for path in asked.replay]
    else:
        seed = int(time.time()) if asked.seed is None else asked.seed
        seconds = None if asked.tries else asked.minutes * 60 / len(asked.targets)
        print(f"seed {seed}", file=sys.stderr)
        results = []
        for name in asked.targets:
            seeds = itertools.count(seed)
            results.append(
                fuzz(
                    name,
                    seeds,
                    seconds=seconds,
                    tries=asked.tries,
                    jobs=asked.jobs,
                    patience=asked.patience,
                    heard=_tell,
                )
            )
            for path in write_failures(results[-1], asked.failures):
                print(f"{path}", file=sys.stderr)
    if asked.json:
        print(json.dumps([
            {"target": r.target, "tries": r.tries, "seconds": r.seconds, "outcomes": r.outcomes, "failures": r.kinds(),
             "first": list(r.first.values())} for r in results
        ], indent=1))  # fmt: skip
    else:
        show(results)
        if asked.replay:
            for result in results:
                for failure in result.first.values():
                    print(failure["text"])
    sys.exit(any(result.failures for result in results))


if __name__ == "__main__":
    main()
