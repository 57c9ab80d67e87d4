"""Policy of the embedded trainer for selection rounds: one model in memory that rolls out, sketches and probes.

Every result depends only on the current weights and the arguments. Nothing uses a global random generator, so a resumed
run needs no random state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from gradstore.engine.gradients.budget import give_back
from gradstore.engine.gradients.logprobs import Reference
from gradstore.engine.gradients.objectives import Objective
from gradstore.engine.probing.aimed import AimedProbe
from gradstore.engine.probing.batch import ProbeBatch
from gradstore.engine.probing.calibration import Calibration
from gradstore.engine.probing.probe import Probe
from gradstore.engine.rollouts.group import Group
from gradstore.engine.rollouts.solutions import solution_groups
from gradstore.engine.rollouts.tokens import text_of
from gradstore.engine.sketches.bases import SketcherFiles, fit_sketcher, sketcher_from
from gradstore.engine.sketches.from_training_pass import sketched_and_summed
from gradstore.engine.sketches.rollout_sketches import RolloutSketches, sketch_rollouts
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchBatch, SketchSpec
from gradstore.errors import RequestError
from gradstore.trainer.local.settings import Sampling
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from gradstore.trainer.sampling.overlong import penalties
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import checked_prompts

CHECKED = 2
"""Validation problems used to choose a probe's step size and to check it against exact dots. A step size from the
previous round is checked on the first of them only."""


class LocalPolicy:
    """A transformers model, its tokenizer and a reward; implements `gradstore.trainer.round.policy.Policy`."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        reward: Reward,
        sampling: Sampling | None = None,
        *,
        token_budget: int | None = None,
        reference: Reference | None = None,
    ) -> None:
        """token_budget: tokens per micro-batch for gradients, padding included; None: as many as memory allows.
        reference: reference model that adds its log-probabilities to all rollouts, for objectives with a KL term."""
        self.model, self.tokenizer, self.reward = model, tokenizer, reward
        self.sampling, self.token_budget, self.reference = sampling or Sampling(), token_budget, reference
        self.backend = TransformersBackend(model, tokenizer, batch_tokens=self.sampling.batch_tokens)
        self.step = 0
        """Training steps done; the training loop must update it."""
        self._sketcher: Sketcher | None = None
        self._aimed: tuple[int, AimedProbe] | None = None
        """(step, probe along the validation groups of the last `aim`)."""

    def prompts(self, problems: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The problems' prompts as token ids; RequestError for one that leaves no room for its response."""
        most, arguments = self.sampling.max_new_tokens, self.sampling.template_kwargs
        return checked_prompts(problems, self.tokenizer, self.backend.context, most, arguments)

    def roll_out(self, problems: Sequence[Mapping[str, Any]], n: int, *, seed: int) -> list[Group]:
        sampling = self.sampling
        prompts = self.prompts(problems)
        found = self.backend.generate(
            prompts,
            n,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
        )
        give_back(self.model)
        ids = [response.token_ids for responses in found for response in responses]
        texts = [text_of(self.tokenizer, own.tolist(), skip_special_tokens=True) for own in ids]
        rewards = np.array(self.reward.many([(problems[k // n], text, k % n) for k, text in enumerate(texts)]))
        rewards = rewards + penalties(
            [len(own) for own in ids], sampling.max_new_tokens, sampling.overlong_buffer, sampling.overlong_penalty
        )
        groups = [
            Group(
                problem["id"],
                np.array(prompts[i], np.int64),
                [response.token_ids for response in found[i]],
                rewards[i * n : (i + 1) * n].copy(),
                [response.logprobs for response in found[i]],
            )
            for i, problem in enumerate(problems)
        ]
        return groups if self.reference is None else self.reference.of(groups)

    def solutions(self, problems: Sequence[Mapping[str, Any]]) -> list[Group]:
        return solution_groups(problems, self.tokenizer, template_kwargs=self.sampling.template_kwargs)

    def fit(self, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()) -> SketcherFiles:
        self._sketcher, files = fit_sketcher(self.model, self._checked(spec), groups, benchmark)
        return files

    def use(self, fingerprint: dict, attachments: Mapping[str, bytes]) -> None:
        spec = self._checked(SketchSpec.of(fingerprint))
        self._sketcher = sketcher_from(self.model, fingerprint, attachments, spec)

    def sketch(self, groups: Sequence[Group]) -> SketchBatch:
        return self.sketcher.sketch(groups)

    def sketch_rollouts(self, groups: Sequence[Group], objective: Objective | None = None) -> RolloutSketches:
        return sketch_rollouts(self.sketcher, groups, objective)

    def aim(self, groups: Sequence[Group]) -> SketchBatch:
        self._aimed = None  # free the old direction before making a new one
        batch, sums = sketched_and_summed(self.sketcher, groups)
        self._aimed = self.step, AimedProbe(groups, sums, len(groups))
        return batch

    def probe(self, groups: Sequence[Group], like: Calibration | None = None) -> ProbeBatch:
        """Probe groups of the current policy; their known log-probabilities save one of two forward passes.

        The step size is calibrated on the validation groups, so a resumed run uses the same one whichever groups it
        probes first. RequestError if `aim` was not called at this step.
        """
        if self._aimed is None or self._aimed[0] != self.step:
            raise RequestError(f"the policy has no direction to probe along at step {self.step}: call `aim` first")
        make = partial(Probe, self.model, settings=self.objective, n_check=CHECKED, token_budget=self.token_budget)
        probe = self._aimed[1].calibrated(make, self._known_logprobs, like)
        return probe.probe(groups, self._known_logprobs(groups))

    def forget_direction(self) -> None:
        """Free the probe direction, which is as large as the weights; call it after a round, before training."""
        self._aimed = None

    def _checked(self, spec: SketchSpec) -> SketchSpec:
        """The spec with this policy's token budget; RequestError if its KL term needs another reference model."""
        own = None if self.reference is None else self.reference.digest
        if spec.objective.kl_beta and (own is None or spec.objective.reference not in (None, own)):
            raise RequestError(
                f"the sketches have a KL term to the reference {spec.objective.reference or 'of the rollouts'}, the "
                f"policy has {'none' if own is None else own}"
            )
        return replace(spec, token_budget=self.token_budget)

    def _known_logprobs(self, groups: Sequence[Group]) -> list[Sequence[np.ndarray]] | None:
        """Log-probabilities of the groups' rollouts; None if one is missing or the objective's temperature is not 1."""
        known = [group.logprobs for group in groups if group.logprobs is not None]
        return known if self.objective.temperature == 1.0 and len(known) == len(groups) else None

    @property
    def objective(self) -> Objective:
        """The sketcher's objective; probes use it too."""
        return self.sketcher.spec.objective

    @property
    def sketcher(self) -> Sketcher:
        """The sketcher from `fit` or `use`; RequestError before either was called."""
        if self._sketcher is None:
            raise RequestError("the policy has no sketcher yet: call `fit`, or `use` with a store's, first")
        return self._sketcher
