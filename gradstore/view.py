"""View: the newest row of each problem of a collection at or before a step. Every query runs on a view.

A view is fixed when it is created: rows published later, deletions and compactions do not change it. Its rows are named
by their positions, 0 to N - 1, in the order in which the problems were added.

D sketch dimensions, N problems of the view.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import RequestError
from gradstore.problem_rows import checked_columns
from gradstore.snapshot import Snapshot
from gradstore.state import State
from gradstore.stored_rows import StoredRows, checked_positions

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    from gradstore.store import Store

MadeBy = tuple[int | None, int | None, int | None, np.ndarray | None]
"""Last step, basis and first step that were asked for, and for a part of a view its positions there."""
_MANY = 0.1
"""From this share of the view's problems on, a table of all positions is faster than a search for each."""
_BLOCK_BYTES = 4 << 20
"""Size of a decoded block: small enough for the allocator to reuse the same memory."""


class View:
    """The newest row at or before `at` of each problem that has one, in any state; in order of addition.

    Columns (`ids`, `steps`, `norms` and so on) have one entry per position. `rows` and `scan` decode sketches,
    `positions` finds problems, `stored` gives what is on disk.
    """

    def __init__(
        self, store: "Store", snapshot: Snapshot, at: int | None, basis: int | None = None, since: int | None = None
    ) -> None:
        newest = snapshot.newest(at, basis, since)
        problem_N = np.flatnonzero(newest >= 0)
        self._set(store, snapshot, problem_N, newest[problem_N], (at, basis, since, None))

    def _set(
        self, store: "Store", snapshot: Snapshot, problem_N: np.ndarray, row_N: np.ndarray, made_by: MadeBy
    ) -> None:
        self.store = store
        self.collection = snapshot.collection.name
        self.at = made_by[0]
        self._snapshot = snapshot
        self._problem_N = problem_N
        self.stored = StoredRows(snapshot, row_N)
        """The rows as they are on disk, not decoded."""
        self._made_by = made_by

    def part(self, positions: Any) -> "View":
        """View of the problems at some distinct positions alone, in that order; files that were read stay read."""
        order = checked_positions(positions, len(self))
        at, basis, since, chosen = self._made_by
        part = object.__new__(View)
        made_by = at, basis, since, order if chosen is None else chosen[order]
        part._set(self.store, self._snapshot, self._problem_N[order], self.stored.numbers[order], made_by)
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        """A view is pickled as its store's path and the commit it was made from; the reader needs the same files.

        It has the same rows at the same positions, whatever was published since. Unpickling raises RequestError if the
        collection was compacted and no reader of that commit is left, or if the store is no folder of files.
        """
        return self.store.view_again, (
            self.store.path.absolute(),
            self.collection,
            self._snapshot.manifest,
            self._made_by,
        )

    def __len__(self) -> int:
        return len(self._problem_N)

    def __repr__(self) -> str:
        at = "newest" if self.at is None else f"step {self.at}"
        return f"View({self.collection!r} at {at}, {len(self)} problems, commit {self.commit})"

    def _repr_html_(self) -> str:
        from gradstore.notebook import SHOWN, rows_html

        shown = slice(min(SHOWN, len(self)))
        columns = {
            "problem": self.ids_at(np.arange(shown.stop)),
            "state": self.states[shown],
            "step": self.steps[shown],
            "pass rate": self.pass_rates[shown],
            "norm": self.norms[shown],
        }
        return rows_html(repr(self), self.states, columns)

    def __iter__(self) -> Iterator[str]:
        """Ids of the problems, in order of addition."""
        return iter(self.ids.tolist())

    def to_pandas(self) -> "pd.DataFrame":
        """One row per problem, in order of addition: id, source, state, step, pass_rate, n_rollouts, norm, problem."""
        import pandas as pd

        problems = self.problems_at(columns=["source", "prompt"])
        return pd.DataFrame(
            {
                "id": self.ids,
                "source": problems["source"].to_pandas().to_numpy(),
                "state": [State(state).name.lower() for state in self.states],
                "step": self.steps,
                "pass_rate": self.pass_rates,
                "n_rollouts": self.n_rollouts,
                "norm": self.norms,
                "problem": problems["prompt"].to_pandas().to_numpy(),
            }
        )

    def to_polars(self) -> "pl.DataFrame":
        """The same as a polars DataFrame; RequestError if polars is not installed."""
        from gradstore.notebook import as_polars

        return as_polars(self.to_pandas())

    @property
    def commit(self) -> int:
        """Commit number that this view was made from."""
        return self._snapshot.manifest.commit

    @property
    def dim(self) -> int:
        return self._snapshot.header.dim

    @cached_property
    def n_bases(self) -> int:
        """Number of bases of the store; a query has one block of dimensions per basis."""
        return len(self.store.bases)

    @cached_property
    def bases(self) -> np.ndarray:
        """Number of the basis that each row is in, uint16 [N]."""
        return self._snapshot.bases()[self.stored.numbers]

    @cached_property
    def live_bases(self) -> list[int]:
        """Numbers of the bases of this view's live rows, ascending."""
        return [0] if not self._snapshot.manifest.bases else np.unique(self.bases[self.live]).tolist()

    @cached_property
    def ids(self) -> np.ndarray:
        """Problem ids, object array of str [N]."""
        return self._snapshot.problems.ids[self._problem_N]

    @property
    def problem_numbers(self) -> np.ndarray:
        """Number of each problem: its place in the collection's order of addition, int64 [N], ascending.

        Numbers stay while problems are added; a compaction after deletions gives new ones.
        """
        return self._problem_N

    @property
    def n_problems(self) -> int:
        """Number of problems of the collection, with those that have no row in this view."""
        return len(self._snapshot.problems)

    @cached_property
    def deleted_numbers(self) -> np.ndarray:
        """Numbers of the problems that were deleted and not appended again, int64, ascending."""
        return self._snapshot.deleted()

    def numbers_of(self, ids: Sequence[str]) -> np.ndarray:
        """Number of each problem of the collection, int64; -1 for an id that it does not have."""
        return self._snapshot.problems.find(ids)

    def positions_of(self, numbers: np.ndarray) -> np.ndarray:
        """Position of each problem by its number, int64; -1 without a row in this view."""
        if not len(self):
            return np.full(len(numbers), -1)
        if len(numbers) > _MANY * len(self):
            known = (numbers >= 0) & (numbers < self.n_problems)
            return np.where(known, self._positions_by_number[np.where(known, numbers, 0)], -1)
        order = self._order
        place = np.minimum(np.searchsorted(self._problem_N, numbers, sorter=order), len(self) - 1)
        place = place if order is None else order[place]
        return np.where(self._problem_N[place] == numbers, place, -1)

    @cached_property
    def _positions_by_number(self) -> np.ndarray:
        """Position of every problem of the collection, int64; -1 without a row in this view."""
        positions = np.full(self.n_problems, -1)
        positions[self._problem_N] = np.arange(len(self))
        return positions

    @cached_property
    def _order(self) -> np.ndarray | None:
        """Positions by problem number; None if they are in that order, as in every view but some parts."""
        ascending = bool((self._problem_N[1:] > self._problem_N[:-1]).all())
        return None if ascending else np.argsort(self._problem_N)

    def ids_of(self, numbers: np.ndarray) -> np.ndarray:
        """Ids of problems by their numbers, object array of str; reads only what it needs."""
        return self._snapshot.problems.ids_at(numbers)

    def column_of(self, numbers: np.ndarray, name: str) -> "pa.ChunkedArray":
        """A column of the records of problems by their numbers, such as `source` or `tags`."""
        return self._snapshot.problems.table_of(checked_columns([name]))[name].take(numbers)

    @cached_property
    def steps(self) -> np.ndarray:
        """Step at which each row was computed, int64 [N]."""
        return self.stored.column("step")

    @cached_property
    def norms(self) -> np.ndarray:
        """Norm of each gradient, float32 [N]; 0 where not live."""
        return self.stored.column("norm")

    @cached_property
    def states(self) -> np.ndarray:
        """`State` of each row, uint8 [N]."""
        return self.stored.column("state")

    @cached_property
    def live(self) -> np.ndarray:
        """True for rows with a gradient, bool [N]."""
        live: np.ndarray = self.states == State.LIVE
        return live

    @cached_property
    def live_positions(self) -> np.ndarray:
        """Positions of the rows with a gradient, int64, ascending, read-only."""
        positions = np.flatnonzero(self.live)
        positions.flags.writeable = False
        return positions

    @cached_property
    def pass_rates(self) -> np.ndarray:
        """Share of right rollouts, float32 [N]; nan where unknown."""
        return self.stored.column("pass_rate")

    @cached_property
    def n_rollouts(self) -> np.ndarray:
        """Number of rollouts that each gradient was computed from, int32 [N]."""
        return self.stored.column("n_rollouts")

    @cached_property
    def ess(self) -> np.ndarray:
        """Effective sample size of off-policy rows in rollouts, float32 [N]; nan where unknown, or for other rows."""
        if "ess" not in self._snapshot.header.columns:
            return np.full(len(self), np.nan, dtype=np.float32)
        return self.stored.column("ess")

    @cached_property
    def reasons(self) -> list[str]:
        """Reason of each failed row, "" for other rows; [N]."""
        texts = self._snapshot.manifest.reasons
        return [texts[number] for number in self.stored.column("reason")]

    @cached_property
    def problems(self) -> "pa.Table":
        """Table of the problems' records, with every text; `problems_at` reads less. Columns as in `Store.problems`."""
        return self.problems_at()

    def problems_at(self, positions: Any = None, columns: Sequence[str] | None = None) -> "pa.Table":
        """Records at some positions (None: all); columns as in `Store.problems`. Reads only what is asked for."""
        known, names = self._snapshot.problems, checked_columns(columns)
        if positions is not None:
            return known.take(self._problem_N[checked_positions(positions, len(self))], names)
        table = known.table_of(names)
        return table if len(self) == len(table) else table.take(self._problem_N)

    def ids_at(self, positions: Any) -> np.ndarray:
        """Ids at some positions, object array of str; much cheaper than `ids` for a few positions."""
        return self._snapshot.problems.ids_at(self._problem_N[checked_positions(positions, len(self))])

    def positions(self, ids: Sequence[str], *, strict: bool = True) -> np.ndarray:
        """Positions of some problems, int64, in the order of ids.

        strict: RequestError for an id that is not in the view; otherwise its position is -1.
        """
        found = self.positions_of(self.numbers_of(ids))
        if strict and len(found) and found.min() < 0:
            at = "" if self.at is None else f" at step {self.at}"
            unknown = ids[int(found.argmin())]
            raise RequestError(f"collection {self.collection!r}{at}: problem id {unknown!r} has no row in this view")
        return found

    def rows(self, positions: Any) -> np.ndarray:
        """Unit rows at some positions, float32 [len(positions), D]; zeros where not live.

        positions: whole numbers in any order, or a mask, bool [N]. RequestError if the live rows are in several bases,
        which have no common dimensions. This holds for every method that decodes rows. Use `store.view(..., basis=...)`
        for the rows of one basis.
        """
        order = checked_positions(positions, len(self))
        self._refuse_several_bases(order)
        return self.stored.unit_rows(order)

    def scan(self, positions: Any = None, block_rows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over blocks (positions int64 [n], unit rows float32 [n, D]), in the given order; bounded memory."""
        order = np.arange(len(self)) if positions is None else checked_positions(positions, len(self))
        if block_rows is None:
            block_rows = max(1, _BLOCK_BYTES // (4 * self.dim))
        if block_rows < 1:
            raise RequestError(f"block_rows must be at least 1, not {block_rows}")
        self._refuse_several_bases(order)
        for start in range(0, len(order), block_rows):
            block = order[start : start + block_rows]
            yield block, self.stored.unit_rows(block)

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the whole view in blocks (ids object [n], unit rows float32 [n, D]), in bounded memory."""
        return ((self.ids[positions], rows_N_D) for positions, rows_N_D in self.scan(block_rows=block_rows))

    def take(self, ids: Sequence[str]) -> np.ndarray:
        """Unit rows of some problems, in the order of ids, float32 [len(ids), D]."""
        return self.rows(self.positions(ids))

    def _refuse_several_bases(self, positions: np.ndarray) -> None:
        if not self._snapshot.manifest.bases:
            return
        found = np.unique(self.bases[positions][self.live[positions]])
        if len(found) > 1:
            raise RequestError(
                f"collection {self.collection!r}: these rows are in bases {', '.join(map(str, found))} and cannot be "
                "compared with each other: collect the older ones anew, or ask for a view of one basis"
            )
