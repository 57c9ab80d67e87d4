"""What the round under way has decided so far, kept in the store's folder until the round is recorded.

What to roll out depends on what is stored, and rows are stored as the round goes on; so each plan is written down,
durably, before its first rollout, with how often each of its problems had been measured then. A round that was
interrupted finds its plans again and completes them.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from gradstore import Store
from gradstore.durable import canonical_json, replace_file, writing
from gradstore.engine.probing.calibration import Calibration
from gradstore.errors import DamagedError


@dataclass(frozen=True, slots=True)
class Plan:
    """Problems to roll out together, and what there was of them at the round's step before."""

    ids: list[str]
    rows: list[int]
    """Rows of each at the round's step when the plan was made."""
    probes: list[int]
    """Probes of each along the round's target likewise."""


class Journal:
    """The plans of one round, in order; an earlier round's are forgotten."""

    def __init__(self, store: Store, pool: str, number: int, step: int, target: str) -> None:
        """target: what probes are kept under."""
        self._path = store.path / f"round-of-{pool}.json"
        self._head = {"round": number, "step": step, "target": target}
        self.calibration: Calibration | None = None
        """How the round's probe was calibrated; None before its first use."""
        self.plans: list[Plan] = self._read()
        history = store.history(pool, step)
        self.rows = Counter(history.filter(pc.equal(history["step"], step))["id"].to_pylist())
        """How many rows at the round's step each problem has now; whoever adds some counts them here."""
        self.probes = Counter(store.probes(pool, step=step, target=target)["id"].to_pylist())
        """How many probes along the round's target each problem has now, likewise."""

    def plan(self, number: int, make: Callable[[], Sequence[str]]) -> Plan:
        """The plan of this number: the one written down, or a new one of the problems that `make` gives."""
        if number < len(self.plans):
            return self.plans[number]
        ids = list(make())
        self.plans.append(Plan(ids, [self.rows[name] for name in ids], [self.probes[name] for name in ids]))
        self._write()
        return self.plans[number]

    def calibrated(self, found: Calibration | None) -> None:
        """Keep how the probe was calibrated, before anything it found is stored; the same all through a round."""
        if self.calibration is None and found is not None:
            self.calibration = found
            self._write()

    def _write(self) -> None:
        plans = [[plan.ids, plan.rows, plan.probes] for plan in self.plans]
        calibration = None if self.calibration is None else self.calibration.describe()
        replace_file(self._path, canonical_json({**self._head, "plans": plans, "calibration": calibration}))

    def close(self) -> None:
        """The round is recorded."""
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
