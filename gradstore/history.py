"""History of a collection: a table with one line per row ever written, without the sketches.

It says when each problem was measured and with what result. Pass-rate predictors, staleness models and reports use it.
All columns are arrays; a million rows take a fraction of a second.
"""

import numpy as np
import pyarrow as pa

from gradstore.snapshot import Snapshot
from gradstore.state import State

SCHEMA = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("norm", pa.float32(), nullable=False),
        pa.field("pass_rate", pa.float32(), nullable=False),
        pa.field("n_rollouts", pa.int32(), nullable=False),
    ]
)
_BY_NUMBER = SCHEMA.set(0, pa.field("problem", pa.int32(), nullable=False))


def history_table(
    snapshot: Snapshot, at: int | None = None, numbers: bool = False, since: int | None = None
) -> pa.Table:
    """Rows at or before step `at` (None: all) that are not deleted, sorted by step, then by order of appending.

    since: only those at or after this step. numbers: `problem`, the problem's number (int32), instead of `id`.
    """
    steps = snapshot.column("step")
    kept = snapshot.alive()
    if at is not None:
        kept &= steps <= at
    if since is not None:
        kept &= steps >= since
    rows = np.flatnonzero(kept)
    if np.any(np.diff(steps[rows]) < 0):
        rows = rows[np.argsort(steps[rows], kind="stable")]
    names = pa.array([state.name.lower() for state in State])
    problem = pa.array(snapshot.column("problem")[rows])
    columns = [
        problem if numbers else snapshot.problems.id_column.take(problem),
        pa.array(steps[rows]),
        names.take(pa.array(snapshot.column("state")[rows])),
        *(pa.array(snapshot.column(name)[rows]) for name in ("norm", "pass_rate", "n_rollouts")),
    ]
    return pa.table(columns, schema=_BY_NUMBER if numbers else SCHEMA)
