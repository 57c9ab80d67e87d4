"""Simulation of a run on Ray workers: `engine/cluster/pool.py` event by event, with times in place of work.

A job is a number of equal windows of problems. The driver (one thread) reads a window, submits it, takes its result,
and uses it in the windows' order; it hands out work as `Pool.map` does, with the same numbers of windows in flight.
Workers take their time at a window. Windows travel through the driver's network link one after another; results are
small, so they are only delayed by their own size.
"""

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from gradstore.engine.cluster.pool import DEPTH, HELD


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run, in seconds and bytes."""

    windows: int
    work: float
    """Seconds of a worker for a window, on average."""
    spread: float = 0.0
    """Standard deviation of the logarithm of a window's work."""
    submit: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the driver for each window that it hands out, by part."""
    take: Mapping[str, float] = field(default_factory=dict)
    """The same for each result that it takes."""
    use: Mapping[str, float] = field(default_factory=dict)
    """The same for each result that it uses, in order."""
    publish: float = 0.0
    """Seconds of the driver for a publication."""
    every: float = 5.0
    """Seconds between publications."""
    sent: float = 0.0
    """Bytes of a window."""
    returned: float = 0.0
    """Bytes of a result."""

    @property
    def driver(self) -> float:
        """Seconds of the driver for a window, publications left out."""
        return sum(sum(part.values()) for part in (self.submit, self.take, self.use))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the simulation found."""

    seconds: float
    workers_busy: float
    """Share of the workers' time that is work."""
    driver_busy: float
    """Share of the time in which the driver does something."""
    link_busy: float
    """Share of the time in which the driver's link sends."""


def simulate(job: Job, workers: int, link: float = float("inf"), *, latency: float = 0.0, seed: int = 0) -> Outcome:
    """Run the job. link: bytes per second that the driver can send. latency: seconds of each message."""
    random = np.random.default_rng(seed)
    works = job.work * np.exp(job.spread * random.standard_normal(job.windows) - job.spread**2 / 2)
    submit, take, use = (sum(part.values()) for part in (job.submit, job.take, job.use))
    sending, returning = job.sent / link, job.returned / link + latency
    running: list[deque[tuple[float, int]]] = [deque() for _ in range(workers)]  # (result arrives, window)
    free = [0.0] * workers
    heads: list[tuple[float, int]] = []  # of the workers' oldest windows: (result arrives, worker)
    by_depth: list[list[int]] = [list(range(workers))[::-1], *([] for _ in range(DEPTH))]
    finished: set[int] = set()
    now = link_free = published = busy = 0.0
    given = wanted = 0
    while wanted < job.windows:
        while given < job.windows and given - wanted < workers * (DEPTH + HELD):
            depth = next((depth for depth in range(DEPTH) if by_depth[depth]), None)
            if depth is None:
                break
            worker = by_depth[depth].pop()
            now, busy = now + submit, busy + submit
            link_free = max(now, link_free) + sending
            free[worker] = max(link_free + latency, free[worker]) + works[given]
            running[worker].append((free[worker] + returning, given))
            by_depth[depth + 1].append(worker)
            if depth == 0:
                heapq.heappush(heads, (running[worker][0][0], worker))
            given += 1
        if wanted in finished:
            finished.remove(wanted)
            wanted += 1
            now, busy = now + use, busy + use
            if job.publish and now - published > job.every:
                now, busy = now + job.publish, busy + job.publish
                published = now
            continue
        arrived, worker = heapq.heappop(heads)
        now = max(now, arrived)
        by_depth[len(running[worker])].remove(worker)
        while running[worker] and running[worker][0][0] <= now:
            finished.add(running[worker].popleft()[1])
            now, busy = now + take, busy + take
        by_depth[len(running[worker])].append(worker)
        if running[worker]:
            heapq.heappush(heads, (running[worker][0][0], worker))
    return Outcome(now, float(works.sum()) / workers / now, busy / now, job.windows * sending / now)
