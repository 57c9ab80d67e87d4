"""Fit a projection to a sample of problems: sides that span the gradients, entries that hold their energy.

For each layer, left and right are found by alternation, as in a Tucker decomposition of the stacked gradients
(higher-order orthogonal iteration, De Lathauwer et al. 2000): the right side spans the rows of L^T G_i over the sample,
then the left the columns of G_i R, and the right again. No gradient is ever formed: each pass accumulates the one-sided
products alone, a window of problems at a time, and keeps a running set of leading directions for each layer. Problems
weigh alike, whatever their norm: a first pass estimates the norms with a random sketch, and each problem's weights are
divided by its norm, a gradient being linear in them. The mean gradient of a benchmark, where there is one, weighs as
much as all problems together: what is ranked are dots with it. Beside each side's fitted directions stand a quarter as
many random ones of their complement: what a gradient has there is not kept, but its length is estimated, because a
cosine divides by the whole.

Cost: five passes over the sample. Memory: for each layer and problem of a window R x (O or I) floats.

Dimension letters: P problems of a window, R rank, O and I a layer's outputs and inputs, W either, K directions kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.rollouts.group import Group
from engine.rollouts.source import RolloutSource
from engine.sketches.projection import (
    LayerBasis,
    Projection,
    Shape,
    beside,
    expert_side,
    fitted_projection,
    random_bases,
)
from engine.sketches.sketcher import Sketcher, SketchSpec, in_slots, project
from gradstore.errors import RequestError

T = TypeVar("T")
_Sides = tuple[np.ndarray | None, np.ndarray | None]
_LEFT, _RIGHT = 0, 1

PASSES = 5
"""Passes over the sample."""
_BESIDE = 4
"""Fitted directions of a side for each random one."""
_WINDOW = 8
"""Problems whose one-sided products are held at once."""


def fit_projection(
    model: nn.Module,
    groups: Sequence[Group],
    spec: SketchSpec,
    progress: Callable[[int], None] | None = None,
    benchmark: Sequence[Group] = (),
) -> Projection:
    """A projection to spec.dim dimensions fitted to the groups, at most spec.rank directions on each side of a layer,
    and a quarter as many random ones beside them.

    groups: a sample of the problems to be ranked. benchmark: groups that they will be ranked against: fitted to like
    the others, and their mean gradient has a dimension of its own. Those without signal are left out. progress: called
    with the number of problems just gone through; five times those with signal in all. RequestError when fewer than two
    have a signal.
    """
    live = [group for group in (*groups, *benchmark) if group.has_signal]
    if len(live) < 2:
        n_all = len(groups) + len(benchmark)
        raise RequestError(f"fitting a projection needs problems with a signal, {len(live)} of {n_all} have one")
    n_pool = sum(group.has_signal for group in groups)
    random = Sketcher(model, replace(spec, basis="random"))
    rows = []
    for window in _windows(live):
        rows.append(random.sketch(window).sketches)
        _tell(progress, window)
    norms = np.linalg.norm(np.concatenate(rows), axis=1).tolist()
    toward_length = float(np.linalg.norm(np.concatenate(rows)[n_pool:].sum(axis=0, dtype=np.float64)))
    sound = [i for i, norm in enumerate(norms) if 0 < norm < float("inf")]
    sample = [(live[i], 1 / norms[i]) for i in sound]
    n_pool = sum(i < n_pool for i in sound)
    toward = (n_pool, np.sqrt(len(sample)) / toward_length if toward_length > 0 else 0.0)
    shapes = [layer.shape for layer in random.gradients.layers]
    sides = [(basis.left_OR, basis.right_IR) for basis in random_bases(shapes, 2 * spec.rank, spec.seed)]
    for fitted in (_RIGHT, _LEFT, _RIGHT):
        sides = _refined(random, sides, fitted, sample, toward, spec.rank, progress)
    bases, fitted_C = _bases(shapes, sides, spec.rank // _BESIDE, spec.seed)
    plain = Projection("random", bases, None, [(basis.name, basis.start, basis.stop) for basis in bases])
    sketcher = Sketcher(model, replace(spec, basis="random"), plain)
    energy_C, toward_C = np.zeros(plain.core_dim), np.zeros(plain.core_dim)
    done = 0
    for pairs in _windows(sample):
        cores_PC = sketcher.sketch([group for group, _ in pairs]).sketches
        toward_C += cores_PC[max(0, n_pool - done) :].sum(axis=0, dtype=np.float64)
        done += len(pairs)
        energy_C += np.square(cores_PC * np.array([[scale] for _, scale in pairs])).sum(axis=0)
        _tell(progress, pairs)
    total = float(len(sample))
    return fitted_projection(bases, energy_C, spec.dim, total, toward_C if benchmark else None, fitted_C)


def sample_groups(source: RolloutSource, n: int, seed: int) -> list[Group]:
    """About n groups with a signal, drawn at random from a source, in its order; fewer where it has fewer."""
    order = np.random.default_rng(seed).permutation(len(source))
    chosen: list[int] = []
    for start in range(0, len(order), n):
        part = sorted(order[start : start + n].tolist())
        groups = source.groups([source.problem_ids[i] for i in part])
        chosen += [i for i, group in zip(part, groups, strict=True) if group.has_signal]
        if len(chosen) >= n:
            break
    return list(source.groups([source.problem_ids[i] for i in sorted(chosen[:n])]))


def _refined(
    sketcher: Sketcher,
    sides: Sequence[_Sides],
    fitted: int,
    sample: Sequence[tuple[Group, float]],
    toward: tuple[int, float],
    rank: int,
    progress: Callable[[int], None] | None,
) -> list[_Sides]:
    """The sides of every layer, the left or the right one fitted to the sample given the other.

    toward: where the benchmark begins in the sample, and what the sum of its gradients is scaled by.
    """
    directions = [_Directions(4 * rank) for _ in sides]
    first, scale = toward
    sums: dict[int, Tensor] = {}
    done = 0
    for window in _windows(sample):
        products = _OneSided(sides, fitted, sketcher.projection.layers, len(window), sketcher.device)
        sketcher.gradients.run([group for group, _ in window], products, inputs_kept=fitted == _RIGHT)
        scales_P = torch.tensor([scale for _, scale in window], dtype=torch.float32, device=sketcher.device)
        for layer, total_PRW in products.totals.items():
            directions[layer].add((total_PRW * scales_P[:, None, None]).flatten(0, 1))
            if done + len(window) > first:
                sum_RW = total_PRW[max(0, first - done) :].sum(0)
                sums[layer] = sums[layer] + sum_RW if layer in sums else sum_RW
        done += len(window)
        _tell(progress, window)
    for layer, sum_RW in sums.items():
        directions[layer].add(sum_RW * scale)
    refined = []
    for (left_OR, right_IR), kept in zip(sides, directions, strict=True):
        if fitted == _LEFT and left_OR is not None:
            left_OR = kept.leading(rank)
        if fitted == _RIGHT and right_IR is not None:
            right_IR = kept.leading(rank)
        refined.append((left_OR, right_IR))
    return refined


class _OneSided:
    """Observer: each problem's gradient times the side that is given, summed over tokens.

    totals: layer -> float32 [P, R, W], W being the side that is fitted; none for a side that is kept as it is.
    """

    def __init__(
        self,
        sides: Sequence[_Sides],
        fitted: int,
        layers: Sequence[LayerBasis],
        n_problems: int,
        device: torch.device,
    ) -> None:
        self._experts = [
            None if basis.expert_EK is None else torch.from_numpy(basis.expert_EK).to(device) for basis in layers
        ]
        self._given = [
            None if (side := pair[1 - fitted]) is None else torch.from_numpy(side).to(device) for pair in sides
        ]
        self._wanted = [pair[fitted] is not None for pair in sides]
        self._fitted, self._n_problems = fitted, n_problems
        self.totals: dict[int, Tensor] = {}

    def reset(self) -> None:
        self.totals.clear()

    def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x_BTI if self._fitted == _RIGHT else project(x_BTI, self._given[layer]), expert_BT

    def on_gradient(self, layer: int, kept: tuple[Tensor, Tensor | None], grad_BTO: Tensor, problem_B: Tensor) -> None:
        if not self._wanted[layer]:
            return
        x_BTI, expert_BT = kept
        given, wide = (project(grad_BTO, self._given[layer]), x_BTI) if self._fitted == _RIGHT else (x_BTI, grad_BTO)
        given = in_slots(given, self._experts[layer], expert_BT)
        products_BRW = torch.bmm(given.transpose(1, 2), wide.float())
        if layer not in self.totals:
            self.totals[layer] = products_BRW.new_zeros(self._n_problems, *products_BRW.shape[1:])
        self.totals[layer].index_add_(0, problem_B, products_BRW)


class _Directions:
    """The leading right singular directions of rows that come a batch at a time (incremental truncated SVD)."""

    def __init__(self, n_kept: int) -> None:
        self._n_kept = n_kept
        self._kept_KW: Tensor | None = None
        """Orthogonal directions, each as long as its singular value."""

    def add(self, rows_NW: Tensor) -> None:
        stacked_NW = rows_NW if self._kept_KW is None else torch.cat([self._kept_KW, rows_NW])
        _, vectors_NN = torch.linalg.eigh((stacked_NW @ stacked_NW.T).double())  # ascending
        self._kept_KW = vectors_NN[:, -self._n_kept :].flip(1).T.float() @ stacked_NW

    def leading(self, rank: int) -> np.ndarray:
        """Orthonormal directions of the most energy, float32 [W, rank or fewer]."""
        if self._kept_KW is None:
            raise RequestError("a layer saw no gradient while fitting: leave it out with `modules`")
        lengths_K = self._kept_KW.norm(dim=1)
        kept_KW = self._kept_KW[lengths_K > 1e-6 * lengths_K.max()][:rank]
        return torch.linalg.qr(kept_KW.T)[0].contiguous().cpu().numpy()


def _bases(
    shapes: Sequence[Shape], sides: Sequence[_Sides], n_random: int, seed: int
) -> tuple[list[LayerBasis], np.ndarray]:
    """The sides with random directions beside them, and which core entries are of fitted directions alone, bool [C]."""
    bases, fitted, start = [], [], 0
    for (name, n_outputs, n_inputs, *n_experts), (left_OR, right_IR) in zip(shapes, sides, strict=True):
        left_fitted_R, left_OR = _widened(n_outputs, left_OR, n_random, seed, name, "left")
        right_fitted_R, right_IR = _widened(n_inputs, right_IR, n_random, seed, name, "right")
        expert_EK = expert_side(n_experts[0], seed, name) if n_experts else None
        right_fitted_R = np.tile(right_fitted_R, 1 if expert_EK is None else expert_EK.shape[1])
        fitted.append(np.outer(left_fitted_R, right_fitted_R).ravel())
        bases.append(LayerBasis(name, left_OR, right_IR, start, start + len(fitted[-1]), expert_EK))
        start = bases[-1].stop
    return bases, np.concatenate(fitted)


def _widened(
    width: int, side_WR: np.ndarray | None, n_random: int, seed: int, name: str, side: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which columns of the wider side are fitted, and the side; None: it is kept as it is, and nothing is beside it."""
    if side_WR is None:
        return np.ones(width, bool), None
    rank = side_WR.shape[1]
    return np.arange(rank + n_random) < rank, beside(side_WR, n_random, seed, name, side)


def _windows(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _WINDOW):
        yield items[start : start + _WINDOW]


def _tell(progress: Callable[[int], None] | None, window: Sequence[object]) -> None:
    if progress:
        progress(len(window))
