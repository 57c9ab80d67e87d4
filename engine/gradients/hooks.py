"""Hooks that show the inputs and output gradients of a model's linear layers, without forming any weight gradient.

While a model is observed, its parameters are frozen and dropout is off. The lowest observed layer's output becomes a
leaf, so the backward stops there. Everything is undone at the end: the model may be a live trainer's policy.

A layer is observed in the call of its module; in the call of `linear` inside its module, if that uses the weight
directly (routers); or in the products of an experts module, which then runs the forward of experts.py. Inputs without a
batch dimension get it back if they have one row per token. A norm's weight and a bias are observed only in the
backward, as one row per sequence (vectors.py).

Dimension letters: B sequences, T tokens, K experts chosen for a token, S = T K slots, I and O a layer's inputs and
outputs.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradstore.engine.gradients.experts import lora_a_gradient, lora_b_input, replaced_forward, watched_experts
from gradstore.engine.gradients.layers import Layer
from gradstore.engine.gradients.vectors import Vector, multiplied
from gradstore.errors import RequestError


class Observer(Protocol):
    """Receives each layer's inputs and output gradients."""

    def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> Any:
        """Called in the forward with the layer's number and detached inputs. `on_gradient` receives the return value
        as `kept`; it stays in memory until then, so keep it small. For a vector, called in the backward. expert_BT: for
        a fused weight, the expert of each row; the rows are then slots, one per token and expert chosen for it."""

    def on_gradient(self, layer: int, kept: Any, grad_BTO: Tensor, problem_B: Tensor) -> None:
        """Called in the backward with the gradient of the layer's outputs and the problem of each sequence."""

    def reset(self) -> None:
        """Discard everything added so far: all groups are run again."""


class NoObserver:
    """An observer of no layers."""

    def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> None: ...

    def on_gradient(self, layer: int, kept: Any, grad_BTO: Tensor, problem_B: Tensor) -> None: ...

    def reset(self) -> None: ...


class PausableObserver:
    """An observer that can be switched off, for a rank that has run its groups and only keeps step with the others."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.on = True

    def on_input(self, layer: int, x_BTI: Tensor, expert_BT: Tensor | None = None) -> Any:
        return self._observer.on_input(layer, x_BTI, expert_BT) if self.on else None

    def on_gradient(self, layer: int, kept: Any, grad_BTO: Tensor, problem_B: Tensor) -> None:
        if self.on:
            self._observer.on_gradient(layer, kept, grad_BTO, problem_B)

    def reset(self) -> None:
        self._observer.reset()


class Observation:
    """The hooks of one observation; `of` sets the problems of the coming forward's sequences."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], observer: Observer) -> None:
        self._layers, self._observer = layers, observer
        self._problem_B: Tensor | None = None
        self._grid: torch.Size | None = None
        """Shape (sequences, tokens) of the running forward."""
        self._seen: set[int] = set()
        self._hooks = ExitStack()
        embedding = cast(Any, model).get_input_embeddings()
        self._hooks.callback(embedding.register_forward_pre_hook(self._begin).remove)
        products: dict[nn.Module, dict[str, list[int]]] = {}
        for number, layer in enumerate(layers):
            if layer.slots is not None:
                products.setdefault(layer.slots.experts, {}).setdefault(layer.slots.product, []).append(number)
            elif layer.is_embedding:
                self._hooks.callback(layer.module.register_forward_hook(partial(self._looked_up, number)).remove)
            elif layer.vector is not None:
                hook = partial(self._elementwise, number, layer.vector)
                self._hooks.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
            elif layer.is_called:
                self._hooks.callback(layer.module.register_forward_hook(partial(self._forward, number)).remove)
            else:
                forward = partial(self._inside, number, layer.module.forward)
                self._hooks.enter_context(replaced_forward(layer.module, forward))
        for module, numbers in products.items():
            forward = partial(self._routed, module, module.forward, numbers)
            self._hooks.enter_context(replaced_forward(module, forward))

    def of(self, problem_B: Tensor) -> None:
        """Set the problem of each sequence in the coming forwards."""
        self._problem_B = problem_B

    def remove(self) -> None:
        """Unhooks the layers."""
        self._hooks.close()

    @property
    def _on(self) -> bool:
        return torch.is_grad_enabled() and self._problem_B is not None

    def _begin(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._grid = inputs[0].shape if inputs else None

    def _forward(self, number: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self._on:
            self._watch(number, inputs[0].detach(), output)

    def _looked_up(self, number: int, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Treats a lookup as experts: the token id is the expert, the input 1; the padding id's row has no gradient."""
        if self._on:
            padding = cast(Any, embedding).padding_idx
            x_BT = torch.ones_like(inputs[0]) if padding is None else inputs[0] != padding
            self._watch(number, x_BT[..., None].to(output.dtype), output, inputs[0].flatten())

    def _elementwise(
        self, number: int, vector: Vector, module: nn.Module, given: Any, named: dict[str, Any], output: Tensor
    ) -> None:
        """Shows the observer the gradient of a scale or a shift, summed over the tokens of each sequence."""
        if not self._on:
            return
        problem_B = cast(Tensor, self._problem_B)
        shape = self._rows(self._layers[number], output, len(output)).shape
        held: list[Any] = []  # the module's arguments, until its gradient has arrived
        if vector.acts == "scale":
            held += [tuple(_detached(x) for x in given), {name: _detached(x) for name, x in named.items()}]
        if not output.requires_grad:
            output.requires_grad_(True)

        def backward(grad: Tensor) -> None:
            if vector.acts == "scale":
                grad = grad * multiplied(module, vector, held[0], held[1], grad)
            held.clear()
            sum_B1W = grad.reshape(shape).sum(1, keepdim=True, dtype=torch.float32)
            one_B11 = torch.ones_like(sum_B1W[..., :1])
            x_B1I, grad_B1O = (sum_B1W, one_B11) if vector.acts == "scale" else (one_B11, sum_B1W)
            self._observer.on_gradient(number, self._observer.on_input(number, x_B1I), grad_B1O, problem_B)

        output.register_hook(backward)

    def _inside(self, number: int, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Runs the module's own forward and observes the `linear` calls with its weight."""
        if not self._on:
            return forward(*args, **named)
        with _LinearOf(self._layers[number].weight, partial(self._watch, number)) as calls:
            found = forward(*args, **named)
        if not calls.n:
            layer = self._layers[number]
            if isinstance(layer.module, nn.Linear) and isinstance(found, Tensor):  # another kernel: quantised weights
                self._watch(number, args[0].detach(), found)
                return found
            raise RequestError(
                f"{layer.name} ({type(layer.module).__name__}) does not use its weight in a linear product, so that "
                f"its gradient cannot be seen; {_left_out(layer.name)}"
            )
        return found

    def _routed(
        self, module: nn.Module, forward: Callable[..., Tensor], numbers: dict[str, list[int]], *args: Any, **named: Any
    ) -> Tensor:
        """An observed experts forward. Arguments in order: hidden states, chosen experts and their weights."""
        if not self._on:
            return forward(*args, **named)

        def see(product: str, x_SI: Tensor, expert_S: Tensor, found_SO: Tensor) -> None:
            for number in numbers.get(product, []):
                self._watch(number, x_SI.detach(), found_SO, expert_S)

        return watched_experts(module, see, *args, *named.values())

    def _watch(self, number: int, x: Tensor, output: Tensor, expert_S: Tensor | None = None) -> None:
        """Shows the observer a product's inputs, and its output gradient when that arrives."""
        layer, problem_B = self._layers[number], cast(Tensor, self._problem_B)
        x_BTI, slots = self._rows(layer, x, None if expert_S is None else len(expert_S)), layer.slots
        expert_BS = None if expert_S is None else expert_S.view(x_BTI.shape[:2])
        turned: Callable[[Tensor], Tensor] | None = None
        if slots is not None and slots.factor is not None and slots.other is not None and expert_S is not None:
            other = cast(Tensor, slots.other.weight).detach()
            if slots.factor == "A":
                turned = partial(_of_a, other, expert_S, slots.n_experts)
            else:
                x_BTI = lora_b_input(x_BTI.flatten(0, 1), other, expert_S, slots.n_experts).unflatten(
                    0, x_BTI.shape[:2]
                )
            expert_BS = None
        given = (x_BTI,) if expert_BS is None else (x_BTI, expert_BS)
        kept, grid = self._observer.on_input(number, *given), x_BTI.shape[:2]  # the hook must not keep the inputs alive
        if not output.requires_grad:
            output.requires_grad_(True)

        def backward(grad: Tensor) -> None:
            grad = grad if turned is None else turned(grad)
            scale = 1.0 if slots is None else slots.scaling
            grad_BTO = grad.reshape(*grid, -1)
            self._observer.on_gradient(number, kept, grad_BTO if scale == 1.0 else grad_BTO * scale, problem_B)

        output.register_hook(backward)

    def _rows(self, layer: Layer, x: Tensor, n_slots: int | None) -> Tensor:
        """Inputs with one row per token (or slot, or head) of each sequence; RequestError for other shapes."""
        n, grid = len(cast(Tensor, self._problem_B)), self._grid
        if len(x) == n and (x.ndim == 3 or (x.ndim > 3 and layer.vector is not None)):
            return x.flatten(1, -2)
        flat = grid is not None and len(grid) == 2 and grid[0] == n and x.ndim == 2
        if flat and grid is not None and (len(x) == grid.numel() or (n_slots and len(x) % grid.numel() == 0)):
            return x.reshape(n, -1, x.shape[-1])
        raise RequestError(
            f"layer {layer.name} sees inputs of shape {tuple(x.shape)} instead of one row per token of {n} sequences, "
            f"so that its gradients cannot be told apart; {_left_out(layer.name)}"
        )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _left_out(name: str) -> str:
    """Advice for a layer that cannot be sketched."""
    pattern = rf"^(?!{re.escape(name.removesuffix('.bias'))}(\.bias)?$)"
    return f"leave it out by choosing the others: `modules` (--modules) '{pattern}'"


def _of_a(weight_OC: Tensor, expert_S: Tensor, n_experts: int, grad_SO: Tensor) -> Tensor:
    return lora_a_gradient(grad_SO, weight_OC, expert_S, n_experts)


class _LinearOf(TorchFunctionMode):
    """Shows the inputs and outputs of `torch.nn.functional.linear` with one weight or a dtype cast of it."""

    def __init__(self, weight: Tensor, see: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._copies = [weight]
        self._see = see
        self.n = 0
        """Number of calls seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _CASTS and any(args[0] is copy for copy in self._copies):
            self._copies.append(found)
        if func is torch.nn.functional.linear and any(args[1] is copy for copy in self._copies):
            self.n += 1
            self._see(args[0].detach(), found)
        return found


_CASTS = (Tensor.type, Tensor.to, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half, Tensor.type_as)


@contextmanager
def observed(model: nn.Module, layers: Sequence[Layer], observer: Observer) -> Iterator[Observation]:
    """Hook the layers in the context; the model is restored at its end, also after an error."""
    with frozen(model), torch.enable_grad():
        observation = Observation(model, layers, observer)
        try:
            yield observation
        finally:
            observation.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with all parameters frozen, in the context."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in the context."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
