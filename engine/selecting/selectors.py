"""Registry of selectors by name: the built-in ones, then those registered by other packages.

Users add their own through the entry-point group `gradstore.selectors`; an entry names an `engine.Selector`.
docs/selectors.md shows a complete package. An entry is imported only when its selector is requested.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from gradstore.engine.selecting.candidates import Selector
from gradstore.engine.selecting.scores_by_gradient import BY_GRADIENT
from gradstore.engine.selecting.scores_by_pass_rate import BY_PASS_RATE, acc_of
from gradstore.engine.selecting.scores_by_probe import BY_PROBE
from gradstore.errors import RequestError, check_known

GROUP = "gradstore.selectors"
ALIASES = {"sim": "cosine", "align": "chunk_mean", "random": "rand"}
"""GradAlign's mode names that differ from ours."""


class Registry(Mapping[str, Selector]):
    """Selectors by name or alias; `acc(LOW..HIGH)` is `acc` with another window."""

    def __init__(self) -> None:
        self._loaded = {selector.name: selector for selector in (*BY_GRADIENT, *BY_PASS_RATE, *BY_PROBE)}
        self._built_in = tuple(self._loaded)

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        """Entry points registered by other packages, by name."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=GROUP):
            if entry.name in self._built_in or entry.name in ALIASES or found.get(entry.name, entry) != entry:
                raise RequestError(f"selector {entry.name!r} of {entry.value} is already registered")
            if "+" in entry.name or ":" in entry.name:
                raise RequestError(f"selector {entry.name!r} of {entry.value}: '+' and ':' are for mixtures")
            found[entry.name] = entry
        return found

    def __getitem__(self, name: str) -> Selector:
        name = ALIASES.get(name, name)
        windowed = acc_of(name)
        if windowed is not None:
            return windowed
        if name not in self._loaded:
            check_known("selector", name, self)
            self._loaded[name] = _load(self._entries[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._entries

    def __len__(self) -> int:
        return len(self._built_in) + len(self._entries)


def _load(entry: EntryPoint) -> Selector:
    try:
        selector = entry.load()
    except (ImportError, AttributeError) as error:
        raise RequestError(f"selector {entry.name!r}: {entry.value} cannot be imported: {error}") from error
    if not isinstance(selector, Selector):
        raise RequestError(f"selector {entry.name!r}: {entry.value} is {selector!r}, expected an engine.Selector")
    if selector.name != entry.name:
        raise RequestError(f"selector {entry.name!r}: {entry.value} calls itself {selector.name!r}: give both one name")
    return selector


SELECTORS = Registry()
