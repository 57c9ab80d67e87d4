"""Log-probabilities of the sampled tokens, from the logits at the position before each.

Dimension letters: B sequences, T tokens, N response tokens, W width, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor

from gradstore.engine.gradients.microbatch import MicroBatch


def at_responses(batch: MicroBatch, x_BTW: Tensor) -> Tensor:
    """Entries of x at the positions that predict the response tokens, [B, N, W]; padding repeats the last position."""
    if batch.prompts is not None:
        return x_BTW  # with shared prompts, a continuation holds exactly these positions
    n_BN = batch.first_B[:, None] + torch.arange(batch.targets_BN.shape[1], device=x_BTW.device)
    n_BN = n_BN.clamp(max=x_BTW.shape[1] - 1)
    return x_BTW.gather(1, n_BN[..., None].expand(-1, -1, x_BTW.shape[2]))


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def chosen_logprobs(logits_BNV: Tensor, targets_BN: Tensor, temperature: float) -> Tensor:
    """Log-softmax of logits / temperature at the targets, [B, N], float32 (float64 of such logits); differentiated once."""
    return cast(Tensor, _ChosenLogprobs.apply(logits_BNV, targets_BN, temperature))


class _ChosenLogprobs(torch.autograd.Function):
    """Hand-written to save memory: the exponentials replace the logits and become the gradient p - onehot in place.
    One [B, N, V] array is written three times; autograd would make six arrays.
    """

    @staticmethod
    def forward(ctx: Any, logits_BNV: Tensor, targets_BN: Tensor, temperature: float) -> Tensor:
        wide_BNV = at_least_float32(logits_BNV)
        scaled_BNV = wide_BNV if temperature == 1.0 else wide_BNV / temperature
        peak_BN1 = scaled_BNV.amax(-1, keepdim=True)
        chosen_BN = scaled_BNV.gather(2, targets_BN[..., None])[..., 0]
        exp_BNV = scaled_BNV.sub(peak_BN1).exp_()
        sum_BN = exp_BNV.sum(-1)
        ctx.exp_BNV, ctx.sum_BN, ctx.targets_BN = exp_BNV, sum_BN, targets_BN
        ctx.temperature, ctx.dtype = temperature, logits_BNV.dtype
        return chosen_BN - peak_BN1[..., 0] - sum_BN.log()

    @staticmethod
    def backward(ctx: Any, *grads_BN: Tensor) -> tuple[Tensor, None, None]:
        scale_BN = grads_BN[0] / ctx.temperature
        grad_BNV = ctx.exp_BNV.mul_((-scale_BN / ctx.sum_BN)[..., None])
        ctx.exp_BNV = None
        return grad_BNV.scatter_add_(2, ctx.targets_BN[..., None], scale_BN[..., None]).to(ctx.dtype), None, None
