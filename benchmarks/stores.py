"""Make large stores of random rows quickly: write the store's files and manifests directly, without record checks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

import gradstore
from gradstore.appender import Appender
from gradstore.header import read_header
from gradstore.layout import COLLECTIONS, PROBLEMS
from gradstore.problem_rows import table_schema
from gradstore.problem_table import PART_ROWS, write_part
from gradstore.quantise import encode
from gradstore.session import Session

BLOCK_ROWS = 16384


def make_store(
    path: Path, problems: int, dim: int, dtype: str = "int8", refreshes: Sequence[float] = (), seed: int = 0
) -> gradstore.Store:
    """A store with a collection `pool`: every problem at step 0, then one step per entry of `refreshes`.

    An entry is the share of the problems that get a new row. Rows repeat one block of normal random numbers; each block
    is shifted by one dimension.
    """
    random = np.random.default_rng(seed)
    store = gradstore.create(path, dim=dim, fingerprint={"made": "at random"}, dtype=dtype)
    header = read_header(path)
    block_PD = random.standard_normal((min(BLOCK_ROWS, problems), dim), dtype=np.float32)
    block_PD *= random.lognormal(0, 1, (len(block_PD), 1)).astype(np.float32)
    with Session(header, path / COLLECTIONS / "pool", create=True) as session:
        session.unpublished = True
        folder = session.generation / PROBLEMS
        starts = range(0, problems, PART_ROWS)
        parts = tuple(
            write_part(folder, number, _problems(start, min(start + PART_ROWS, problems)))
            for number, start in enumerate(starts)
        )
        appender = Appender(session.generation, header.arrays, 0, {})
        try:
            for step, share in enumerate((1.0, *refreshes)):
                chosen = np.flatnonzero(random.random(problems) < share)
                for number, start in enumerate(range(0, len(chosen), BLOCK_ROWS)):
                    problem = chosen[start : start + BLOCK_ROWS]
                    rows_PD = np.roll(block_PD[: len(problem)], number + 7 * step, axis=1)
                    codes, scale, norm, _ = encode(rows_PD, dtype)
                    n = len(problem)
                    columns = {
                        "codes": codes,
                        "scale": scale,
                        "norm": norm.astype(np.float32),
                        "step": np.full(n, step),
                        "problem": problem,
                        "state": np.zeros(n),
                        "pass_rate": np.full(n, 0.5),
                        "n_rollouts": np.full(n, 8),
                        "reason": np.zeros(n),
                    }
                    appender.write(columns)
            appender.sync()
        finally:
            appender.close()
        session.publish(parts=parts, rows=appender.rows, chunks=appender.chunks)
    return store


def _problems(start: int, stop: int) -> pa.Table:
    n = stop - start
    columns = {
        "id": [f"problem-{i:08d}" for i in range(start, stop)],
        "source": ["random"] * n,
        "prompt": ["?"] * n,
        "messages": [None] * n,
        "ground_truth": [""] * n,
        "tags": [[]] * n,
        "extra": ["{}"] * n,
    }
    return pa.table(columns, schema=table_schema())
