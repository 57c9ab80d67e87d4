"""Watch what enters a model's linear layers and what gradient comes back, without forming any weight gradient.

Parameters are frozen while a model is observed, dropout is off, and the lowest observed layer's output is made a leaf,
so that nothing below it is back-propagated. Everything is undone at the end: the model may be a live trainer's policy.

Dimension letters: B sequences, T tokens, I and O a layer's inputs and outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.gradients.layers import Layer
from gradstore.errors import RequestError


class Observer(Protocol):
    """What is done with each layer's inputs and output gradients."""

    def on_input(self, layer: int, x_BTI: Tensor) -> Any:
        """Called in the forward with the layer's number and detached inputs; what it returns comes back with the
        gradient. Keep as little as possible: it lives until then."""

    def on_gradient(self, layer: int, kept: Any, grad_BTO: Tensor, problem_B: Tensor) -> None:
        """Called in the backward with the gradient of the layer's outputs and the problem of each sequence."""

    def reset(self) -> None:
        """Forget all that was added: the groups are run again from the first."""


class Mutable:
    """An observer that can be told not to look: a rank that has run its groups keeps step with the others."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.on = True

    def on_input(self, layer: int, x_BTI: Tensor) -> Any:
        return self._observer.on_input(layer, x_BTI) if self.on else None

    def on_gradient(self, layer: int, kept: Any, grad_BTO: Tensor, problem_B: Tensor) -> None:
        if self.on:
            self._observer.on_gradient(layer, kept, grad_BTO, problem_B)

    def reset(self) -> None:
        self._observer.reset()


class Observation:
    """The hooks of one observation; `of` says whose sequences the coming forward holds."""

    def __init__(self, layers: Sequence[Layer], observer: Observer) -> None:
        self._names = [layer.name for layer in layers]
        self._observer = observer
        self._handles = [
            layer.module.register_forward_hook(partial(self._forward, number)) for number, layer in enumerate(layers)
        ]
        self._problem_B: Tensor | None = None

    def of(self, problem_B: Tensor) -> None:
        """The forwards from here on hold one sequence for each entry, belonging to that problem."""
        self._problem_B = problem_B

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _forward(self, layer: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled() or self._problem_B is None:
            return
        x_BTI, problem_B = inputs[0].detach(), self._problem_B
        if x_BTI.ndim != 3 or len(x_BTI) != len(problem_B):
            raise RequestError(
                f"layer {self._names[layer]} sees inputs of shape {tuple(x_BTI.shape)} instead of one row per token of "
                f"{len(problem_B)} sequences; leave it out with `modules`"
            )
        kept = self._observer.on_input(layer, x_BTI)
        if not output.requires_grad:
            output.requires_grad_(True)

        def backward(grad_BTO: Tensor) -> None:
            self._observer.on_gradient(layer, kept, grad_BTO, problem_B)

        output.register_hook(backward)


@contextmanager
def observed(model: nn.Module, layers: Sequence[Layer], observer: Observer) -> Iterator[Observation]:
    """Hooks the layers for the duration; the model is left as it was found, also after an error."""
    with frozen(model), torch.enable_grad():
        observation = Observation(layers, observer)
        try:
            yield observation
        finally:
            observation.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter requiring a gradient, for the duration."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
