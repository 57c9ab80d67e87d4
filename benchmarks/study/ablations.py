"""What each part of the forecast of old rows is worth: the budgeted refresh with that part taken out.

    python -m benchmarks.study run --methods budgeted-lcb,budgeted-lcb~norms,... --seeds 0-2 --out FILE
    python -m benchmarks.study ablations FILE

`METHOD~PART` runs METHOD with PART replaced by the obvious simpler rule. The replacements are here and nowhere in the
product.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.study.statistics import difference, final_accuracy, of
from benchmarks.study.toy import ARMS
from gradstore.engine.forecasting import forecast
from gradstore.engine.forecasting.cosine_model import Pairs, Staleness

WITHOUT = "~"
"""Between a method's name and the part that it does without."""


class NewestScore:
    """Each problem's newest score, never aged, instead of a filter over all its scores."""

    def __init__(self, model: Staleness, n: int) -> None:
        self._noise = model.noise
        self._mean_P, self._variance_P = np.full(n, model.mean), np.full(n, model.signal)

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self._mean_P, np.sqrt(self._variance_P)

    def measure(self, places: np.ndarray, step: int, scores: np.ndarray, rollouts: np.ndarray) -> None:
        self._mean_P[places] = scores
        self._variance_P[places] = self._noise / np.maximum(rollouts, 1)


def _newest_norms(rate_P: np.ndarray, *_: Any) -> np.ndarray:
    """No expected norms: the forecast then uses each newest row's own."""
    return np.full(len(rate_P), np.nan)


def _no_pairs(*_: Any) -> Pairs:
    return Pairs(*np.zeros((5, 0)))


def _no_scale(*_: Any) -> None:
    return None


_OLD_SCORES: Mapping[str, Callable[..., Any]] = {"measured_pairs": _no_pairs, "Beliefs": NewestScore}

PARTS: Mapping[str, tuple[str, Mapping[str, Callable[..., Any]]]] = {
    "norms": ("norms of the newest rows", {"expected_norms": _newest_norms}),
    "probe_scale": ("a probed dot is the sketched one", {"calibrate": _no_scale}),
    "drift_fit": ("the drift model's prior, nothing fitted", {"measured_pairs": _no_pairs}),
    "cosine_model": ("newest cosines, never aged", _OLD_SCORES),
    "everything": ("all of these", {"expected_norms": _newest_norms, "calibrate": _no_scale, **_OLD_SCORES}),
}
"""Part of the forecast -> what stands in for it, and the replaced names of engine/forecasting/forecast.py."""


@contextmanager
def without(part: str | None) -> Iterator[None]:
    """Run with a part of the forecast replaced; None: with all of it."""
    with ExitStack() as stack:
        for name, replacement in PARTS[part][1].items() if part else ():
            stack.enter_context(mock.patch.object(forecast, name, replacement))
        yield


def table(rows: Sequence[Mapping[str, Any]], whole: str) -> str:
    """Accuracy lost without each part, by arm and on average over the arms, as Markdown; 95 % intervals over seeds."""
    lines = ["| without | " + " | ".join([*ARMS, "all arms"]) + " |", "| --- |" + " --- |" * (len(ARMS) + 1)]
    everything = [final_accuracy(of(rows, arm, whole)) for arm in ARMS]
    lines.append("| nothing: accuracy | " + " | ".join(f"{one.mean:.3f}" for one in everything) + " | |")
    pooled = [_pooled(rows, name) for name in (whole, *(f"{whole}{WITHOUT}{part}" for part in PARTS))]
    for (part, (what, _)), mine in zip(PARTS.items(), pooled[1:], strict=True):
        found = [difference(of(rows, arm, f"{whole}{WITHOUT}{part}"), of(rows, arm, whole)) for arm in ARMS]
        found.append(difference(mine, pooled[0]))
        cells = [f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in found]
        lines.append(f"| `{part}`: {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pooled(rows: Sequence[Mapping[str, Any]], method: str) -> list[dict[str, Any]]:
    """One row per seed that has run every arm: the mean of the arms' last accuracies."""
    last: dict[int, list[float]] = {}
    for arm in ARMS:
        for row in of(rows, arm, method):
            last.setdefault(row["seed"], []).append(row["accuracy"][-1])
    return [{"seed": seed, "accuracy": [np.mean(own)]} for seed, own in last.items() if len(own) == len(ARMS)]
