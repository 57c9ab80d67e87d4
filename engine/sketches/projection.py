"""Projections from a layer's gradient to sketch dimensions: two sides, then a fold.

A layer's gradient G [O, I] becomes a core left^T G right, [R, R]; the cores of all layers, one after another, are
folded to the sketch. Three kinds:

- `random`: sides of signs +-1/sqrt(R), no fold. Inner products are preserved in expectation: E<Pa, Pb> = <a, b>.
- `dense`: wider random sides, each core then folded by a count sketch (every entry goes to one dimension with a sign).
  Also unbiased, and close to a dense projection if hidden states share a mean direction.
- `fitted`: orthonormal sides span the directions with most energy in a sample's gradients. The fold keeps the core
  entries with the highest energy over all layers: one budget for the whole model (fitting.py). One more dimension
  holds the benchmark's mean gradient in all other entries, so dots with it lose nothing there. Random directions
  beside the fitted ones make the norm of the whole core an estimate of the gradient's norm.

A side no wider than the rank is not projected. Signs are bits of a Philox counter keyed by seed, layer and side: the
same on every machine, device and version.

A fused weight of E experts is one layer whose input is the token in the slot of its expert. Its gradient has a third
side: G [E, O, I] becomes sum_e (left^T G_e right) c_e^T, [R, K, R]. The experts share left and right. Up to EXPERT_RANK
experts are kept apart (K = E, the identity); of more, the rows c_e are signs +-1/sqrt(K), K = EXPERT_RANK.

Dimension letters: P problems, C core entries of all layers, D sketch dimensions, M entries of a fold, R rank, O and I
a layer's outputs and inputs, E experts, K directions of the experts' side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gradstore.errors import RequestError
from gradstore.projection_digest import projection_digest

Kind = Literal["random", "dense", "fitted"]
REST = "rest of all layers"
"""Pseudo-layer in the layout: the dimension along a benchmark in the entries without their own dimension."""
Shape = tuple[str, int, int] | tuple[str, int, int, int]
"""A layer as (name, outputs, inputs), and for a fused weight its number of experts."""
EXPERT_RANK = 16
"""Width of the experts' side."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerBasis:
    """The two sides of one layer's projection and the core entries they fill."""

    name: str
    left_OR: np.ndarray | None
    """float32 [O, R]; None: the output side is not projected."""
    right_IR: np.ndarray | None
    """float32 [I, R]; None: the input side is not projected."""
    start: int
    stop: int
    expert_EK: np.ndarray | None = None
    """float32 [E, K], the experts' side of a fused weight; None for every other layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """A sparse linear map from core entries to sketch dimensions: dimension `to` gets sign x core entry `of`.

    Signs are +-1, or the coefficients of a direction over many entries.
    """

    of_M: np.ndarray
    to_M: np.ndarray
    sign_M: np.ndarray
    """Coefficients, float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A map from the gradients of a model's layers to a sketch."""

    kind: Kind
    layers: list[LayerBasis]
    fold: Fold | None
    layout: list[tuple[str, int, int]]
    """(layer, start, stop): the range of sketch dimensions of each layer."""
    captured: float | None = None
    """Share of the sample's energy in the sketch, measured at the fit."""
    fidelity: float | None = None
    """Rank correlation of sketched with exact cosines on held-out problems, measured at the fit."""

    @property
    def dim(self) -> int:
        return self.layout[-1][2]

    @property
    def core_dim(self) -> int:
        return self.layers[-1].stop

    def digest(self) -> str:
        """Digest (SHA-256) over names, ranges and entries: projections with equal digests give equal sketches."""
        layers = (
            ((basis.name, basis.start, basis.stop), (basis.left_OR, basis.right_IR, basis.expert_EK))
            for basis in self.layers
        )
        fold = None if self.fold is None else (self.fold.of_M, self.fold.to_M, self.fold.sign_M)
        return projection_digest(self.layout, layers, fold)


def random_projection(layers: Sequence[Shape], rank: int, seed: int, right_rank: int | None = None) -> Projection:
    """Random sign projection with at most rank x rank dimensions per layer (rank x right_rank if given)."""
    bases = random_bases(layers, rank, seed, right_rank)
    return Projection("random", bases, None, [(basis.name, basis.start, basis.stop) for basis in bases])


def dense_projection(layers: Sequence[Shape], rank: int, dim: int, seed: int) -> Projection:
    """Sign projection of high rank; a count sketch folds each layer's core to an equal share of `dim` dimensions."""
    bases = random_bases(layers, rank, seed)
    if dim < len(bases):
        raise RequestError(f"dim is {dim}, expected at least one dimension for each of {len(bases)} layers")
    bounds = np.arange(len(bases) + 1) * dim // len(bases)
    to_parts, sign_parts, layout = [], [], []
    for basis, start, stop in zip(bases, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        size = basis.stop - basis.start
        width = min(size, stop - start)
        words = _words(size, seed, basis.name, "fold")
        to_parts.append(start + ((words >> np.uint64(1)) % np.uint64(width)).astype(np.int64))
        sign_parts.append((words & np.uint64(1)).astype(np.float32) * 2 - 1)
        layout.append((basis.name, start, stop))
    fold = Fold(np.arange(bases[-1].stop), np.concatenate(to_parts), np.concatenate(sign_parts))
    return Projection("dense", bases, fold, layout)


def fitted_projection(
    bases: Sequence[LayerBasis],
    energy_C: np.ndarray,
    dim: int,
    total_energy: float | None = None,
    toward_C: np.ndarray | None = None,
    fitted_C: np.ndarray | None = None,
) -> Projection:
    """Projection to the `dim` core entries with the highest energy, in layer order; layers without any are left out.

    toward_C: a benchmark's mean core. The last dimension is then its unit direction in the entries not kept.
    fitted_C: mask of entries of fitted directions; None: all. Other entries are kept only if these do not fill `dim`:
    they would add more noise than signal to dots.
    """
    n_kept = dim if toward_C is None else dim - 1
    fitted_C = np.ones(len(energy_C), bool) if fitted_C is None else fitted_C
    of_M = np.sort(np.lexsort((-energy_C, ~fitted_C))[:n_kept])
    layout = []
    for basis in bases:
        start, stop = np.searchsorted(of_M, [basis.start, basis.stop]).tolist()
        if stop > start:
            layout.append((basis.name, start, stop))
    fold = Fold(of_M, np.arange(len(of_M)), np.ones(len(of_M), np.float32))
    captured = None if not total_energy else float(energy_C[of_M].sum() / total_energy)
    if toward_C is not None and len(of_M):
        rest_C = toward_C.astype(np.float64)
        rest_C[of_M] = 0.0
        if n_kept < fitted_C.sum():
            rest_C[~fitted_C] = 0.0
        length, n_kept = float(np.linalg.norm(rest_C)), len(of_M)
        if length > 0:
            more_M = np.flatnonzero(rest_C)
            fold = Fold(
                np.concatenate([of_M, more_M]),
                np.concatenate([np.arange(n_kept), np.full(len(more_M), n_kept)]),
                np.concatenate([np.ones(n_kept), rest_C[more_M] / length]).astype(np.float32),
            )
            layout.append((REST, n_kept, n_kept + 1))
    return Projection("fitted", list(bases), fold, layout, captured)


def random_bases(layers: Sequence[Shape], rank: int, seed: int, right_rank: int | None = None) -> list[LayerBasis]:
    """Seeded sign bases of the layers. right_rank: width of the input side if it differs from `rank`."""
    right_rank = right_rank or rank
    bases: list[LayerBasis] = []
    start = 0
    for name, n_outputs, n_inputs, *n_experts in layers:
        expert_EK = expert_side(n_experts[0], seed, name) if n_experts else None
        n_slots = 1 if expert_EK is None else expert_EK.shape[1]
        left_OR = None if n_outputs <= rank else _signs(n_outputs, rank, seed, name, "left")
        right_IR = None if n_inputs <= right_rank else _signs(n_inputs, right_rank, seed, name, "right")
        stop = start + min(n_outputs, rank) * n_slots * min(n_inputs, right_rank)
        bases.append(LayerBasis(name, left_OR, right_IR, start, stop, expert_EK))
        start = stop
    return bases


def expert_side(n_experts: int, seed: int, name: str) -> np.ndarray:
    """The experts' side of a fused weight, float32 [E, K]: identity up to EXPERT_RANK experts, else seeded signs."""
    if n_experts <= EXPERT_RANK:
        return np.eye(n_experts, dtype=np.float32)
    return _signs(n_experts, EXPERT_RANK, seed, name, "experts")


def beside(fitted_WR: np.ndarray, n: int, seed: int, name: str, side: str) -> np.ndarray:
    """An orthonormal side and n random directions of its complement, float32 [W, R + n].

    The random directions are signs / sqrt(n) minus their projection on the side. In expectation, norms and products
    over all columns equal those over the whole width.
    """
    signs_WN = _signs(len(fitted_WR), n, seed, name, f"{side} beside") if n else fitted_WR[:, :0]
    return np.concatenate([fitted_WR, signs_WN - fitted_WR @ (fitted_WR.T @ signs_WN)], axis=1)


def _signs(width: int, rank: int, seed: int, name: str, side: str) -> np.ndarray:
    words = _words(-(-width * rank // 64), seed, name, side).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=width * rank)
    return ((bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(rank))).reshape(width, rank)


def _words(n: int, seed: int, name: str, side: str) -> np.ndarray:
    """n words of 64 random bits, determined by seed, layer and side."""
    key = hashlib.sha256(f"{seed}/{name}/{side}".encode()).digest()[:16]
    return np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(n)
