"""Writer: appends sketches; checks and quantises them, writes them, and publishes when the context closes.

D sketch dimensions, P problems of one append.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from gradstore.appender import Appender
from gradstore.errors import RequestError
from gradstore.header import Header
from gradstore.manifest import Manifest
from gradstore.problem_table import ProblemTable
from gradstore.quantise import encode
from gradstore.session import Session
from gradstore.state import State

MAX_REASONS = 1000
"""Most distinct reasons per collection: the manifest holds them all, and texts with numbers never repeat."""
_NO_MORE_REASONS = f"(not kept: the collection already has {MAX_REASONS} different reasons)"
_REASON_LENGTH = 500


@dataclass(frozen=True)
class _Rows:
    """Checked and encoded rows of one append."""

    columns: dict[str, np.ndarray]
    reasons: tuple[str, ...]


class Writer:
    """Appends rows of one step to one collection; use it as a context manager.

    Rows are written to disk in the background; if a write fails, the next append or publication raises its error. Rows
    become visible together when the context closes, or earlier by `publish`. After an exception inside the context,
    nothing more is published, and rows appended since the last publication are removed.
    """

    def __init__(
        self,
        header: Header,
        collection: Path,
        where: str,
        step: int,
        n_bases: int,
        problems: Callable[[Manifest], ProblemTable],
    ) -> None:
        """problems: manifest of the collection -> its problem table."""
        self._header = header
        self._collection = collection
        self._where = where
        self._step = step
        self._n_bases = n_bases
        self._problems_of = problems
        self._session: Session | None = None
        self._failed = False

    def __enter__(self) -> Self:
        if self._session is not None:
            raise RequestError(f"{self._where}: this writer is already open; ask the store for another")
        self._session = Session(self._header, self._collection)
        manifest = self._session.manifest
        self._problems = self._problems_of(manifest)
        self._reasons = manifest.reasons
        self._bases = manifest.bases
        self._appender = Appender(self._session.generation, self._header.arrays, manifest.rows, manifest.chunks)
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
        rows = self._check(list(ids), sketches, norms, whole_norms, state, pass_rate, n_rollouts, reason)
        if "ess" in self._header.columns:
            rows.columns["ess"] = self._ess(ess, list(ids))
        elif ess is not None:
            raise RequestError(f"{self._where}: the store's rows have no effective sample size; leave `ess` out")
        session.unpublished = True
        if basis != (self._bases[-1][1] if self._bases else 0):
            self._bases = (*self._bases, (self._appender.rows, basis))
        self._failed = True  # If this raises, an earlier append did not reach the disk, and nothing more may.
        self._appender.write(rows.columns)
        self._reasons = rows.reasons
        self._failed = False

    def publish(self) -> int:
        """Make the rows appended so far durable and visible; returns the commit number."""
        session = self._open()
        self._refuse_failed()
        if self._appender.rows > session.manifest.rows:
            self._failed = True
            self._appender.settle()
            session.publish(
                rows=self._appender.rows,
                chunks=self._appender.chunks,
                reasons=self._reasons,
                bases=self._bases,
                syncing=self._appender.syncing(),
            )
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

    def _check(
        self,
        ids: list[str],
        sketches: Any,
        norms: Any,
        whole_norms: Any,
        state: Any,
        pass_rate: Any,
        n_rollouts: Any,
        reason: Any,
    ) -> _Rows:
        problem = self._problems.rows_of(ids, self._where)
        _refuse_duplicates(ids, self._where)
        n, dim = len(ids), self._header.dim
        try:
            rows_P_D = np.asarray(sketches)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{self._where}: sketches are not an array of numbers: {error}") from error
        if rows_P_D.ndim != 2 or rows_P_D.shape[1] != dim:
            raise RequestError(
                f"{self._where}: sketches have shape {rows_P_D.shape}, expected ({n}, {dim}): the store's dim is {dim}"
            )
        if len(rows_P_D) != n:
            raise RequestError(f"{self._where}: {n} ids but {len(rows_P_D)} sketches; give one row an id")
        if rows_P_D.dtype.kind not in "fiu":
            raise RequestError(f"{self._where}: sketches have dtype {rows_P_D.dtype}, expected real numbers")
        with np.errstate(over="ignore"):
            rows_P_D = np.ascontiguousarray(rows_P_D, dtype=np.float32)
            codes, scale, lengths_P, peaks_P = encode(rows_P_D, self._header.dtype)
        if norms is not None and whole_norms is not None:
            raise RequestError(f"{self._where}: norms and whole_norms were given; give one")
        given, field = (norms, "norms") if whole_norms is None else (whole_norms, "whole_norms")
        norms_P = None if given is None else self._numbers(given, field, ids)
        states_P = self._states(state, ids, peaks_P if norms_P is None else norms_P)
        live = states_P == State.LIVE
        self._check_live(ids, rows_P_D, peaks_P, norms_P, live)
        if whole_norms is not None and norms_P is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                share_P = np.where(live, lengths_P / norms_P, 1.0)
            self._first_wrong(share_P > 1 + 1e-4, ids, field, norms_P, "a norm no less than that of the sketch")
            scale = (scale * np.minimum(share_P, 1.0)).astype(np.float32)
        codes[~live] = 0
        scale[~live] = 0
        norm = np.where(live, lengths_P if norms_P is None else norms_P, 0)
        with np.errstate(over="ignore"):
            norm = norm.astype(np.float32)
        self._first_wrong(~np.isfinite(norm) | (live & (norm == 0)), ids, "norms", norm, "a norm that float32 can hold")
        reasons, reason_P = self._reason_rows(reason, ids, states_P)
        columns = {
            "codes": codes,
            "scale": scale,
            "norm": norm,
            "step": np.full(n, self._step, dtype=np.int64),
            "problem": problem,
            "state": states_P,
            "pass_rate": self._pass_rates(pass_rate, ids),
            "n_rollouts": self._counts(n_rollouts, ids),
            "reason": reason_P,
        }
        return _Rows(columns, reasons)

    def _check_live(
        self, ids: list[str], rows_P_D: np.ndarray, peaks_P: np.ndarray, norms_P: np.ndarray | None, live: np.ndarray
    ) -> None:
        bad = live & ~np.isfinite(peaks_P)
        if bad.any():
            row = int(np.argmax(bad))
            column = int(np.argmax(~np.isfinite(rows_P_D[row])))
            raise RequestError(
                f"{self._where}: the sketch of problem {ids[row]!r} is {rows_P_D[row, column]} at dimension "
                f"{column}; a live row must be finite: append it with state failed and a reason"
            )
        self._first_wrong(
            live & (peaks_P == 0),
            ids,
            "sketches",
            peaks_P,
            "a row that is not all zeros, or state no_signal",
            "largest",
        )
        if norms_P is not None:
            wrong = live & ~(np.isfinite(norms_P) & (norms_P > 0))
            self._first_wrong(wrong, ids, "norms", norms_P, "a finite positive norm for a live row")

    def _states(self, state: Any, ids: list[str], sizes_P: np.ndarray) -> np.ndarray:
        n = len(ids)
        if state is None:
            # A nan size counts as live here, so that the checks of live rows report it.
            return np.where(sizes_P == 0, State.NO_SIGNAL, State.LIVE).astype(np.uint8)
        states = [state] * n if isinstance(state, int | np.integer) else list(state)
        if len(states) != n:
            raise RequestError(f"{self._where}: {n} ids but {len(states)} values of state")
        for problem_id, value in zip(ids, states, strict=True):
            if value not in State._value2member_map_:
                known = ", ".join(f"{member.value} ({member.name.lower()})" for member in State)
                raise RequestError(f"{self._where}: problem {problem_id!r}: state {value!r} is not one of {known}")
        return np.array(states, dtype=np.uint8).reshape(n)

    def _pass_rates(self, pass_rate: Any, ids: list[str]) -> np.ndarray:
        rates = self._numbers(np.nan if pass_rate is None else pass_rate, "pass_rate", ids)
        wrong = ~(np.isnan(rates) | ((rates >= 0) & (rates <= 1)))
        self._first_wrong(wrong, ids, "pass_rate", rates, "a share between 0 and 1, or nan for unknown")
        return rates.astype(np.float32)

    def _counts(self, n_rollouts: Any, ids: list[str]) -> np.ndarray:
        counts = self._numbers(0 if n_rollouts is None else n_rollouts, "n_rollouts", ids)
        wrong = ~((counts >= 0) & (counts < 2**31) & (counts == np.floor(counts)))
        self._first_wrong(wrong, ids, "n_rollouts", counts, "a whole number of rollouts")
        return counts.astype(np.int32)

    def _ess(self, ess: Any, ids: list[str]) -> np.ndarray:
        sizes = self._numbers(np.nan if ess is None else ess, "ess", ids)
        self._first_wrong(~(np.isnan(sizes) | (sizes >= 0)), ids, "ess", sizes, "at least 0, or nan for unknown")
        return sizes.astype(np.float32)

    def _numbers(self, values: Any, field: str, ids: list[str]) -> np.ndarray:
        """Convert to one number per problem (a scalar is used for all), float64 [P]."""
        try:
            numbers = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{self._where}: {field} must be numbers: {error}") from error
        if numbers.ndim == 0:
            numbers = np.full(len(ids), numbers)
        if numbers.shape != (len(ids),):
            raise RequestError(f"{self._where}: {len(ids)} ids but {field} has shape {numbers.shape}")
        return numbers

    def _reason_rows(self, reason: Any, ids: list[str], states_P: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        n = len(ids)
        if reason is None and not (states_P == State.FAILED).any():
            return self._reasons, np.zeros(n, dtype=np.uint16)
        texts = [reason] * n if reason is None or isinstance(reason, str) else list(reason)
        if len(texts) != n:
            raise RequestError(f"{self._where}: {n} ids but {len(texts)} values of reason")
        reasons = list(self._reasons)
        number = {text: row for row, text in enumerate(reasons)}
        rows = np.zeros(n, dtype=np.uint16)
        for row, (problem_id, given) in enumerate(zip(ids, texts, strict=True)):
            if given is not None and not isinstance(given, str):
                raise RequestError(f"{self._where}: problem {problem_id!r}: reason {given!r} is not a string")
            text = (given or "")[:_REASON_LENGTH]
            if states_P[row] == State.FAILED and not text:
                raise RequestError(f"{self._where}: problem {problem_id!r} failed without a reason; say why")
            if text not in number:
                text = text if len(reasons) <= MAX_REASONS else _NO_MORE_REASONS
                if text not in number:
                    number[text] = len(reasons)
                    reasons.append(text)
            rows[row] = number[text]
        return tuple(reasons), rows

    def _first_wrong(
        self, wrong: np.ndarray, ids: list[str], field: str, values: np.ndarray, expected: str, of: str = "value"
    ) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise RequestError(
                f"{self._where}: problem {ids[row]!r}: {field}: {of} {values[row]:g}, expected {expected}"
            )


def _refuse_duplicates(ids: list[str], where: str) -> None:
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(problem_id for problem_id in ids if problem_id in seen or seen.add(problem_id))  # type: ignore[func-returns-value]
        raise RequestError(f"{where}: problem id {twice!r} occurs twice in one append; append one row a problem")
