"""Track of one problem: its own rows over all steps, found without a view of the collection at each step.

R rows of the problem, D sketch dimensions.
"""

import numpy as np

from gradstore.snapshot import Snapshot
from gradstore.stored_rows import StoredRows


class Track:
    """All rows of a problem that are not deleted, in the order of their steps, then of appending; arrays are [R]."""

    def __init__(self, snapshot: Snapshot, number: int) -> None:
        """number: the problem's, in the collection."""
        rows = np.flatnonzero(snapshot.column("problem") == number)
        rows = rows[rows >= snapshot.manifest.tombstones.get(number, 0)]
        rows = rows[np.argsort(snapshot.column("step")[rows], kind="stable")]
        self.is_deleted = not len(rows) and number in snapshot.manifest.tombstones
        """Whether the problem was deleted and not appended again."""
        self._stored = StoredRows(snapshot, rows)
        self.steps = self._stored.column("step")
        """int64."""
        self.states = self._stored.column("state")
        """`State`, uint8."""
        self.norms = self._stored.column("norm")
        """float32; 0 where not live."""
        self.pass_rates = self._stored.column("pass_rate")
        """float32; nan where unknown."""
        self.n_rollouts = self._stored.column("n_rollouts")
        """int32; 0 where unknown."""

    def __len__(self) -> int:
        return len(self.steps)

    def newest(self, at: int | None) -> int:
        """Place of the newest row at or before a step (None: of all), as a view at that step has it; -1 without one."""
        return len(self) - 1 if at is None else int(np.searchsorted(self.steps, at, side="right")) - 1

    def unit_rows(self) -> np.ndarray:
        """Decoded rows, float32 [R, D]: unit length where live, zeros elsewhere."""
        return self._stored.unit_rows(np.arange(len(self)))
