"""Locally weighted regression of probed on sketched dots, through the origin; slopes are at least 0.

Probed problem k has the weight max(cos, 0)^2, rounded to 2^-22. The global slope is added as one pseudo-problem of
weight 1. Formulas: docs/methods.md, Budgeted refresh.

Cosines are products of int8 codes, which are exact: they do not depend on the order in which a kernel adds, and with it
on the place of a row in its block. Both sums over the probed problems of a step are of whole numbers below 2^53, which
float64 adds exactly. So they do not depend on the order of the problems either, and a changed probe can be taken out
and put in again.

Dimension letters: P problems, K probed ones, S steps, W columns of codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradstore import View
from gradstore.engine.searching.products import int8_sums
from gradstore.quantise import encode

_WEIGHT_BITS, _TERM_BITS = 22, 20
"""Bits of a weight and of a term of the sums: with eleven more for the number of probes they fit in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Sketches:
    """Unit sketches as whole numbers: row = codes * scale. Those of a store with another dtype are rounded to int8."""

    codes: np.ndarray
    """int8 [P, W]."""
    scale: np.ndarray
    """float32 [P]."""

    @classmethod
    def at(cls, view: View, positions: np.ndarray) -> "Sketches":
        """Copies of the rows at some positions of a view."""
        if view.stored.dtype == "int8":
            return cls(*view.stored.codes(positions))
        return cls.of(view.rows(positions))

    @classmethod
    def of(cls, rows_PD: np.ndarray) -> "Sketches":
        """Rounded from unit rows, float32."""
        return cls(*encode(np.ascontiguousarray(rows_PD, np.float32), "int8")[:2])

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, places: np.ndarray | slice) -> "Sketches":
        return Sketches(self.codes[places], self.scale[places])

    @classmethod
    def join(cls, parts: Sequence["Sketches"]) -> "Sketches":
        return cls(np.concatenate([own.codes for own in parts]), np.concatenate([own.scale for own in parts]))


@dataclass(frozen=True, slots=True, eq=False)
class Probed:
    """Live probes of one step and the sketches of their problems at that step; both dots are divided by the norm."""

    step: int
    sketches: Sketches
    sketched: np.ndarray
    """Cosine with the target times its length, float64 [K]."""
    dots: np.ndarray
    """Probed dot over the norm, float64 [K]."""
    errors: np.ndarray
    """Standard error of the probed dot over the norm, float64 [K]."""

    def __len__(self) -> int:
        return len(self.dots)


class Part:
    """The probed problems of one step, with the terms of their sums as whole numbers."""

    def __init__(self, probed: Probed) -> None:
        terms_K2 = np.stack([probed.dots * probed.sketched, probed.sketched**2], axis=1)
        self._sketches = probed.sketches
        self._exponents_2 = np.frexp(np.abs(terms_K2).max(axis=0, initial=0.0))[1]
        self._terms_K2 = np.rint(np.ldexp(terms_K2, _TERM_BITS - self._exponents_2))

    def whole(self) -> "Change":
        """All of its problems, put in."""
        return Change(self._sketches, self._terms_K2)

    def change_to(self, new: "Part") -> "Change | None":
        """What makes the sums of `new` from these; None where that is no less work than from nothing."""
        if (self._exponents_2 != new._exponents_2).any():
            return None
        old_n, new_n = len(self._sketches), len(new._sketches)
        n = min(old_n, new_n)
        same = (self._sketches.codes[:n] == new._sketches.codes[:n]).all(axis=1)
        same &= self._sketches.scale[:n] == new._sketches.scale[:n]
        same &= (self._terms_K2[:n] == new._terms_K2[:n]).all(axis=1)
        others = np.flatnonzero(~same)
        gone, come = (np.append(others, np.arange(n, size)) for size in (old_n, new_n))
        if len(gone) + len(come) > new_n // 2:
            return None
        return Change(
            Sketches.join([self._sketches[gone], new._sketches[come]]),
            np.concatenate([-self._terms_K2[gone], new._terms_K2[come]]),
        )

    def sizes(self, sums_P2: np.ndarray) -> np.ndarray:
        """Sums of probed x sketched and of sketched^2, float64 [P, 2], from those of whole numbers."""
        found: np.ndarray = np.ldexp(sums_P2, self._exponents_2 - _TERM_BITS - _WEIGHT_BITS)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Probed problems of a step that are put in or taken out."""

    sketches: Sketches
    terms: np.ndarray
    """Terms of both sums, negative for those that are taken out, float64 [K, 2]."""

    def __len__(self) -> int:
        return len(self.terms)


class LocalRatios:
    """The regression on the probed problems of several steps."""

    def __init__(self, probes: Sequence[Probed]) -> None:
        """probes: of distinct steps, newest first."""
        sketched_K = np.concatenate([own.sketched for own in probes])
        products_K = np.concatenate([own.dots for own in probes]) * sketched_K
        squares_K = sketched_K**2
        self._usual = float(products_K.sum() / (squares_K.sum() or 1.0))
        self._one = float(squares_K.mean()) or 1.0
        self.parts = {own.step: Part(own) for own in probes}
        self.usual = max(self._usual, 0.0)
        """Global slope, at least 0; also the slope of a problem that is similar to no probed one."""

    def __call__(self, rows: Sketches) -> np.ndarray:
        """Slopes of problems, float64 [P]; memory for P x K numbers."""
        return self.slopes(self.sums(rows))

    def sums(self, rows: Sketches) -> dict[int, np.ndarray]:
        """By step: weighted sums of probed x sketched and of sketched^2, whole numbers in float64 [P, 2]."""
        return self.whole.sums(rows)

    @cached_property
    def whole(self) -> "Changes":
        """All probed problems, put in."""
        return Changes({step: part.whole() for step, part in self.parts.items()})

    def slopes(self, sums: Mapping[int, np.ndarray], places: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Slopes of problems, float64 [P], by the sums at some places (default: all)."""
        products_P, squares_P = np.zeros((2, 1))
        for step, part in self.parts.items():
            sizes_2P = part.sizes(sums[step][places]).T
            products_P, squares_P = products_P + sizes_2P[0], squares_P + sizes_2P[1]
        slope_P: np.ndarray = (products_P + self._one * self._usual) / (squares_P + self._one)
        return np.maximum(slope_P, 0.0)


class Changes:
    """Changes of several steps, whose sums are computed together: rows are read once."""

    def __init__(self, by_step: Mapping[int, Change]) -> None:
        self.steps = [step for step, change in by_step.items() if len(change)]
        some = [by_step[step] for step in self.steps]
        self.n = sum(map(len, some))
        self._terms_KS2 = np.zeros((self.n, len(some), 2))
        done = 0
        for place, change in enumerate(some):
            self._terms_KS2[done : done + len(change), place] = change.terms
            done += len(change)
        self.sketches = Sketches.join([change.sketches for change in some]) if some else None
        """Of all of them, step after step; None without any."""

    @cached_property
    def _sums_of_codes(self) -> Callable[[np.ndarray], np.ndarray]:
        assert self.sketches is not None
        return int8_sums(self.sketches.codes)

    def sums(self, rows: Sketches) -> dict[int, np.ndarray]:
        """What to add to the sums of problems with these sketches, by step: float64 [P, 2]."""
        if self.sketches is None:
            return {}
        weights_PK = self._sums_of_codes(rows.codes).astype(np.float32)
        weights_PK *= self.sketches.scale * np.float32(2 ** (_WEIGHT_BITS // 2))
        weights_PK *= rows.scale[:, None]
        np.maximum(weights_PK, 0.0, out=weights_PK)
        np.square(weights_PK, out=weights_PK)
        np.rint(weights_PK, out=weights_PK)
        sums_PC = weights_PK.astype(np.float64) @ self._terms_KS2.reshape(self.n, -1)
        return {step: sums_PC[:, 2 * place : 2 * place + 2] for place, step in enumerate(self.steps)}
