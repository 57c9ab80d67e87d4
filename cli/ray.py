"""The options of commands whose work Ray workers can do, and what is said of the workers afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from gradstore.cli.app import opt
from gradstore.cli.show import say
from gradstore.errors import RequestError, check_number

if TYPE_CHECKING:
    from gradstore.engine.cluster.pool import Cost

Address = Annotated[
    str | None,
    opt(
        "Spread the work over Ray workers: local (a Ray of its own here), auto (the cluster of this machine) "
        "or HOST:PORT. The result is that of one process.",
        "--ray",
    ),
]
Workers = Annotated[int | None, opt("--ray: workers, each with the model [default: as many as there is room for].")]
Threads = Annotated[int | None, opt("--ray: CPUs and torch threads of a worker, and torch threads here [default: 1].")]


@dataclass(frozen=True, slots=True)
class Size:
    """Number and size of the workers."""

    workers: int
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says of Ray."""

    address: str
    workers: int | None
    threads: int
    device: str | None

    @contextmanager
    def connected(self, gpus_each: int = 1) -> Iterator[Size]:
        """Ray for the time of the block. gpus_each: GPUs of a worker on a cluster with GPUs."""
        from gradstore.engine.cluster.pool import room_for
        from gradstore.engine.cluster.ray_start import connected

        with connected(self.address, self.threads * (self.workers or 1)):
            gpus = 0 if self.device == "cpu" or not room_for(cpus=1, gpus=1) else gpus_each
            size = Size(self.workers or max(1, room_for(cpus=self.threads, gpus=gpus)), self.threads, gpus)
            with_gpus = f" and {gpus} GPUs" if gpus else ""
            say(f"Ray workers: {size.workers}, each with {self.threads} CPUs{with_gpus}")
            yield size


def asked(address: str | None, workers: int | None, threads: int | None, device: str | None) -> Asked | None:
    """The checked options; None without --ray.

    From here on this process computes with as many threads as a worker: what it fits and measures is then what one
    process with OMP_NUM_THREADS=`threads` would. RequestError for options that lack their --ray, and for a numbered
    device: Ray says which GPU a worker gets.
    """
    for name, value in (("--workers", workers), ("--threads", threads)):
        if value is not None and address is None:
            raise RequestError(f"{name}: only with --ray")
        check_number(name, 1 if value is None else value, least=1)
    if address is None:
        return None
    if device not in (None, "cpu", "cuda"):
        raise RequestError(f"--device {device} with --ray: expected cpu or cuda; Ray gives each worker its own GPU")
    from gradstore.engine.cluster.worker import limit_threads

    limit_threads(threads or 1)
    return Asked(address, workers, threads or 1, device)


def described(costs: "list[Cost]") -> list[dict[str, Any]]:
    """The workers' costs for --json."""
    from gradstore.engine.cluster.pool import describe

    return describe(costs)


def say_costs(costs: "list[Cost]") -> None:
    """A line of commentary for each worker."""
    from gradstore.engine.cluster.pool import sentences

    for line in sentences(costs):
        say(line)
