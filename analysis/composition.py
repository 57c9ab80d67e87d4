"""What a set of problems is made of: the share of each source and of each tag."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa


def source_shares(problems: pa.Table) -> dict[str, float]:
    """Source -> share of the problems, in [0, 1]; problems: rows of a problem table."""
    return _shares(problems.column("source").to_pylist(), len(problems))


def tag_shares(problems: pa.Table) -> dict[str, float]:
    """Tag -> share of the problems that carry it, in [0, 1]."""
    return _shares((tag for tags in problems.column("tags").to_pylist() for tag in set(tags)), len(problems))


def _shares(names: Iterable[str], n: int) -> dict[str, float]:
    return {name: count / n for name, count in sorted(Counter(names).items())}
