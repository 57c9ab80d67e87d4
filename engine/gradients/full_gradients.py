"""Full gradients of the observed layers, for computations on every entry: norms, elementwise transforms.

Cost: a plain backward with weight gradients, 6 I O FLOPs per token of a layer I -> O. Memory: one float32 matrix per
layer, for any number of groups. Computations on one layer at a time use blocks of layers whose matrices fit into
memory (`blocks`). The backward pass ends at a block's lowest layer. So B blocks cost (2 + (B + 1) + 2) I O FLOPs
instead of 6 for the first layer, and in total less than B times as much.

Dimension letters: B sequences, T tokens, N tokens of all sequences, I and O a layer's inputs and outputs.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from gradstore.engine.gradients.budget import formed_bytes
from gradstore.engine.gradients.experts import by_expert
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.passes import OnWeights
from gradstore.engine.gradients.sharding import largest
from gradstore.engine.rollouts.group import Group


def blocks(gradients: GradientPass) -> list[tuple[slice, GradientPass]]:
    """Consecutive blocks of layers whose float32 matrices fit into memory, each with a pass that observes it alone."""
    limit, starts, held = formed_bytes(gradients.model), [0], 0
    for place, layer in enumerate(gradients.layers):
        size = 4 * math.prod(layer.matrix_shape)
        if held and held + size > limit:
            starts.append(place)
            held = 0
        held += size
    cuts = [slice(*pair) for pair in pairwise([*starts, len(gradients.layers)])]
    return [(cut, gradients.of_layers(gradients.layers[cut])) for cut in cuts]


def formed(
    gradients: GradientPass,
    groups: Sequence[Group],
    buffers: list[Tensor] | None = None,
    on_weights: OnWeights | None = None,
) -> tuple[list[Tensor], int]:
    """The groups' summed gradient, float32 [O, I] per layer ([E, O, I] of fused experts), and the tokens run.

    buffers: matrices to write to; None: new ones.
    """
    if buffers is None:
        buffers = [torch.empty(layer.matrix_shape, device=gradients.device) for layer in gradients.layers]
    return buffers, gradients.run(groups, _Sum(buffers), on_weights, inputs_kept=True)


def problem_gradients(
    gradients: GradientPass, groups: Sequence[Group], on_weights: OnWeights | None = None
) -> Iterator[tuple[list[Tensor], int]]:
    """Each group's own gradient and its tokens, one group at a time; the next group overwrites the matrices.

    Under FSDP2 a rank with fewer groups keeps step with the others.
    """
    buffers = None
    n_idle = largest(gradients.model, len(groups)) - len(groups)
    for row, group in enumerate(groups):
        told = None if on_weights is None else partial(_of_row, on_weights, row)
        buffers, n_tokens = formed(gradients, [group], buffers, told)
        yield buffers, n_tokens
    for _ in range(n_idle):
        formed(gradients, [], buffers)


def _of_row(on_weights: OnWeights, row: int, problem_B: Tensor, before_BN: Tensor, after_BN: Tensor) -> None:
    on_weights(problem_B + row, before_BN, after_BN)


class _Sum:
    """Adds every token's g x^T to one matrix per layer."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self._matrices = matrices

    def reset(self) -> None:
        for matrix in self._matrices:
            matrix.zero_()

    def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return x_BTI, expert_BT

    def on_gradient(self, layer: int, kept: tuple[Tensor, Tensor | None], grad_BTO: Tensor, problem_B: Tensor) -> None:
        grads_NO, inputs_NI, expert_BT = grad_BTO.flatten(0, 1), kept[0].flatten(0, 1), kept[1]
        if expert_BT is None:
            _add_product(self._matrices[layer], grads_NO, inputs_NI)
            return
        if inputs_NI.shape[1] == 1:  # an embedding
            rows_NO1 = (grads_NO * inputs_NI).float()[..., None]
            self._matrices[layer].index_add_(0, expert_BT.flatten(), rows_NO1)
            return
        order_N, ends_E = by_expert(expert_BT.flatten(), len(self._matrices[layer]))
        start = 0
        for matrix_OI, end in zip(self._matrices[layer], ends_E.tolist(), strict=True):
            rows = order_N[start:end]
            _add_product(matrix_OI, grads_NO[rows], inputs_NI[rows])
            start = end


def _add_product(matrix_OI: Tensor, grads_NO: Tensor, inputs_NI: Tensor) -> None:
    if grads_NO.dtype == torch.float32:
        matrix_OI.addmm_(grads_NO.T, inputs_NI)
    else:  # each micro-batch's product accumulates in float32 and is rounded once; the sum is float32
        matrix_OI.add_(grads_NO.T @ inputs_NI)
