"""A group: the rollouts of one problem at one step, as token ids. It is the input of all computations in the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore.errors import RequestError

ROUNDING = 1e-12
"""A float64 sum of at most this size, relative to its terms, counts as rounding error."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rollouts of one problem.

    Raises RequestError if created without rollouts, with a non-finite reward, or with counts that disagree.
    """

    problem_id: str
    prompt_ids: np.ndarray
    """Token ids of the prompt, int64 [prompt tokens], at least one."""
    responses: Sequence[np.ndarray]
    """Token ids of each response, int64 [response tokens]; an empty response counts only in the baseline. With tools or
    several turns it is everything after the prompt, as the model saw it: see `masks`."""
    rewards: np.ndarray
    """One finite reward per response, float64 [responses]."""
    logprobs: Sequence[np.ndarray] | None = None
    """Behaviour log-probability of each response token, float32 [response tokens] each; None if not recorded."""
    reference_logprobs: Sequence[np.ndarray] | None = None
    """The same under a reference policy, for objectives with a KL term; None if unknown."""
    masks: Sequence[np.ndarray] | None = None
    """Which tokens of each response the policy wrote, bool [response tokens] each. It reads the others (tools, users,
    the environment) and is not trained on them. None: it wrote all."""
    solution: bool = False
    """Whether the one response is the problem's reference solution (solutions.py): then the objective is its mean token
    log-likelihood, whatever the rewards."""

    def __post_init__(self) -> None:
        name = f"problem {self.problem_id!r}"
        if not len(self.responses):
            raise RequestError(f"{name}: an empty group, expected at least one rollout")
        if not len(self.prompt_ids):
            raise RequestError(f"{name}: the prompt has no tokens")
        if len(self.rewards) != len(self.responses):
            raise RequestError(f"{name}: {len(self.responses)} responses but {len(self.rewards)} rewards")
        if self.solution and (len(self.responses) != 1 or not len(self.responses[0])):
            raise RequestError(f"{name}: a group of a solution has one response, which has tokens")
        if not np.isfinite(self.rewards).all():
            j = int(np.flatnonzero(~np.isfinite(self.rewards))[0])
            raise RequestError(f"{name}: reward of rollout {j} is {self.rewards[j]}, expected a finite number")
        for kind, given in (
            ("log-probabilities", self.logprobs),
            ("reference log-probabilities", self.reference_logprobs),
            ("mask values", self.masks),
        ):
            if given is None:
                continue
            if len(given) != len(self.responses):
                raise RequestError(f"{name}: {len(self.responses)} responses but {len(given)} lists of {kind}")
            for j, (response, values) in enumerate(zip(self.responses, given, strict=True)):
                if len(response) != len(values):
                    raise RequestError(f"{name}: rollout {j} has {len(response)} tokens but {len(values)} {kind}")

    @property
    def pass_rate(self) -> float:
        """Mean reward if all rewards are in [0, 1]; otherwise the share of rewards above 0. NaN for a solution."""
        if self.solution:
            return float("nan")
        rewards = self.rewards
        if rewards.min() >= 0 and rewards.max() <= 1:
            return float(rewards.mean())
        return float((rewards > 0).mean())

    @property
    def has_signal(self) -> bool:
        """False if all rewards are equal up to rounding: then all advantages, and so the gradient, are zero."""
        return self.solution or differ(self.rewards)

    @property
    def n_written(self) -> np.ndarray:
        """Tokens of each response that the policy wrote, int64 [responses]: the lengths that objectives divide by."""
        if self.masks is None:
            return np.array([len(response) for response in self.responses], dtype=np.int64)
        return np.array([np.count_nonzero(mask) for mask in self.masks], dtype=np.int64)

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest sequence, prompt plus response: the width of the padded group."""
        return len(self.prompt_ids) + max(len(response) for response in self.responses)


def differ(rewards_G: np.ndarray) -> bool:
    """Whether float64 rewards differ by more than rounding (such as 0.1 + 0.2 and 0.3), at any scale."""
    return bool(np.ptp(rewards_G) > ROUNDING * np.abs(rewards_G).max())


def joined(groups: Sequence[Group]) -> Group:
    """Several groups of one problem joined into one, with one baseline; log-probabilities only if all have them."""
    if len(groups) == 1:
        return groups[0]

    def masks_of(group: Group) -> Sequence[np.ndarray]:
        return group.masks or [np.ones(len(response), dtype=bool) for response in group.responses]

    def together(given: list[Sequence[np.ndarray] | None]) -> list[np.ndarray] | None:
        known = [own for own in given if own is not None]
        return [tokens for own in known for tokens in own] if len(known) == len(given) else None

    return Group(
        groups[0].problem_id,
        groups[0].prompt_ids,
        [response for group in groups for response in group.responses],
        np.concatenate([group.rewards for group in groups]),
        together([group.logprobs for group in groups]),
        together([group.reference_logprobs for group in groups]),
        None if all(group.masks is None for group in groups) else [mask for one in groups for mask in masks_of(one)],
    )
