"""Filters on problems: by source, tags and pass rate."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import RequestError, near_miss

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Where:
    """A filter: a problem passes if it satisfies every condition given."""

    sources: tuple[str, ...] = ()
    """The problem must have one of these sources."""
    tags: tuple[str, ...] = ()
    """The problem must have all of these tags."""
    pass_rate: tuple[float, float] | None = None
    """Lowest and highest pass rate, both included; an unknown pass rate never passes."""

    def __post_init__(self) -> None:
        for name in ("sources", "tags"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))

    @classmethod
    def of(cls, given: "Where | str | Iterable[str] | None") -> "Where | None":
        """A filter as it is, or from terms as `parse` takes them: `"source=gsm8k"`; None stays."""
        if given is None or isinstance(given, Where):
            return given
        if isinstance(given, Mapping) or not isinstance(given, Iterable):
            raise RequestError(f"where is {given!r:.80}, expected Where(sources=..., tags=..., pass_rate=...) or terms")
        return cls.parse([given] if isinstance(given, str) else given)

    @classmethod
    def parse(cls, terms: Iterable[str]) -> "Where":
        """Parse texts such as `source=gsm8k`, `tag=algebra`, `pass_rate=0.2..0.8`; RequestError for another form."""
        sources, tags, pass_rate = [], [], None
        for term in terms:
            name, _, value = str(term).partition("=")
            if name == "source" and value:
                sources.append(value)
            elif name == "tag" and value:
                tags.append(value)
            elif name == "pass_rate":
                pass_rate = _interval(term, value)
            else:
                raise RequestError(f"filter {term!r}: expected source=NAME, tag=NAME or pass_rate=LOW..HIGH")
        return cls(tuple(sources), tuple(tags), pass_rate)

    def check(self, problems: "pa.Table", pass_rates_P: np.ndarray) -> None:
        """RequestError, with what there is, for a source or tag that no problem has, and where none passes."""
        import pyarrow.compute as pc

        there = {
            "source": pc.unique(problems.column("source")).to_pylist(),
            "tag": pc.unique(problems.column("tags").combine_chunks().flatten()).to_pylist(),
        }
        for name, wanted in (("source", self.sources), ("tag", self.tags)):
            for one in wanted:
                if one not in there[name]:
                    some = ", ".join(map(repr, sorted(there[name])[:10])) or "none"
                    more = f" and {len(there[name]) - 10} more" if len(there[name]) > 10 else ""
                    near = near_miss(one, filter(None, there[name]))
                    raise RequestError(f"where: no problem has {name} {one!r}; there are {some}{more}{near}")
        if not self.mask(problems, pass_rates_P).any():
            known = pass_rates_P[np.isfinite(pass_rates_P)]
            rates = (
                f"their pass rates are {known.min():.2f} to {known.max():.2f}" if len(known) else "none has a pass rate"
            )
            raise RequestError(f"where: none of {len(problems)} problems passes; {rates}")

    def mask(self, problems: "pa.Table", pass_rates_P: np.ndarray) -> np.ndarray:
        """bool [P]: which problems satisfy the filter.

        problems: rows with `source` and `tags`, such as `View.problems`; pass_rates_P: float [P], NaN unknown.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        mask_P = np.ones(len(problems), bool)
        if self.sources:
            own = problems.column("source")
            mask_P &= pc.is_in(own, value_set=pa.array(self.sources, own.type)).to_numpy()
        if self.tags:
            tags = problems.column("tags").combine_chunks()
            flat = tags.flatten().to_numpy(zero_copy_only=False)
            owner = pc.list_parent_indices(tags).to_numpy()
            for tag in self.tags:
                has = np.zeros(len(problems), bool)
                has[owner[flat == tag]] = True
                mask_P &= has
        if self.pass_rate is not None:
            low, high = self.pass_rate
            mask_P &= (pass_rates_P >= low) & (pass_rates_P <= high)
        return mask_P


def _interval(term: str, value: str) -> tuple[float, float]:
    low, dots, high = value.partition("..")
    try:
        bounds = float(low), float(high if dots else low)
    except ValueError:
        raise RequestError(f"filter {term!r}: expected pass_rate=LOW..HIGH with two numbers") from None
    if not 0 <= bounds[0] <= bounds[1] <= 1:
        raise RequestError(f"filter {term!r}: expected pass_rate=LOW..HIGH with 0 <= LOW <= HIGH <= 1")
    return bounds
