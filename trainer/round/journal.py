"""Journal of the current round's plans, kept in the store's folder until the round is recorded.

A plan depends on the stored rows, and the round itself adds rows. So each plan is written durably before its first
rollout, with the number of rows and probes that each problem had then. After an interruption, the round reads its plans
back and completes them.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradstore import Store
from gradstore.durable import canonical_json, replace_file, writing
from gradstore.engine.probing.calibration import Calibration
from gradstore.errors import DamagedError


@dataclass(frozen=True, slots=True)
class Plan:
    """Problems to roll out together, with their counts of rows and probes when the plan was made."""

    ids: list[str]
    rows: list[int]
    """Rows of each problem at the round's step when the plan was made."""
    probes: list[int]
    """Probes of each problem along the round's target when the plan was made."""


class Journal:
    """The plans of one round, in order; plans of earlier rounds are ignored."""

    def __init__(self, store: Store, pool: str, number: int, step: int, target: str) -> None:
        """target: the name under which probes are stored."""
        self._path = store.path / f"round-of-{pool}.json"
        self._head = {"round": number, "step": step, "target": target}
        self.calibration: Calibration | None = None
        """Calibration of the round's probe; None before its first use."""
        self.plans: list[Plan] = self._read()
        history, view = store.history(pool, step, numbers=True), store.view(pool, step)
        now = history["problem"].to_numpy()[history["step"].to_numpy() == step]
        self.rows = Counter(view.ids_of(now).tolist())
        """Current number of rows per problem at the round's step; code that adds rows must update it."""
        self.probes = Counter(store.probes(pool).table(step=step, target=target)["id"].to_pylist())
        """Current number of probes per problem along the round's target; code that adds probes must update it."""

    def plan(self, number: int, make: Callable[[], Sequence[str]]) -> Plan:
        """Plan `number`: the one in the journal, or a new one for the problems that `make` returns."""
        if number < len(self.plans):
            return self.plans[number]
        ids = list(make())
        self.plans.append(Plan(ids, [self.rows[name] for name in ids], [self.probes[name] for name in ids]))
        self._write()
        return self.plans[number]

    def calibrated(self, found: Calibration | None) -> None:
        """Write the probe's calibration before any of its results is stored; a round keeps its first calibration."""
        if self.calibration is None and found is not None:
            self.calibration = found
            self._write()

    def _write(self) -> None:
        plans = [[plan.ids, plan.rows, plan.probes] for plan in self.plans]
        calibration = None if self.calibration is None else self.calibration.describe()
        replace_file(self._path, canonical_json({**self._head, "plans": plans, "calibration": calibration}))

    def close(self) -> None:
        """Delete the journal, once the round is recorded."""
        with writing(self._path):
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[Plan]:
        if not self._path.exists():
            return []
        try:
            kept = json.loads(self._path.read_bytes())
            plans = [Plan(*parts) for parts in kept.pop("plans")]
            calibration = kept.pop("calibration", None)
            if kept == self._head and calibration is not None:
                self.calibration = Calibration.of(calibration)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{self._path}: not the plans of a round ({error}); remove it to do the round anew"
            ) from None
        return plans if kept == self._head else []
