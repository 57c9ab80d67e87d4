"""Which way of answering is the fastest: a model of the time of each, with constants measured on two cores.

Only ratios matter, and they follow the bytes a kind reads. FAISS's quantised kinds on the CPU are slower than scanning
the stored rows and are chosen by name alone (docs/benchmarks.md).
"""

from collections.abc import Collection
from dataclasses import dataclass

_SCAN_CALL, _SCAN = 2e-3, 5e-11
"""Seconds for each query, and for each stored number of it."""
_TURBOVEC_CALL, _TURBOVEC, _TURBOVEC_CANDIDATE = 2e-3, 1e-11, 1e-5
"""The same, and seconds for each candidate fetched."""
_TURBOVEC_BUILD = 12e-9
"""Seconds for each number of a row: quantising, and the self-test."""
_TURBOVEC_FACTOR = 2.0
_TURBOVEC_K = 300
"""Beyond so many, what is fetched to rescore leaves turbovec's fast path (about 1,000 results)."""
_GPU_PASS = 1e-12
_GPU_BUILD = 1e-9
_SMALL = 4_000_000
"""Stored numbers that a scan goes through faster than a person notices."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the choice depends on."""

    n_rows: int
    dim: int
    k: int
    n_queries: int = 1
    built: frozenset[str] = frozenset()
    """Kinds that are built already for this metric."""
    gpu_bytes: int = 0
    """Free memory of the GPU that FAISS sees; 0: none."""


def seconds(situation: Situation, kind: str) -> float:
    """Expected time for all the queries, one after the other, building included where it is not built."""
    numbers, queries = situation.n_rows * situation.dim, situation.n_queries
    if kind == "scan":
        return queries * (_SCAN_CALL + numbers * _SCAN)
    if kind == "turbovec":
        candidates = _TURBOVEC_FACTOR * situation.k
        searching = queries * (_TURBOVEC_CALL + numbers * _TURBOVEC + candidates * _TURBOVEC_CANDIDATE)
        return searching + (0 if "turbovec" in situation.built else _TURBOVEC_BUILD * numbers)
    return numbers * _GPU_PASS * queries + (0 if "flat" in situation.built else _GPU_BUILD * numbers)


def choose(situation: Situation, available: Collection[str]) -> str:
    """`scan`, or the kind that answers sooner. available: kinds whose library is installed."""
    ways = ["scan"]
    numbers = situation.n_rows * situation.dim
    if numbers > _SMALL:
        if (
            "turbovec" in available
            and situation.k <= min(_TURBOVEC_K, situation.n_rows // 20)
            and situation.dim <= 16384
        ):
            ways.append("turbovec")
        if "flat" in available and situation.k <= 2048 and 5 * numbers < situation.gpu_bytes:
            ways.append("flat")
    return min(ways, key=lambda way: seconds(situation, way))
