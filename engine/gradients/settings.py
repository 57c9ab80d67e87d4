"""Settings of every gradient pass over a model: layers, objective and micro-batches."""

import re
from dataclasses import dataclass, field

from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.errors import RequestError, check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSpec:
    """The layers and the objective of a gradient pass, and how it runs. RequestError for settings that conflict."""

    objective: Objective = field(default_factory=lambda: objective("gradalign"))
    modules: tuple[str, ...] | None = None
    """Regular expressions that select the layers; None: LoRA matrices if there are any, else all layers."""
    head_only: bool = False
    """Head mode: only the output layer's gradient, from the forward pass (LESSER's feature)."""
    embeddings: bool = False
    """Include the input embedding; it must be a plain lookup."""
    vectors: bool = True
    """Include norm weights and biases, if the whole model trains."""
    token_budget: int | None = None
    """Tokens of one micro-batch, padding included; None: as memory allows (budget.py)."""
    share_prompts: bool = True
    """Compute a prompt once for its rollouts, if this is exact for the model and saves work."""

    def __post_init__(self) -> None:
        if self.head_only and (self.modules or self.embeddings):
            raise RequestError("head_only sketches the output layer alone: leave `modules` and `embeddings` out")
        for pattern in self.modules or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise RequestError(f"modules {pattern!r}: not a regular expression: {error}") from None
        if self.token_budget is not None:
            check_number("token budget", self.token_budget, least=1)
