"""Registry by name: the built-in entries, then those that other packages register through an entry-point group.

An entry is imported only when it is requested. docs/selectors.md shows a complete package.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, Protocol, TypeVar

from gradstore.errors import RequestError, check_known


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T], Generic[T]):
    """Entries of one class by name or alias."""

    def __init__(
        self,
        cls: type[T],
        built_in: Sequence[T],
        *,
        kind: str,
        group: str,
        aliases: Mapping[str, str] | None = None,
        forbidden: str = "",
        spelled: Callable[[str], T | None] = lambda name: None,
    ) -> None:
        """cls: class of the entries. kind: what messages call an entry. group: the entry-point group. aliases: other
        name -> name. forbidden: characters that no name may have; they mean something else. spelled: the entry that a
        name with settings in it means; None for other names."""
        self._spelled = spelled
        self._cls, self._kind, self._group, self._forbidden = cls, kind, group, forbidden
        self._aliases = dict(aliases or {})
        self._loaded = {entry.name: entry for entry in built_in}
        self._built_in = tuple(self._loaded)

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        """Entry points registered by other packages, by name."""
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=self._group):
            if entry.name in self._built_in or entry.name in self._aliases or found.get(entry.name, entry) != entry:
                raise RequestError(f"{self._kind} {entry.name!r} of {entry.value} is already registered")
            if any(sign in entry.name for sign in self._forbidden):
                signs = " and ".join(map(repr, self._forbidden))
                raise RequestError(f"{self._kind} {entry.name!r} of {entry.value}: {signs} are for mixtures")
            found[entry.name] = entry
        return found

    def __getitem__(self, name: str) -> T:
        name = self._aliases.get(name, name)
        meant = self._spelled(name)
        if meant is not None:
            return meant
        if name not in self._loaded:
            check_known(self._kind, name, self)
            self._loaded[name] = self._load(self._entries[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._entries

    def __len__(self) -> int:
        return len(self._built_in) + len(self._entries)

    def _load(self, entry: EntryPoint) -> T:
        what = f"{self._kind} {entry.name!r}"
        try:
            found = entry.load()
        except (ImportError, AttributeError) as error:
            raise RequestError(f"{what}: {entry.value} cannot be imported: {error}") from error
        if not isinstance(found, self._cls):
            raise RequestError(f"{what}: {entry.value} is {found!r}, expected an engine.{self._cls.__name__}")
        if found.name != entry.name:
            raise RequestError(f"{what}: {entry.value} calls itself {found.name!r}: give both one name")
        return found
