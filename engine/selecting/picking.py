"""Picks of a selection: each part of a mixture takes its number of problems from each source, and none twice.

P candidates of one part, A parts, S groups of sources.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gradstore.engine.searching.ranking import best
from gradstore.engine.selecting.apportionment import apportion, cross
from gradstore.engine.selecting.candidates import Candidates, Scored, Selector
from gradstore.engine.selecting.diversity import Diversity
from gradstore.engine.selecting.mixture import Part
from gradstore.engine.selecting.quotas import OTHERS, group_sizes
from gradstore.errors import RequestError

Take = Callable[[np.ndarray, int], np.ndarray]
"""(keys [P], NaN excludes; n) -> places of at most n picks, best first."""


def numbers_of_picks(n: int, parts: list[Part], quotas: Mapping[str, float] | None) -> np.ndarray:
    """Number of picks of each part from each group of sources, int64 [A, S]; without quotas there is one group."""
    by_part_A = apportion(n, np.array([part.share for part in parts]))
    if quotas is None:
        return by_part_A[:, None]
    return cross(by_part_A, np.array(list(group_sizes(quotas, n).values())))


def taker(candidates: Candidates, diversity: Diversity | None, seed: int) -> Take:
    """Function that takes the best candidates: the plain ranking with ties by id, or a diverse one."""

    def id_of(places_P: np.ndarray) -> np.ndarray:
        return candidates.ids_at(places_P)

    def ranked(keys_P: np.ndarray, n: int) -> np.ndarray:
        return best(keys_P, n, id_of)

    def spread(keys_P: np.ndarray, n: int) -> np.ndarray:
        assert diversity is not None
        leading = best(keys_P, diversity.candidates * n, id_of)
        if not len(leading):
            return leading
        units_KD = candidates.view.rows(candidates.positions[leading])
        return leading[diversity.pick(units_KD, keys_P[leading], n, seed)]

    return ranked if diversity is None else spread


def pick_from_groups(
    keys_P: np.ndarray, n_S: np.ndarray, group_P: np.ndarray | None, take: Take, seen: Candidates, in_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pick from each group; returns places of the picks, int64, and the number found in each group, int64 [S].

    n_S: picks requested from each group. group_P: group of each candidate; None: there is only one group. in_order:
    sort the picks of all groups together by key, ties by id; otherwise group after group.
    """
    chosen: list[np.ndarray] = [
        take(keys_P if group_P is None else np.where(group_P == group, keys_P, np.nan), int(n))
        if n
        else np.empty(0, np.int64)
        for group, n in enumerate(n_S)
    ]
    picked = np.concatenate(chosen)
    if in_order and len(chosen) > 1:
        picked = picked[np.lexsort((seen.ids_at(picked).astype(str), -keys_P[picked]))]
    return picked, np.array([len(places_P) for places_P in chosen])


def refuse_shortage(
    part: Part, n_S: np.ndarray, found_S: np.ndarray, collection: str, quotas: Mapping[str, float] | None, census: str
) -> None:
    """Raise RequestError if a group of sources has too few candidates; names the first one."""
    short = np.flatnonzero(found_S < n_S)
    if not len(short):
        return
    group = int(short[0])
    whence, advice = f"from {collection!r}", "ask for fewer, or allow fewer"
    if quotas is not None:
        named = f"source {list(quotas)[group]!r}" if group < len(quotas) else OTHERS
        whence, advice = f"from {named} of {collection!r}", "ask for fewer, or change the quotas"
    share = f" with a share of {part.share:g}" if part.share < 1 else ""
    raise RequestError(
        f"selector {part.selector.name!r}{share} can choose {found_S[group]} of {n_S[group]} problems asked {whence} "
        f"({census}): {advice}"
    )


class Picks:
    """Collects the picks of a selection, part after part."""

    def __init__(self) -> None:
        self._picked: list[np.ndarray] = []
        self._ids: list[str] = []
        self._picked_by: list[str] = []
        self._numbers: dict[str, list[np.ndarray]] = {
            name: [] for name in ("scores", "low", "high", "weights", "rollouts")
        }
        self._could: list[np.ndarray] = []

    def free(self, candidates: Candidates, keys_P: np.ndarray) -> np.ndarray:
        """Set the keys of picked problems to NaN; counts all problems with a key as candidates of the selection."""
        self._could.append(candidates.numbers[~np.isnan(keys_P)])
        if not self._picked:
            return keys_P
        return np.where(np.isin(candidates.numbers, np.concatenate(self._picked)), np.nan, keys_P)

    def add(self, selector: Selector, candidates: Candidates, scored: Scored, picked: np.ndarray) -> None:
        """Add a selector's picks; picked: places among its candidates."""
        self._picked.append(candidates.numbers[picked])
        self._ids += map(str, candidates.ids_at(picked))
        self._picked_by += [selector.name] * len(picked)
        for name, column in self._numbers.items():
            column.append(getattr(scored, name)[picked])

    def columns(self) -> dict[str, Any]:
        """Fields of the Selection that describe the picks."""
        could = self._could[0] if len(self._could) == 1 else np.unique(np.concatenate(self._could))
        return {
            "ids": self._ids,
            "picked_by": self._picked_by,
            "n_candidates": len(could),
            **{name: np.concatenate(column) for name, column in self._numbers.items()},
        }


def answer(selector: Selector, candidates: Candidates) -> Scored:
    """Run a selector; checks its result and fills in defaults, so that no array is None; non-finite scores become NaN.

    RequestError if an array has not one entry per candidate, or for an invalid weight or number of rollouts.
    """
    given = selector.score(candidates)
    given = given if isinstance(given, Scored) else Scored(given)
    n = len(candidates)
    blank = {"low": np.nan, "high": np.nan, "weights": 1.0, "rollouts": 0}
    columns = {}
    for name in ("scores", *blank):
        value = getattr(given, name)
        column = np.full(n, blank[name]) if value is None else np.asarray(value)
        if column.shape != (n,):
            raise RequestError(f"selector {selector.name!r}: {name} of shape {column.shape} for {n} candidates")
        columns[name] = column.astype(np.int64 if name == "rollouts" else np.float64)
    columns["scores"] = np.where(np.isfinite(columns["scores"]), columns["scores"], np.nan)
    if not (np.isfinite(columns["weights"]) & (columns["weights"] >= 0)).all() or (columns["rollouts"] < 0).any():
        raise RequestError(
            f"selector {selector.name!r}: weights must be finite, and neither they nor rollouts negative"
        )
    return Scored(**columns)
