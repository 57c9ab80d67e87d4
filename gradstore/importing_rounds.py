"""Import a run folder of GradAlign: its problems, and its rounds with candidates, scores, pass rates and picks.

Everything is read and checked before anything is written (reading/gradalign_run.py). A store that the import creates
has no rows, for the run kept no gradients; one that is there keeps its rows, so rollouts can be collected first.
"""

import logging
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gradstore.durable import canonical_json
from gradstore.errors import RequestError
from gradstore.layout import check_name
from gradstore.reading.gradalign_run import GradAlignRun, Iteration, read_run
from gradstore.rounds import SCHEMA, Round
from gradstore.store import Store, create
from gradstore.store import open as open_store
from gradstore.undo import undone_on

log = logging.getLogger(__name__)

FINGERPRINT = {"imported": "gradalign"}
"""Fingerprint of a store that an import creates; it holds no sketches."""
SELECTORS = {"sim": "cosine", "align": "chunk_mean"}
"""GradAlign's mode -> our name for it, where they differ."""


@dataclass(frozen=True, slots=True)
class RunImport:
    """What an import added."""

    problems: int
    validation: int
    """Problems of the benchmark."""
    rounds: int
    known: int
    """Rounds that an earlier import had added."""
    notes: list[str]
    """What the run folder lacks."""


def import_gradalign(
    run_path: Path,
    store_path: Path,
    collection: str = "pool",
    benchmark: str = "validation",
    *,
    problems: Path | None = None,
    mode: str | None = None,
    steps: int | None = None,
) -> RunImport:
    """Add a run's problems and rounds to a store, which is created if there is none.

    A run that goes on can be imported again, and an import that was interrupted: the rounds that are there are
    compared, new ones are added. The other arguments are those of `read_run`. RequestError for a folder that is no
    whole run, for a problem that the store has with other content, and for a collection whose rounds are others; the
    store is then as it was.
    """
    if check_name(collection) == check_name(benchmark):
        raise RequestError(f"the pool and the benchmark are both called {collection!r}: give one another name")
    run = read_run(run_path, problems=problems, mode=mode, steps=steps)
    made = _rounds(run, benchmark)
    is_new = not store_path.exists()
    store = create(store_path, dim=1, fingerprint=FINGERPRINT) if is_new else open_store(store_path, mode="a")
    with undone_on(BaseException, store) if is_new else nullcontext():
        for name, records in ((collection, run.problems), (benchmark, run.validation)):
            _check_problems(store, name, records)
        known = 0
        if collection in store.collections:
            known = len(store.rounds(collection))
            for number in range(known):
                _check_same(store.rounds(collection)[number], made, store_path, collection)
        added = store.add_problems(collection, run.problems.values())
        added_validation = store.add_problems(benchmark, run.validation.values())
        for about, table in made[known:]:
            store.rounds(collection).add(about, table)
    return RunImport(added, added_validation, max(0, len(made) - known), known, run.notes)


def _check_problems(store: Store, name: str, records: dict[str, dict[str, Any]]) -> None:
    """RequestError for a problem that the store has with other content."""
    for stored in store.records(name) if name in store.collections else ():
        own = records.get(stored["id"], stored)
        other = next((field for field in own if own[field] != stored[field]), None)
        if other is not None:
            raise RequestError(
                f"{store.path}: problem {stored['id']!r} of {name!r} has another {other!r} than in the run: "
                "collect with --problems and the run's own train.jsonl, or choose another collection"
            )


def _check_same(found: Round, made: list[tuple[dict[str, Any], pa.Table]], store_path: Path, collection: str) -> None:
    """RequestError unless the recorded round is the run's."""
    if found.number < len(made):
        about, table = made[found.number]
        same = _plain(found.table) == _plain(table) and found.about.get("imported") == about["imported"]
        if same:
            return
    raise RequestError(
        f"{store_path}: round {found.number} of {collection!r} is there already and is not this run's: a collection "
        "holds the rounds of one run; choose another --collection or store"
    )


def _plain(table: pa.Table) -> bytes:
    """The table's content as bytes, in which NaN equals NaN."""
    return canonical_json({name: list(map(str, values)) for name, values in table.to_pydict().items()})


def _rounds(run: GradAlignRun, benchmark: str) -> list[tuple[dict[str, Any], pa.Table]]:
    """(`about`, table) of every round, in order."""
    made, seen = [], set[str]()
    used = [benchmark] if run.validation else []
    for number, own in enumerate(run.iterations):
        table = _table(own)
        seen |= set(own.candidates)
        right = own.validation[1] / own.validation[0] if own.validation[0] else None
        about = {
            "number": number,
            "step": own.step,
            "warm_up": False,
            "selector": SELECTORS.get(own.mode, own.mode),
            "seed": run.seed,
            "target": None,
            "targets": [],
            "benchmarks": used,
            "settings": {"candidates": len(own.candidates), "selected": len(own.picks)},
            "pool": {"problems": len(run.problems), "seen": len(seen)},
            "n_candidates": len(own.candidates),
            "n_rolled_out": len(own.measured.rollouts),
            "rollouts": sum(own.measured.rollouts.values()),
            "target_rollouts": own.validation[0],
            "tokens": 0,
            "costs": {},
            "probe": None,
            "refresh": {},
            "selection": {},
            "counts": {"live": 0, "no_signal": 0, "failed": 0, "unmeasured": 0, **Counter(table["state"].to_pylist())},
            "picked_by": [SELECTORS.get(own.mode, own.mode)] * len(own.picks),
            "warnings": [],
            "imported": {"from": "gradalign", "round": own.number, "mode": own.mode, "validation_pass_rate": right},
        }
        made.append((about, table))
    return made


def _table(own: Iteration) -> pa.Table:
    """The round's table; docs/gradalign.md says how its columns follow from the files."""
    measured = own.measured
    rates = {name: measured.correct[name] / total for name, total in measured.rollouts.items()}
    scores = {name: _score(own.mode, measured.similarity.get(name), rates.get(name)) for name in own.candidates}
    order = {name: place for place, name in enumerate(own.picks)}
    best_first = sorted(own.picks, key=lambda name: (-_ranked(scores[name]), order[name]))
    place_of = {name: place for place, name in enumerate(best_first)}
    states = [_state(measured.similarity.get(name), rates.get(name)) for name in own.candidates]
    n = len(own.candidates)
    columns = {
        "id": own.candidates,
        "score": [scores[name] for name in own.candidates],
        "low": [math.nan] * n,
        "high": [math.nan] * n,
        "state": states,
        "step": [-1 if state == "unmeasured" else own.step for state in states],
        "pass_rate": [rates.get(name, math.nan) for name in own.candidates],
        "rolled_out": [name in measured.rollouts for name in own.candidates],
        "picked": [place_of.get(name, -1) for name in own.candidates],
        "weight": [float(name in place_of) for name in own.candidates],
        "rollouts": [0] * n,
    }
    return pa.table(columns, schema=SCHEMA)


def _score(mode: str, similarity: float | None, rate: float | None) -> float:
    """The number by which a mode ranks, higher is better; NaN where it is unknown, or the mode draws at random."""
    if mode == "accgreedy":
        return math.nan if rate is None else -abs(rate - 0.5)
    if mode in ("acc", "rand") or similarity is None or (mode == "simacc" and rate is None):
        return math.nan
    if mode == "simacc":
        assert rate is not None
        return 4 * similarity * rate * (1 - rate)
    return -similarity if mode == "negsim" else similarity


def _ranked(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _state(similarity: float | None, rate: float | None) -> str:
    """No signal: all rollouts were rewarded alike, or, where rewards are unknown, the similarity is exactly 0."""
    if similarity is not None and not math.isfinite(similarity):
        return "failed"
    if rate is not None:
        return "no_signal" if rate in (0.0, 1.0) else "live"
    if similarity is not None:
        return "no_signal" if similarity == 0 else "live"
    return "unmeasured"
