"""The trainer's side: reward workers, started when first needed, that any number of threads share.

    results = pool_of("math").results(["42"], [(0, "\\boxed{42}", 0), (0, "\\boxed{43}", 1)])

Keepers (keeper.py) are started with an environment of a few names and none of the trainer's descriptors. They end with
this process, however it ends. After a fork, the child has no workers until it starts its own.
"""

import atexit
import functools
import logging
import os
import selectors
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gradstore.errors import GradstoreError, RequestError
from gradstore.trainer.sampling.workers import frames

log = logging.getLogger(__name__)

KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Environment variables that a worker keeps: none of them is a secret."""
MOST_WORKERS = 4
"""Workers of a pool, if the machine has as many processors."""
CHUNK = 64
"""Items sent to a worker at once."""
START_S = 300
"""Time in seconds in which a worker must have started."""


PoolItem = tuple[int, str | None, int]
"""What is graded: (index of its problem, response or None, number of the rollout)."""


@dataclass(frozen=True)
class Limits:
    """What grading one response may take."""

    seconds: float = 10.0
    """Processor time; a grader that computes longer is ended. On a busy machine no honest answer overruns."""
    wall: float = 60.0
    """Time on the clock, for a grader that waits."""
    memory: int = 1 << 30
    """Bytes in addition to what the verifiers hold when loaded."""


_live: "set[_Worker]" = set()
"""All workers of this process."""


class _Worker:
    """A keeper's process, and the chunk that it works on."""

    def __init__(self, role: str, spec: str, limits: Limits) -> None:
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gradstore.trainer.sampling.workers.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("a worker without pipes")
        self.requests, self.answers = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.inbox = frames.Inbox()
        self.ready = self.lost = False
        self.scratch = ""
        self.chunk: _Chunk | None = None
        self.deadline = time.monotonic() + START_S
        _live.add(self)
        frames.write(self.requests, {"role": role, "spec": spec, "limits": asdict(limits)})

    def send(self, chunk: "_Chunk", limits: Limits) -> None:
        """Give the idle worker a chunk."""
        self.chunk = chunk
        # the keeper watches every item; this is for a keeper that has stopped altogether
        self.deadline = time.monotonic() + 60 + 2 * len(chunk.items) * (limits.wall + 5)
        frames.write(self.requests, {"problems": chunk.problems, "items": chunk.items})

    def close(self, wait: float = 10.0) -> None:
        """Close the pipes, which ends the keeper and its scratch folder; kill it if it lives after `wait` seconds."""
        _live.discard(self)
        self.lost = True
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if not self.ready:  # it imports, and has no scratch folder yet
            self.process.kill()
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.scratch:  # the keeper removes it, unless it was killed
            shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class _Chunk:
    """Consecutive items of a call, with the problems they refer to."""

    first: int
    problems: list[Any]
    items: list[list[Any]]
    failed: int = 0
    """Keepers that were lost over it."""


class WorkerPool:
    """Workers of one role; its methods can be called from any thread."""

    def __init__(self, role: str, spec: str = "", limits: Limits = Limits(), workers: int | None = None) -> None:
        """role: "math", "reasoning-gym" or "function", of which `spec` is the name. workers: the largest number."""
        self._role, self._spec, self._limits = role, spec, limits
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._most = workers or min(MOST_WORKERS, processors)
        self._idle: list[_Worker] = []
        self._taken = 0
        self._change = threading.Condition()

    def results(self, problems: Sequence[Any], items: Iterable[PoolItem]) -> list[dict[str, Any]]:
        """Grade items; one result per item, in order.

        A result is {"score": number}, {"stopped": reason} where the response is to blame, or {"unusable": reason} where
        the problem is. None as a response asks only whether the problem can be graded.
        """
        chunks = deque(_chunks(problems, items))
        found: dict[int, dict[str, Any]] = {}
        workers = self._borrow(len(chunks))
        try:
            self._drive(workers, chunks, found)
        finally:
            self._give_back(workers)
        return [found[place] for place in range(len(found))]

    def close(self) -> None:
        """End all idle workers."""
        with self._change:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def _borrow(self, wanted: int) -> list[_Worker]:
        """At least one worker; more, up to `wanted`, if they are free or there may be more."""
        taken: list[_Worker] = []
        with self._change:
            while wanted and not self._idle and self._taken >= self._most:
                self._change.wait()
            while len(taken) < wanted and (self._idle or self._taken < self._most):
                self._taken += 1
                try:
                    taken.append(self._idle.pop() if self._idle else _Worker(self._role, self._spec, self._limits))
                except BaseException:
                    self._taken -= len(taken) + 1
                    self._idle += taken
                    raise
        return taken

    def _give_back(self, workers: list[_Worker]) -> None:
        """Keep those that are idle or start; those at work, after an interruption, are ended."""
        for worker in workers:
            if worker.chunk is not None:
                worker.close()
        whole = [worker for worker in workers if not worker.lost]
        with self._change:
            self._taken -= len(workers)
            self._idle += whole
            self._change.notify_all()

    def _drive(self, workers: list[_Worker], chunks: deque[_Chunk], found: dict[int, dict[str, Any]]) -> None:
        """Keep the workers at work until every chunk has its results; replace those that are lost."""
        while chunks or any(worker.chunk for worker in workers):
            for place, worker in enumerate(workers):
                if worker.ready and worker.chunk is None and chunks:
                    try:
                        worker.send(chunks.popleft(), self._limits)
                    except BrokenPipeError:
                        workers[place] = self._replaced(worker, chunks, found)
            for place in self._waited(workers):
                worker = workers[place]
                data = os.read(worker.answers, 1 << 20) if time.monotonic() < worker.deadline else b""
                try:
                    for message in worker.inbox.take(data):
                        self._received(worker, message, found)
                except frames.BrokenFrameError:
                    data = b""
                if not data:
                    workers[place] = self._replaced(worker, chunks, found)

    def _waited(self, workers: list[_Worker]) -> list[int]:
        """Places of workers that have sent something, or whose time is up."""
        busy = [place for place, worker in enumerate(workers) if worker.chunk is not None or not worker.ready]
        with selectors.DefaultSelector() as waiting:
            for place in busy:
                waiting.register(workers[place].answers, selectors.EVENT_READ, place)
            until = min(workers[place].deadline for place in busy)
            events = waiting.select(max(0.0, until - time.monotonic()))
        now = time.monotonic()
        return [key.data for key, _ in events] or [place for place in busy if workers[place].deadline <= now]

    def _received(self, worker: _Worker, message: Mapping[str, Any], found: dict[int, dict[str, Any]]) -> None:
        if "failed" in message:
            worker.close()
            reason = message["failed"]
            hint = "; pip install 'gradstore[sketch]'" if not self._spec and reason.startswith("ModuleNotFound") else ""
            raise RequestError(f"the workers of reward {self._spec or self._role!r} cannot start: {reason}{hint}")
        if "ready" in message:
            worker.ready, worker.scratch = True, message["scratch"]
            _say_missing(tuple(message["missing"]))
            return
        chunk, worker.chunk = worker.chunk, None
        if chunk is not None:
            found |= {chunk.first + i: result for i, result in enumerate(message["results"])}

    def _replaced(self, worker: _Worker, chunks: deque[_Chunk], found: dict[int, dict[str, Any]]) -> _Worker:
        """A new worker for one that was lost; its chunk is graded again, item by item."""
        chunk, worker.chunk = worker.chunk, None
        worker.close()
        if chunk is None and not worker.ready:
            raise GradstoreError(
                f"a worker of reward {self._spec or self._role!r} ended while it started, with status "
                f"{worker.process.returncode}"
            )
        if chunk is not None and len(chunk.items) > 1:
            chunks.extend(_Chunk(chunk.first + i, chunk.problems, [item]) for i, item in enumerate(chunk.items))
        elif chunk is not None and not chunk.failed:
            chunk.failed += 1
            chunks.append(chunk)
        elif chunk is not None:
            found[chunk.first] = {"stopped": "its worker was ended twice, perhaps for want of memory"}
        return _Worker(self._role, self._spec, self._limits)


def _chunks(problems: Sequence[Any], items: Iterable[PoolItem]) -> Iterable[_Chunk]:
    listed = list(items)
    for first in range(0, len(listed), CHUNK):
        part = listed[first : first + CHUNK]
        used = {problem: place for place, problem in enumerate(dict.fromkeys(item[0] for item in part))}
        yield _Chunk(first, [problems[i] for i in used], [[used[problem], *rest] for problem, *rest in part])


@functools.cache
def _say_missing(lacks: tuple[str, ...]) -> None:
    if lacks:
        log.warning("rewards run with fewer protections than on Linux 5.13 or later, without: %s", "; ".join(lacks))


_pools: dict[tuple[str, str], WorkerPool] = {}
_lock = threading.Lock()


def pool_of(role: str, spec: str = "") -> WorkerPool:
    """This process's workers of a role, shared by all rewards and threads."""
    with _lock:
        if (role, spec) not in _pools:
            _pools[role, spec] = WorkerPool(role, spec)
        return _pools[role, spec]


def close_workers() -> None:
    """End all idle workers; the next answer starts new ones."""
    for pool in list(_pools.values()):
        pool.close()


def _forget() -> None:
    """In a forked child: close the pipes of the parent's workers, which end when no process holds their pipes."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()
    for worker in list(_live):
        worker.process.returncode, worker.ready, worker.scratch = 0, True, ""  # no child of this process
        worker.close()


atexit.register(close_workers)
os.register_at_fork(after_in_child=_forget)
