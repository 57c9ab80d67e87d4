"""The record of a round (docs/format.md, docs/rounds.md): its table, its metadata, and its scalars for a logger."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore import Round, State, Store, View
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.searching.targets import kind_of
from gradstore.trainer.round.aiming import Aim
from gradstore.trainer.round.journal import Plan
from gradstore.trainer.round.measuring import Costs
from gradstore.trainer.round.picking import Picked
from gradstore.trainer.round.run import Scope

log = logging.getLogger(__name__)

FILLED = "(random)"
"""Value of `picked_by` for problems drawn at random because too few could be ranked."""
_MUCH_WITHOUT_SIGNAL = 0.3
_STATES = {int(state): state.name.lower() for state in State} | {-1: "unmeasured"}


@dataclass(frozen=True, slots=True)
class Work:
    """What was measured in a round, and what it cost."""

    plans: Sequence[Plan]
    calibration: Calibration | None
    """Calibration of the round's probe; None without probes."""
    refresh: Mapping[str, Any]
    """What the planning tells (`Plans.about`)."""
    costs: Costs


def record(store: Store, scope: Scope, aim: Aim, picked: Picked, work: Work) -> None:
    """Add the round to the store: its table and its metadata, whose warnings are logged too."""
    seen = seen_of_pool(store, scope)
    about = about_round(scope, aim, picked, work, seen)
    for line in about["warnings"]:
        log.warning("round %d: %s", scope.number, line)
    share = 100 * seen / len(scope.run.records)
    log.info("round %d: %d candidates; seen so far: %.0f %% of the pool", scope.number, len(picked.forecast), share)
    view = store.view(scope.run.pool, scope.step)
    store.rounds(scope.run.pool).add(about, round_table(view, picked, _rolled_out(work)))


def seen_of_pool(store: Store, scope: Scope) -> int:
    """How many of the pool's problems were candidates in this round or an earlier one."""
    if len(scope.candidates) == len(scope.run.records):
        return len(scope.run.records)
    unseen = scope.run.records.keys() - set(scope.candidates)
    for found in store.rounds(scope.run.pool) if unseen else ():
        unseen -= set(found.table["id"].to_pylist())
    return len(scope.run.records) - len(unseen)


def _rolled_out(work: Work) -> set[str]:
    return {name for plan in work.plans for name in plan.ids}


def round_table(view: View, picked: Picked, rolled_out: set[str]) -> pa.Table:
    """The round's table: one row per candidate, in the order they were drawn."""
    now, chosen, filled = picked.forecast, picked.chosen, len(picked.filled)
    n, picks = len(now), [*chosen.ids, *picked.filled]
    picked_K = now.places_of(view.numbers_of(picks))
    scores_P3 = picked.scores.copy()
    scores_P3[picked_K[: len(chosen)]] = np.stack([chosen.scores, chosen.low, chosen.high], axis=1)
    place_P, weight_P, rollouts_P = np.full(n, -1), np.zeros(n), np.zeros(n, np.int64)
    place_P[picked_K] = np.arange(len(picks))
    weight_P[picked_K] = [*chosen.weights, *[1.0] * filled]
    rollouts_P[picked_K] = [*chosen.rollouts, *[0] * filled]
    rolled_out_P = np.zeros(n, bool)
    again_K = now.places_of(view.numbers_of(list(rolled_out)))
    rolled_out_P[again_K[again_K >= 0]] = True
    names = np.array([_STATES[state] for state in sorted(_STATES)], object)
    return pa.table(
        {
            "id": now.ids,
            "score": scores_P3[:, 0],
            "low": scores_P3[:, 1],
            "high": scores_P3[:, 2],
            "state": names[now.newest.states + 1],
            "step": now.newest.steps,
            "pass_rate": now.newest.pass_rates,
            "rolled_out": rolled_out_P,
            "picked": place_P,
            "weight": weight_P,
            "rollouts": rollouts_P,
        }
    )


def about_round(scope: Scope, aim: Aim, picked: Picked, work: Work, seen: int) -> dict[str, Any]:
    """The round's metadata; docs/rounds.md lists the members. seen: as `seen_of_pool` returns it."""
    settings, now, chosen = scope.settings, picked.forecast, picked.chosen
    counts = {name: int(np.count_nonzero(now.newest.states == state)) for state, name in _STATES.items()}
    targets = [own.describe() for own in aim.targets]
    selection = chosen.describe()
    del selection["problems"]
    rolled_out = [name for name in scope.benchmarks if scope.measures_target and kind_of(name) == "rollouts"]
    n_validation = sum(len(scope.run.benchmarks[name]) for name in rolled_out)
    return {
        "number": scope.number,
        "step": scope.step,
        "warm_up": scope.warm_up,
        "selector": chosen.selector,
        "seed": settings.seed,
        "target": targets[0] if len(targets) == 1 else None,
        "targets": targets,
        "benchmarks": list(scope.run.benchmarks),
        "commit": chosen.commit,
        "settings": settings.describe(),
        "pool": {"problems": len(scope.run.records), "seen": seen},
        "n_candidates": len(now),
        "n_rolled_out": len(_rolled_out(work)),
        "rollouts": sum(scope.rollouts(number) * len(plan.ids) for number, plan in enumerate(work.plans)),
        "target_rollouts": settings.target_rollouts * n_validation,
        "costs": dict(work.costs.seconds),
        "tokens": work.costs.tokens,
        "probe": _described(work.calibration),
        "counts": counts,
        "refresh": {
            **work.refresh,
            "model": _described(now.cosine.model),
            "calibration": _described(now.calibration),
        },
        "selection": selection,
        "picked_by": [*chosen.picked_by, *([FILLED] * len(picked.filled))],
        "ess": work.costs.sizes.describe(),
        "warnings": [*picked.warnings, *_warnings(counts), *filter(None, [work.costs.sizes.warning])],
    }


def _described(found: Any) -> dict[str, Any] | None:
    return None if found is None else found.describe()


def _warnings(counts: Mapping[str, int]) -> list[str]:
    """Warnings about the states of the candidates."""
    measured = sum(count for name, count in counts.items() if name != "unmeasured")
    lines = []
    if measured and counts["no_signal"] > _MUCH_WITHOUT_SIGNAL * measured:
        lines.append(f"{100 * counts['no_signal'] / measured:.0f} % of {measured} problems had no signal")
    if counts["failed"]:
        lines.append(f"{counts['failed']} problems failed; the store has the reasons")
    return lines


def scalars(found: Round, before: Round | None) -> dict[str, float]:
    """The scalars of a round, for a logger. before: the previous round, to compute the share of picks kept."""
    about, table = found.about, found.table
    picked = table["picked"].to_numpy() >= 0
    scores, steps = table["score"].to_numpy(), table["step"].to_numpy()
    measured = steps >= 0
    values = {
        "round/number": float(found.number),
        "round/candidates": float(about["n_candidates"]),
        "round/rolled_out": float(about["n_rolled_out"]),
        "round/rollouts": float(about["rollouts"]),
        "round/target_rollouts": float(about["target_rollouts"]),
        "round/picked": float(picked.sum()),
        **{f"round/{name}": float(count) for name, count in about["counts"].items()},
        "round/seconds": float(sum(about["costs"].values())),
        "round/seconds_without_rollouts": float(sum(about["costs"].values()) - about["costs"].get("rollouts", 0.0)),
        **{f"round/seconds/{stage}": float(took) for stage, took in about["costs"].items()},
    }
    if "pool" in about:
        values["round/pool_seen"] = about["pool"]["seen"] / about["pool"]["problems"]
    if np.isfinite(scores[picked]).any():
        values["round/score_picked"] = float(np.nanmean(scores[picked]))
    if np.isfinite(scores).any():
        values["round/score_all"] = float(np.nanmean(scores))
    if (picked & measured).any():
        values["round/age_picked"] = float((about["step"] - steps[picked & measured]).mean())
        rates = table["pass_rate"].to_numpy()[picked]
        if np.isfinite(rates).any():
            values["round/pass_rate_picked"] = float(np.nanmean(rates))
    if before is not None:
        values["round/kept"] = len(set(found.picks) & set(before.picks)) / max(len(found.picks), 1)
    model = about["refresh"].get("model")
    if model is not None:
        values["round/staleness/life"] = float(model["life"])
        usual = about["settings"]["rollouts"]
        values["round/staleness/reliability"] = float(model["signal"] / (model["signal"] + model["noise"] / usual))
    if "settled" in about["refresh"]:
        values["round/settled"] = float(about["refresh"]["settled"])
    return values
