"""Whether the rows of a step are of the weights at hand: digests of weights are compared and kept.

Whether rollouts are of these weights, their recorded log-probabilities say (sketches/effective_sizes.py).
"""

from pathlib import Path

from torch import nn

from gradstore.attachments import keep_weights, read_weights
from gradstore.engine.gradients.models import weights_digest


class SamePolicy:
    """The digest of a model's weights, compared with the one that a store keeps for a step."""

    def __init__(self, model: nn.Module) -> None:
        self.digest = weights_digest(model)

    def warning(self, store: Path, step: int) -> str | None:
        """A sentence if the step's rows were made with other weights. It is said and not refused, because the same
        weights in another precision have another digest."""
        known = read_weights(store, step)
        if known in (None, self.digest):
            return None
        return (
            f"the rows of step {step} were made with other weights ({known}) than the model's ({self.digest}), or in "
            "another precision: their scores do not compare; give another --step, or another store"
        )

    def keep(self, store: Path, step: int) -> None:
        """Keep the digest as that of a step's rows, unless the step has one."""
        keep_weights(store, step, self.digest)
