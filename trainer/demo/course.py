"""A short training run of the demo's model that leaves a store with history: rounds of measure, select, train.

Each round rolls out the pool and two benchmarks with the policy as it is, collects their sketches at its step, selects,
records the round, and takes a few plain policy-gradient updates on what was selected. It takes seconds at the sizes of
a test: the report, the explorer and the tutorial are shown on it.

Dimension letters: B sequences, T tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

import gradstore
from engine.gradients.models import load_model, load_tokenizer
from engine.rollouts import Group, read_rollouts
from engine.searching.query import score_rows
from engine.searching.targets import target
from engine.selecting.selection import Selection, select
from engine.sketches.bases import create_store, sketcher_of
from engine.sketches.collector import collect
from engine.sketches.fitting import fit_projection, sample_groups
from engine.sketches.sketcher import Sketcher, SketchSpec
from gradstore import State, Store
from trainer.backends.hugging_face import TransformersBackend
from trainer.demo import tasks
from trainer.demo.run import MODEL
from trainer.rewards import Reward
from trainer.rollout import rollout

SECOND_FAMILY = "spell_backward"
"""Family of the second benchmark."""


@dataclass(frozen=True, slots=True)
class CourseSettings:
    """Sizes of the run."""

    n_pool: int = 60
    n_benchmark: int = 16
    n_rounds: int = 3
    n_selected: int = 12
    n_rollouts: int = 8
    n_updates: int = 4
    """Optimizer steps between two rounds; the step number counts them."""
    learning_rate: float = 2e-4
    dim: int = 256
    seed: int = 0


SHOWN = CourseSettings(n_pool=240, n_benchmark=40, n_rounds=4, n_selected=48, n_rollouts=16, dim=512)
"""The run that `gradstore demo` shows."""


def run_course(folder: Path, settings: CourseSettings, tell: Callable[[str], None] = lambda line: None) -> Store:
    """Train for some rounds; `folder/store` and one rollout file a collection and step are left.

    Called again after an interruption it trains again, without sampling or sketching anew what is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "store"
    store = gradstore.open(path, "a") if path.exists() else None
    if store is not None and _recorded(store) >= settings.n_rounds:
        return store
    torch.set_num_threads(1)
    model, tokenizer = load_model(MODEL, device="cpu"), load_tokenizer(MODEL)
    backend, reward = TransformersBackend(model, tokenizer), Reward("demo", tasks.reward)
    problems = {
        "pool": tasks.pool(settings.seed, settings.n_pool),
        "sums": tasks.benchmark(settings.seed, settings.n_benchmark),
        "spelling": _clean_of(SECOND_FAMILY, settings),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    for number in range(settings.n_rounds):
        step, costs = number * settings.n_updates, dict[str, float]()
        started = time.monotonic()
        sources = {}
        for name, records in problems.items():
            file = folder / f"{name}-{step}.jsonl"
            n, seed = settings.n_rollouts, settings.seed + number
            rollout(records, backend, reward, file, n=n, max_new_tokens=8, seed=seed, chunk=256, step=step)
            sources[name] = read_rollouts(file)
        costs["rollouts"] = -started + (started := time.monotonic())
        if store is None:
            spec = SketchSpec(basis="fitted", dim=settings.dim, seed=settings.seed)
            projection = fit_projection(model, sample_groups(sources["pool"], 100, settings.seed), spec)
            store = create_store(path, Sketcher(model, spec, projection))
            costs["fitting the projection"] = -started + (started := time.monotonic())
        sketcher = sketcher_of(store, model)
        for name, source in sources.items():
            collect(store, name, source, sketcher=sketcher, step=step)
        costs["sketches"] = -started + (started := time.monotonic())
        wanted = target(store, "sums", step)
        chosen = select(store, "pool", wanted, settings.n_selected, "cosine", step, seed=settings.seed + number)
        costs["selection"] = -started + (started := time.monotonic())
        if number + 1 < settings.n_rounds:
            groups = list(sources["pool"].groups(chosen.ids))
            for _ in range(settings.n_updates):
                update(model, optimizer, groups)
            costs["training"] = time.monotonic() - started
        if number >= _recorded(store):
            _record(store, step, chosen, settings, costs)
        tell(f"step {step}: {sum(costs.values()):.1f} s")
    assert store is not None  # n_rounds is at least 1 wherever settings are made
    return store


def _recorded(store: Store) -> int:
    return len(store.rounds("pool")) if "pool" in store.collections else 0


def update(model: nn.Module, optimizer: torch.optim.Optimizer, groups: Sequence[Group]) -> float:
    """One policy-gradient step on the groups (advantage: reward less the group's mean); returns the loss."""
    rows = [
        (group.prompt_ids, response, float(reward - group.rewards.mean()))
        for group in groups
        for response, reward in zip(group.responses, group.rewards, strict=True)
        if len(response)
    ]
    width = max(len(prompt) + len(response) for prompt, response, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    weights_BT = torch.zeros(len(rows), width)
    for i, (prompt, response, advantage) in enumerate(rows):
        end = len(prompt) + len(response)
        ids_BT[i, :end] = torch.from_numpy(np.concatenate([prompt, response]))
        weights_BT[i, len(prompt) : end] = advantage / len(response)
    logits: Tensor = model(ids_BT).logits[:, :-1]
    logprobs_BT = torch.log_softmax(logits, -1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    loss = -(weights_BT[:, 1:] * logprobs_BT).sum() / len(rows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _clean_of(family: str, settings: CourseSettings) -> list[dict[str, Any]]:
    """Clean problems of one family that the pool does not have, as a benchmark."""
    prompts = {str(record["prompt"]) for record in tasks.pool(settings.seed, settings.n_pool)}
    others = tasks.pool(settings.seed + 1, 20 * settings.n_benchmark)
    found = [r for r in others if r["source"] == family and r["tags"] == ["clean"] and str(r["prompt"]) not in prompts]
    return [{**record, "id": f"spelling-{i:04d}"} for i, record in enumerate(found[: settings.n_benchmark])]


def _record(store: Store, step: int, chosen: Selection, settings: CourseSettings, costs: dict[str, float]) -> None:
    """Keep the round: the score of every candidate against the target, and what was picked."""
    view = store.view("pool", step)
    scores = score_rows(view, _unit(target(store, "sums", step).vector), "cosine", np.flatnonzero(view.live))
    rank = {problem_id: place for place, problem_id in enumerate(chosen.ids)}
    unknown = np.full(len(view), np.nan)
    counts = {state.name.lower(): int((view.states == state).sum()) for state in State}
    about = {
        "step": step,
        "selector": chosen.selector,
        "seed": chosen.seed,
        "target": chosen.target,
        "benchmarks": ["sums"],
        "commit": chosen.commit,
        "settings": asdict(settings),
        "n_candidates": len(view),
        "n_rolled_out": len(view),
        "rollouts": len(view) * settings.n_rollouts,
        "costs": costs,
        "counts": counts,
        "warnings": [],
    }
    columns = {
        "id": view.ids.tolist(),
        "score": scores.astype(np.float64),
        "low": unknown,
        "high": unknown,
        "state": [State(state).name.lower() for state in view.states],
        "step": view.steps,
        "pass_rate": view.pass_rates.astype(np.float64),
        "rolled_out": np.ones(len(view), bool),
        "picked": np.array([rank.get(problem_id, -1) for problem_id in view.ids]),
        "weight": np.ones(len(view)),
        "rollouts": np.full(len(view), settings.n_rollouts),
    }
    store.add_round("pool", about, pa.table(columns))


def _unit(vector_D: np.ndarray) -> np.ndarray:
    return np.asarray(vector_D / np.linalg.norm(vector_D), np.float32)
