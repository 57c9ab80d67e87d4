"""Probe measurements of several problems, with their statistics; rewards can be corrected afterwards.

Dimension letters: P problems, G rollouts of one problem.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from gradstore import Store
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.probing import statistics as probe_statistics
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError, check_known
from gradstore.state import State, live_mask

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS: dict[str, type] = {"derivatives": np.float64, "rewards": np.float64, "lengths": np.int64}
"""Columns of lists, and what their numbers become."""


@dataclass(frozen=True, slots=True, eq=False)
class ProbeBatch:
    """Probes of several problems: measurements and statistics."""

    ids: list[str]
    derivatives: list[np.ndarray]
    """d_ij of every rollout, float64 [G] each; nan if the problem was not run."""
    rewards: list[np.ndarray]
    """Rewards of the rollouts, float64 [G] each."""
    lengths: list[np.ndarray]
    """Tokens of the rollouts that the policy wrote, int64 [G] each."""
    dots: np.ndarray
    """<g_i, V>, float64 [P]; 0 where not live."""
    standard_errors: np.ndarray
    """Standard errors of the dots, over draws of the rollouts, float64 [P]; 0 where not live."""
    t: np.ndarray
    """t statistic of the correlation of reward and derivative, float64 [P]; 0 where not live."""
    p_values: np.ndarray
    """One-sided p-values of `t` against "not positively correlated", float64 [P]; 1 where not live."""
    states: list[State]
    reasons: list[str]
    """Why a problem failed; empty for the others."""
    settings: Objective
    calibration: Calibration | None = None
    numbers: np.ndarray | None = None
    """Numbers of the problems in their collection (View.problem_numbers), int64 [P]; None: to be looked up by id."""

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        derivatives: Sequence[np.ndarray],
        settings: Objective,
        calibration: Calibration | None = None,
    ) -> "ProbeBatch":
        """The batch with statistics, from measured derivatives; groups and derivatives in the same order."""
        return cls._of(
            [group.problem_id for group in groups],
            list(derivatives),
            [np.asarray(group.rewards, np.float64) for group in groups],
            [group.n_written_of_rollouts for group in groups],
            settings,
            calibration,
        )

    @classmethod
    def _of(
        cls,
        ids: list[str],
        derivatives: list[np.ndarray],
        rewards: list[np.ndarray],
        lengths: list[np.ndarray],
        settings: Objective,
        calibration: Calibration | None,
    ) -> "ProbeBatch":
        n = len(ids)
        dots, errors, t, p_values = np.zeros(n), np.zeros(n), np.zeros(n), np.ones(n)
        states, reasons = [State.NO_SIGNAL] * n, [""] * n
        sizes_P = np.array([len(r_G) for r_G in rewards], np.int64)
        for size in np.unique(sizes_P).tolist():
            places = np.flatnonzero(sizes_P == size)
            r_PG, d_PG, T_PG = (np.stack([each[i] for i in places]) for each in (rewards, derivatives, lengths))
            differ_P, finite_P = r_PG.max(axis=1) != r_PG.min(axis=1), np.isfinite(d_PG).all(axis=1)
            for i in places[differ_P & ~finite_P].tolist():
                states[i], reasons[i] = State.FAILED, "a derivative is not finite, or was not measured"
            live_P = differ_P & finite_P & d_PG.any(axis=1)
            live = places[live_P]
            if not len(live):
                continue
            for i in live.tolist():
                states[i] = State.LIVE
            r_PG, d_PG, T_PG = r_PG[live_P], d_PG[live_P], T_PG[live_P]
            dots[live], errors[live] = probe_statistics.dots_and_errors(r_PG, d_PG, T_PG, settings)
            t[live], p_values[live] = probe_statistics.t_tests(r_PG, d_PG)
        return cls(
            ids, derivatives, rewards, lengths, dots, errors, t, p_values, states, reasons, settings, calibration
        )

    @classmethod
    def load(cls, store: Store, collection: str, *, step: int, target: str) -> "ProbeBatch":
        """The saved probes of a step along a target; the newest of each problem.

        RequestError if there are none, or if they were measured under different objectives.
        """
        table = store.probes(collection).table(step=step, target=target)
        if not len(table):
            raise RequestError(f"collection {collection!r} has no probes at step {step} along {target!r}")
        if len(table["objective"].unique()) > 1:
            raise RequestError(f"collection {collection!r}: probes at step {step} along {target!r} differ in objective")
        return cls.of_table(table)

    @classmethod
    def of_table(cls, table: "pa.Table") -> "ProbeBatch":
        """The probes in rows of `RecordedProbes.table`, one or more of one objective; the newest of each problem."""
        newest = {name: row for row, name in enumerate(table["id"].to_pylist())}
        if len(newest) < len(table):
            table = table.take(list(newest.values()))
        derivatives, rewards, lengths = (_arrays(table[name], kind) for name, kind in _COLUMNS.items())
        settings = Objective(**json.loads(table["objective"][0].as_py()))
        return cls._of(list(newest), derivatives, rewards, lengths, settings, None)

    def save(self, store: Store, collection: str, *, step: int, target: str, target_commit: int = 0) -> None:
        """Save derivatives, rewards and lengths beside the collection's rows; see `RecordedProbes.add`."""
        store.probes(collection).add(
            self.ids,
            self.derivatives,
            self.rewards,
            self.lengths,
            step=step,
            target=target,
            target_commit=target_commit,
            objective=self.settings.as_dict(),
        )

    @property
    def n_rollouts(self) -> np.ndarray:
        """Number of rollouts of each problem, int64 [P]."""
        return np.fromiter(map(len, self.rewards), np.int64, len(self.rewards))

    @property
    def live(self) -> np.ndarray:
        """Mask of problems that can be ranked, bool [P]."""
        return live_mask(self.states)

    def scores(self, kind: str = "dot") -> np.ndarray:
        """Scores by `dot`, `corr` (of reward and derivative), `snr` (dot / SE), `lcb` (dot - SE), `shrunk` (empirical
        Bayes over this batch) or `fdr` (dot, if it passes a Benjamini-Hochberg cut at 0.1), float64 [P]; -inf where a
        problem is not live or fails the cut. RequestError for another kind."""
        check_known("probe score", kind, probe_statistics.PROBE_SCORES)
        live = self.live
        found = np.full(len(self.ids), -np.inf)
        n_P = self.n_rollouts
        if live.any():
            found[live] = probe_statistics.scores(
                kind, self.dots[live], self.standard_errors[live], self.t[live], self.p_values[live], n_P[live]
            )
        return found

    def rescored(self, rewards: Sequence[np.ndarray]) -> "ProbeBatch":
        """The same derivatives with other rewards (say, after a fix of the verifier), without running the model.

        RequestError if counts differ, if a reward is not finite, or under a clipped objective: its derivatives depend
        on the sign of the advantage.
        """
        if self.settings.sign_dependent:
            raise RequestError("a clipped objective's derivatives depend on the rewards: probe again")
        if len(rewards) != len(self.ids):
            raise RequestError(f"{len(rewards)} lists of rewards for {len(self.ids)} problems")
        checked = [np.asarray(r_G, np.float64) for r_G in rewards]
        for name, r_G, d_G in zip(self.ids, checked, self.derivatives, strict=True):
            if r_G.shape != d_G.shape or not np.isfinite(r_G).all():
                raise RequestError(f"problem {name!r}: expected {len(d_G)} finite rewards, got shape {r_G.shape}")
        return self._of(self.ids, self.derivatives, checked, self.lengths, self.settings, self.calibration)


def _arrays(column: "pa.ChunkedArray", kind: type) -> list[np.ndarray]:
    """Each list of a column as an array."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(kind)
    ends = np.cumsum(np.diff(lists.offsets.to_numpy())).tolist()
    return [values[start:end] for start, end in pairwise([0, *ends])]
