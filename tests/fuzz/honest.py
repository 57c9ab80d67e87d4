"""Honest data that targets start from: stores with everything that a store may hold."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

import gradstore
from gradstore import State, Store
from gradstore.attachments import write_attachment
from gradstore.rounds import SCHEMA

DIM = 16
LAYOUT = [["model.layers.0.a", 0, 6], ["model.layers.1.b", 6, DIM]]
SECRET = "What is the secret of problem"
"""Beginning of every prompt."""


def write_store(path: Path, n: int = 40, *, dtype: str = "int8", steps: int = 2) -> Store:
    """A store with a pool of n problems, two benchmarks, failed rows, deletions, rounds, probes and an attachment."""
    random = np.random.default_rng(0)
    store = gradstore.create(path, dim=DIM, fingerprint={"layout": LAYOUT, "model": "m"}, dtype=dtype, chunk_rows=32)
    for name, size in (("pool", n), ("bench", 8), ("other", 4)):
        ids = [f"{name}{i:04d}" for i in range(size)]
        store.add_problems(name, [_record(name, i) for i in range(size)])
        for step in range(steps):
            states = [_state(i) if name == "pool" else State.LIVE for i in range(size)]
            with store.writer(name, step=step * 10) as writer:
                writer.append(
                    ids,
                    random.normal(size=(size, DIM)).astype(np.float32),
                    state=states,
                    pass_rate=np.where(np.arange(size) % 13 == 12, np.nan, np.arange(size) % 9 / 8).astype(np.float32),
                    n_rollouts=np.full(size, 8),
                    reason=["broken" if state == State.FAILED else "" for state in states],
                )
    store.delete("pool", ["pool0003"])
    coverage = {"parameters": 0.9, "gradient": 0.8, "n_groups": 4, "lookups": 0.1, "left_out": []}
    write_attachment(path, "coverage.json", json.dumps(coverage).encode())
    _record_round(store, n)
    rolled = [random.normal(size=4).astype(np.float32) for _ in range(5)]
    ids = [f"pool{i:04d}" for i in range(5)]
    rewards = [np.array([0, 1, 0, 1], np.float32)] * 5
    store.probes("pool").add(
        ids, rolled, rewards, [np.full(4, 7, np.int32)] * 5, step=10, target="bench", target_commit=2
    )
    return gradstore.open(path)


def _record(name: str, i: int) -> dict:
    text = f"{SECRET} {name} {i}?"
    prompt = text if i % 3 else [{"role": "system", "content": "Answer."}, {"role": "user", "content": text}]
    tags = ["even"] if i % 2 == 0 else []
    return {"id": f"{name}{i:04d}", "prompt": prompt, "source": f"s{i % 3}", "ground_truth": str(i), "tags": tags}


def _state(i: int) -> State:
    return State.NO_SIGNAL if i % 11 == 7 else State.FAILED if i % 17 == 5 else State.LIVE


def _record_round(store: Store, n: int) -> None:
    size = min(n, 20)
    columns = {
        "id": [f"pool{i:04d}" for i in range(size)],
        "score": np.linspace(1, -1, size),
        "low": np.full(size, np.nan),
        "high": np.full(size, np.nan),
        "state": ["live"] * size,
        "step": np.full(size, 10),
        "pass_rate": np.full(size, 0.5),
        "rolled_out": np.zeros(size, bool),
        "picked": np.where(np.arange(size) < 4, np.arange(size), -1),
        "weight": np.where(np.arange(size) < 4, 1.0, 0.0),
        "rollouts": np.zeros(size, np.int64),
    }
    about = {"step": 10, "selector": "cosine", "seed": 0, "target": {"collection": "bench"}, "n_picked": 4}
    store.rounds("pool").add(about, pa.table(columns, schema=SCHEMA))
