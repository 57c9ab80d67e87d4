"""Exact gradients of the sketched layers, and exact dot products with known targets without forming them.

For a layer with output gradients g_t and inputs x_t, <G, V> = sum_t g_t^T V x_t: one more product of the layer's size
per token and target, 2 I O FLOPs. So forward + input gradient + dots cost as much as a plain backward, in any
micro-batch and with shared prompts. The norm of a problem's gradient needs the gradient itself. It is then formed, one
problem at a time (2 I O FLOPs per token), and all dots from it cost next to nothing. Formed gradients are held one
block of layers at a time (full_gradients.py). Targets may lie in host memory; each layer is moved when needed.

Dimension letters: P problems, K targets, L layers, B sequences, T tokens, I and O a layer's inputs and outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradstore.engine.gradients.experts import routed_product
from gradstore.engine.gradients.full_gradients import blocks, formed, problem_gradients
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.layers import Layer
from gradstore.engine.gradients.ranks import each_its_share
from gradstore.engine.gradients.settings import GradientSpec
from gradstore.engine.gradients.sharding import gathered, inner, own_share, plain_inner, sum_over_ranks
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError
from gradstore.state import State, live_mask, states_of


@dataclass(frozen=True, slots=True, eq=False)
class LayerGradients:
    """One gradient over the sketched layers: of a problem, or the mean over a benchmark's problems."""

    names: list[str]
    """Layer names, in the model's order."""
    matrices: list[Tensor]
    """float32 [O, I] each ([E, O, I] for a fused weight of E experts), in the ascent direction, on any device."""

    @property
    def norm(self) -> float:
        """Euclidean length over all layers."""
        return float(sum(inner(matrix, matrix) for matrix in self.matrices) ** 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class ExactBatch:
    """Exact scores of some problems."""

    ids: list[str]
    layers: list[str]
    terms: np.ndarray
    """Dot product of each gradient with each target per layer, float64 [P, K, L]; zero where not live."""
    norms: np.ndarray | None
    """Norm of each gradient over all layers, float64 [P]; None if not requested."""
    target_norms: np.ndarray
    """Norm of each target, float64 [K]."""
    states: list[State]
    reasons: list[str]
    """Why a problem failed; empty for the others."""
    n_tokens: int
    """Tokens that went through the model, without padding and repeated responses."""

    @property
    def dots(self) -> np.ndarray:
        """<g_i, V_k>, float64 [P, K]."""
        return self.terms.sum(2)

    @property
    def cosines(self) -> np.ndarray:
        """Cosines, float64 [P, K], NaN for problems that are not live; RequestError if norms were not requested."""
        if self.norms is None:
            raise RequestError("exact cosines need norms: exact_dots(..., norms=True)")
        live_P = live_mask(self.states)
        lengths_PK = self.norms[:, None] * self.target_norms
        return np.divide(self.dots, lengths_PK, out=np.full_like(lengths_PK, np.nan), where=live_P[:, None])


def layer_gradients(model: nn.Module, groups: Sequence[Group], spec: GradientSpec | None = None) -> LayerGradients:
    """The exact mean gradient of the groups over the sketched layers; groups without signal count as zero.

    Memory: one float32 matrix per layer, for any number of groups; in host memory if a GPU cannot hold all of them
    beside the model. `engine.target` takes the same mean of sketches. Under FSDP2 the mean is over this rank's groups
    alone: give every rank all of them.
    RequestError for no groups or groups the model cannot run, or if the gradient is zero or not finite.
    """
    if not groups:
        raise RequestError("the mean gradient of no groups is not defined")
    gradients = GradientPass(model, spec or GradientSpec())
    parts = blocks(gradients)
    kept_on = gradients.device if len(parts) == 1 else torch.device("cpu")
    matrices = [matrix.to(kept_on) for _, part in parts for matrix in _mean(part, groups)]
    found = LayerGradients([layer.name for layer in gradients.layers], matrices)
    _check_length(found.norm, len(groups))
    return found


def exact_against(
    model: nn.Module, groups: Sequence[Group], others: Sequence[Group], spec: GradientSpec | None = None
) -> ExactBatch:
    """Exact dots and norms of the groups against the mean gradient of `others`, in bounded memory.

    As `exact_dots(model, groups, layer_gradients(model, others, spec), spec, norms=True)`, but in blocks of layers:
    no whole gradient is ever held. Under FSDP2 all ranks call this together with the same groups: each runs its share
    of both, the mean alone is summed over the ranks, and all get all scores. RequestError as in either function.
    """
    if not others:
        raise RequestError("the mean gradient of no groups is not defined")
    gradients = GradientPass(model, spec or GradientSpec())
    own_others = own_share(model, others)

    def targets_of(cut: slice, part: GradientPass) -> list[list[Tensor]]:
        matrices, _ = formed(part, own_others)
        return [[sum_over_ranks(model, matrix).div_(len(others)) for matrix in matrices]]

    def run(own: list[Group]) -> list[ExactBatch]:
        return [_formed_batch(gradients, own, targets_of, 1)]

    with gathered(model):
        (batch,) = each_its_share(model, groups, run, ("layers", "target_norms"))
    _check_length(float(batch.target_norms[0]), len(others))
    return batch


def exact_dots(
    model: nn.Module,
    groups: Sequence[Group],
    targets: LayerGradients | Sequence[LayerGradients],
    spec: GradientSpec | None = None,
    *,
    norms: bool = False,
) -> ExactBatch:
    """Exact dot products of each group's gradient with known targets, over the layers the spec sketches.

    Without norms, one pass as for a sketch, no gradient formed: 2 I O FLOPs per token, layer and target on top of
    4 I O. With norms, each problem's gradient is formed in turn: 6 I O for any number of targets, and more if the
    layers are taken in several blocks.
    RequestError if a target does not cover the same layers.
    """
    gradients = GradientPass(model, spec or GradientSpec())
    wanted = [targets] if isinstance(targets, LayerGradients) else list(targets)
    for target in wanted:
        _check_target(target, gradients.layers)
    if norms:

        def targets_of(cut: slice, part: GradientPass) -> list[list[Tensor]]:
            return [[matrix.to(gradients.device) for matrix in target.matrices[cut]] for target in wanted]

        return _formed_batch(gradients, groups, targets_of, len(wanted))
    dots = _Dots([target.matrices for target in wanted], len(gradients.layers), len(groups), gradients.device)
    n_tokens = gradients.run(groups, dots, inputs_kept=True)
    terms_PKL = dots.terms_LKP.permute(2, 1, 0).double().cpu().numpy()
    return _batch(gradients, groups, terms_PKL, None, np.array([target.norm for target in wanted]), n_tokens)


class _Dots:
    """Adds g^T V x over a sequence's tokens to the dots of its problem."""

    def __init__(
        self, targets: Sequence[Sequence[Tensor]], n_layers: int, n_problems: int, device: torch.device
    ) -> None:
        self._targets = targets
        self.terms_LKP = torch.zeros(n_layers, len(targets), n_problems, device=device)

    def reset(self) -> None:
        self.terms_LKP.zero_()

    def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x_BTI, expert_BT

    def on_gradient(self, layer: int, kept: tuple[Tensor, Tensor | None], grad_BTO: Tensor, problem_B: Tensor) -> None:
        x_BTI, expert_BT = kept
        for row_P, matrices in zip(self.terms_LKP[layer], self._targets, strict=True):
            matrix_OI = matrices[layer].to(grad_BTO.device, grad_BTO.dtype)
            if expert_BT is not None:
                products_NO = routed_product(x_BTI.flatten(0, 1), matrix_OI.transpose(1, 2), expert_BT.flatten())
                dots_B = _rowwise_dot(grad_BTO, products_NO.view_as(grad_BTO))
            elif matrix_OI.shape[0] <= matrix_OI.shape[1]:  # the elementwise product runs over the narrower side
                dots_B = _rowwise_dot(grad_BTO, x_BTI @ matrix_OI.T)
            else:
                dots_B = _rowwise_dot(grad_BTO @ matrix_OI, x_BTI)
            row_P.index_add_(0, problem_B, dots_B)


def _mean(gradients: GradientPass, groups: Sequence[Group]) -> list[Tensor]:
    """Mean gradient of the groups, float32 [O, I] per layer of the pass; groups without signal count as zero."""
    return [matrix.div_(len(groups)) for matrix in formed(gradients, groups)[0]]


def _check_length(length: float, n_groups: int) -> None:
    """Raise RequestError for a target whose norm is zero or not finite."""
    if not np.isfinite(length) or length == 0.0:
        raise RequestError(f"the mean gradient of the {n_groups} groups has length {length}")


def _formed_batch(
    gradients: GradientPass,
    groups: Sequence[Group],
    targets_of: Callable[[slice, GradientPass], list[list[Tensor]]],
    n_targets: int,
) -> ExactBatch:
    """Dots and norms from the problems' gradients, formed block by block of the layers.

    targets_of: returns the targets' matrices of one block, by target. Called once per block; freed before the next.
    """
    terms_PKL = np.zeros((len(groups), n_targets, len(gradients.layers)))
    squares_P, target_squares_K, total = np.zeros(len(groups)), np.zeros(n_targets), 0
    for cut, part in blocks(gradients):
        targets = targets_of(cut, part)
        target_squares_K += [sum(inner(matrix, matrix) for matrix in matrices) for matrices in targets]
        total = 0
        rows, found_RKL = [], []  # kept on the device until the block's last problem: one wait for the GPU
        for row, (matrices, n_tokens) in enumerate(problem_gradients(part, groups)):
            total += n_tokens
            if not n_tokens:
                continue
            against = [matrices, *targets]  # the gradient itself first, for its norm
            found = [plain_inner(*pair) for wanted in against for pair in zip(matrices, wanted, strict=True)]
            rows.append(row)
            found_RKL.append(torch.stack(found).view(len(against), -1))
        del targets
        if rows:
            numbers_RKL = torch.stack(found_RKL).cpu().numpy()
            squares_P[rows] += numbers_RKL[:, 0].sum(1)
            terms_PKL[rows, :, cut] = numbers_RKL[:, 1:]
    return _batch(gradients, groups, terms_PKL, np.sqrt(squares_P), np.sqrt(target_squares_K), total)


def _batch(
    gradients: GradientPass,
    groups: Sequence[Group],
    terms_PKL: np.ndarray,
    norms_P: np.ndarray | None,
    target_norms_K: np.ndarray,
    n_tokens: int,
) -> ExactBatch:
    states, reasons = _states(groups, terms_PKL, norms_P)
    return ExactBatch(
        [group.problem_id for group in groups],
        [layer.name for layer in gradients.layers],
        terms_PKL,
        norms_P,
        target_norms_K,
        states,
        reasons,
        n_tokens,
    )


def _states(
    groups: Sequence[Group], terms_PKL: np.ndarray, norms_P: np.ndarray | None
) -> tuple[list[State], list[str]]:
    """States and failure reasons of the problems, from rewards and results; rows that are not live are set to zero."""
    lengths_P = np.ones(len(groups)) if norms_P is None else norms_P
    signal_P = np.array([group.has_signal for group in groups], bool) & (lengths_P != 0)
    states, reasons = states_of(np.isfinite(terms_PKL).all(axis=(1, 2)) & np.isfinite(lengths_P), signal_P)
    rest_P = ~live_mask(states)
    terms_PKL[rest_P] = 0.0
    lengths_P[rest_P] = 0.0
    return states, reasons


def _check_target(target: LayerGradients, layers: Sequence[Layer]) -> None:
    names = [layer.name for layer in layers]
    if target.names != names:
        odd = next(iter(set(target.names) ^ set(names)), "the same names in another order")
        raise RequestError(
            f"the target is over {len(target.names)} layers, the spec sketches {len(names)} (first difference: {odd}): "
            "make the target with the same model and spec"
        )
    for layer, matrix in zip(layers, target.matrices, strict=True):
        if tuple(matrix.shape) != layer.matrix_shape:
            raise RequestError(
                f"the target's layer {layer.name} has shape {tuple(matrix.shape)}, expected {layer.matrix_shape}"
            )


def _rowwise_dot(a_BTW: Tensor, b_BTW: Tensor) -> Tensor:
    """Inner product of each sequence's entries, accumulated in float32; [B]."""
    return torch.linalg.vecdot(a_BTW.flatten(1).float(), b_BTW.flatten(1).float())
