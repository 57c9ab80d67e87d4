"""Kill workers and drivers of `rollout --ray` and `collect --ray` at random moments; compare with undisturbed runs.

    python -m benchmarks.ray_kills [--workers-killed 10] [--drivers-killed 5] [--problems 384] [--seed 0]
                                   [--only rollout,collect]

Workers: several runs of each command on one Ray, in which workers are killed (SIGKILL) at random times, most while they
compute, the others in whatever they do. Drivers: the command is killed at a random time of its start-up or its work and
started again, as often as asked; then it runs to its end. The reference is the same command without --ray, undisturbed.
Every rollout file must have the reference's bytes, and every file of a store too (`benchmarks/contents.py`).

`collect` publishes every 0.2 s here instead of every 5 s: so short a run would otherwise have nothing to go on from.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import tiny
from benchmarks.contents import contents
from gradstore.cli.show import print_table
from gradstore.engine.cluster.ray_start import connected

_WORKERS = 2
_MAIN = """
from gradstore.engine.sketches import collector
collector._PUBLISH_SECONDS = 0.2
from gradstore.cli import main; main()
"""
_RUNS = 3
"""Runs of each command over which the killed workers are spread; more if a run ends before its share is killed."""
_COMPUTING = "ray::PoolWorker.run"
"""How the process of a worker is called while it computes a window."""
_MINUTES = 15


@dataclass(slots=True)
class Job:
    """A command, and how to look at what it leaves."""

    name: str
    arguments: Callable[[Path], list[str]]
    """Where its result goes -> the command's arguments."""
    result: Callable[[Path], object]
    """The bytes to compare."""


def main(
    workers_killed: Annotated[int, typer.Option(help="Workers killed, of each command.")] = 10,
    drivers_killed: Annotated[int, typer.Option(help="Drivers killed, of each command.")] = 5,
    problems: Annotated[int, typer.Option(help="Problems rolled out and collected.")] = 384,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    only: Annotated[str, typer.Option(help="Commands to disturb, separated by a comma.")] = "rollout,collect",
) -> None:
    """Kill, resume, compare; any difference ends the run with an error."""
    os.environ["OMP_NUM_THREADS"] = "1"
    random, rows = np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as temporary, connected("local", 8, object_store=200 << 20):
        folder = Path(temporary)
        for job in jobs(folder, problems):
            expected = job.result(reference(job, folder))
            if job.name not in only.split(","):
                continue
            if workers_killed:
                rows.append(kill_workers(job, folder, workers_killed, expected, random))
            if drivers_killed:
                rows.append(kill_drivers(job, folder, drivers_killed, expected, random))
    columns = ["command", "killed", "how", "runs", "result"]
    print_table(f"{problems} problems, {_WORKERS} workers, each run compared byte for byte", columns, rows)


def jobs(folder: Path, problems: int) -> list[Job]:
    """`rollout` of a tiny model and `collect` of the rollouts that it wrote undisturbed."""
    model, pool = str(tiny.save(folder / "model")), folder / "problems.jsonl"
    records = [{"id": f"p{i}", "prompt": f"{i}+{i}=", "ground_truth": str(2 * i)} for i in range(problems)]
    pool.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    sampled = ["rollout", str(pool), "--model", model, "--reward", "benchmarks.real:even", "-n", "4", "--as-text"]
    sampled += ["--max-new-tokens", "24", "--device", "cpu"]
    fitted = ["--model", model, "--rank", "4", "--dim", "64", "--fit-problems", "16", "--accept-coverage", "0"]
    fitted += ["--token-budget", "128", "--device", "cpu"]

    def file_of(out: Path) -> Path:
        return out.with_suffix(".jsonl")

    return [
        Job("rollout", lambda out: [*sampled, "--out", str(file_of(out))], lambda out: file_of(out).read_bytes()),
        Job(
            "collect",
            lambda out: ["collect", str(out), "pool", str(folder / "rollout-reference.jsonl"), *fitted],
            contents,
        ),
    ]


def reference(job: Job, folder: Path) -> Path:
    """The result of one process."""
    out = folder / f"{job.name}-reference"
    started = time.monotonic()
    finish(start(job, out, []), job)
    print(f"{job.name} in one process: {time.monotonic() - started:.1f} s", flush=True)
    return out


def kill_workers(job: Job, folder: Path, kills: int, expected: object, random: np.random.Generator) -> list[str]:
    """Kill workers in runs of the command, two thirds while they compute; each run must give what is expected."""
    killed = computing = runs = replaced = 0
    while killed < kills:
        out, before, started = folder / f"{job.name}-workers-{runs}", killed, time.monotonic()
        quota = min(kills - killed, -(-kills // _RUNS))
        driver, at_work = start(job, out, with_ray()), True
        while killed - before < quota and driver.poll() is None:
            victims = [worker for worker in workers() if not at_work or worker[1].startswith(_COMPUTING)]
            if not victims:
                time.sleep(0.02)
                continue
            if not at_work:
                time.sleep(float(random.uniform(0, 1)))
            pid, title = victims[int(random.integers(len(victims)))]
            if pid in [worker for worker, _ in workers()]:
                os.kill(pid, signal.SIGKILL)
                killed, computing = killed + 1, computing + title.startswith(_COMPUTING)
                at_work = random.random() < 2 / 3
                time.sleep(float(random.uniform(0, 1)))
        lost = sum(worker["lost"] for worker in finish(driver, job)["workers"])
        compare(job, out, expected)
        took = time.monotonic() - started
        print(f"{job.name}, run {runs}: {killed - before} killed, {lost} replaced, {took:.1f} s", flush=True)
        runs, replaced = runs + 1, replaced + lost
    how = f"workers, {computing} of them computing; {replaced} replaced"
    return [job.name, str(killed), how, str(runs), "identical"]


def kill_drivers(job: Job, folder: Path, kills: int, expected: object, random: np.random.Generator) -> list[str]:
    """Kill the command and start it again, until `kills`; every third kill is in its start-up, others after results."""
    killed = working = runs = finished = 0
    out = folder / f"{job.name}-drivers-0"
    while killed < kills:
        runs += 1
        driver, before = start(job, out, with_ray()), size(out)
        if killed % 3 == 2:
            time.sleep(float(random.uniform(0, 8)))
        else:
            while driver.poll() is None and size(out) == before:
                time.sleep(0.02)
            time.sleep(float(random.uniform(0, 1)))
        if driver.poll() is None:
            driver.kill()
            driver.communicate()
            killed, working = killed + 1, working + (size(out) != before)
            print(f"{job.name}: driver killed with {size(out)} bytes there, {before} when it started", flush=True)
        else:
            finish(driver, job)
            compare(job, out, expected)
            finished += 1
            out = folder / f"{job.name}-drivers-{finished}"
    finish(start(job, out, with_ray()), job)
    compare(job, out, expected)
    deadline = time.monotonic() + 30
    while workers():
        if time.monotonic() > deadline:
            raise ValueError(f"{job.name}: workers outlive their killed driver: {workers()}")
        time.sleep(0.2)
    how = f"drivers, {working} of them after results of their own"
    return [job.name, str(killed), how, str(runs + 1), "identical"]


def with_ray() -> list[str]:
    """Options that spread a command over workers of this process's Ray."""
    import ray

    return ["--ray", ray.get_runtime_context().gcs_address, "--workers", str(_WORKERS)]


def start(job: Job, out: Path, more: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MAIN, *job.arguments(out), *more, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], job: Job) -> dict:
    """What a command printed; ValueError if it failed."""
    printed, errors = process.communicate(timeout=60 * _MINUTES)
    if process.returncode:
        raise ValueError(f"{job.name} ended with {process.returncode}:\n{errors}")
    try:
        answer: dict = json.loads(printed)
    except ValueError:
        raise ValueError(f"{job.name} printed {printed!r}, not JSON alone:\n{errors}") from None
    return answer


def compare(job: Job, out: Path, expected: object) -> None:
    found = job.result(out)
    if found == expected:
        return
    differing = ""
    if isinstance(found, dict) and isinstance(expected, dict):
        names = sorted(found.keys() | expected.keys())
        differing = ", ".join(name for name in names if found.get(name) != expected.get(name))
    raise ValueError(f"{out}: not the result of an undisturbed run {differing}")


def size(out: Path) -> int:
    """Bytes of what the command has written so far."""
    files = [out.with_suffix(".jsonl"), *(out / "collections").rglob("manifest.json"), *out.rglob("codes/c*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def workers() -> list[tuple[int, str]]:
    """Process and title of each pool worker of the Ray that this process started (its raylet is this one's child).

    Ray names a process by its actor's class and what that is doing.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().decode(errors="replace")
            if title.startswith("ray::PoolWorker") and _parent(_parent(int(path.parent.name))) == os.getpid():
                found.append((int(path.parent.name), title))
        except OSError:
            continue  # it has just ended
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


if __name__ == "__main__":
    typer.run(main)
