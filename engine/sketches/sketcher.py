"""Per-problem sketches of the policy gradient from one forward and one input-gradient backward.

A linear layer's inputs are projected (x R) during the forward, and its output gradients (g L) during the backward. Then
sum_t (g_t L)^T (x_t R) is added to the sketch of the sequence's problem; no weight gradient is ever formed. Cost per
token of a layer I -> O: 4 I O FLOPs plus 2 R (I + O + R), against 6 I O for training.

Dimension letters: P problems, B sequences, T tokens, C core entries, D sketch dimensions, M entries of the fold,
R rank, I and O a layer's inputs and outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.adapters import adapter_identity
from gradstore.engine.gradients.full_gradients import problem_gradients
from gradstore.engine.gradients.gradient_pass import EffectiveSampleSize, GradientPass
from gradstore.engine.gradients.hooks import Observer
from gradstore.engine.gradients.layers import Layer, model_identity
from gradstore.engine.gradients.optimizer_direction import OptimizerDirection
from gradstore.engine.gradients.ranks import each_its_share
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.projection import LayerBasis, Projection, dense_projection, random_projection
from gradstore.engine.sketches.spec import HEAD_ONLY, SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.state import live_mask, states_of

_LANES = 16
"""float32 numbers in the widest CPU registers."""


class Sketcher:
    """Sketches groups of rollouts with the model in its current state, and leaves the model unchanged."""

    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec | None = None,
        projection: Projection | None = None,
        optimizer: OptimizerDirection | None = None,
    ) -> None:
        """projection: a fitted or loaded one; default: a new random or dense one by the spec.
        optimizer: sketch Adam's direction for each problem instead of its gradient; each problem's gradient is then
        formed in full, one at a time.

        RequestError if the spec asks for a fitted projection and none is given, or if the given projection has other
        layers than the spec chooses.
        """
        self.model = model
        self.spec = spec or SketchSpec()
        self.gradients = GradientPass(model, self.spec)
        self.policy, self.device = self.gradients.policy, self.gradients.device
        self.projection = projection or _make(self.gradients.layers, self.spec)
        self._check(self.projection)
        self._sides: dict[int, tuple[Projection, list[_Sides]]] = {}
        self.optimizer = optimizer
        self._moments = optimizer.moments_of(self.gradients.layers, model) if optimizer else []

    @property
    def dim(self) -> int:
        """Dimensions of a sketch."""
        return self.projection.dim

    @property
    def fingerprint(self) -> dict:
        """All settings that must agree for sketches to be comparable: a store holds rows of one fingerprint only."""
        return {
            "model": model_identity(self.model),
            "adapters": adapter_identity(self.model),
            "projection": {
                "kind": self.projection.kind,
                "rank": self.spec.rank,
                **({} if self.spec.right_rank is None else {"right_rank": self.spec.right_rank}),
                "dim": self.dim,
                "seed": self.spec.seed,
                "basis": self.projection.digest(),
            },
            **({"gradient": HEAD_ONLY} if self.spec.head_only else {}),
            **({"embeddings": True} if self.spec.embeddings else {}),
            **({"vectors": True} if any(layer.vector for layer in self.gradients.layers) else {}),
            **({"optimizer": self.optimizer.describe()} if self.optimizer else {}),
            "modules": list(self.spec.modules) if self.spec.modules else None,
            "objective": self.spec.objective.as_dict(),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "layout": [list(segment) for segment in self.projection.layout],
        }

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        """Sketches of the groups, in their order.

        Groups whose rewards are all equal are not run and, like any zero gradient, are `no_signal`; a problem whose
        gradient is not finite is `failed` with the reason. RequestError for a sequence longer than the model's
        context, a token id outside the vocabulary, or missing log-probabilities under an importance-weighted
        objective.
        """
        return self.sketch_in([self.projection], groups)[0]

    def sketch_in(self, projections: Sequence[Projection], groups: Sequence[Group]) -> list[SketchBatch]:
        """Sketches of the groups in several projections of the same layers, from one forward and backward."""
        for projection in projections:
            self._check(projection)
        sums = [
            torch.zeros(len(groups), projection.core_dim, dtype=torch.float32, device=self.device)
            for projection in projections
        ]
        rule = self.spec.objective
        recorded = all(group.logprobs is not None for group in groups)
        ess = EffectiveSampleSize(groups, self.device, rule.ratio) if rule.importance or recorded else None
        sides = [self._sides_of(projection) for projection in projections]
        projector = _Projector(list(zip(sides, sums, strict=True)))
        if self.optimizer is None:
            n_tokens = self.gradients.run(groups, projector, ess)
        else:
            n_tokens = self._directions(groups, self.optimizer, projector, ess)
        batches = [
            _batch(groups, projection, sums_PC, n_tokens) for projection, sums_PC in zip(projections, sums, strict=True)
        ]
        if ess is None:
            return batches
        used, unused = (ess.of_groups(), None) if rule.importance else (None, ess.of_groups())
        return [replace(batch, ess=used, ess_of_ratios=unused) for batch in batches]

    def observer(self, n: int) -> tuple[Observer, Tensor]:
        """An observer of `gradients.layers` for a backward pass that runs for another purpose, and its sums: the cores
        of n groups, float32 [n, C], initially zero. `batch` turns them into sketches."""
        sums_PC = torch.zeros(n, self.projection.core_dim, dtype=torch.float32, device=self.device)
        return _Projector([(self._sides_of(self.projection), sums_PC)]), sums_PC

    def folded(self, cores_PC: Tensor) -> Tensor:
        """The sketches of cores, float32 [P, D]."""
        return _folded(self.projection, cores_PC)

    def batch(self, groups: Sequence[Group], cores_PC: Tensor, n_tokens: int) -> SketchBatch:
        """Sketches of groups from their cores."""
        return _batch(groups, self.projection, cores_PC, n_tokens)

    def _check(self, projection: Projection) -> None:
        if [basis.name for basis in projection.layers] != [layer.name for layer in self.gradients.layers]:
            raise RequestError("the projection is of other layers than the model has or `modules` chooses")

    def _sides_of(self, projection: Projection) -> "list[_Sides]":
        """The projection's sides on the model's device; cached, so they move only once."""
        if id(projection) not in self._sides:
            sides = [_sides_on(self.device, basis) for basis in projection.layers]
            self._sides[id(projection)] = (projection, sides)  # the reference keeps the id from being reused
        return self._sides[id(projection)][1]

    def _directions(
        self,
        groups: Sequence[Group],
        optimizer: OptimizerDirection,
        projector: "_Projector",
        ess: EffectiveSampleSize | None,
    ) -> int:
        """Project each problem's optimizer direction; returns the tokens run. Problems without signal stay zero: the
        optimizer's momentum is not their signal."""
        total = 0
        for row, (matrices, n_tokens) in enumerate(problem_gradients(self.gradients, groups, ess)):
            total += n_tokens
            if n_tokens and any(bool(gradient_OI.any()) for gradient_OI in matrices):
                for layer, (gradient_OI, moments) in enumerate(zip(matrices, self._moments, strict=True)):
                    projector.add(layer, row, optimizer.apply(gradient_OI, moments))
        return total

    def check(self, group: Group) -> None:
        """Raise RequestError if the model cannot run the group; see `sketch`."""
        self.gradients.check(group)


def sketch_together(sketcher: Sketcher, groups: Sequence[Group]) -> SketchBatch:
    """`sketcher.sketch(groups)`; of a sharded model each rank sketches its share, and all get all of it."""
    (batch,) = each_its_share(sketcher.model, groups, lambda own: [sketcher.sketch(own)])
    return batch


@dataclass(frozen=True, slots=True)
class _Sides:
    """One layer's basis on the model's device; None: the side is not projected."""

    basis: LayerBasis
    left_OR: Tensor | None
    right_IR: Tensor | None
    expert_EK: Tensor | None


class _Projector:
    """Adds each layer's projected gradient to the sums of the problems, for one projection or several."""

    def __init__(self, projections: Sequence[tuple[Sequence[_Sides], Tensor]]) -> None:
        """projections: for each, the sides of every layer and the sums [P, C] to add to."""
        self._projections = projections

    def on_input(
        self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        return [project(x_BTI, sides[layer].right_IR) for sides, _ in self._projections], expert_BT

    def on_gradient(
        self, layer: int, kept: tuple[list[Tensor], Tensor | None], grad_BTO: Tensor, problem_B: Tensor
    ) -> None:
        narrow, expert_BT = kept
        for (sides, sums_PC), x_BTR in zip(self._projections, narrow, strict=True):
            side = sides[layer]
            right_BTR = in_slots(x_BTR, side.expert_EK, expert_BT)
            products_BRR = torch.bmm(project(grad_BTO, side.left_OR).transpose(1, 2), right_BTR)
            sums_PC[:, side.basis.start : side.basis.stop].index_add_(0, problem_B, products_BRR.flatten(1))

    def reset(self) -> None:
        for _, sums_PC in self._projections:
            sums_PC.zero_()

    def add(self, layer: int, problem: int, matrix_OI: Tensor) -> None:
        """Add the projection of a whole matrix, [E, O, I] for a fused weight, to one problem's sums."""
        for sides, sums_PC in self._projections:
            side = sides[layer]
            partial_RI = matrix_OI if side.left_OR is None else side.left_OR.T @ matrix_OI
            core_RR = partial_RI if side.right_IR is None else partial_RI @ side.right_IR
            if side.expert_EK is not None:
                core_RR = torch.einsum("eor,ek->okr", core_RR, side.expert_EK)
            sums_PC[problem, side.basis.start : side.basis.stop] += core_RR.flatten()


def in_slots(x_BTR: Tensor, expert_EK: Tensor | None, expert_BT: Tensor | None) -> Tensor:
    """Projected rows in the slots of their experts, [B, T, K * R]; unchanged for a layer without experts."""
    if expert_EK is None or expert_BT is None:
        return x_BTR
    return (expert_EK[expert_BT][..., None] * x_BTR[:, :, None]).flatten(2)


def project(x_BTW: Tensor, side_WR: Tensor | None) -> Tensor:
    """The tokens' vectors on one side of the basis, float32 [B, T, R]."""
    if side_WR is None:
        return x_BTW.float()
    if side_WR.shape[1] % _LANES == 0:
        return x_BTW.float() @ side_WR
    # If R does not fill CPU registers, the product with the side as rows costs a fifth less on some CPUs.
    n_sequences, n_tokens = x_BTW.shape[:2]
    product_RN = side_WR.T @ x_BTW.float().flatten(0, 1).T
    return product_RN.view(-1, n_sequences, n_tokens).permute(1, 2, 0)


def _folded(projection: Projection, sums_PC: Tensor) -> Tensor:
    fold, device = projection.fold, sums_PC.device
    if fold is None:
        return sums_PC
    of_M, to_M, sign_M = (torch.from_numpy(x).to(device) for x in (fold.of_M, fold.to_M, fold.sign_M))
    return sums_PC.new_zeros(len(sums_PC), projection.dim).index_add_(1, to_M, sums_PC[:, of_M] * sign_M)


def _make(layers: Sequence[Layer], spec: SketchSpec) -> Projection:
    shapes = [layer.shape for layer in layers]
    if spec.basis == "fitted":
        raise RequestError("a fitted projection must be fitted first (engine.fit_projection) or loaded from the store")
    if spec.basis == "dense":
        return dense_projection(shapes, spec.rank, spec.dim, spec.seed)
    return random_projection(shapes, spec.rank, spec.seed, spec.right_rank)


def _sides_on(device: torch.device, basis: LayerBasis) -> _Sides:
    left_OR, right_IR, expert_EK = (
        None if side is None else torch.from_numpy(side).to(device)
        for side in (basis.left_OR, basis.right_IR, basis.expert_EK)
    )
    return _Sides(basis, left_OR, right_IR, expert_EK)


def _batch(groups: Sequence[Group], projection: Projection, sums_PC: Tensor, n_tokens: int) -> SketchBatch:
    sketches_PD = _folded(projection, sums_PC)
    if projection.kind != "fitted":
        return _label(groups, sketches_PD.cpu().numpy(), n_tokens)
    lengths_P1 = sums_PC.double().norm(dim=1, keepdim=True).float()
    found_PX = torch.cat([sketches_PD, lengths_P1], 1).cpu().numpy()  # one wait for the GPU
    batch = _label(groups, np.ascontiguousarray(found_PX[:, :-1]), n_tokens)
    return replace(batch, norms=np.where(live_mask(batch.states), found_PX[:, -1], np.float32(0)))


def _label(groups: Sequence[Group], sketches_PD: np.ndarray, n_tokens: int) -> SketchBatch:
    """A batch with the state of each problem; rows of problems that are not live are set to zero."""
    states, reasons = states_of(np.isfinite(sketches_PD).all(axis=1), np.count_nonzero(sketches_PD, axis=1) > 0)
    sketches_PD[~live_mask(states)] = 0.0
    return SketchBatch(
        [group.problem_id for group in groups],
        sketches_PD,
        states,
        reasons,
        np.array([group.pass_rate for group in groups], np.float32),
        np.array([group.n_rollouts for group in groups], np.int32),
        n_tokens,
    )
