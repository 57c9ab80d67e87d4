"""Stores of unusual but honest shapes: the report and the explorer show a page or say one line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstore
from gradstore import State, Store
from gradstore.analysis.explorer.catalogue import Catalogue, Filter
from gradstore.analysis.report import write_report
from gradstore.analysis.report.findings import find
from gradstore.errors import GradstoreError, RequestError

DIM = 8
LAYOUT = [["a", 0, 4], ["b", 4, DIM]]


def rows(
    store: Store, name: str, step: int, n: int, *, state: State = State.LIVE, rate: float | None = 0.5, seed: int = 0
) -> None:
    """Rows of a collection at one step; its problems are added if they are new."""
    ids = [f"{name}{p}" for p in range(n)]
    store.add_problems(name, [{"id": one, "prompt": f"What is {one}?"} for one in ids])
    values = np.random.default_rng(seed + step).normal(size=(n, DIM)).astype(np.float32)
    with store.writer(name, step=step) as writer:
        writer.append(
            ids,
            values if state == State.LIVE else np.zeros_like(values),
            state=[state] * n,
            pass_rate=None if rate is None else np.full(n, rate, np.float32),
            reason=["broken" if state == State.FAILED else ""] * n,
        )


def record(store: Store, picked: Sequence[str], candidates: Sequence[str], step: int) -> None:
    """One selection round."""
    import pyarrow as pa

    n = len(candidates)
    order = {name: place for place, name in enumerate(picked)}
    table = pa.table(
        {
            "id": list(candidates),
            "picked": np.array([order.get(name, -1) for name in candidates], np.int32),
            "rolled_out": np.zeros(n, bool),
            "score": np.full(n, np.nan, np.float32),
            "pass_rate": np.full(n, np.nan, np.float32),
            "low": np.full(n, np.nan, np.float32),
            "high": np.full(n, np.nan, np.float32),
            "weight": np.ones(n, np.float32),
            "rollouts": np.full(n, 4, np.int32),
            "step": np.full(n, -1, np.int64),
            "state": ["unmeasured"] * n,
        }
    )
    store.rounds("pool").add({"step": step, "selector": "rand"}, table)


def benchmark_first(store: Store) -> None:
    rows(store, "bench", 0, 6)
    rows(store, "pool", 3, 12)


def pool_first(store: Store) -> None:
    rows(store, "pool", 0, 12)
    rows(store, "bench", 3, 6)


def nothing_live(store: Store) -> None:
    rows(store, "bench", 0, 6)
    for step in (0, 3):
        rows(store, "pool", step, 12, state=State.NO_SIGNAL, rate=1.0)


def all_failed(store: Store) -> None:
    rows(store, "bench", 0, 6, state=State.FAILED)
    rows(store, "pool", 0, 12, state=State.FAILED, rate=None)


def one_problem(store: Store) -> None:
    rows(store, "bench", 0, 1)
    for step in (0, 3):
        rows(store, "pool", step, 1)


def no_pass_rates(store: Store) -> None:
    for step in (0, 3):
        rows(store, "bench", step, 6, rate=None)
        rows(store, "pool", step, 12, rate=None)


def two_benchmarks_apart(store: Store) -> None:
    rows(store, "bench", 0, 6)
    rows(store, "late", 5, 6, seed=9)
    rows(store, "pool", 3, 12)


def without_picks(store: Store) -> None:
    rows(store, "bench", 0, 6)
    rows(store, "pool", 0, 12)
    record(store, [], [f"pool{p}" for p in range(12)], 0)


def rounds_before_rows(store: Store) -> None:
    """What a selector without gradients leaves: rounds first, rows later."""
    store.add_problems("pool", [{"id": f"pool{p}", "prompt": f"What is pool{p}?"} for p in range(12)])
    record(store, ["pool1", "pool2"], [f"pool{p}" for p in range(12)], 0)
    rows(store, "bench", 2, 6)
    rows(store, "pool", 4, 12)


def benchmark_alone(store: Store) -> None:
    store.add_problems("pool", [{"id": f"pool{p}", "prompt": "?"} for p in range(12)])
    rows(store, "bench", 0, 6)


def pool_alone(store: Store) -> None:
    rows(store, "pool", 0, 12)


def deleted_again(store: Store) -> None:
    rows(store, "bench", 0, 6)
    rows(store, "pool", 0, 12)
    store.delete("pool", [f"pool{p}" for p in range(12)])


SHAPES = [
    benchmark_first, pool_first, nothing_live, all_failed, one_problem, no_pass_rates, two_benchmarks_apart,
    without_picks, rounds_before_rows, benchmark_alone, pool_alone, deleted_again,
]  # fmt: skip


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.__name__)
def odd(request: Any, tmp_path: Path) -> Store:
    fingerprint = {"layout": LAYOUT}
    request.param(gradstore.create(tmp_path / "store", dim=DIM, fingerprint=fingerprint, dtype="fp32"))
    return gradstore.open(tmp_path / "store")


def test_the_report_is_a_page_or_one_line(odd: Store, tmp_path: Path) -> None:
    lines: list[str] = []
    for pool, format in ((None, "html"), ("pool", "md")):
        try:
            page = write_report(odd, tmp_path / f"report.{format}", pool=pool, format=format)
        except RequestError as error:
            lines.append(str(error))
            continue
        assert len(page.sections) == 12
        assert all(section.blocks or section.missing for section in page.sections)
    assert not any("\n" in line for line in lines)


def test_the_explorer_shows_a_view_or_one_line(odd: Store) -> None:
    from gradstore.analysis.explorer import comparison, problem, ranking

    found = find(odd)
    catalogue = Catalogue(odd, found.pool, found.benchmarks)
    asked: list[Callable[[], Any]] = [
        lambda: ranking.layout(catalogue),
        lambda: comparison.layout(catalogue),
        lambda: problem._view(catalogue, f"{found.pool}0", "cosine", None, "all", "light"),
    ]
    for metric in ("cosine", "dot", "fisher"):
        for step in (None, 0, 3, 5):
            for name in found.benchmarks:
                asked.append(lambda n=name, s=step, m=metric: catalogue.ranked(n, s, m, Filter(pass_rate=(0.2, 0.9))))
                asked.append(lambda n=name, s=step, m=metric: catalogue.compare((n, s), (n, None), m))
    lines = []
    for ask in asked:
        try:
            ask()
        except GradstoreError as error:
            lines.append(str(error))
    assert not any("\n" in line for line in lines)


def test_layers_are_shown_for_a_pool_that_came_after_its_benchmark(tmp_path: Path) -> None:
    """The target of step 0 is the newest one at step 3, where the pool's rows are."""
    store = gradstore.create(tmp_path / "store", dim=DIM, fingerprint={"layout": LAYOUT}, dtype="fp32")
    benchmark_first(store)
    page = write_report(store, tmp_path / "report.html")
    section = next(one for one in page.sections if one.key == "layers")
    assert not section.missing
    assert {row[0] for row in section.blocks[1].rows} == {"a", "b"}
