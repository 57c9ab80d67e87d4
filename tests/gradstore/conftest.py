"""Small stores whose every number is known: problem p<i>, and a row that depends on problem and step alone."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import gradstore

DIM = 24


def vector(problem: int, step: int, dim: int = DIM) -> np.ndarray:
    """The sketch of problem number `problem` at `step`: float32 [dim], heavy-tailed, far from unit length."""
    rng = np.random.default_rng((problem, step))
    return (rng.standard_normal(dim) * rng.gamma(0.5, 1e-4, dim) + 1e-9).astype(np.float32)


def records(n: int, first: int = 0) -> list[dict]:
    return [
        {
            "id": f"p{i}",
            "prompt": f"what is {i}?" if i % 2 else [{"role": "user", "content": f"what is {i}?"}],
            "source": f"family-{i % 3}",
            "ground_truth": str(i),
            "tags": ["easy"] if i % 5 else [],
            "extra": {"number": i},
        }
        for i in range(first, first + n)
    ]


def append(store: gradstore.Store, step: int, problems: list[int], collection: str = "pool") -> None:
    """One writer that appends the known row of some problems at a step."""
    with store.writer(collection, step=step) as writer:
        writer.append([f"p{i}" for i in problems], np.stack([vector(i, step, store.dim) for i in problems]))


def check_rows(view: gradstore.View, tolerance: float = 0.1) -> None:
    """Every row of a view is the known row of its problem at its step."""
    for positions, rows in view.scan():
        for position, row in zip(positions, rows, strict=True):
            known = vector(int(view.ids[position][1:]), int(view.steps[position]), view.dim)
            norm = np.linalg.norm(known)
            assert np.linalg.norm(row - known / norm) < tolerance, (view.ids[position], view.steps[position])
            assert np.isclose(view.norms[position], norm, rtol=1e-5)


@pytest.fixture
def tools() -> dict[str, Callable]:
    return {"vector": vector, "records": records, "append": append, "check_rows": check_rows}


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests sync thousands of times and never lose power."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory, prefix="gradstore-test-") as folder:
        yield Path(folder)


@pytest.fixture
def new_store(fast_path: Path) -> Callable[..., gradstore.Store]:
    """A store with a collection "pool" of `n` problems and no rows; chunks are tiny so that tests cross them."""

    def make(
        n: int = 10,
        dim: int = DIM,
        dtype: str = "int8",
        chunk_rows: int = 8,
        column_rows: int | None = 12,
        name: str = "store",
    ) -> gradstore.Store:
        store = gradstore.create(
            fast_path / name,
            dim=dim,
            fingerprint={"model": "tiny", "seed": 1},
            dtype=dtype,
            chunk_rows=chunk_rows,
            column_rows=column_rows,
        )
        if n:
            store.add_problems("pool", records(n))
        return store

    return make
