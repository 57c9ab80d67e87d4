"""What the page found, in a few sentences: what helps, what harms, how sure, how much better than chance.

Each answer says how large its noise is, and says so where there is no answer.
"""

from contextlib import suppress

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from gradstore.analysis import curricula, drift, suspicion
from gradstore.analysis.report.choices import error_of_mean
from gradstore.analysis.report.findings import Findings, mean_and_error
from gradstore.analysis.report.pieces import SURE, Result, digits_of, written
from gradstore.errors import RequestError

_LEVEL = 0.05
_LOW, _HIGH = 0.5, 0.8
"""Reliabilities below which single ranks mean little, and from which they can be trusted."""
_NAMED = 3
"""Sources named in a sentence."""
_LEAST_OF_SOURCE = 5
"""Sources with fewer problems with a gradient are not judged."""


def results(found: Findings) -> list[Result]:
    """The answers about the main benchmark; empty without one."""
    if not found.benchmarks:
        return []
    answers: list[Result] = []
    for answer in (_sources, _sure, _better_than_chance, _suspicious):
        with suppress(RequestError):  # for example rows of several bases; the section below says why
            answers += answer(found)
    return answers


def _sources(found: Findings) -> list[Result]:
    """What helps and what harms, by source, at a family-wise level of 5 %."""
    newest = found.newest[found.main]
    scores = newest["score"].to_numpy(float)
    codes, known = newest["source"].cat.codes.to_numpy(), np.isfinite(scores)
    rows = []
    for code, name in enumerate(newest["source"].cat.categories.astype(str)):
        mine = scores[(codes == code) & known]
        if len(mine) >= _LEAST_OF_SOURCE:
            rows.append((*mean_and_error(mine), len(mine), name or "(none)"))
    sure = [row for row in rows if row[1] and abs(row[0]) > stats.t.isf(_LEVEL / 2 / len(rows), row[2] - 1) * row[1]]
    live = scores[np.isfinite(scores)]
    above = f"{written(float((live > 0).mean()), 'percent')} of {len(live)} scores are above 0." if len(live) else ""
    found_ones = []
    for title, sign, mark, verb in (("What helps", 1, "up", "helps"), ("What harms", -1, "down", "harms")):
        these = sorted((row for row in sure if row[0] * sign > 0), key=lambda row: -abs(row[0]))
        if these:
            digits = digits_of([row[0] for row in these], "signed")
            parts = [
                f"{name} ({written(mean, 'signed', digits)} ± {written(error, 'number', digits)}, {n} problems)"
                for mean, error, n, name in these[:_NAMED]
            ]
            more = f", and {len(these) - _NAMED} more" if len(these) > _NAMED else ""
            says = f"{found.main}: {', '.join(parts)}{more}. Mean {found.metric} of the source ± standard error."
        elif rows:
            says = f"No source {verb} {found.main} beyond chance, of {len(rows)} with enough problems."
        else:
            says = f"No source has {_LEAST_OF_SOURCE} problems with a gradient, so none is judged."
        if sign > 0:
            says = f"{says} {above}".strip()
        found_ones.append(Result(title, says, mark if these else "flat", "sources"))  # type: ignore[arg-type]
    return found_ones


def _sure(found: Findings) -> list[Result]:
    frame, title = found.ranking_drift[found.main], "How sure"
    live = int(found.store.view(found.main).live.sum())
    rests = f" The target rests on {live} problems with a gradient."
    if frame.empty or not drift.tells_noise(frame):
        says = f"The store cannot tell how well new rollouts would repeat the ranking against {found.main}: "
        says += "gradstore probe, or more measured steps, would."
        return [Result(title, says + rests, "flat", "drift")]
    trust = float(frame["reliability"].iloc[-1])
    says = f"New rollouts would repeat the ranking against {found.main} with a rank correlation of {trust:.2f}: "
    if trust < _LOW:
        return [Result(title, says + "single ranks mean little." + rests, "down", "drift")]
    if trust < _HIGH:
        return [Result(title, says + "trust groups more than single ranks." + rests, "flat", "drift")]
    return [Result(title, says + "single ranks can be trusted." + rests, "up", "drift")]


def _better_than_chance(found: Findings) -> list[Result]:
    title = "Better than chance"
    if not found.rounds:
        scores = found.newest[found.main]["score"].dropna().to_numpy(float)
        n = min(found.n_picked, len(scores))
        if not n:
            return [Result(title, "Nothing is ranked, so nothing can be picked.")]
        best, mean = float(np.sort(scores)[-n:].mean()), float(scores.mean())
        digits = digits_of([best, mean], "signed")
        says = (
            f"The {n} best have a mean {found.metric} of {written(best, 'signed', digits)}, a random choice "
            f"{written(mean, 'signed', digits)}, by the rollouts that ranked them. No round was trained and measured "
            "again, so hindsight cannot tell."
        )
        return [Result(title, says, "flat", "problems")]
    mine = found.judged[found.judged["selector"] == curricula.TRAINED]
    if mine.empty:
        says = "Nothing was measured again after a round, so hindsight cannot tell."
        return [Result(title, says, "flat", "selections")]
    gained, chance = float(mine["gained"].mean()), float(mine["chance"].mean())
    best, error = float(mine["best"].mean()), error_of_mean(mine["chance_error"])
    digits = digits_of([gained, chance, best], "signed")
    verdict, sign = "no better and no worse than chance, within its noise", "flat"
    if gained - chance > SURE * error:
        verdict, sign = "better than chance", "up"
    elif gained - chance < -SURE * error:
        verdict, sign = "worse than chance", "down"
    says = (
        f"In hindsight the trained picks had a mean {found.metric} of {written(gained, 'signed', digits)} with "
        f"{found.main}, a random choice {written(chance, 'signed', digits)} ± {written(error, 'number', digits)}, the "
        f"best possible {written(best, 'signed', digits)}: {verdict}, over {len(mine)} "
        f"round{'s' if len(mine) > 1 else ''} that were measured again."
    )
    return [Result(title, says, sign, "selections")]  # type: ignore[arg-type]


def _suspicious(found: Findings) -> list[Result]:
    title = "Suspicious rewards"
    try:
        frame = found.suspicious
    except RequestError:
        return [Result(title, "Nothing has a gradient, so no reward can be judged.")]
    n = len(suspicion.beyond(frame))
    limit = f"a suspicion of at least {suspicion.THRESHOLD}, and a gradient against the rest of the source"
    if not n:
        return [Result(title, f"None of {len(frame)} rewards looks broken ({limit}).", "up", "suspects")]
    return [Result(title, f"{n} of {len(frame)} rewards look broken ({limit}): read them first.", "down", "suspects")]
