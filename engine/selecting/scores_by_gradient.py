"""Selectors based on stored gradients: alignment with one target, with several, or among the candidates.

Formulas and sources: docs/methods.md.

P candidates, Q targets, D sketch dimensions.
"""

import numpy as np

from gradstore import State
from gradstore.engine.searching.fusion import fuse_scores
from gradstore.engine.searching.scan import scan_rows
from gradstore.engine.searching.targets import Target, target
from gradstore.engine.selecting.candidates import Candidates, Selector
from gradstore.engine.selecting.membership import places
from gradstore.errors import RequestError


def cosine(candidates: Candidates) -> np.ndarray:
    return candidates.cosines(candidates.target_D)


def _dot(candidates: Candidates) -> np.ndarray:
    return _dot_with(candidates, candidates.target_D)


def _fisher(candidates: Candidates) -> np.ndarray:
    from gradstore.engine.searching.fisher import preconditioned

    if candidates.target_D is None:
        raise RequestError("this selector needs a target")
    return _dot_with(candidates, preconditioned(candidates.view, candidates.target_D))


def _dot_with(candidates: Candidates, query_D: np.ndarray | None) -> np.ndarray:
    if query_D is None:
        raise RequestError("this selector needs a target")
    return candidates.norms * candidates.cosines(query_D) * candidates.lengths(query_D)


def _simacc(candidates: Candidates) -> np.ndarray:
    p = candidates.pass_rates
    return cosine(candidates) * 4 * p * (1 - p)


def _chunk_mean(candidates: Candidates) -> np.ndarray:
    return candidates.cosines(candidates.weighted_sum(candidates.norms))


def _learnalign(candidates: Candidates) -> np.ndarray:
    """Mean over j of V_i V_j cos(g_i, g_j), computed with one mean vector; NaN where the pass rate is unknown."""
    value_P = candidates.pass_rates * (1 - candidates.pass_rates)
    known = int(np.count_nonzero(~np.isnan(value_P)))
    mean_D = candidates.weighted_sum(np.nan_to_num(value_P)) / max(known, 1)
    return value_P * candidates.cosines(mean_D) * np.linalg.norm(mean_D)


def _cropi(candidates: Candidates) -> np.ndarray:
    cosines_QP = candidates.cosines_with(np.stack([goal.query(candidates.view) for goal in candidates.targets]))
    return fuse_scores(cosines_QP, "rrf", constant=0.0)


def _less(candidates: Candidates) -> np.ndarray:
    benchmarks = dict.fromkeys(goal.benchmark for goal in candidates.targets)
    return np.max(
        [_over_steps(candidates, [g for g in candidates.targets if g.benchmark == name]) for name in benchmarks], axis=0
    )


def _over_steps(candidates: Candidates, goals: list[Target]) -> np.ndarray:
    """Mean over steps, weighted by learning rates, of the mean cosine with a benchmark's problems, float64 [P].

    A problem without signal at a step scores 0 there. Steps where it failed or was not measured yet are left out of its
    mean.
    """
    view, name = candidates.view, goals[0].benchmark
    store = view.store
    total_P, measured_P = np.zeros(len(candidates)), np.zeros(len(candidates))
    for step, rate in _learning_rates(candidates, goals):
        past = store.view(view.collection, step)
        place_P = places(candidates.ids, past.ids)
        state_P = np.append(past.states, np.uint8(State.FAILED))[place_P]
        direction_D = target(store, name, step, "unit_mean").query(past)
        score_P = np.append(scan_rows(past, direction_D[None], place_P[state_P == State.LIVE])[0], np.float32(0))
        total_P += rate * np.where(state_P == State.LIVE, np.nan_to_num(score_P[place_P]), 0.0)
        unknown_P = (state_P == State.LIVE) & np.isnan(score_P[place_P])
        measured_P += rate * ((state_P != State.FAILED) & ~unknown_P)
    return np.divide(total_P, measured_P, out=np.full(len(candidates), np.nan), where=measured_P > 0)


def _learning_rates(candidates: Candidates, goals: list[Target]) -> list[tuple[int, float]]:
    """Steps used for a benchmark, as (step, learning rate).

    With several targets or with learning rates: the targets' steps. With one target and no learning rate: every step at
    which the benchmark was measured, up to the target's and the view's step, with rate 1.
    """
    view, name = candidates.view, goals[0].benchmark
    given = [goal.learning_rate for goal in goals]
    if len(goals) == 1 and given[0] is None:
        last = goals[0].steps[1] if view.at is None else min(goals[0].steps[1], view.at)
        steps = [step for step in view.store.steps(name) if step <= last]
        return [(step, 1.0) for step in steps if view.store.view(name, step).live.any()]
    if any(rate is None for rate in given) and any(rate is not None for rate in given):
        raise RequestError(f"less: some targets of {name!r} have a learning rate and some have none: give all or none")
    rates = [1.0 if rate is None else float(rate) for rate in given]
    if not all(0 < rate < np.inf for rate in rates):
        raise RequestError(f"less: learning rates {rates} of {name!r}: expected finite numbers above 0")
    return [(goal.steps[1], rate) for goal, rate in zip(goals, rates, strict=True)]


BY_GRADIENT: list[Selector] = [
    Selector("cosine", cosine, "cos(g, t)", needs_target=True),
    Selector("dot", _dot, "<g, t>", needs_target=True),
    Selector("fisher", _fisher, "<g, (M/n + lambda I)^-1 t>", needs_target=True),
    Selector("norm", lambda c: c.norms, "|g|"),
    Selector("negsim", lambda c: -cosine(c), "-cos(g, t)", needs_target=True),
    Selector("simacc", _simacc, "cos(g, t) 4 p (1 - p)", needs_target=True),
    Selector("chunk_mean", _chunk_mean, "cos(g, sum of the candidates' g)"),
    Selector("learnalign", _learnalign, "V <u, mean of V u over the candidates>, V = p (1 - p)"),
    Selector("less", _less, "max over benchmarks, mean over steps, of mean cos(g, g_v)", needs_target=True),
    Selector("cropi", _cropi, "mean over targets of 1 / rank of cos(g, t)", needs_target=True),
]
