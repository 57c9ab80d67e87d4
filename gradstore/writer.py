"""Writer: appends sketches; checks and quantises them, writes them, and publishes when the context closes.

D sketch dimensions, P problems of one append.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from gradstore.appender import Appender
from gradstore.collection import Collection
from gradstore.errors import RequestError
from gradstore.id_lookup import listed
from gradstore.layout import check_step
from gradstore.new_problems import NewParts, checked_table, new_rows
from gradstore.new_rows import NewRows
from gradstore.problem_table import ProblemTable
from gradstore.session import Session
from gradstore.state import State


class Writer:
    """Appends rows of one step to one collection; use it as a context manager.

    Rows are written to disk in the background; if a write fails, the next append or publication raises its error. Rows
    become visible together when the context closes, or earlier by `publish`. After an exception inside the context,
    nothing more is published, and rows appended since the last publication are removed.
    """

    def __init__(self, collection: Collection, step: int, n_bases: int, records: Iterable[dict] = ()) -> None:
        """records: of new problems, which become visible together with the first rows."""
        self._collection = collection
        self._records = checked_table(collection, records) if records else None
        self._addition: NewParts | None = None
        self._where = collection.where
        self._step = check_step(step)
        self._n_bases = n_bases
        self._session: Session | None = None
        self._failed = False

    def __enter__(self) -> Self:
        if self._session is not None:
            raise RequestError(f"{self._where}: this writer is already open; ask the store for another")
        header = self._collection.header
        if self._records is not None:
            new_rows(self._collection, self._records)  # An error here creates no collection.
        self._session = Session(header, self._collection.folder, create=self._records is not None)
        manifest = self._session.manifest
        self._problems = self._collection.problems(manifest)
        if self._records is not None:
            try:
                self._addition = NewParts.write(self._session, self._collection, self._records)
            except BaseException:
                self._session.abandon()
                raise
            self._problems = ProblemTable(self._collection.folder, replace(manifest, parts=self._addition.parts))
        self._reasons = manifest.reasons
        self._bases = manifest.bases
        self._appender = Appender(self._session.generation, header.arrays, manifest.rows, manifest.chunks)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._open(), closing(self._appender):
            try:
                if error is None:
                    self.publish()
            finally:
                self._failed = True
            if error is not None:
                raise error

    @property
    def commit(self) -> int:
        """Commit number of the newest publication."""
        return self._open().manifest.commit

    def append(
        self,
        ids: Sequence[str],
        sketches: Any,
        *,
        norms: Any = None,
        whole_norms: Any = None,
        state: State | int | Sequence[State | int] | None = None,
        pass_rate: Any = None,
        n_rollouts: Any = None,
        ess: Any = None,
        reason: str | Sequence[str | None] | None = None,
        basis: int | None = None,
    ) -> None:
        """Append one row for each of P problems.

        sketches: [P, D], any real dtype; the raw projected gradients.
        norms: [P], the gradients' norms; None: the L2 norms of the sketches.
        whole_norms: [P], instead of norms, for sketches that hold only a part of a gradient: the norm of the whole
            gradient, at least that of the sketch. Such a row decodes to sketch / whole norm, which is shorter than 1.
            Cosines are then those of the whole gradients, and dots those of the sketches.
        state: one for all or [P]; None: live where the norm is positive, no_signal where it is zero.
            Rows that are not live are stored as zeros.
        pass_rate: [P] in [0, 1] or nan (unknown).  n_rollouts: [P] counts.  reason: why a row failed.
        ess: [P], effective sample sizes in rollouts, nan (unknown); for stores of off-policy rows.
        basis: number of the rows' basis; required if the store has several.
        RequestError names the id and the field; then nothing of this call is appended.
        """
        session = self._open()
        self._refuse_failed()
        basis = self._basis(basis)
        ids = listed(ids)
        problem = self._problems.rows_of(ids, self._where)
        rows = NewRows(ids, self._where)
        columns = {
            "step": np.full(len(ids), self._step, dtype=np.int64),
            "problem": problem,
            **rows.sketches(sketches, norms, whole_norms, state, self._collection.header),
            "pass_rate": rows.pass_rates(pass_rate),
            "n_rollouts": rows.counts(n_rollouts),
        }
        columns["reason"], reasons = rows.reasons(reason, columns["state"], self._reasons)
        if "ess" in self._collection.header.columns:
            columns["ess"] = rows.sample_sizes(ess)
        elif ess is not None:
            raise RequestError(f"{self._where}: the store's rows have no effective sample size; leave `ess` out")
        session.unpublished = True
        if basis != (self._bases[-1][1] if self._bases else 0):
            self._bases = (*self._bases, (self._appender.rows, basis))
        self._failed = True  # If this raises, an earlier append did not reach the disk, and nothing more may.
        self._appender.write(columns)
        self._reasons = reasons
        self._failed = False

    def publish(self) -> int:
        """Make the rows appended so far durable and visible; returns the commit number."""
        session = self._open()
        self._refuse_failed()
        if self._appender.rows > session.manifest.rows or (self._addition and self._addition.rows):
            self._failed = True
            self._appender.settle()
            session.publish(
                rows=self._appender.rows,
                chunks=self._appender.chunks,
                reasons=self._reasons,
                bases=self._bases,
                **({} if self._addition is None else {"parts": self._addition.parts}),
                syncing=self._appender.syncing(),
            )
            if self._addition is not None:
                self._addition.clear()
                self._addition = None
            self._failed = False
        return session.manifest.commit

    def _open(self) -> Session:
        if self._session is None:
            raise RequestError(f"{self._where}: open the writer first: `with store.writer(...) as writer:`")
        return self._session

    def _basis(self, basis: int | None) -> int:
        if basis is None and self._n_bases == 1:
            return 0
        if basis is None or not 0 <= basis < self._n_bases:
            raise RequestError(
                f"{self._where}: basis is {basis}, the store has 0 to {self._n_bases - 1}: say which the rows are in"
            )
        return int(basis)

    def _refuse_failed(self) -> None:
        if self._failed:
            raise RequestError(f"{self._where}: this writer is closed or failed earlier; ask the store for another")
