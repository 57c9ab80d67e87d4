"""Cost model that chooses the fastest way to answer: scan or an index kind; constants measured on two cores.

Only ratios matter, and they follow the bytes that a kind reads.
"""

from collections.abc import Collection
from dataclasses import dataclass

_SCAN_CALL, _SCAN = 2e-3, 5e-11
"""Seconds per query, and per query and stored number."""
_TURBOVEC_CALL, _TURBOVEC, _TURBOVEC_CANDIDATE = 2e-3, 1e-11, 1e-5
"""The same, and seconds per candidate fetched."""
_TURBOVEC_BUILD = 12e-9
"""Seconds per stored number: quantisation and the self-test."""
_TURBOVEC_FACTOR = 2.0
_TURBOVEC_K = 300
"""Largest k: with more, the candidates to rescore exceed turbovec's fast path (about 1,000 results)."""
_TOGETHER = {512: (5.2e-12, 3.1e-12), 256: (1.6e-11, 1.6e-11), 0: (6.6e-11, 1.6e-11)}
"""Seconds per stored number and query where many are asked together, scan and turbovec, by `products.registers`."""
_GPU_PASS = 1e-12
_GPU_BUILD = 1e-9
_SMALL = 4_000_000
"""Stored numbers below which a scan takes no noticeable time."""


@dataclass(frozen=True, slots=True)
class Situation:
    """Input of the choice: sizes, number of queries, built kinds and GPU memory."""

    n_rows: int
    dim: int
    k: int
    n_queries: int = 1
    built: frozenset[str] = frozenset()
    """Kinds that are built already for this metric."""
    gpu_bytes: int = 0
    """Free memory of the GPU that FAISS sees; 0: none."""
    together: bool = False
    """Whether all queries are asked at once, as by `search_each`."""
    registers: int = 512
    """Bits of the vector registers that products are computed with, as `products.registers`."""


def seconds(situation: Situation, kind: str) -> float:
    """Expected seconds for all queries, plus the build if the kind is not built yet."""
    numbers, queries = situation.n_rows * situation.dim, situation.n_queries
    together = situation.together and queries > 1
    scan_more, turbovec_more = _TOGETHER[situation.registers]
    if kind == "scan":
        if together:
            return _SCAN_CALL + numbers * max(_SCAN, queries * scan_more)
        return queries * (_SCAN_CALL + numbers * _SCAN)
    if kind == "turbovec":
        candidates = _TURBOVEC_FACTOR * situation.k * _TURBOVEC_CANDIDATE
        if together:
            searching = _TURBOVEC_CALL + numbers * max(_TURBOVEC, queries * turbovec_more)
        else:
            searching = queries * (_TURBOVEC_CALL + numbers * _TURBOVEC + candidates)
        return searching + (0 if "turbovec" in situation.built else _TURBOVEC_BUILD * numbers)
    return numbers * _GPU_PASS * queries + (0 if "flat" in situation.built else _GPU_BUILD * numbers)


def choose(situation: Situation, available: Collection[str]) -> str:
    """Return the fastest way: `scan` or a kind. available: kinds whose library is installed."""
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
