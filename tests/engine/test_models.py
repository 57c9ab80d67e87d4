"""Digests of weights: any size, and the same as those that files keep from before."""

import pytest
import torch
from torch import nn

from gradstore.engine.gradients.models import weights_digest


def _of_size(n: int) -> nn.Module:
    """One weight of n equal entries that takes no memory."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1).expand(n), requires_grad=False)
    return model


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 2**24 - 1, 2**24 + 1, 49_152 * 576, 151_936 * 896, 2**31 + 7])
def test_weights_of_every_size_have_a_digest(n: int) -> None:
    """Float32 places past 2^24 round beyond the end: every real model's embedding is that large."""
    assert weights_digest(_of_size(n)) == weights_digest(_of_size(n)) != weights_digest(_of_size(n + 64))


def test_digests_kept_from_before_stay_valid() -> None:
    model = nn.Linear(40, 50)
    with torch.no_grad():
        model.weight.copy_(torch.arange(2000.0).view(50, 40) / 64)
        model.bias.copy_(torch.arange(50.0))
    assert weights_digest(model) == "11a60647a157fec4"
