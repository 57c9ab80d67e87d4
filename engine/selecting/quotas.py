"""Quotas: the share of the picks for each source.

A named source gets its share of the picks, rounded to an integer. The rest, 1 minus the sum of the shares, goes to the
sources without a quota. P candidates, S groups of them.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from gradstore.engine.selecting.apportionment import apportion
from gradstore.errors import RequestError, check_number

OTHERS = "sources without a quota"


def check_quotas(quotas: Mapping[str, float], sources: np.ndarray) -> None:
    """Check quotas; RequestError for shares outside [0, 1] or with a sum above 1, and for an unknown source."""
    if not quotas:
        raise RequestError("no quota given: name at least one source and its share, or leave quotas out")
    for source, share in quotas.items():
        check_number(f"quota of source {source!r}", share, least=0, most=1)
    if sum(quotas.values()) > 1 + 1e-9:
        raise RequestError(f"quotas sum to {sum(quotas.values()):g}, expected at most 1")
    known = set(sources.tolist())
    for source in quotas:
        if source not in known:
            raise RequestError(f"quota of source {source!r}: the collection has {', '.join(map(repr, sorted(known)))}")


def group_sizes(quotas: Mapping[str, float], n: int) -> dict[str, int]:
    """Number of picks for each named source and, last, for all others together; the sum is n."""
    shares = [*quotas.values(), max(0.0, 1 - sum(quotas.values()))]
    return dict(zip([*quotas, OTHERS], apportion(n, np.array(shares)).tolist(), strict=True))


def parse_quotas(terms: Iterable[str]) -> dict[str, float]:
    """Parse texts such as `gsm8k=0.5`; RequestError for another form or a repeated source."""
    quotas: dict[str, float] = {}
    for term in terms:
        source, _, share = term.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not source or not 0 <= value <= 1:
            raise RequestError(f"quota {term!r}: expected SOURCE=SHARE with a share from 0 to 1")
        if source in quotas:
            raise RequestError(f"quota {term!r}: source {source!r} has one already")
        quotas[source] = value
    return quotas


def groups_of(quotas: Mapping[str, float], sources_P: np.ndarray) -> np.ndarray:
    """Group of each candidate: the index of its source among the quotas, or len(quotas) without one; int64 [P]."""
    group_P = np.full(len(sources_P), len(quotas), np.int64)
    for group, source in enumerate(quotas):
        group_P[sources_P == source] = group
    return group_P
