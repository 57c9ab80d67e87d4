"""Whose gradients, of which objective: the settings of every pass over a model."""

from dataclasses import dataclass, field

from gradstore.engine.gradients.objectives import Objective, objective
from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSpec:
    """Which layers' gradients of which objective, and how they are computed. RequestError for settings that clash."""

    objective: Objective = field(default_factory=lambda: objective("gradalign"))
    modules: tuple[str, ...] | None = None
    """Regular expressions choosing the layers; None: LoRA matrices if there are any, else all."""
    head_only: bool = False
    """Head mode: the output layer's gradient alone, from the forward pass (LESSER's feature)."""
    embeddings: bool = False
    """The input embedding too, where it is a lookup and nothing else."""
    vectors: bool = True
    """Norm weights and biases too, where the whole model trains."""
    token_budget: int | None = None
    """Tokens of one micro-batch, padding included; None: as memory allows (budget.py)."""
    share_prompts: bool = True
    """Compute a prompt once for its rollouts where the model allows it exactly and it spares work."""

    def __post_init__(self) -> None:
        if self.head_only and (self.modules or self.embeddings):
            raise RequestError("head_only sketches the output layer alone: leave `modules` and `embeddings` out")
        if self.token_budget is not None and self.token_budget < 1:
            raise RequestError(f"token budget is {self.token_budget}, expected at least 1")
