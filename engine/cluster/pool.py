"""A pool of Ray actors that maps windows of problems to results, in order, with a bounded number in flight.

    with Pool(make, workers=4) as pool:           # make() -> the function that a worker applies, e.g. with a model
        for result in pool.map(windows):          # in the windows' order, whatever worker was first
            ...

A window is the unit of work: it is computed as a whole by one worker, so a result depends neither on the number of
workers nor on which of them had it. A lost worker is replaced and its windows are computed again; the window at which
workers are lost `ATTEMPTS` times ends the run. The pool takes no more windows than its workers have room for, so a slow
consumer slows the workers down instead of filling the memory.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any

from gradstore.engine.cluster.worker import Make, PoolWorker, installed_version
from gradstore.errors import GradstoreError, RequestError, check_number, first_line, needing

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Workers that may be lost at one window, or in a row while they load, before the run fails."""
DEPTH = 2
"""Windows that a worker holds: the one it computes and the next."""
HELD = 2
"""Windows per worker beyond those, finished but waiting for an earlier one."""
_PATIENCE = 600.0
"""Seconds to wait for the cluster to place the first worker."""
_REMARK = 30.0
"""Seconds without an event after which missing workers are mentioned."""


@dataclass(frozen=True, slots=True)
class Window:
    """One call of a worker's function."""

    arguments: tuple[Any, ...]
    problems: int
    name: str
    """For messages: `problems 'a' to 'b'`."""


@dataclass(slots=True)
class Cost:
    """What one place of the pool has done."""

    worker: int
    node: str = ""
    """Address of the machine of the newest worker in this place."""
    pid: int = 0
    windows: int = 0
    problems: int = 0
    seconds: float = 0.0
    """Time spent on finished windows."""
    loading_seconds: float = 0.0
    lost: int = 0
    """Workers lost in this place, each replaced by another."""


@dataclass(slots=True)
class _Place:
    """A place of the pool and the worker in it."""

    cost: Cost
    actor: Any = None
    starting: Any = None
    """Reference to the answer of a worker that does not yet work: to `hello`, then to `load`."""
    loading: bool = False
    """Whether `starting` is the answer to `load`."""
    failed_starts: int = 0
    running: deque[tuple[int, Any]] = field(default_factory=deque)
    """(number of the window, reference to its result), in the order in which the worker computes them."""

    @property
    def ready(self) -> bool:
        return self.starting is None

    def __str__(self) -> str:
        return f"worker {self.cost.worker} (process {self.cost.pid} on {self.cost.node or 'no machine yet'})"


class Pool:
    """Workers that apply one function to many windows; Ray must be initialised (ray_start.py)."""

    def __init__(self, make: Make, *, workers: int, cpus: int = 1, gpus: int = 0) -> None:
        """make: picklable. cpus: CPUs of a worker, and torch's threads in it. gpus: GPUs of a worker.

        RequestError if the cluster has room for none of them. If it has room for fewer, those that can be placed work.
        """
        with needing("a pool of workers", "gradstore[ray]"):
            import ray

        self._ray = ray
        check_number("workers", workers, least=1)
        check_number("threads of a worker", cpus, least=1)
        room = room_for(cpus=cpus, gpus=gpus)
        if not room:
            raise RequestError(
                f"the Ray cluster has no room for a worker of {cpus} CPUs and {gpus} GPUs: {_resources(ray)}"
            )
        if room < workers:
            log.warning("the Ray cluster has room for %d of %d workers now: %s", room, workers, _resources(ray))
        self._make = ray.put(make)
        self._kind = ray.remote(PoolWorker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
        self._cpus = cpus
        self._about: Any = None
        self._agreed = False
        self._places = [_Place(Cost(number)) for number in range(workers)]
        self._began = time.monotonic()
        for place in self._places:
            self._start(place)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        for place in self._places:
            if place.actor is not None:
                self._ray.kill(place.actor)
                place.actor = place.starting = None
                place.running.clear()

    @property
    def costs(self) -> list[Cost]:
        """What each place has done so far."""
        return [place.cost for place in self._places]

    def about(self) -> Any:
        """`about` of the workers' function, once the first has loaded; None if the function has none."""
        while not self._agreed:
            self._wait()
        return self._about

    def map(self, windows: Iterable[Window]) -> Iterator[Any]:
        """The results of all windows, in their order. One `map` at a time.

        Raises the GradstoreError that a worker's function raised; GradstoreError naming the window and the worker if
        workers are lost again and again.
        """
        source, numbers = iter(windows), count()
        run = _Run()
        most = len(self._places) * (DEPTH + HELD)
        wanted, exhausted = 0, False
        while True:
            for place in self._with_room(run):
                if run.again:
                    if place.running:
                        continue  # alone on a worker: if that is lost too, it was at this window
                    number = run.again.popleft()
                elif exhausted or len(run.windows) >= most:
                    break
                else:
                    window = next(source, None)
                    if window is None:
                        exhausted = True
                        break
                    number = next(numbers)
                    run.windows[number] = window
                self._submit(place, number, run.windows[number])
            if wanted in run.results:
                del run.windows[wanted]
                yield run.results.pop(wanted)
                wanted += 1
            elif exhausted and not run.windows:
                return
            else:
                self._wait(run)

    def _with_room(self, run: "_Run") -> Iterator[_Place]:
        """Working places that can take a window, those with the fewest first; none behind a window done again."""
        for depth in range(DEPTH):
            for place in self._places:
                behind = any(number in run.lost for number, _ in place.running)
                if place.ready and len(place.running) == depth and not behind:
                    yield place

    def _submit(self, place: _Place, number: int, window: Window) -> None:
        place.running.append((number, place.actor.run.remote(window.arguments)))

    def _start(self, place: _Place) -> None:
        place.actor = self._kind.remote()
        place.starting, place.loading = place.actor.hello.remote(), False

    def _wait(self, run: "_Run | None" = None) -> None:
        """Wait for something to happen, and take it."""
        events = {place.starting: place for place in self._places if place.starting is not None}
        events |= {place.running[0][1]: place for place in self._places if place.running}
        done, _ = self._ray.wait(list(events), num_returns=1, timeout=_REMARK)
        if not done:
            self._remark()
        for event in done:
            place = events[event]
            try:
                if place.starting is not None:
                    self._started(place)
                elif run is not None:
                    self._take(place, run)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                if not isinstance(cause, GradstoreError):
                    raise
                if not place.ready:
                    raise type(cause)(f"{place}: {cause}") from None
                raise cause from None
            except self._ray.exceptions.RayError as error:
                self._replace(place, error, run or _Run())

    def _started(self, place: _Place) -> None:
        """Take the answer of a worker that starts."""
        answer = self._ray.get(place.starting)
        if not place.loading:
            place.cost.node, place.cost.pid, version = answer
            if version != installed_version():
                raise RequestError(
                    f"{place}: it has gradstore {version}, here is {installed_version()}: install the same"
                )
            place.starting, place.loading = place.actor.load.remote(self._make, self._cpus, os.getcwd()), True
            return
        about, seconds, records = answer
        _pass_on(place, records)
        if not self._agreed:
            self._about, self._agreed = about, True
        elif about != self._about:
            raise RequestError(
                f"{place}: it has {about}, the others have {self._about}: results would depend on the worker; give all "
                "the same model, and fix the number of tokens computed at once (--batch-tokens, --token-budget)"
            )
        place.cost.loading_seconds += seconds
        place.starting, place.failed_starts = None, 0

    def _take(self, place: _Place, run: "_Run") -> None:
        """Take all finished windows of a worker, in its order."""
        while place.running:
            number, reference = place.running[0]
            if not self._ray.wait([reference], timeout=0)[0]:
                return
            result, seconds, records = self._ray.get(reference)
            place.running.popleft()
            _pass_on(place, records)
            cost = place.cost
            cost.windows, cost.problems = cost.windows + 1, cost.problems + run.windows[number].problems
            cost.seconds += seconds
            run.results[number] = result

    def _replace(self, place: _Place, error: Exception, run: "_Run") -> None:
        """Put a new worker into the place of a lost one; its windows are computed again."""
        reason = first_line(error)
        place.cost.lost += 1
        if place.running:
            for number, _ in place.running:  # the result of the first may have been on its way
                run.lost[number] = run.lost.get(number, 0) + 1
            tries = max(run.lost[number] for number, _ in place.running)
            at = " or ".join(run.windows[number].name for number, _ in place.running)
        else:
            place.failed_starts += 1
            tries, at = place.failed_starts, "loading"
        if tries >= ATTEMPTS:
            raise GradstoreError(f"{tries} workers were lost at {at}; the last was {place}: {reason}")
        log.warning("%s was lost at %s and is replaced: %s", place, at, reason)
        run.again.extendleft(number for number, _ in reversed(place.running))
        place.running.clear()
        self._ray.kill(place.actor)
        self._start(place)

    def _remark(self) -> None:
        """Mention workers that the cluster has not placed; GradstoreError if it placed none for a long time."""
        unplaced = [place for place in self._places if place.starting is not None and not place.loading]
        if not unplaced:
            return
        waited, text = time.monotonic() - self._began, _resources(self._ray)
        if len(unplaced) == len(self._places) and waited > _PATIENCE:
            raise GradstoreError(f"Ray placed none of {len(unplaced)} workers in {waited:.0f} s: {text}")
        log.info("%d of %d workers wait for a place in the Ray cluster: %s", len(unplaced), len(self._places), text)


@dataclass(slots=True)
class _Run:
    """State of one `map`: windows by their number."""

    windows: dict[int, Window] = field(default_factory=dict)
    """Taken from the source, and not yet passed on."""
    results: dict[int, Any] = field(default_factory=dict)
    again: deque[int] = field(default_factory=deque)
    """Windows of lost workers, to be computed before others."""
    lost: dict[int, int] = field(default_factory=dict)
    """Window -> workers lost at it."""


def room_for(*, cpus: int, gpus: int) -> int:
    """Workers of this size that the cluster's machines have room for when nothing else runs there."""
    import ray

    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            own = node["Resources"]
            fitting = [int(own.get("CPU", 0) // cpus), *([int(own.get("GPU", 0) // gpus)] if gpus else [])]
            total += min(fitting)
    return total


def named_range(ids: Sequence[str]) -> str:
    """A window's name by its problems."""
    return f"problem {ids[0]!r}" if len(ids) == 1 else f"problems {ids[0]!r} to {ids[-1]!r}"


def describe(costs: Iterable[Cost]) -> list[dict[str, Any]]:
    """The costs as JSON-able values, with problems per second."""
    return [{**asdict(cost), "problems_per_second": _rate(cost)} for cost in costs]


def sentences(costs: Iterable[Cost]) -> list[str]:
    """A line for each worker."""
    return [
        f"worker {cost.worker} on {cost.node}: {cost.problems} problems in {cost.windows} windows, {cost.seconds:.1f} s"
        + (f", {cost.lost} lost and replaced" if cost.lost else "")
        for cost in costs
    ]


def _rate(cost: Cost) -> float:
    return cost.problems / cost.seconds if cost.seconds else 0.0


def _resources(ray: Any) -> str:
    found = ray.cluster_resources()
    return f"it has {found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs"


def _pass_on(place: _Place, records: Iterable[tuple[str, int, str]]) -> None:
    for name, level, text in records:
        logging.getLogger(name).log(level, "worker %d: %s", place.cost.worker, text)
