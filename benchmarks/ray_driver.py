"""What the driver of Ray workers needs for a window and for a problem, measured on this machine.

Processor time of the driver's one thread, so that other load on the machine counts little; publications by the clock.
Workers sleep instead of computing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gradstore
from gradstore import State, Writer
from gradstore.engine.cluster.pool import Pool, Window
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.rollout import Rollout
from gradstore.engine.rollouts.source import RolloutSource, read_rollouts
from gradstore.engine.rollouts.write import write_rollouts
from gradstore.engine.sketches.spec import SketchBatch

ROLLOUTS, TOKENS, PROMPT = 16, 1000, 200
"""Rollouts of a problem, tokens of a response and of a prompt."""


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds for a window of n problems: `window + n * problem`."""

    window: float
    problem: float

    @classmethod
    def through(cls, seconds: Mapping[int, float]) -> "Line":
        """The line through two measurements, problems -> seconds; neither part below 0."""
        (few, low), (many, high) = sorted(seconds.items())
        problem = max(0.0, (high - low) / (many - few))
        return cls(max(0.0, low - few * problem), problem)

    def __call__(self, n: int) -> float:
        return self.window + n * self.problem


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver needs, in seconds; `Line`s for parts that have a cost per window."""

    index: dict[str, Line]
    """The pass that checks a rollout file, before anything is computed; by the file's suffix."""
    read: dict[str, Line]
    """Read a problem's group again; twice: for the checks of `collect`, and for the workers."""
    submit: Line
    take: Line
    append: Line
    """Rows into the store."""
    publish: float
    publish_per_row: float
    """Further seconds of a publication for each row of the store."""
    decode: Line
    """Token ids of the responses to text."""
    write: Line
    """Rows of the rollout file."""
    file_bytes: float
    """Of a problem's rollouts in a file."""
    sent_bytes: float
    """Of a problem's group, sent to a worker of `collect`; nearly those a worker of `rollout` returns."""
    row_bytes: float


def measured(folder: Path, dim: int) -> Driver:
    """Measure all parts on this machine. Ray must be initialised. A window's own cost follows from 1 and 8 problems."""
    from gradstore.demo.pretrain import make_tokenizer
    from gradstore.engine.rollouts.tokens import text_of

    tokenizer = make_tokenizer()
    made = {n: list(random_rollouts(n, len(tokenizer))) for n in (1, 8)}

    def file(n: int, suffix: str = ".jsonl") -> Path:
        return folder / f"rollouts-{n}{suffix}"

    def write(n: int, suffix: str = ".jsonl") -> None:
        with write_rollouts(file(n, suffix)) as writer:
            writer.append(made[n])

    def decode(n: int) -> None:
        for rollout in made[n]:
            text_of(tokenizer, rollout.response_ids.tolist(), skip_special_tokens=True)

    decoded, written, index, read = _line(decode), _line(write), {}, {}
    for suffix in (".jsonl", ".parquet"):
        for n in made:
            write(n, suffix)
        sources = {n: read_rollouts(file(n, suffix)) for n in made}
        index[suffix] = _line(lambda n, suffix=suffix: read_rollouts(file(n, suffix)))
        read[suffix] = _line(lambda n, sources=sources: list(sources[n].groups()))
    source = read_rollouts(file(8))
    submit, take = _through_ray(list(source.groups()), dim)
    append, publish, publish_per_row, row_bytes = _through_store(folder, dim)
    sent = sum(sum(r.nbytes for r in g.responses) + sum(p.nbytes for p in g.logprobs or ()) for g in source.groups())
    return Driver(
        index, read, submit, take, append, publish, publish_per_row, decoded, written,
        file(8).stat().st_size / 8, sent / 8, row_bytes,
    )  # fmt: skip


def random_rollouts(n: int, vocabulary: int) -> Iterator[Rollout]:
    random = np.random.default_rng(0)
    for problem in range(n):
        prompt = random.integers(4, vocabulary, PROMPT)
        for _ in range(ROLLOUTS):
            response = random.integers(4, vocabulary, TOKENS)
            logprobs = -random.exponential(size=TOKENS).astype(np.float32)
            yield Rollout(
                f"p{problem}", float(random.integers(2)), prompt="?", prompt_ids=prompt, response_ids=response,
                logprobs=logprobs, response="x" * 4 * TOKENS,
            )  # fmt: skip


def _line(job: Callable[[int], object], repeats: int = 5) -> Line:
    """Least processor seconds of this thread, for 1 and 8 problems."""
    seconds = {1: float("inf"), 8: float("inf")}
    for _ in range(repeats):
        for n in seconds:
            started = time.thread_time()
            job(n)
            seconds[n] = min(seconds[n], time.thread_time() - started)
    return Line.through(seconds)


class _TimedPool(Pool):
    """A pool that adds up the processor time of its driver's thread."""

    submitting = taking = 0.0

    def _submit(self, *arguments: Any) -> None:
        started = time.thread_time()
        super()._submit(*arguments)
        self.submitting += time.thread_time() - started

    def _wait(self, *arguments: Any) -> None:
        started = time.thread_time()
        super()._wait(*arguments)
        self.taking += time.thread_time() - started


@dataclass(frozen=True, slots=True)
class Sleeping:
    """A worker's function that sleeps instead of sketching."""

    dim: int

    def __call__(self) -> Callable[..., SketchBatch]:
        return self.sketch

    def sketch(self, groups: Sequence[Group], seconds: float = 0.0) -> SketchBatch:
        """Random sketches of the groups, after this time."""
        time.sleep(seconds)
        return _batch([group.problem_id for group in groups], self.dim)


def _batch(ids: Sequence[str], dim: int) -> SketchBatch:
    n = len(ids)
    sketches = np.random.default_rng(0).standard_normal((n, dim), dtype=np.float32)
    counts, rates = np.full(n, ROLLOUTS, np.int32), np.full(n, 0.5, np.float32)
    return SketchBatch(list(ids), sketches, [State.LIVE] * n, [""] * n, rates, counts, 0)


def _through_ray(groups: Sequence[Group], dim: int, n_windows: int = 150) -> tuple[Line, Line]:
    """The driver's seconds to hand out windows and to take results, with a worker that does nothing."""
    submitting, taking = {}, {}
    for n in (1, 8):
        with _TimedPool(Sleeping(dim), workers=1) as pool:
            list(pool.map(Window((groups[:n],), n, "warm") for _ in range(10)))
            pool.submitting = pool.taking = 0.0
            list(pool.map(Window((groups[:n],), n, "timed") for _ in range(n_windows)))
        submitting[n], taking[n] = pool.submitting / n_windows, pool.taking / n_windows
    return Line.through(submitting), Line.through(taking)


def _through_store(folder: Path, dim: int, rows: int = 100_000) -> tuple[Line, float, float, float]:
    """Seconds to append a window; of a publication, and more per row of the store; and a row's bytes."""
    ids = [f"p{i:07d}" for i in range(rows)]
    store = gradstore.create(folder / "store", dim=dim, fingerprint={})
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    batches = {n: _batch(ids[:n], dim) for n in (1, 8)}
    with store.writer("pool", step=0) as writer:
        append = _line(lambda n: writer.append(**batches[n].rows()), 30)
        few = _publication(writer, batches[8])
        for start in range(0, rows, 8000):
            writer.append(**_batch(ids[start : start + 8000], dim).rows())
        writer.publish()
        many = _publication(writer, batches[8])
    size_of = sum(file.stat().st_size for file in (folder / "store/collections/pool").rglob("*") if file.is_file())
    return append, few, max(0.0, (many - few) / rows), size_of / rows


def _publication(writer: Writer, batch: SketchBatch) -> float:
    """Seconds by the clock, the median of nine."""
    taken = []
    for _ in range(9):
        writer.append(**batch.rows())
        started = time.perf_counter()
        writer.publish()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def slowness(source: RolloutSource) -> float:
    """Seconds by the clock for a second of this thread's processor time, reading groups now: 1 on an idle machine."""
    started, used = time.perf_counter(), time.thread_time()
    for _ in range(6):
        list(source.groups())
    return (time.perf_counter() - started) / (time.thread_time() - used)


def sleeping_run(
    folder: Path, source: RolloutSource, pool: Pool, work: float, n_windows: int, n_problems: int, dim: int
) -> tuple[float, float]:
    """What `collect` does in the driver, with workers that sleep for `work` seconds at a window.

    Returns seconds by the clock of reading, mapping and appending; and the driver thread's processor time per window.
    """
    store = gradstore.create(folder, dim=dim, fingerprint={})
    store.add_problems("pool", list(source.records()))

    def windows() -> Iterator[Window]:
        for number in range(n_windows):
            ids = [source.problem_ids[(number + j) % len(source)] for j in range(n_problems)]
            yield Window((list(source.groups(ids)), work), n_problems, str(number))

    with store.writer("pool", step=0) as writer:
        started, used = time.perf_counter(), time.thread_time()
        for batch in pool.map(windows()):
            writer.append(**batch.rows())
        took, used = time.perf_counter() - started, time.thread_time() - used
    return took, used / n_windows
