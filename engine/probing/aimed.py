"""Probe along the mean gradient of a benchmark, made when it is first used.

A round aims at its benchmarks in the pass that sketches them, and may then probe several times or not at all. The sum
of the gradients and the direction made from it are as large as the weights, so only one of them is held.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from gradstore.engine.gradients.directions import Direction
from gradstore.engine.gradients.logprobs import TokenLogprobs
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group


class AimedProbe:
    """Probe along the mean gradient of validation groups; before its first use, the sum of their gradients."""

    def __init__(self, validation: Sequence[Group], sums: dict[str, Tensor], n_problems: int) -> None:
        """validation: groups to calibrate the step on; under FSDP2 this rank's own. sums: their summed gradient over
        all ranks, by parameter name (`summed_gradient`). n_problems: validation problems of all ranks."""
        self._validation, self._sums, self._n_problems = list(validation), sums, n_problems
        self.probe: Probe | None = None
        """The probe; None before its first use."""

    def calibrated(
        self,
        make: Callable[[Direction], Probe],
        known_logprobs: Callable[[Sequence[Group]], TokenLogprobs | None] = lambda groups: None,
        like: Calibration | None = None,
    ) -> Probe:
        """The probe, with its step calibrated on the validation groups: results do not depend on what is probed first.

        make: makes the probe from the direction. known_logprobs: log-probabilities of the groups' rollouts, if known.
        like: calibration of an earlier probe, to start from. RequestError if no validation problem has a signal.
        """
        if self.probe is None:
            self.probe = make(Direction.mean(self._sums, self._n_problems))
            self._sums = {}
        if self.probe.calibration is None:
            self.probe.calibrate(self._validation, known_logprobs(self._validation), like)
            self._validation = []
        return self.probe
