"""View: the newest row of each problem of a collection at or before a step. Every query runs on a view.

A view is fixed when it is created: rows published later, deletions and compactions do not change it.

D sketch dimensions, N problems of the view.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import RequestError
from gradstore.snapshot import Snapshot
from gradstore.state import State

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.store import Store

_BLOCK_BYTES = 4 << 20
"""Size of a decoded block: small enough for the allocator to reuse the same memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some stored rows of one chunk file, not decoded."""

    positions: np.ndarray
    """Positions in the view, int64 [n], in the order of the rows."""
    rows: np.ndarray
    """Row numbers, int64 [n], ascending."""
    _snapshot: Snapshot

    @property
    def scale(self) -> np.ndarray:
        """Scale of each row, float32 [n]: decoded row = codes * scale."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        column = self._snapshot.column("scale")
        return column[first : last + 1] if last - first + 1 == len(self.rows) else column[self.rows]

    def span(self) -> tuple[np.ndarray, np.ndarray]:
        """Mapped codes from the first row to the last [m, W], read-only; and the indices of this piece's rows [n]."""
        chunk, first = divmod(int(self.rows[0]), self._snapshot.header.chunk_rows)
        stop = first + int(self.rows[-1] - self.rows[0]) + 1
        return self._snapshot.codes.chunk(chunk)[first:stop], self.rows - self.rows[0]


class View:
    """The newest row at or before `at` of each problem that has one, in any state; in order of addition."""

    def __init__(
        self, store: "Store", snapshot: Snapshot, collection: str, at: int | None, basis: int | None = None
    ) -> None:
        self.store = store
        self.collection = collection
        self.at = at
        self._snapshot = snapshot
        newest = snapshot.newest(at, basis)
        self._problem_N = np.flatnonzero(newest >= 0)
        self._row_N = newest[self._problem_N]

    def __len__(self) -> int:
        return len(self._row_N)

    def __repr__(self) -> str:
        at = "newest" if self.at is None else f"step {self.at}"
        return f"View({self.collection!r} at {at}, {len(self)} problems, commit {self.commit})"

    def _repr_html_(self) -> str:
        from gradstore.notebook import SHOWN, html_table

        states = {state: int((self.states == state).sum()) for state in State}
        facts = ", ".join(f"{count:,} {state.name.lower().replace('_', ' ')}" for state, count in states.items())
        rows = [
            (
                str(self.ids_at(np.array([place]))[0]),
                State(self.states[place]).name.lower().replace("_", " "),
                int(self.steps[place]),
                float(self.pass_rates[place]),
                float(self.norms[place]),
            )
            for place in range(min(SHOWN, len(self)))
        ]
        return html_table(repr(self), facts, ["problem", "state", "step", "pass rate", "norm"], rows, len(self))

    @property
    def commit(self) -> int:
        """Commit number that this view was made from."""
        return self._snapshot.manifest.commit

    @property
    def generation(self) -> int:
        """Number of the generation of files that this view reads; rows of one generation never change."""
        return self._snapshot.manifest.generation

    @property
    def row_numbers(self) -> np.ndarray:
        """Row number of each problem's row within the generation, int64 [N]."""
        return self._row_N

    @property
    def dim(self) -> int:
        return self._snapshot.header.dim

    @property
    def layers(self) -> list[tuple[str, int, int]]:
        """(name, start, stop): each layer's range of dimensions."""
        return self.store.layers

    @cached_property
    def bases(self) -> np.ndarray:
        """Number of the basis that each row is in, uint16 [N]."""
        return self._snapshot.bases()[self._row_N]

    @cached_property
    def n_bases(self) -> int:
        """Number of bases of the store; a query has one block of dimensions per basis."""
        return len(self.store.bases)

    @cached_property
    def live_bases(self) -> list[int]:
        """Numbers of the bases of this view's live rows, ascending."""
        return [0] if not self._snapshot.manifest.bases else np.unique(self.bases[self.live]).tolist()

    @cached_property
    def ids(self) -> np.ndarray:
        """Problem ids, object array of str [N]."""
        return self._snapshot.problems.ids[self._problem_N]

    @cached_property
    def steps(self) -> np.ndarray:
        """Step at which each row was computed, int64 [N]."""
        return self._column("step")

    @cached_property
    def norms(self) -> np.ndarray:
        """Norm of each gradient, float32 [N]; 0 where not live."""
        return self._column("norm")

    @cached_property
    def states(self) -> np.ndarray:
        """`State` of each row, uint8 [N]."""
        return self._column("state")

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
        return self._column("pass_rate")

    @cached_property
    def n_rollouts(self) -> np.ndarray:
        """Number of rollouts that each gradient was computed from, int32 [N]."""
        return self._column("n_rollouts")

    @cached_property
    def ess(self) -> np.ndarray:
        """Effective sample size of off-policy rows in rollouts, float32 [N]; nan where unknown, or for other rows."""
        if "ess" not in self._snapshot.header.columns:
            return np.full(len(self), np.nan, dtype=np.float32)
        return self._column("ess")

    @cached_property
    def reasons(self) -> list[str]:
        """Reason of each failed row, "" for other rows; [N]."""
        texts = self._snapshot.manifest.reasons
        return [texts[number] for number in self._column("reason")]

    @cached_property
    def problems(self) -> "pa.Table":
        """Table of the problems' records, one row per position."""
        return self._snapshot.problems.table.take(self._problem_N)

    def ids_at(self, positions: Any) -> np.ndarray:
        """Ids at some positions, object array of str; much cheaper than `ids` for a few positions."""
        return self._snapshot.problems.ids_at(self._problem_N[self._checked(positions)])

    def pieces(self, positions: Any = None) -> list[Piece]:
        """Stored rows at some distinct positions (None: all), one Piece per chunk file, not decoded."""
        row_order = self._row_order
        every = positions is None
        if not every:
            wanted = np.zeros(len(self), dtype=bool)
            wanted[self._checked(positions)] = True
            every = bool(wanted.all())
        if every:
            places = np.arange(len(self)) if row_order is None else row_order
        else:
            places = np.flatnonzero(wanted) if row_order is None else row_order[wanted[row_order]]
        rows = self._row_N if every and row_order is None else self._row_N[places]
        chunk_rows = self._snapshot.header.chunk_rows
        self._snapshot.column("scale")  # Read once, before several threads ask for it.
        cuts = np.searchsorted(rows, np.arange(0, self._snapshot.manifest.rows + chunk_rows, chunk_rows))
        return [Piece(places[a:b], rows[a:b], self._snapshot) for a, b in pairwise(cuts.tolist()) if b > a]

    def codes(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored rows at a few positions, copied but not decoded: codes [n, W] and scale float32 [n]."""
        rows = self._row_N[positions]
        return self._snapshot.code_rows(rows), self._snapshot.column("scale")[rows]

    def places(self, positions: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        """Addresses of the stored rows at a few positions, without a copy.

        Mapped codes of the chunks, read-only; each row's chunk among these and its place in it, both int64 [n]; and
        scale float32 [n].
        """
        rows = self._row_N[positions]
        return *self._snapshot.places(rows), self._snapshot.column("scale")[rows]

    def rows(self, positions: Any) -> np.ndarray:
        """Unit rows at some positions, float32 [len(positions), D]; zeros where not live.

        RequestError if the live rows are in several bases, which have no common dimensions. This holds for every method
        that decodes rows. Use `store.view(..., basis=...)` for the rows of one basis.
        """
        order = self._checked(positions)
        self._refuse_several_bases(order)
        return self._snapshot.unit_rows(self._row_N[order])

    def scan(self, positions: Any = None, block_rows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over blocks (positions int64 [n], unit rows float32 [n, D]), in the given order; bounded memory."""
        order = np.arange(len(self)) if positions is None else self._checked(positions)
        if block_rows is None:
            block_rows = max(1, _BLOCK_BYTES // (4 * self.dim))
        if block_rows < 1:
            raise RequestError(f"block_rows must be at least 1, not {block_rows}")
        self._refuse_several_bases(order)
        for start in range(0, len(order), block_rows):
            block = order[start : start + block_rows]
            yield block, self._snapshot.unit_rows(self._row_N[block])

    def blocks(self, block_rows: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the whole view in blocks (ids object [n], unit rows float32 [n, D]), in bounded memory."""
        for positions, rows_N_D in self.scan(block_rows=block_rows):
            yield self.ids[positions], rows_N_D

    def take(self, ids: Sequence[str]) -> np.ndarray:
        """Unit rows of some problems, in the order of ids, float32 [len(ids), D]."""
        return self.rows(self.positions(ids))

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Positions of some problems, int64; RequestError for an id that is not in the view."""
        index = self._position_of
        try:
            return np.fromiter((index[problem_id] for problem_id in ids), dtype=np.int64, count=len(ids))
        except KeyError as error:
            at = "" if self.at is None else f" at step {self.at}"
            raise RequestError(
                f"collection {self.collection!r}{at}: problem id {error.args[0]!r} has no row in this view"
            ) from None

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Positions of some problems, int64; -1 for an id that is not in the view."""
        index = self._position_of
        return np.fromiter((index.get(problem_id, -1) for problem_id in ids), dtype=np.int64, count=len(ids))

    def problems_of(self, ids: Sequence[str]) -> "pa.Table":
        """Records of some problems, in the order of ids; RequestError for an id that is not in the view."""
        return self._snapshot.problems.table.take(self._problem_N[self.positions(ids)])

    @cached_property
    def _position_of(self) -> dict[str, int]:
        return {problem_id: position for position, problem_id in enumerate(self.ids)}

    @cached_property
    def _row_order(self) -> np.ndarray | None:
        """Positions sorted by row number; None if the rows are already sorted."""
        if bool(np.all(self._row_N[1:] > self._row_N[:-1])):
            return None
        return np.argsort(self._row_N)

    def _refuse_several_bases(self, positions: np.ndarray) -> None:
        if not self._snapshot.manifest.bases:
            return
        found = np.unique(self.bases[positions][self.live[positions]])
        if len(found) > 1:
            raise RequestError(
                f"collection {self.collection!r}: these rows are in bases {', '.join(map(str, found))} and cannot be "
                "compared with each other: collect the older ones anew, or ask for a view of one basis"
            )

    def _column(self, name: str) -> np.ndarray:
        return self._snapshot.column(name)[self._row_N]

    def _checked(self, positions: Any) -> np.ndarray:
        order = np.asarray(positions)
        if order.dtype == bool and order.shape == (len(self),):
            return np.flatnonzero(order)
        if order.size == 0:
            return np.zeros(0, dtype=np.int64)
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise RequestError(f"positions must be whole numbers, one dimension, not {order.dtype} {order.shape}")
        if order.min() < 0 or order.max() >= len(self):
            raise RequestError(f"positions must be in [0, {len(self)}), not {order.min()} to {order.max()}")
        return order.astype(np.int64, copy=False)
