"""Checks of the rows of one append: every field becomes a column of the store, or an error names the problem.

D sketch dimensions, P problems of the append.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradstore.errors import RequestError
from gradstore.header import Header
from gradstore.problem_rows import repeated
from gradstore.quantise import encode
from gradstore.state import State

MAX_REASONS = 1000
"""Most distinct reasons per collection: the manifest holds them all, and texts with numbers never repeat."""
_NO_MORE_REASONS = f"(not kept: the collection already has {MAX_REASONS} different reasons)"
_REASON_LENGTH = 500


def reason_number(text: str, number: dict[str, int], reasons: list[str]) -> int:
    """Number of a reason; a new one is added to `reasons` and `number`, unless the collection has MAX_REASONS."""
    if text not in number:
        text = text if len(reasons) <= MAX_REASONS else _NO_MORE_REASONS
        if text not in number:
            number[text] = len(reasons)
            reasons.append(text)
    return number[text]


class NewRows:
    """The rows of one append, one per problem; each method checks one field and returns its columns, [P].

    Every method raises RequestError that names the problem's id and the field. `Writer.append` explains the fields.
    """

    def __init__(self, ids: list[str], where: str) -> None:
        """where: the beginning of error messages."""
        self.ids = ids
        self._where = where
        twice = repeated(ids)
        if twice is not None:
            raise RequestError(f"{where}: problem id {twice!r} occurs twice in one append; append one row a problem")

    def sketches(
        self, sketches: Any, norms: Any, whole_norms: Any, state: Any, header: Header
    ) -> dict[str, np.ndarray]:
        """Columns `codes`, `scale`, `norm` and `state`."""
        rows_P_D = self._matrix(sketches, header.dim)
        with np.errstate(over="ignore"):
            codes, scale, lengths_P, peaks_P = encode(rows_P_D, header.dtype)
        if norms is not None and whole_norms is not None:
            raise RequestError(f"{self._where}: norms and whole_norms were given; give one")
        given, field = (norms, "norms") if whole_norms is None else (whole_norms, "whole_norms")
        norms_P = None if given is None else self._numbers(given, field)
        states_P = self._states(state, peaks_P if norms_P is None else norms_P)
        live = states_P == State.LIVE
        self._check_live(rows_P_D, peaks_P, norms_P, live)
        if whole_norms is not None and norms_P is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                share_P = np.where(live, lengths_P / norms_P, 1.0)
            self._refuse(share_P > 1 + 1e-4, field, norms_P, "a norm no less than that of the sketch")
            scale = (scale * np.minimum(share_P, 1.0)).astype(np.float32)
        codes[~live] = 0
        scale[~live] = 0
        norm = np.where(live, lengths_P if norms_P is None else norms_P, 0)
        with np.errstate(over="ignore"):
            norm = norm.astype(np.float32)
        self._refuse(~np.isfinite(norm) | (live & (norm == 0)), "norms", norm, "a norm that float32 can hold")
        return {"codes": codes, "scale": scale, "norm": norm, "state": states_P}

    def pass_rates(self, pass_rate: Any) -> np.ndarray:
        """Column `pass_rate`, float32."""
        if pass_rate is None:
            return np.full(len(self.ids), np.nan, dtype=np.float32)
        rates = self._numbers(pass_rate, "pass_rate")
        wrong = ~(np.isnan(rates) | ((rates >= 0) & (rates <= 1)))
        self._refuse(wrong, "pass_rate", rates, "a share between 0 and 1, or nan for unknown")
        return rates.astype(np.float32)

    def counts(self, n_rollouts: Any) -> np.ndarray:
        """Column `n_rollouts`, int32."""
        if n_rollouts is None:
            return np.zeros(len(self.ids), dtype=np.int32)
        counts = self._numbers(n_rollouts, "n_rollouts")
        wrong = ~((counts >= 0) & (counts < 2**31) & (counts == np.floor(counts)))
        self._refuse(wrong, "n_rollouts", counts, "a whole number of rollouts")
        return counts.astype(np.int32)

    def sample_sizes(self, ess: Any) -> np.ndarray:
        """Column `ess`, float32."""
        if ess is None:
            return np.full(len(self.ids), np.nan, dtype=np.float32)
        sizes = self._numbers(ess, "ess")
        self._refuse(~(np.isnan(sizes) | (sizes >= 0)), "ess", sizes, "at least 0, or nan for unknown")
        return sizes.astype(np.float32)

    def reasons(self, reason: Any, states_P: np.ndarray, known: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
        """Column `reason`, uint16, and the texts that it points into: the known ones and new ones after them."""
        n = len(self.ids)
        failed = bool((states_P == State.FAILED).any())
        if reason is None and not failed:
            return np.zeros(n, dtype=np.uint16), known
        texts = self._each(reason, "reason", str | None)
        if not failed and all(text is None or text == "" for text in texts):
            return np.zeros(n, dtype=np.uint16), known
        reasons = list(known)
        number = {text: row for row, text in enumerate(reasons)}
        rows = np.zeros(n, dtype=np.uint16)
        for row, (problem_id, given) in enumerate(zip(self.ids, texts, strict=True)):
            if given is not None and not isinstance(given, str):
                raise RequestError(f"{self._where}: problem {problem_id!r}: reason {given!r} is not a string")
            text = (given or "")[:_REASON_LENGTH].encode(errors="replace").decode()  # Half surrogate pairs are no text.
            if states_P[row] == State.FAILED and not text:
                raise RequestError(f"{self._where}: problem {problem_id!r} failed without a reason; say why")
            rows[row] = reason_number(text, number, reasons)
        return rows, tuple(reasons)

    def _matrix(self, sketches: Any, dim: int) -> np.ndarray:
        """The sketches as contiguous float32 [P, D]."""
        n = len(self.ids)
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
            return np.ascontiguousarray(rows_P_D, dtype=np.float32)

    def _check_live(
        self, rows_P_D: np.ndarray, peaks_P: np.ndarray, norms_P: np.ndarray | None, live: np.ndarray
    ) -> None:
        bad = live & ~np.isfinite(peaks_P)
        if bad.any():
            row = int(np.argmax(bad))
            column = int(np.argmax(~np.isfinite(rows_P_D[row])))
            raise RequestError(
                f"{self._where}: the sketch of problem {self.ids[row]!r} is {rows_P_D[row, column]} at dimension "
                f"{column}; a live row must be finite: append it with state failed and a reason"
            )
        expected = "a row that is not all zeros, or state no_signal"
        self._refuse(live & (peaks_P == 0), "sketches", peaks_P, expected, "largest")
        if norms_P is not None:
            wrong = live & ~(np.isfinite(norms_P) & (norms_P > 0))
            self._refuse(wrong, "norms", norms_P, "a finite positive norm for a live row")

    def _states(self, state: Any, sizes_P: np.ndarray) -> np.ndarray:
        """Column `state`, uint8; without given states, rows of size 0 have no signal."""
        if state is None:
            # A nan size counts as live here, so that the checks of live rows report it.
            return np.where(sizes_P == 0, State.NO_SIGNAL, State.LIVE).astype(np.uint8)
        states = self._each(state, "state", int | np.integer)
        for problem_id, value in zip(self.ids, states, strict=True):
            if value not in State._value2member_map_:
                known = ", ".join(f"{member.value} ({member.name.lower()})" for member in State)
                raise RequestError(f"{self._where}: problem {problem_id!r}: state {value!r} is not one of {known}")
        return np.array(states, dtype=np.uint8)

    def _numbers(self, values: Any, field: str) -> np.ndarray:
        """Convert to one number per problem (a scalar is used for all), float64 [P]."""
        try:
            numbers = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{self._where}: {field} must be numbers: {error}") from error
        if numbers.ndim == 0:
            numbers = np.full(len(self.ids), numbers)
        if numbers.shape != (len(self.ids),):
            raise RequestError(f"{self._where}: {len(self.ids)} ids but {field} has shape {numbers.shape}")
        return numbers

    def _each(self, values: Any, field: str, one: Any) -> Sequence[Any]:
        """One value per problem; a value of type `one` is used for all."""
        every = [values] * len(self.ids) if isinstance(values, one) else list(values)
        if len(every) != len(self.ids):
            raise RequestError(f"{self._where}: {len(self.ids)} ids but {len(every)} values of {field}")
        return every

    def _refuse(self, wrong: np.ndarray, field: str, values: np.ndarray, expected: str, of: str = "value") -> None:
        """Raise RequestError for the first problem that is marked in `wrong`, bool [P]."""
        if wrong.any():
            row = int(np.argmax(wrong))
            raise RequestError(
                f"{self._where}: problem {self.ids[row]!r}: {field}: {of} {values[row]:g}, expected {expected}"
            )
