"""The problems of a run's pool by id. The caller's records are kept as they are: a million copies take half a GB."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradstore.errors import RequestError
from gradstore.problems import canonical


class Records(Mapping[str, dict[str, Any]]):
    """Canonical records (docs/format.md, Problems) by id, in the order given; each is made when it is asked for."""

    def __init__(self, given: Sequence[Mapping[str, Any]], collection: str) -> None:
        """RequestError for an invalid record, and for an id that occurs more than once. given: not to be changed."""
        self.given = given if isinstance(given, Sequence) else list(given)
        self._where = f"collection {collection!r}"
        self._place_of: dict[str, int] = {}
        for place in range(len(self.given)):
            name = self._at(place)["id"]
            if self._place_of.setdefault(name, place) != place:
                raise RequestError(f"{self._where}: problem id {name!r} occurs more than once; keep one")

    def __getitem__(self, problem_id: str) -> dict[str, Any]:
        return self._at(self._place_of[problem_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._place_of)

    def __len__(self) -> int:
        return len(self._place_of)

    def __contains__(self, problem_id: object) -> bool:
        return problem_id in self._place_of

    def _at(self, place: int) -> dict[str, Any]:
        return canonical(dict(self.given[place]), f"{self._where}, record {place}")
