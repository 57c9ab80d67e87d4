"""What Ray itself costs in `rollout --ray` and `collect --ray`, and what more workers bring on one machine.

    python -m benchmarks.ray_costs [--only overhead,throughput] [--repeats 5] [--seconds-each 0.05,0.5,5]
                                   [--limit 300] [--keep FILE]

overhead     A pool whose workers compute nothing: they get windows as large as those of `rollout` and `collect`, and
             answer with results as large as theirs. Time per problem with one worker, less the same calls in this
             process; seconds to start Ray, a worker, and a worker that imports torch and loads a tiny model. From these
             the number of problems from which Ray takes less than 5 % of the work's time, for some seconds per problem.
throughput   `collect` of a model of 4 million parameters by 1, 2 and 4 workers of one thread, each in turn with one
             process of one thread and one with all cores' threads; the workers are started before. A stage is one
             number of workers: it takes at most --limit seconds after their start, a run that is late is broken off,
             and what was measured is printed. With --keep it is in a file too, and the same command goes on from there.
"""

import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import tiny
from benchmarks.timing import interleaved, print_times
from gradstore import State
from gradstore.cli.show import print_table
from gradstore.engine.cluster.pool import Pool, Window
from gradstore.engine.cluster.ray_start import connected
from gradstore.engine.cluster.worker import limit_threads
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import create_store
from gradstore.engine.sketches.collector import collect
from gradstore.engine.sketches.on_workers import OnWorkers, Replica
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.trainer.sampling.backends import Call, Response

_G, _PROMPT, _RESPONSE, _DIM = 8, 100, 300, 1024
"""Rollouts per problem, tokens of a prompt and a response, dimensions of a sketch."""
_WINDOWS = {"rollout": 64, "collect": 32768 // (_G * (_PROMPT + _RESPONSE))}
"""Problems of a window: `rollout`'s chunk; 16 micro-batches of 2,048 tokens of `collect` on a CPU."""
_SHARE = 0.05
_ALONE = "one process, 1 thread"
_WORKERS = (1, 2, 4)


def main(
    only: Annotated[str, typer.Option(help="Sections, separated by commas.")] = "overhead,throughput",
    repeats: Annotated[int, typer.Option(help="How often each is timed.")] = 5,
    seconds_each: Annotated[str, typer.Option(help="Seconds of work per problem, separated by commas.")] = "0.05,0.5,5",
    problems: Annotated[int, typer.Option(help="throughput: problems collected.")] = 96,
    limit: Annotated[float, typer.Option(help="throughput: seconds of a stage.")] = 300,
    keep: Annotated[Path | None, typer.Option(help="throughput: file of what was measured, read and written.")] = None,
) -> None:
    """Print the tables."""
    sections = {
        "overhead": lambda folder: overhead(folder, repeats, [float(text) for text in seconds_each.split(",")]),
        "throughput": lambda folder: throughput(folder, repeats, problems, limit, keep),
    }
    print(f"load at the start {os.getloadavg()[0]:.0f}, {len(os.sched_getaffinity(0))} cores")
    for name in only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            sections[name](Path(folder))
    print(f"load at the end {os.getloadavg()[0]:.0f}")


def overhead(folder: Path, repeats: int, seconds_each: list[float]) -> None:
    """Time windows of no work, and starting."""
    model = tiny.save(folder / "model")
    started = time.perf_counter()
    with connected("local", 2):
        ray_seconds = time.perf_counter() - started
        idle_seconds = np.median([_start(_answering) for _ in range(repeats)])
        model_seconds = np.median([_start(partial(_loading, str(model))) for _ in range(repeats)])
        with Pool(_answering, workers=1) as pool:
            pool.about()
            measured = {name: _per_problem(pool, name, repeats) for name in ("empty", *_WINDOWS)}
    rows = []
    for name, (each, size, sent, received) in measured.items():
        shown = f"{np.median(each) * 1e3:.2f} ({each.min() * 1e3:.2f}-{each.max() * 1e3:.2f})"
        rows.append([name, str(size), f"{sent / 1e3:.1f}", f"{received / 1e3:.1f}", shown])
    columns = ["windows of", "problems each", "kB sent per problem", "kB received", "ms per problem (range)"]
    print_table(f"Ray itself, workers that compute nothing, {repeats} repeats", columns, rows, right=columns[1:])
    print(f"Ray starts in {ray_seconds:.1f} s, a worker in {idle_seconds:.1f} s")
    print(f"a worker that imports torch and loads a tiny model starts in {model_seconds:.1f} s")
    rows = []
    for name in _WINDOWS:
        slowest = float(np.median(measured[name][0]))
        for seconds in seconds_each:
            bounds = [smallest(start, slowest, seconds) for start in (idle_seconds, ray_seconds + idle_seconds)]
            rows.append([name, f"{seconds:g}", f"{slowest / seconds:.2%}", *map(str, bounds)])
    columns = ["windows of", "seconds of work per problem", "per problem", "running cluster", "Ray started too"]
    print_table(f"Problems per worker from which Ray takes less than {_SHARE:.0%}", columns, rows, right=columns[1:])


def smallest(start: float, each: float, work: float) -> int | str:
    """Least number of problems of one worker for which start + n * each <= 5 % of n * work; all in seconds."""
    return int(np.ceil(start / (_SHARE * work - each))) if each < _SHARE * work else "none"


def _start(make: Callable[[], Callable]) -> float:
    started = time.perf_counter()
    with Pool(make, workers=1) as pool:
        pool.about()
        return time.perf_counter() - started


def _per_problem(pool: Pool, name: str, repeats: int) -> tuple[np.ndarray, int, float, float]:
    """Seconds per problem of each repeat, problems of a window, and bytes sent and received per problem."""
    size = _WINDOWS.get(name, 1)
    n = 256 if name == "empty" else 20
    sent = _sent(name)
    windows = [Window((name, sent), size, f"window {number}") for number in range(n)]
    here = _answering()

    def by_pool() -> None:
        for _ in pool.map(windows):
            pass

    def by_call() -> None:
        for window in windows:
            here(*window.arguments)

    seconds = interleaved({"pool": by_pool, "call": by_call}, repeats)
    received = len(pickle.dumps(here(name, sent), 5))
    return (seconds["pool"] - seconds["call"]) / (n * size), size, len(pickle.dumps(sent, 5)) / size, received / size


def _sent(name: str) -> Any:
    """What a window of this kind sends."""
    random = np.random.default_rng(0)
    if name == "rollout":
        prompts = [random.integers(0, 50_000, _PROMPT).tolist() for _ in range(_WINDOWS[name])]
        return Call(prompts=prompts, n=_G, max_new_tokens=_RESPONSE, temperature=1.0, top_p=1.0, seed=0)
    if name == "collect":
        return [_group(random, f"p{i}") for i in range(_WINDOWS[name])]
    return None


def _answers() -> dict[str, Any]:
    """What the windows of each kind give back."""
    random = np.random.default_rng(1)
    n = _WINDOWS["collect"]
    sketches = random.standard_normal((n, _DIM)).astype(np.float32)
    ones = np.ones(n, np.float32)
    batch = SketchBatch(
        [f"p{i}" for i in range(n)], sketches, [State.LIVE] * n, [""] * n, ones, np.full(n, _G), 0, norms=ones
    )
    responses = [
        [Response(random.integers(0, 50_000, _RESPONSE), np.zeros(_RESPONSE, np.float32), "stop") for _ in range(_G)]
        for _ in range(_WINDOWS["rollout"])
    ]
    return {"empty": None, "rollout": responses, "collect": [batch]}


def _answering() -> Callable[[str, Any], Any]:
    """The function of a worker that computes nothing."""
    answers = _answers()
    return lambda name, sent: answers[name]


def _loading(model: str) -> Callable[[], None]:
    """The function of a worker that has loaded a model."""
    from gradstore.engine.gradients.models import load_model

    load_model(model, device="cpu")
    return lambda: None


def _group(random: np.random.Generator, name: str, tokens: int = 50_000, response: int = _RESPONSE) -> Group:
    """A problem's rollouts, with a signal."""
    responses = [random.integers(4, tokens, response) for _ in range(_G)]
    prompt = random.integers(4, tokens, _PROMPT if response == _RESPONSE else response)
    return Group(name, prompt, responses, np.arange(_G) % 2.0, [np.zeros(response, np.float32)] * _G)


class _LateError(Exception):
    """A stage has taken its time."""


def throughput(folder: Path, repeats: int, problems: int, limit: float, keep: Path | None) -> None:
    """Time `collect` of new rows by a pool that is already running and by this process, one pool after the other."""
    model = tiny.save(folder / "model", hidden=256, layers=6)
    from gradstore.engine.gradients.models import load_model

    cores = len(os.sched_getaffinity(0))
    kept: dict[str, list[dict[str, float]]] = {}
    if keep and keep.exists():
        kept = json.loads(keep.read_text(encoding="utf-8"))
    limit_threads(1)
    policy, random = load_model(str(model), device="cpu"), np.random.default_rng(0)
    spec = SketchSpec(basis="random", rank=4, token_budget=512)
    groups = [_group(random, f"p{i}", tokens=250, response=48) for i in range(problems)]
    sketcher = Sketcher(policy, spec)
    store = create_store(folder / "store", sketcher)
    names = (f"pool{number}" for number in range(10**6))

    def collected(sketch_each: OnWorkers | None, threads: int, end: float) -> float:
        def progress(n: int) -> None:
            if time.perf_counter() > end:
                raise _LateError

        name = next(names)
        store.add_problems(name, [{"id": group.problem_id, "prompt": "?"} for group in groups])
        limit_threads(threads)
        started = time.perf_counter()
        how = {"sketcher": sketcher, "accept_coverage": 0.0, "sketch_each": sketch_each, "progress": progress}
        collect(store, name, groups, step=0, **how)
        return time.perf_counter() - started

    for n in _WORKERS:
        measured = kept.setdefault(f"{problems} problems, {n} workers", [])
        if len(measured) >= repeats:
            continue
        replica = Replica(model=str(model), spec=spec, device="cpu")
        with connected("local", n), OnWorkers(replica, sketcher, workers=n) as pool, suppress(_LateError):
            collected(pool, 1, time.perf_counter() + limit)  # they start with the first window
            end = time.perf_counter() + limit
            while len(measured) < repeats:
                jobs = {
                    _ALONE: partial(collected, None, 1, end),
                    f"one process, {cores} threads": partial(collected, None, cores, end),
                    f"{n} workers": partial(collected, pool, 1, end),
                }
                order = np.random.default_rng(len(measured)).permutation(list(jobs)).tolist()
                seconds = {name: jobs[name]() for name in order}
                measured.append({name: seconds[name] for name in jobs} | {"load": os.getloadavg()[0]})
                if keep:
                    keep.write_text(json.dumps(kept), encoding="utf-8")
    size = f"{problems} problems of {_G} rollouts of 48 + 48 tokens, {cores} cores"
    for n in _WORKERS:
        measured = kept[f"{problems} problems, {n} workers"]
        if not measured:
            print(f"{n} workers: nothing measured in {limit:.0f} s")
            continue
        loads = [one["load"] for one in measured]
        title = f"collect, {size}, {len(measured)} of {repeats} repeats, load {min(loads):.0f}-{max(loads):.0f}"
        seconds_of = {name: np.array([one[name] for one in measured]) for name in measured[0] if name != "load"}
        print_times(title, seconds_of, _ALONE)


if __name__ == "__main__":
    typer.run(main)
