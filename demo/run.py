"""Compare selectors end to end, on a small model and problems with known defects.

For each seed: draw a pool and a benchmark, roll both out, collect sketches into a store, compute the target, query, and
let every selector pick a tenth of the pool. The picks are then compared with the problems' known kinds: of the target
family or not, with a right reward or a broken one. Every stage resumes after an interruption.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradstore
from gradstore.analysis.composition import source_shares, tag_shares
from gradstore.demo import tasks
from gradstore.engine.assessing.start import start_store
from gradstore.engine.gradients.models import load_model, load_tokenizer
from gradstore.engine.rollouts import read_rollouts
from gradstore.engine.searching.query import search
from gradstore.engine.searching.targets import target
from gradstore.engine.selecting.selection import select
from gradstore.engine.selecting.selectors import SELECTORS
from gradstore.engine.sketches.bases import sketcher_of
from gradstore.engine.sketches.collector import collect
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout

MODEL = Path(__file__).parent / "model"
SEEN = 0.8
"""Minimum share of the gradient that sketches must see; in this model, the embedding has an eighth of the gradient."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The demo's policy, and the problems that it can learn."""

    model: Path = MODEL
    families: tasks.Configs = field(default_factory=lambda: tasks.CONFIGS)
    """Families of the pool; the target family is one of them."""
    second_family: str = "spell_backward"
    """Family of a training run's second benchmark, which is measured but not used for selection."""
    second_benchmark: str = "spelling"
    """Name of that benchmark."""
    least_seen: float = SEEN
    """Minimum share of the gradient that sketches must see."""
    n_threads: int | None = 1
    """Threads of torch; None: torch's default. For small layers, a second thread costs more than it gains."""

    def load(self) -> tuple[nn.Module, Any]:
        """The model and its tokenizer; sets the number of threads."""
        if self.n_threads is not None:
            torch.set_num_threads(self.n_threads)
        return load_model(self.model, device="cpu"), load_tokenizer(self.model)


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Sizes of the demo."""

    subject: Subject = field(default_factory=Subject)
    n_pool: int = tasks.POOL_SIZE
    n_benchmark: int = tasks.BENCHMARK_SIZE
    n_selected: int = 200
    n_rollouts: int = 16
    max_new_tokens: int = 8
    dim: int = 1024
    n_fitted: int = 200
    batch_tokens: int = 16_384
    chunk: int = 256
    """Problems rolled out at once; an interruption loses at most this much work."""


@dataclass(slots=True)
class DemoResult:
    """Results of one seed."""

    seed: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage, in seconds."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Selector -> shares among its picks: target family, broken rewards, and each kind of broken reward."""
    bytes_per_problem: float = 0.0
    dim: int = 0
    states: dict[str, int] = field(default_factory=dict)

    called: str = ""
    """Which seed of how many, in words."""
    left: "TimeLeft | None" = None

    @contextmanager
    def stage(self, name: str, tell: Callable[[str], None]) -> Iterator[None]:
        """Time a stage and report its end, with the time that is left."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        left = "" if self.left is None else self.left.after(name)
        tell(f"{self.called}: {name} {self.seconds[name]:.1f} s{left}")


Bar = Callable[[str, int | None], AbstractContextManager[Callable[..., None]]]
"""bar(title, total) -> a context with a callback(number newly done)."""


def run_demo(
    folder: Path,
    seed: int,
    settings: DemoSettings,
    tell: Callable[[str], None],
    *,
    bar: Bar | None = None,
    called: str | None = None,
    left: "TimeLeft | None" = None,
) -> DemoResult:
    """Run all stages for one seed, in its own folder; `tell` is called with a line at the end of each stage.

    bar: shows the progress of a long stage; None: a line every 20 s. called: which seed it is, in words. left: tells
    the time that the whole demo still takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = DemoResult(seed, called=called or f"seed {seed}", left=left)
    shows: Bar = bar or (lambda title, total: nullcontext(counted(title, total, tell)))
    model, tokenizer = settings.subject.load()
    backend = TransformersBackend(model, tokenizer, batch_tokens=settings.batch_tokens)
    reward = Reward("demo", tasks.reward)
    problems = {
        "pool": tasks.pool(seed, settings.n_pool, settings.subject.families),
        "benchmark": tasks.benchmark(seed, settings.n_benchmark, settings.subject.families),
    }
    for name, records in problems.items():
        title = f"rollouts of the {name}"
        with result.stage(title, tell), shows(f"{result.called}: {title}", len(records)) as advance:
            rollout(
                records,
                backend,
                reward,
                folder / f"{name}.jsonl",
                n=settings.n_rollouts,
                max_new_tokens=settings.max_new_tokens,
                seed=seed,
                chunk=settings.chunk,
                step=0,
                progress=advance,
            )
    path = folder / "store"
    if path.exists():
        store = gradstore.open(path, mode="a")
    else:
        with result.stage("fitting the projection", tell):
            made = start_store(
                path,
                model,
                read_rollouts(folder / "pool.jsonl"),
                SketchSpec(basis="fitted", dim=settings.dim, seed=seed),
                fit_problems=settings.n_fitted,
                measured=False,
                accept_coverage=settings.subject.least_seen,
                widen=False,
                say=lambda line: tell(f"{result.called}: {line}"),
                bar=lambda title, total: shows(f"{result.called}: {title}", total),
            )
            store = made.store
    sketcher = sketcher_of(store, model)
    for name in problems:
        title, source = f"sketches of the {name}", read_rollouts(folder / f"{name}.jsonl")
        with result.stage(title, tell), shows(f"{result.called}: {title}", len(source)) as advance:
            collect(store, name, source, sketcher=sketcher, step=0, progress=advance)
    with result.stage("target", tell):
        wanted = target(store, "benchmark")
    with result.stage("query, top 20", tell):
        search(store.view("pool"), wanted, 20)
    without_probes = {name: selector for name, selector in SELECTORS.items() if not selector.needs_probes}
    with result.stage(f"{len(without_probes)} selectors", tell):
        for name, selector in without_probes.items():
            chosen = select(
                store, "pool", wanted if selector.needs_target else None, settings.n_selected, name, seed=seed
            )
            result.shares[name] = _shares(store, chosen.ids)
    result.shares["(pool)"] = _shares(store, store.view("pool").ids.tolist())
    about = store.info()["collections"]["pool"]
    result.dim, result.states = store.dim, about["states"]
    result.bytes_per_problem = store.row_bytes
    return result


def counted(
    name: str, total: int | None, tell: Callable[[str], None], of: str = "problem", every: float = 20.0
) -> Callable[..., None]:
    """A progress callback(number newly done, of what `of` says) that reports the total every `every` seconds."""
    done, last = 0, time.monotonic()

    def advance(n: int, *, description: str | None = None) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last >= every:
            last = time.monotonic()
            tell(f"{name}: {done} {of}s" if total is None else f"{name}: {done} of {total} {of}s")

    return advance


_FINDS = 0.5
"""A selector finds the target family if at least this share of its picks is of it."""


def conclusion(shares: dict[str, dict[str, list[float]]]) -> str:
    """What the shares of `summary` say, in two or three sentences."""
    by_name = {name: kinds for name, kinds in shares.items() if name != "(pool)"}
    family = {name: kinds["family"] for name, kinds in by_name.items()}
    pool = shares["(pool)"]
    best = max(family, key=lambda name: family[name][0])
    finders = [name for name in family if family[name][0] >= _FINDS]
    text = (
        f"Of the picks of {best}, {_percent(family[best][0])} are of the benchmark's family, of the pool "
        f"{_percent(pool['family'][0])}."
    )
    if finders:
        cleanest = min(finders, key=lambda name: by_name[name]["broken"][0])
        broken = _percent(by_name[cleanest]["broken"][0]), _percent(pool["broken"][0])
        text += (
            f" Of the {len(finders)} selectors that mostly find this family, {cleanest} takes the fewest broken "
            f"rewards, {broken[0]} of its picks, where the pool has {broken[1]}."
        )
    if "rand" in family:
        worse = [
            name
            for name in family
            if by_name[name]["broken"][0] > by_name["rand"]["broken"][0] + _spread(by_name, name)
        ]
        if worse:
            names = " and ".join(filter(None, (", ".join(worse[:-1]), worse[-1])))
            text += f" {names} {'take' if len(worse) > 1 else 'takes'} more broken rewards than a random choice."
    return text


def _spread(by_name: dict, name: str) -> float:
    """Two standard deviations of the difference of a selector's broken share and that of `rand`."""
    return 2 * float(np.hypot(by_name[name]["broken"][1], by_name["rand"]["broken"][1]))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


BETTER = {"family": max, "broken": min, "wrong_truth": min, "coin_flip": min}
"""Share -> which of several is the best."""


def best_of(shares: dict[str, dict[str, list[float]]]) -> dict[str, str]:
    """Share -> the selector that has the best of it, by its mean over seeds."""
    names = [name for name in shares if name != "(pool)"]
    return {kind: best(names, key=lambda name: shares[name][kind][0]) for kind, best in BETTER.items()}


_USUAL = {
    "rollouts of the pool": 0.28, "rollouts of the benchmark": 0.03, "fitting the projection": 0.21,
    "sketches of the pool": 0.43, "sketches of the benchmark": 0.04,
}  # fmt: skip
"""Share of each stage in the time of one seed, measured on two cores."""
_AFTER = 0.25
"""Time of the training run at the end, in times of one seed."""


class TimeLeft:
    """How long the demo still takes: what is done so far, and what share of the whole that usually is."""

    def __init__(self, n_seeds: int) -> None:
        self._started, self._whole, self._done = time.monotonic(), n_seeds + _AFTER, 0.0

    def after(self, stage: str) -> str:
        """Words about the time left after a stage; empty while it is unknown."""
        self._done += _USUAL.get(stage, 0.0)
        if stage not in _USUAL or self._done < 0.25:
            return ""
        seconds = (time.monotonic() - self._started) * (self._whole - self._done) / self._done
        return f"; about {seconds / 60:.0f} min left" if seconds > 90 else f"; about {seconds:.0f} s left"


def _shares(store: gradstore.Store, ids: list[str]) -> dict[str, float]:
    problems = store.problems("pool", ids)
    tags = tag_shares(problems)
    wrong, coin = tags.get(tasks.WRONG_TRUTH, 0.0), tags.get(tasks.COIN_FLIP, 0.0)
    family = source_shares(problems).get(tasks.TARGET_FAMILY, 0.0)
    return {"family": family, "broken": wrong + coin, "wrong_truth": wrong, "coin_flip": coin}


def summary(results: list[DemoResult]) -> dict:
    """Mean and standard deviation of every share over seeds, with times and sizes; JSON-able."""
    shares: dict[str, dict[str, list[float]]] = {}
    for name in results[0].shares:
        shares[name] = {}
        for kind in results[0].shares[name]:
            values = np.array([result.shares[name][kind] for result in results])
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            shares[name][kind] = [float(values.mean()), spread]
    return {
        "seeds": [result.seed for result in results],
        "shares": shares,
        "seconds": {
            stage: float(np.mean([result.seconds[stage] for result in results])) for stage in results[0].seconds
        },
        "states": results[0].states,
        "dim": results[0].dim,
        "bytes_per_problem": results[0].bytes_per_problem,
    }
