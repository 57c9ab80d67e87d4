"""reasoning-gym's verifiers: a data set by its name and settings, and its judgement of an answer to an entry.

Names and settings come from data files. A name is looked up among reasoning-gym's data sets, settings among the fields
of the data set's own settings; neither can name code. All of it happens in a grader, under its limits.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from gradstore.errors import first_line

COMPARE_TUPLES = frozenset({"arc_agi", "rearc"})
"""Data sets whose verifiers compare tuples; with lists from JSON they would reject right answers."""
BUILT = 256
"""Data sets kept ready; some hold a dictionary of words."""


class UnusableError(ValueError):
    """The problem's data set or entry cannot be used, whatever the answer."""


def verified(kept: Mapping[str, Any], answer: str | None) -> float:
    """The verifier's score of an answer, or of the entry's own where it is None.

    kept: "dataset", "entry" and perhaps "config". UnusableError if no answer could be judged.
    """
    name = kept["dataset"]
    if not isinstance(name, str):
        raise UnusableError(f"no reasoning-gym data set {name!r}")
    verifier = _verifier(name, json.dumps(kept.get("config") or {}, sort_keys=True))
    entry = _with_tuples(kept["entry"]) if name in COMPARE_TUPLES else dict(kept["entry"])
    try:
        return verifier(_own(entry) if answer is None else answer, entry)
    except Exception as error:
        # Some verifiers raise for an answer of an unexpected form. To distinguish this from a broken entry, grade the
        # entry's own answer, which every verifier can judge.
        if answer is not None and _judges_own(verifier, entry):
            return 0.0
        if isinstance(error, MemoryError):
            raise
        raise UnusableError(
            f"reasoning-gym cannot use extra.reasoning_gym.entry: {type(error).__name__}: {first_line(error)}"
        ) from error


def _own(entry: Mapping[str, Any]) -> str:
    return str(entry["answer"])


def _judges_own(verifier: Callable[[str, dict], float], entry: dict[str, Any]) -> bool:
    try:
        verifier(_own(entry), entry)
    except Exception:  # noqa: BLE001 - a hundred verifiers by many authors may raise anything
        return False
    return True


def _with_tuples(value: Any) -> Any:
    """Convert JSON's lists back to tuples, recursively."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


@functools.lru_cache(maxsize=BUILT)
def _verifier(dataset: str, config: str) -> Callable[[str, dict], float]:
    """The verifier of a data set with these settings, which are JSON text."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    settings = json.loads(config)
    problem = f"no reasoning-gym data set {dataset!r} so configured"
    if dataset not in DATASETS:
        raise UnusableError(f"no reasoning-gym data set {dataset!r}")
    fields = {field.name for field in dataclasses.fields(DATASETS[dataset][1])}
    if not isinstance(settings, dict) or not settings.keys() <= fields:
        unknown = sorted(settings.keys() - fields) if isinstance(settings, dict) else settings
        raise UnusableError(f"{problem}: {unknown} is none of its settings")
    try:
        return reasoning_gym.create_dataset(dataset, **settings).score_answer
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise UnusableError(f"{problem}: {type(error).__name__}: {first_line(error)}") from error
