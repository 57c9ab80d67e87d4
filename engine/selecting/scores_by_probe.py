"""Selectors based on probes (each rollout's derivative along the target); every score has a confidence interval.

Pool statistics (shrinkage, the false-discovery cut, the floor of a standard error) are computed over the candidates
with a live probe. A candidate without a probe is not ranked.

P candidates, K of them with a live probe.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gradstore import View
from gradstore.engine.selecting.candidates import Candidates, Scored, Selector
from gradstore.errors import RequestError

if TYPE_CHECKING:
    from gradstore.engine.probing.batch import ProbeBatch


def stored_probes(view: View, benchmark: str) -> tuple["ProbeBatch", int]:
    """Load the newest stored probes along a benchmark, as of the view, and their step; RequestError without any."""
    from gradstore.engine.probing.batch import ProbeBatch

    steps = view.store.probes(view.collection).table(target=benchmark)["step"].to_numpy()
    steps = steps if view.at is None else steps[steps <= view.at]
    if not len(steps):
        moment = "" if view.at is None else f" at or before step {view.at}"
        raise RequestError(
            f"collection {view.collection!r} has no probes along {benchmark!r}{moment}: probe it first, or give probes"
        )
    step = int(steps.max())
    return ProbeBatch.load(view.store, view.collection, step=step, target=benchmark), step


def _by(kind: str) -> Callable[[Candidates], Scored]:
    def score(candidates: Candidates) -> Scored:
        from gradstore.engine.probing import statistics

        probes = candidates.probes
        if probes is None:
            raise RequestError("this selector needs probes")
        number_K = candidates.view.numbers_of(probes.ids) if probes.numbers is None else probes.numbers
        place_N = np.full(candidates.view.n_problems + 1, -1)  # the last one for probes of other problems
        place_N[number_K[::-1]] = np.arange(len(number_K))[::-1]  # of two probes of a problem the first
        place_N[-1] = -1
        place_P = place_N[candidates.numbers]
        live_P = (place_P >= 0) & np.append(probes.live, False)[place_P]
        place_K = place_P[live_P]
        dots_K, errors_K, t_K = probes.dots[place_K], probes.standard_errors[place_K], probes.t[place_K]
        n_K = probes.n_rollouts[place_K]
        found = np.full((3, len(candidates)), np.nan)
        if len(place_K):
            scores_K = statistics.scores(kind, dots_K, errors_K, t_K, probes.p_values[place_K], n_K)
            found[0, live_P] = np.where(np.isfinite(scores_K), scores_K, np.nan)
            found[1:, live_P] = statistics.intervals(kind, dots_K, errors_K, t_K, n_K, candidates.confidence)
        return Scored(*found)

    return score


def _selector(name: str, kind: str, formula: str) -> Selector:
    return Selector(name, _by(kind), formula, live_only=False, whole_pool=True, needs_probes=True)


BY_PROBE: list[Selector] = [
    _selector("exact", "dot", "<g, V> over every parameter"),
    _selector("corr", "corr", "correlation of reward and derivative"),
    _selector("snr", "snr", "<g, V> / SE"),
    _selector("lcb", "lcb", "<g, V> - SE"),
    _selector("shrunk", "shrunk", "posterior mean of <g, V>"),
    _selector("fdr", "fdr", "<g, V> past a false-discovery cut at 0.1"),
]
