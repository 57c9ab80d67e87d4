"""One pass of a fit: products of gradients with one side, and their covariances, from which the other side is fitted.

For a layer's gradient G the pass computes L^T G and G R with the current sides, summed over a problem's tokens. It sums
the covariances of their rows, G^T L L^T G and G R R^T G^T, over problems scaled to unit norm (spectrum.py). Nothing
else is kept, so the sums of a sharded model's ranks can be added up.

Dimension letters: P problems of a window, R rank, O and I a layer's outputs and inputs, W either, B sequences,
T tokens, E experts, K slots of theirs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.sharding import divided, sum_over_ranks, summed_by_key
from gradstore.engine.sketches.projection import LayerBasis
from gradstore.engine.sketches.sketcher import in_slots, project
from gradstore.engine.sketches.spectrum import Spectrum

Sides = tuple[np.ndarray, np.ndarray]
"""Left float32 [O, R] and right float32 [I, R] of a layer, orthonormal."""
Fitted = tuple[np.ndarray, np.ndarray]
"""Masks of the fitted columns of a layer's left and right side, bool [R]; the other columns are random."""
Key = tuple[int, int]
"""A layer's number, and LEFT or RIGHT."""
LEFT, RIGHT = 0, 1
_RANDOM = 0.5
"""Weight of components along random directions, relative to fitted ones. They show what the first pass missed, but
hardly any of them will be kept."""
_BENCHMARK = 2.0
"""Norm of a benchmark's mean gradient, relative to that of all problems' gradients together."""


class OneSided:
    """Observer that computes the products of each problem's gradient with either side.

    totals: (layer, side to be fitted) -> float32 [P, K R, W], the product with the other side. W is the width of the
    side to be fitted; K is 1 in a layer without experts.
    """

    def __init__(self, bases: Sequence[LayerBasis], device: torch.device) -> None:
        def on_device(side: np.ndarray | None) -> Tensor | None:
            return None if side is None else torch.from_numpy(side).to(device)

        self._given = [(on_device(basis.left_OR), on_device(basis.right_IR)) for basis in bases]
        self._experts = [on_device(basis.expert_EK) for basis in bases]
        self.n_problems = 0
        """Number of problems in the next window."""
        self.totals: dict[Key, Tensor] = {}

    def reset(self) -> None:
        self.totals = {}

    def on_input(
        self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return project(x_BTI, self._given[layer][RIGHT]), x_BTI, expert_BT

    def on_gradient(
        self, layer: int, kept: tuple[Tensor, Tensor, Tensor | None], grad_BTO: Tensor, problem_B: Tensor
    ) -> None:
        right_BTR, x_BTI, expert_BT = kept
        left_BTR = project(grad_BTO, self._given[layer][LEFT])
        for side, narrow_BTR, wide_BTW in ((LEFT, right_BTR, grad_BTO), (RIGHT, left_BTR, x_BTI)):
            narrow_BTR = in_slots(narrow_BTR, self._experts[layer], expert_BT)
            products_BRW = torch.bmm(narrow_BTR.transpose(1, 2), wide_BTW.float())
            if (layer, side) not in self.totals:
                self.totals[layer, side] = products_BRW.new_zeros(self.n_problems, *products_BRW.shape[1:])
            self.totals[layer, side].index_add_(0, problem_B, products_BRW)


class Covariances:
    """Sums over a pass: covariances of unit-norm gradients, and the sum of the benchmark's gradients."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rank: int, device: torch.device, fitted: Sequence[Fitted] | None = None
    ) -> None:
        """shapes: outputs and inputs of each layer. rank: number of directions of a side that is not kept in full
        width. fitted: masks of the fitted directions; None: all directions are random."""
        self._rank = rank
        self._weights = {
            (layer, side): torch.from_numpy(np.where(pair[1 - side], 1.0, _RANDOM).astype(np.float32)).to(device)
            for layer, pair in enumerate(fitted or [])
            for side in (LEFT, RIGHT)
        }
        self._spectra = {
            (layer, side): Spectrum(widths[side], rank, device)
            for layer, widths in enumerate(shapes)
            for side in (LEFT, RIGHT)
        }
        self._benchmark: dict[Key, Tensor] = {}
        self._n = torch.zeros((), device=device)

    def add(self, totals: dict[Key, Tensor], of_benchmark: bool) -> None:
        """Adds a window's products. A problem whose gradient is zero or not finite adds nothing."""
        if not totals:
            return
        lengths_P = _lengths(totals)
        sound_P = (lengths_P > 0) & torch.isfinite(lengths_P)
        scales_P11 = torch.where(sound_P, 1 / lengths_P, 0)[:, None, None]
        self._n += sound_P.sum()
        for key, total_PRW in totals.items():
            sound_PRW = torch.where(sound_P[:, None, None], total_PRW, 0)
            self._spectra[key].add(self._weighted(key, sound_PRW * scales_P11).flatten(0, 1))
            if of_benchmark:
                self._benchmark[key] = self._benchmark.get(key, 0) + sound_PRW.sum(0)

    def sides(self, model: nn.Module) -> list[Sides]:
        """Left and right side of every layer, fitted to the sums of all ranks; each rank solves for some of them.

        A side of width up to twice the rank keeps its full width, rotated so that few directions have most energy.
        """
        self._add_up(model)
        if self._benchmark:
            length = _lengths({key: sum_RW[None] for key, sum_RW in self._benchmark.items()})[0]
            scale = torch.where(length > 0, _BENCHMARK * self._n.sqrt() / length, 0)
            for key, sum_RW in self._benchmark.items():
                self._spectra[key].add(self._weighted(key, sum_RW * scale))
        keys = list(self._spectra)
        found = dict(zip(keys, divided(model, keys, self._directions), strict=True))
        return [(found[layer, LEFT], found[layer, RIGHT]) for layer in range(len(keys) // 2)]

    def _weighted(self, key: Key, rows_XRW: Tensor) -> Tensor:
        """Rows with less weight along random directions of the other side, in every expert slot alike."""
        weights_R = self._weights.get(key)
        if weights_R is None:
            return rows_XRW
        return rows_XRW * weights_R.repeat(rows_XRW.shape[-2] // len(weights_R))[:, None]

    def _directions(self, key: Key) -> np.ndarray:
        spectrum = self._spectra[key]
        width = len(spectrum.sum_WK)
        return spectrum.leading(width if width <= 2 * self._rank else self._rank)

    def _add_up(self, model: nn.Module) -> None:
        """Add up the sums of all ranks. A rank without benchmark problems, or without a layer's gradients, adds 0."""
        sum_over_ranks(model, self._n)
        for spectrum in self._spectra.values():
            sum_over_ranks(model, spectrum.sum_WK)
        self._benchmark = summed_by_key(model, list(self._spectra), self._benchmark)


def _lengths(totals: dict[Key, Tensor]) -> Tensor:
    """Estimated norm of each gradient, float32 [P]; a layer's squared norm is the mean over its two products."""
    return torch.stack([total_PRW.square().sum((1, 2)) / 2 for total_PRW in totals.values()]).sum(0).sqrt()
