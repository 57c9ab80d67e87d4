"""Reliability tests for docs/reliability.md: kills, flipped bits, full disks, power cuts, concurrent readers.

    python -m benchmarks.reliability [--only kills,compactions,indexes,flips,full,cuts,live,clock]
                                     [--kills 200] [--flips 200] [--changes 60] [--seconds 60]

Every trial ends with a check of every row and byte (`gradstore verify`), and with a writer that continues. A trial that
loses a row, shows a wrong one, or fails by itself ends the run with the reason.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import gradstore
from benchmarks.churn import (
    DIM,
    N_PROBLEMS,
    Content,
    changes,
    check,
    content_of,
    create,
    do,
    records,
    sketch,
    write_more,
)
from benchmarks.powercut import recorded
from gradstore.cli.show import print_table
from gradstore.errors import GradstoreError


def churn_until_killed(path: str, log: str, seed: int, content: Content, compactions: float) -> None:
    """Change a store until killed; the log says which change is next and which is done."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = gradstore.open(path, mode="a")
    for number, (change, _) in enumerate(changes(seed, content, compactions)):
        os.write(out, f"try {number}\n".encode())
        do(store, change)
        os.write(out, f"done {number}\n".encode())


def index_until_killed(path: str, log: str, seed: int) -> None:
    """Repeatedly publish rows and build or extend their stored index, until killed."""
    from gradstore.engine.searching.indexes import index_for

    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = gradstore.open(path)
    while True:
        os.write(out, b"try 0\n")
        shutil.rmtree(Path(path) / "collections/pool/indexes", ignore_errors=True)
        index_for(store.view("pool"), 5, kind="flat")


def start(target: Callable, *arguments: object) -> BaseProcess:
    """Start a process that has already imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        # pyarrow imports the last two at its first use; that takes seconds, in which a kill would test nothing else.
        [
            "benchmarks.churn",
            "typer",
            "pyarrow.parquet",
            "gradstore.compact",
            "gradstore.verify",
            "pyarrow.compute",
            "pandas",
        ]
    )
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def kills(folder: Path, trials: int, compactions: float = 0.15) -> str:
    """Kill writers and compactions of one store at random moments."""
    path, log = folder / "store", folder / "log"
    create(path)
    content, random, interrupted = Content(), np.random.default_rng(0), 0
    for seed in range(trials):
        log.write_text("")
        process = start(churn_until_killed, str(path), str(log), seed, content, compactions)
        _wait_for(log, process)
        time.sleep(float(random.uniform(0, 0.3)))
        _kill(process)
        lines = [line.split() for line in log.read_text().splitlines()]
        tried = [int(number) for what, number in lines if what == "try"]
        done = [int(number) for what, number in lines if what == "done"]
        sequence = changes(seed, content, compactions)
        contents = [content, *(next(sequence)[1] for _ in range(tried[-1] + 1))]
        interrupted += bool((path / "collections/pool/LOCK").read_bytes())
        content = check(path, contents[(done[-1] + 1 if done else 0) :])
        if seed % 10 == 9:
            content = write_more(path, content)
    return f"{trials} kills, {interrupted} of them in the middle of a change, {content.serial} rows appended"


def index_kills(folder: Path, trials: int) -> str:
    """Kill index builds and writes: rows must stay, and the next search must agree with the exact scan."""
    from gradstore.engine.searching.indexes import index_for
    from gradstore.engine.searching.query import search

    path, log = folder / "store", folder / "log"
    store = create(path)
    content = Content()
    for number, (change, after) in enumerate(changes(0, content, 0)):
        do(store, change)
        content = after
        if number == 30:
            break
    query, random = np.ones(DIM, np.float32), np.random.default_rng(0)
    for seed in range(trials):
        log.write_text("")
        process = start(index_until_killed, str(path), str(log), seed)
        _wait_for(log, process)
        time.sleep(float(random.uniform(0, 0.05)))
        _kill(process)
        check(path, [content])
        view = gradstore.open(path).view("pool")
        found = search(view, query, 5, index=index_for(view, 5, kind="flat"))
        if found.ids.tolist() != search(view, query, 5).ids.tolist():
            raise ValueError("an index left by a killed build gives another answer")
    write_more(path, content)
    return f"{trials} kills while an index was built and written"


def flips(folder: Path, trials: int) -> str:
    """Flip one random bit of a random file: verify must name the file."""
    path, random = folder / "store", np.random.default_rng(0)
    store, content = create(path), Content()
    for number, (change, after) in enumerate(changes(1, content)):
        do(store, change)
        content = after
        if number == 25:
            break
    files = sorted(file for file in path.glob("**/*") if file.is_file() and file.stat().st_size)
    for _ in range(trials):
        file = files[random.integers(len(files))]
        whole = file.read_bytes()
        place = int(random.integers(len(whole)))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(random.integers(8))]) + whole[place + 1 :])
        try:
            report = gradstore.open(path).verify()
            named = {finding.file for finding in report.findings}
            if file.relative_to(path).as_posix() not in named:
                raise ValueError(f"{file}: byte {place} flipped, verify names {named}")
        except GradstoreError as error:
            if str(file) not in str(error):
                raise ValueError(f"{file}: byte {place} flipped, told: {error}") from error
        file.write_bytes(whole)
    check(path, [content])
    return f"{trials} bits in {len(files)} files, each found and its file named"


def full(folder: Path, trials: int) -> str:
    """Fill a small file system until a write fails; then free space, and the writer must continue."""
    random, changed = np.random.default_rng(0), 0
    for trial in range(trials):
        disk = folder / f"disk-{trial}"
        disk.mkdir()
        size = int(random.integers(400, 1200))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True, capture_output=True)
        try:
            ballast = disk / "ballast"
            ballast.write_bytes(bytes(150_000))
            store, content = create(disk / "store"), Content()
            for change, after in changes(trial, content, 0.05):
                try:
                    do(store, change)
                except GradstoreError as error:
                    if "the disk is full" not in str(error):
                        raise
                    break
                content, changed = after, changed + 1
            content = check(disk / "store", [content, after])
            del store
            ballast.unlink()
            write_more(disk / "store", content)
        finally:
            subprocess.run(["umount", "--lazy", disk], check=True)
    return f"{trials} file systems of 0.4 to 1.2 MB, {changed} changes before they were full"


def cuts(folder: Path, n_changes: int, every: int = 1, seed: int = 0) -> str:
    """Cut the power before and after every fsync; of unsynced data nothing, or a random part, stays."""
    path, random = folder / "store", np.random.default_rng(seed)
    store, content = create(path), Content()
    with recorded(path) as disk:
        disk.mark([content])
        for _, (change, after) in zip(range(n_changes), changes(seed, content, 0.12), strict=False):
            disk.mark([content, after])
            do(store, change)
            disk.mark([after])
            content = after
    allowed: list[Content] = []
    points = tried = 0
    for number, state in disk.states():
        event, following = disk.log[number], disk.log[min(number + 1, len(disk.log) - 1)]
        if event[0] == "mark":
            allowed = event[1]
        points += "sync" in (event[0], following[0])
        if "sync" not in (event[0], following[0]) or points % every:
            continue
        for part in (None, random):
            target = folder / "after"
            state.build(target, part)
            try:
                write_more(target, check(target, allowed))
            except (GradstoreError, ValueError) as error:
                raise ValueError(f"cut after event {number} {event[:2]}, {part or 'nothing'} kept: {error}") from error
            shutil.rmtree(target)
            tried += 1
    return (
        f"{tried} cuts, before and after each fsync of {n_changes} changes; of the rest nothing or a random part stays"
    )


def live(folder: Path, seconds: float, readers: int = 4) -> str:
    """A writer publishes every 100 ms and sometimes compacts, while readers query without pause."""
    path = folder / "store"
    store = gradstore.create(path, dim=DIM, fingerprint={}, chunk_rows=64)
    store.add_problems("pool", records(0, N_PROBLEMS))
    stop = time.time() + seconds
    logs = [folder / f"log-{number}" for number in range(readers + 1)]
    processes = [start(publish_until, str(path), str(logs[0]), stop)]
    _wait_for(logs[0], processes[0])
    processes += [start(query_until, str(path), str(log), stop, seed) for seed, log in enumerate(logs[1:])]
    for process in processes:
        process.join()
        if process.exitcode:
            raise ValueError(f"a process of the live run ended with {process.exitcode}")
    published = json.loads(logs[0].read_text().splitlines()[-1])
    told = [json.loads(log.read_text()) for log in logs[1:]]
    if not gradstore.open(path).verify().ok:
        raise ValueError("verify finds damage after the live run")
    queries, moments = sum(one["queries"] for one in told), min(one["moments"] for one in told)
    return (
        f"{seconds:.0f} s, {published} publications, {readers} readers, {queries} queries, each of {moments}+ moments"
    )


def publish_until(path: str, log: str, stop: float) -> None:
    """Publish a new row of every problem at each step, in two appends that become visible together."""
    store, step = gradstore.open(path, mode="a"), 0
    with open(log, "a", encoding="utf-8", buffering=1) as out:
        while time.time() < stop:
            started = time.time()
            serial = np.arange(N_PROBLEMS) + N_PROBLEMS * step
            with store.writer("pool", step=step) as writer:
                half = N_PROBLEMS // 2
                for part in (serial[:half], serial[half:]):
                    ids = [f"p{i % N_PROBLEMS}" for i in part]
                    writer.append(ids, sketch(part), n_rollouts=part)
            if step % 50 == 49:
                store.compact("pool", keep="newest")
            out.write(f"{step + 1}\n")
            step += 1
            time.sleep(max(0, 0.1 - (time.time() - started)))


def query_until(path: str, log: str, stop: float, seed: int) -> None:
    """Query without pause: each answer must contain every problem, all from the same step."""
    from gradstore.engine.searching.query import search

    query = np.random.default_rng(seed).standard_normal(DIM)
    query /= np.linalg.norm(query)
    queries, moments = 0, set()
    store = gradstore.open(path)
    while time.time() < stop:
        view = store.view("pool")
        hits = search(view, query.astype(np.float32), N_PROBLEMS)
        serial = view.n_rollouts[hits.positions]
        (step,) = set(view.steps.tolist())
        rows = sketch(serial)
        scores = rows @ query / np.linalg.norm(rows, axis=1)
        if len(hits) != N_PROBLEMS or set((serial // N_PROBLEMS).tolist()) != {step}:
            raise ValueError(f"an answer with {len(hits)} problems of steps {set((serial // N_PROBLEMS).tolist())}")
        if not np.allclose(hits.scores, scores, atol=0.02) or hits.ids.tolist() != [
            f"p{i % N_PROBLEMS}" for i in serial
        ]:
            raise ValueError(f"a wrong answer at step {step}")
        queries += 1
        moments.add(step)
    Path(log).write_text(json.dumps({"queries": queries, "moments": len(moments)}), encoding="utf-8")


def clock(folder: Path, trials: int) -> str:
    """Set file times to the past and the future, in any order: a reader must still see each publication."""
    path, random = folder / "store", np.random.default_rng(0)
    store, content = create(path), Content()
    reader = gradstore.open(path)
    for _, (change, after) in zip(range(trials), changes(2, content), strict=False):
        do(store, change)
        content = after
        for file in path.glob("**/*"):
            moment = float(random.choice([0.0, 1e9, 4.1e9]))
            with suppress(FileNotFoundError):
                os.utime(file, (moment, moment))
        if content_of(reader) != after.newest:
            raise ValueError("a publication was not seen after the clock was set")
    check(path, [content])
    return f"{trials} changes, after each the times of all files set to 1970, 2001 or 2099"


def _wait_for(log: Path, process: BaseProcess) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size):
        if not process.is_alive() or time.monotonic() > deadline:
            raise ValueError(f"a process that was to be killed ended by itself with {process.exitcode}")
        time.sleep(0.001)


def _kill(process: BaseProcess) -> None:
    if not process.is_alive() or process.pid is None:
        raise ValueError(f"a process that was to be killed ended by itself with {process.exitcode}")
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def main(
    only: Annotated[str, typer.Option(help="Parts, separated by commas; default: all.")] = "",
    kill: Annotated[int, typer.Option("--kills", help="Kills, over writers, compactions and index builds.")] = 200,
    flip: Annotated[int, typer.Option("--flips", help="Flipped bits.")] = 200,
    n_changes: Annotated[int, typer.Option("--changes", help="Changes in the log of the power cuts.")] = 60,
    seconds: Annotated[float, typer.Option(help="Length of the live run.")] = 60,
) -> None:
    """Run all parts and print the results."""
    parts: dict[str, tuple[str, Callable[[Path], str]]] = {
        "kills": ("kill -9: writers, deletions", lambda folder: kills(folder, kill - 2 * (kill // 4), 0.05)),
        "compactions": ("kill -9: mostly compactions", lambda folder: kills(folder, kill // 4, 0.6)),
        "indexes": ("kill -9: index builds", lambda folder: index_kills(folder, kill // 4)),
        "flips": ("flipped bits", lambda folder: flips(folder, flip)),
        "full": ("a full disk", lambda folder: full(folder, 20)),
        "cuts": ("power cuts", lambda folder: cuts(folder, n_changes)),
        "live": ("readers beside a writer", lambda folder: live(folder, seconds)),
        "clock": ("the clock jumps", lambda folder: clock(folder, 50)),
    }
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    rows = []
    for name in only.split(",") if only else parts:
        title, work = parts[name]
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            started = time.monotonic()
            told = work(Path(folder))
            rows.append([title, told, f"{time.monotonic() - started:.0f}", "0"])
    print_table("rows lost or wrong", ["what", "trials", "s", "rows lost or wrong"], rows, right=["s"])


if __name__ == "__main__":
    typer.run(main)
