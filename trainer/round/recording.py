"""The record of a round (docs/format.md, docs/rounds.md): its table and metadata, read back as Selection or scalars."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore import Round, State
from gradstore.engine.forecasting.forecast import CandidateForecast
from gradstore.engine.selecting.selection import Selection
from gradstore.trainer.round.settings import RoundSettings

FILLED = "(random)"
"""Value of `picked_by` for problems drawn at random because too few could be ranked."""
_MUCH_WITHOUT_SIGNAL = 0.3


def round_table(
    now: CandidateForecast, scored: Selection, chosen: Selection, filled: Sequence[str], rolled_out: set[str]
) -> pa.Table:
    """The round's table: one row per candidate, in the order they were drawn."""
    score_of = dict(zip(scored.ids, zip(scored.scores, scored.low, scored.high, strict=True), strict=True))
    score_of |= dict(zip(chosen.ids, zip(chosen.scores, chosen.low, chosen.high, strict=True), strict=True))
    pick_of = {name: (place, chosen.weights[place], chosen.rollouts[place]) for place, name in enumerate(chosen.ids)}
    pick_of |= {name: (len(chosen) + place, 1.0, 0) for place, name in enumerate(filled)}
    unknown, unpicked = (float("nan"),) * 3, (-1, 0.0, 0)
    scores, picks = (
        [of.get(name, none) for name in now.ids] for of, none in ((score_of, unknown), (pick_of, unpicked))
    )
    names = {int(state): state.name.lower() for state in State} | {-1: "unmeasured"}
    return pa.table(
        {
            "id": now.ids,
            "score": [float(score) for score, _, _ in scores],
            "low": [float(low) for _, low, _ in scores],
            "high": [float(high) for _, _, high in scores],
            "state": [names[state] for state in now.newest.states.tolist()],
            "step": now.newest.steps,
            "pass_rate": now.newest.pass_rates,
            "rolled_out": [name in rolled_out for name in now.ids],
            "picked": [int(place) for place, _, _ in picks],
            "weight": [float(weight) for _, weight, _ in picks],
            "rollouts": [int(count) for _, _, count in picks],
        }
    )


def about_round(
    *,
    run_settings: RoundSettings,
    number: int,
    step: int,
    warm_up: bool,
    benchmarks: list[str],
    targets: list[dict[str, Any]],
    now: CandidateForecast,
    chosen: Selection,
    filled: Sequence[str],
    n_rolled_out: int,
    rollouts: int,
    target_rollouts: int,
    seconds: Mapping[str, float],
    tokens: int,
    probe: Mapping[str, Any] | None,
    refreshed: Mapping[str, Any],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The round's metadata; docs/rounds.md lists the members."""
    names = {int(state): state.name.lower() for state in State} | {-1: "unmeasured"}
    counted = Counter(names[state] for state in now.newest.states.tolist())
    counts = {name: counted.get(name, 0) for name in names.values()}
    measured = sum(count for name, count in counts.items() if name != "unmeasured")
    lines = list(warnings)
    if measured and counts["no_signal"] > _MUCH_WITHOUT_SIGNAL * measured:
        lines.append(f"{100 * counts['no_signal'] / measured:.0f} % of {measured} problems had no signal")
    if counts["failed"]:
        lines.append(f"{counts['failed']} problems failed; the store has the reasons")
    about = chosen.describe()
    del about["problems"]
    return {
        "number": number,
        "step": step,
        "warm_up": warm_up,
        "selector": chosen.selector,
        "seed": run_settings.seed,
        "target": targets[0] if len(targets) == 1 else None,
        "targets": targets,
        "benchmarks": benchmarks,
        "commit": chosen.commit,
        "settings": run_settings.describe(),
        "n_candidates": len(now),
        "n_rolled_out": n_rolled_out,
        "rollouts": rollouts,
        "target_rollouts": target_rollouts,
        "costs": dict(seconds),
        "tokens": tokens,
        "probe": probe,
        "counts": counts,
        "refresh": {
            **refreshed,
            "model": None if now.cosine.model is None else now.cosine.model.describe(),
            "motion": None if now.norm.motion is None else now.norm.motion.describe(),
            "calibration": None if now.calibration is None else now.calibration.describe(),
        },
        "selection": about,
        "picked_by": [*chosen.picked_by, *([FILLED] * len(filled))],
        "warnings": lines,
    }


def selection_of(found: Round) -> Selection:
    """The picks of a recorded round, identical for a new round and one read back."""
    ranks = found.table["picked"].to_numpy()
    rows = np.flatnonzero(ranks >= 0)
    rows = rows[np.argsort(ranks[rows], kind="stable")]
    columns = {name: found.table[name].to_numpy()[rows] for name in ("score", "low", "high", "weight", "rollouts")}
    kept = found.about["selection"]
    known = {field.name for field in fields(Selection)}
    return Selection(
        ids=found.picks,
        scores=columns["score"],
        low=columns["low"],
        high=columns["high"],
        weights=columns["weight"],
        rollouts=columns["rollouts"],
        picked_by=list(found.about["picked_by"]),
        **{name: value for name, value in kept.items() if name in known},
    )


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
