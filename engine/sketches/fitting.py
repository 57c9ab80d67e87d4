"""Fit a projection to a sample of problems: sides that span the gradients, core entries with the most energy.

For each layer, both sides come from a Tucker decomposition of the stacked gradients (higher-order orthogonal iteration,
De Lathauwer et al. 2000): the right side spans the rows of L^T G_i over the sample, the left the columns of G_i R. No
gradient is ever formed: one pass computes both products with the current sides, and sums their covariances
(one_sided.py). The first pass uses random sides and a quarter of a large sample; the second uses the sides from the
first and the whole sample; the third gives the energies of the entries. All problems have equal weight: each gradient
is divided by the norm estimated from its products. A benchmark's mean gradient, if given, has more weight than all
problems together, because the ranking is by dots with it. Each side also gets random directions in its complement, a
quarter as many as fitted ones. They are not kept in the sketch, but they estimate the rest of the gradient's norm: a
cosine divides by the whole norm.

Only sums over problems are kept: under FSDP2 each rank runs its share of the sample, the sums are added up, and every
rank gets the same bases. The sketch selects entries from the cores of the last pass, so that pass also gives the
sample's rows. Memory: per layer and problem of a window 2 R x (O + I) floats, the sums, and the cores of the sample.

Dimension letters: P problems of a window, R rank, O and I a layer's outputs and inputs, W either, B sequences,
T tokens, C core entries of all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from gradstore.engine.gradients.layers import Layer
from gradstore.engine.gradients.sharding import gathered, largest, own_share, total
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.source import RolloutSource
from gradstore.engine.sketches.one_sided import Covariances, Fitted, OneSided, Sides
from gradstore.engine.sketches.projection import (
    LayerBasis,
    Projection,
    Shape,
    beside,
    expert_side,
    fitted_projection,
    random_bases,
)
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.state import State

T = TypeVar("T")
Progress = Callable[[int], None]

_FIRST = 4
"""The first pass takes every 4th problem of a large sample."""
_LEAST = 32
"""Minimum problems of the first pass, if there are as many: fewer show too little of a layer where gradients have
hardly any direction in common (where they have, 8 do: docs/benchmarks.md)."""
_BESIDE = 4
"""Fitted directions of a side for each random one."""
_WINDOW, _HELD = 8, 1 << 27
"""Limits on the one-sided products held at once: number of problems, and bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A fitted projection, and the sketches that the fit made with it."""

    projection: Projection
    rows: list[SketchBatch]
    """Sketches of the sample's live problems, in the given order; under FSDP2 of this rank's share. They equal those of
    `Sketcher.sketch` up to rounding."""
    benchmark: list[SketchBatch]
    """The same for the benchmark's problems."""


def fit_projection(
    model: nn.Module,
    groups: Sequence[Group],
    spec: SketchSpec,
    progress: Progress | None = None,
    benchmark: Sequence[Group] = (),
) -> Projection:
    """The projection from `fit`, without the sketches."""
    return fit(model, groups, spec, progress, benchmark).projection


def fit(
    model: nn.Module,
    groups: Sequence[Group],
    spec: SketchSpec,
    progress: Progress | None = None,
    benchmark: Sequence[Group] = (),
) -> Fit:
    """Fit a projection to spec.dim dimensions to the groups. Each side of a layer has at most spec.rank fitted
    directions, plus a quarter as many random ones; a side of width up to twice the rank keeps all directions.

    groups: a sample of the problems to be ranked. benchmark: groups to rank against; the fit uses them like the others,
    and their mean gradient gets its own dimension. Groups without signal are left out. progress: called with the number
    of problems just run; `passed` gives the total. Under FSDP2 all ranks call this together with the same groups, and
    each runs its share. RequestError if fewer than two groups have a signal.
    """
    live, wanted = ([group for group in given if group.has_signal] for given in (groups, benchmark))
    if len(live) + len(wanted) < 2:
        raise RequestError(
            f"fitting a projection needs two problems whose rollouts are rewarded differently, "
            f"{len(live) + len(wanted) or 'none'} of these is one: sample more rollouts, or easier problems"
        )
    random = Sketcher(model, replace(spec, basis="random"))
    shapes = [layer.shape for layer in random.gradients.layers]
    with gathered(model):
        bases = random_bases(shapes, 2 * spec.rank, spec.seed)
        sides = _refined(random, bases, _begin(live), _begin(wanted), progress)
        bases, fitted = _bases(shapes, sides, spec.rank, spec.seed, " first")
        sides = _refined(random, bases, live, wanted, progress, fitted)
        bases, fitted = _bases(shapes, sides, spec.rank // _BESIDE, spec.seed)
        sketcher = _of_cores(model, spec, bases)
        last = [_cores(sketcher, part, progress) for part in (live, wanted)]
    projection = _finished(sketcher, [found for _, found in last], spec, _entries(bases, fitted), bool(benchmark))
    finished = Sketcher(model, spec, projection)
    return Fit(projection, *([_row(finished, *pair) for pair in zip(*part, strict=True)] for part in last))


def rows_again(sketcher: Sketcher, groups: Sequence[Group]) -> list[SketchBatch]:
    """The sketches that the fit of the sketcher's projection made of these groups (`Fit.rows`), by its last pass alone.

    The bits are the same if the groups are. Under FSDP2 of this rank's share.
    """
    live = [group for group in groups if group.has_signal]
    with gathered(sketcher.model):
        windows, cores = _cores(_of_cores(sketcher.model, sketcher.spec, sketcher.projection.layers), live, None)
    return [_row(sketcher, *pair) for pair in zip(windows, cores, strict=True)]


def _of_cores(model: nn.Module, spec: SketchSpec, bases: Sequence[LayerBasis]) -> Sketcher:
    """A sketcher of all core entries."""
    layout = [(basis.name, basis.start, basis.stop) for basis in bases]
    return Sketcher(model, replace(spec, basis="random"), Projection("random", list(bases), None, layout))


def passed(*n_live: int) -> int:
    """Total problems that a fit runs in all its passes, given the live problems of the sample and the benchmark."""
    return sum(2 * n + len(_begin(range(n))) for n in n_live)


def _begin(items: Sequence[T]) -> Sequence[T]:
    """The items of the first pass: a quarter, but at least `_LEAST` if there are as many."""
    return items[:: max(1, min(_FIRST, len(items) // _LEAST))]


def sample_groups(source: RolloutSource, n: int, seed: int) -> list[Group]:
    """Up to n groups with a signal, drawn at random from a source, in the source's order."""
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
    bases: Sequence[LayerBasis],
    live: Sequence[Group],
    wanted: Sequence[Group],
    progress: Progress | None,
    fitted: Sequence[Fitted] | None = None,
) -> list[Sides]:
    """Both sides of every layer; each is fitted to the groups with the other side of `bases` held fixed.

    A side without a gradient has no fitted direction. Example: a fresh adapter's A has no gradient while its B is zero.
    """
    model, layers = sketcher.model, sketcher.gradients.layers
    products = OneSided(bases, sketcher.device)
    sums = Covariances([layer.shape[1:3] for layer in layers], sketcher.spec.rank, sketcher.device, fitted)
    size = window_size(_product_bytes(layers, bases))
    for groups, of_benchmark in ((live, False), (wanted, True)):
        for window in _windows(model, own_share(model, groups), size):
            products.n_problems = len(window)
            sketcher.gradients.run(window, products, inputs_kept=True)
            sums.add(products.totals, of_benchmark)
            if progress:
                progress(len(window))
    return sums.sides(model)


def _bases(
    shapes: Sequence[Shape], sides: Sequence[Sides], n_random: int, seed: int, name_of_random: str = ""
) -> tuple[list[LayerBasis], list[Fitted]]:
    """Bases with random directions added to each side, and masks of the fitted directions.

    Without the random directions, a gradient's estimated norm would be that of its part in the sides. name_of_random:
    gives each pass its own random directions.
    """
    bases: list[LayerBasis] = []
    fitted: list[Fitted] = []
    start = 0
    for (name, _, _, *n_experts), (left_OR, right_IR) in zip(shapes, sides, strict=True):
        left_fitted_R, left_OR = _widened(left_OR, n_random, seed, name, f"left{name_of_random}")
        right_fitted_R, right_IR = _widened(right_IR, n_random, seed, name, f"right{name_of_random}")
        expert_EK = expert_side(n_experts[0], seed, name) if n_experts else None
        stop = start + left_OR.shape[1] * right_IR.shape[1] * (1 if expert_EK is None else expert_EK.shape[1])
        bases.append(LayerBasis(name, left_OR, right_IR, start, stop, expert_EK))
        fitted.append((left_fitted_R, right_fitted_R))
        start = stop
    return bases, fitted


def _entries(bases: Sequence[LayerBasis], fitted: Sequence[Fitted]) -> np.ndarray:
    """Mask of core entries between fitted directions only, bool [C]."""
    parts = []
    for basis, (left_R, right_R) in zip(bases, fitted, strict=True):
        right_KR = np.tile(right_R, 1 if basis.expert_EK is None else basis.expert_EK.shape[1])
        parts.append(np.outer(left_R, right_KR).ravel())
    return np.concatenate(parts)


def _widened(side_WR: np.ndarray, n_random: int, seed: int, name: str, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Mask of fitted columns, and the side with random columns added; a full-rank side gets none."""
    width, rank = side_WR.shape
    n_random = 0 if rank == width else n_random
    return np.arange(rank + n_random) < rank, beside(side_WR, n_random, seed, name, which)


def _cores(
    sketcher: Sketcher, groups: Sequence[Group], progress: Progress | None
) -> tuple[list[Sequence[Group]], list[SketchBatch]]:
    """This rank's share of the groups, window by window, and their cores."""
    windows, found = [], []
    for window in _windows(sketcher.model, own_share(sketcher.model, groups), _WINDOW):
        windows.append(window)
        found.append(sketcher.sketch(window))
        if progress:
            progress(len(window))
    return windows, found


def _finished(
    sketcher: Sketcher, cores: Sequence[Sequence[SketchBatch]], spec: SketchSpec, fitted_C: np.ndarray, aimed: bool
) -> Projection:
    """The projection to the core entries with the most energy, over unit-norm gradients of all ranks.

    cores: those of the sample, then those of the benchmark. A core's norm estimates its gradient's norm. aimed: whether
    the benchmark's mean core gets a dimension.
    """
    sums, n = np.zeros((2, sketcher.dim)), 0
    for of_benchmark, batches in enumerate(cores):
        for batch in batches:
            cores_PC = batch.sketches.astype(np.float64)
            squares_P1 = np.square(cores_PC).sum(axis=1, keepdims=True)
            n += int((squares_P1 > 0).sum())
            sums[0] += (np.square(cores_PC) / np.where(squares_P1 > 0, squares_P1, 1)).sum(axis=0)
            sums[1] += of_benchmark * cores_PC.sum(axis=0)
    whole = np.array(total(sketcher.model, np.append(sums, n).tolist()))
    energy_C, toward_C, (n_all,) = np.split(whole, [sketcher.dim, 2 * sketcher.dim])
    bases = sketcher.projection.layers
    return fitted_projection(bases, energy_C, spec.dim, float(n_all), toward_C if aimed else None, fitted_C)


def _row(sketcher: Sketcher, groups: Sequence[Group], cores: SketchBatch) -> SketchBatch:
    """Sketches of the live problems, from their cores."""
    live = [place for place, state in enumerate(cores.states) if state is State.LIVE]
    cores_PC = torch.from_numpy(cores.sketches[live])
    rows = sketcher.batch([groups[place] for place in live], cores_PC, cores.n_tokens)
    used, unused = (None if sizes_P is None else sizes_P[live] for sizes_P in (cores.ess, cores.ess_of_ratios))
    return replace(rows, ess=used, ess_of_ratios=unused)


def window_size(problem_bytes: int) -> int:
    """Problems per window, if the products of one problem take problem_bytes."""
    return max(1, min(_WINDOW, _HELD // problem_bytes))


def _product_bytes(layers: Sequence[Layer], bases: Sequence[LayerBasis]) -> int:
    """Bytes of one problem's products with both sides of every layer."""
    numbers = 0
    for layer, basis in zip(layers, bases, strict=True):
        n_left = layer.n_outputs if basis.left_OR is None else basis.left_OR.shape[1]
        n_right = layer.n_inputs if basis.right_IR is None else basis.right_IR.shape[1]
        n_slots = 1 if basis.expert_EK is None else basis.expert_EK.shape[1]
        numbers += n_slots * (n_right * layer.n_outputs + n_left * layer.n_inputs)
    return 4 * numbers


def _windows(model: nn.Module, groups: Sequence[Group], size: int) -> Iterator[Sequence[Group]]:
    """Windows of the groups, the same number on every rank: some may be empty, so that the ranks keep step."""
    for number in range(largest(model, -(-len(groups) // size))):
        yield groups[number * size : (number + 1) * size]
