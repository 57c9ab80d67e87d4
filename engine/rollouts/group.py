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

    Each rollout gives one response, or several outputs (`rollout_of`): an agent may go on from a summary of its
    context, as a new prompt. Outputs of one rollout share its reward and advantage; each is a sequence of the loss.

    Raises RequestError if created without rollouts, with a non-finite reward, or with counts that disagree.
    """

    problem_id: str
    prompt_ids: np.ndarray
    """Token ids of the prompt, int64 [prompt tokens], at least one."""
    responses: Sequence[np.ndarray]
    """Token ids of each response, int64 [response tokens]; an empty response counts only in the baseline. With tools or
    several turns it is everything after the prompt, as the model saw it: see `masks`."""
    rewards: np.ndarray
    """One finite reward per rollout, float64 [rollouts]."""
    logprobs: Sequence[np.ndarray] | None = None
    """Behaviour log-probability of each response token, float32 [response tokens] each; None if not recorded."""
    reference_logprobs: Sequence[np.ndarray] | None = None
    """The same under a reference policy, for objectives with a KL term; None if unknown."""
    masks: Sequence[np.ndarray] | None = None
    """Which tokens of each response the policy wrote, bool [response tokens] each. It reads the others (tools, users,
    the environment) and is not trained on them. None: it wrote all."""
    prompts: Sequence[np.ndarray] | None = None
    """Token ids of each response's own prompt, int64 [prompt tokens] each, at least one; None: `prompt_ids` for all."""
    rollout_of: np.ndarray | None = None
    """The rollout that each response is an output of, as its position in `rewards`, int64 [responses]; every rollout
    has one or more. None: each response is a rollout."""
    solution: bool = False
    """Whether the one response is the problem's reference solution (solutions.py): then the objective is its mean token
    log-likelihood, whatever the rewards."""

    def __post_init__(self) -> None:
        name = f"problem {self.problem_id!r}"
        if not len(self.responses):
            raise RequestError(f"{name}: an empty group, expected at least one rollout")
        if not len(self.prompt_ids):
            raise RequestError(f"{name}: the prompt has no tokens")
        if self.rollout_of is not None:
            _check_outputs(name, self.rollout_of, len(self.responses), len(self.rewards))
        elif len(self.rewards) != len(self.responses):
            raise RequestError(f"{name}: {len(self.responses)} responses but {len(self.rewards)} rewards")
        if self.prompts is not None:
            if len(self.prompts) != len(self.responses):
                raise RequestError(f"{name}: {len(self.responses)} responses but {len(self.prompts)} prompts")
            if not all(len(prompt) for prompt in self.prompts):
                raise RequestError(f"{name}: the prompt of a response has no tokens")
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
                    raise RequestError(f"{name}: response {j} has {len(response)} tokens but {len(values)} {kind}")
        for j, mask in enumerate(self.masks or ()):
            if mask.dtype != bool:
                raise RequestError(f"{name}: the mask of response {j} has dtype {mask.dtype}, expected bool")

    @property
    def n_rollouts(self) -> int:
        """Number of rollouts."""
        return len(self.rewards)

    @property
    def rollouts(self) -> np.ndarray:
        """The rollout of each response, int64 [responses]."""
        return np.arange(len(self.responses)) if self.rollout_of is None else self.rollout_of

    def prompt_of(self, j: int) -> np.ndarray:
        """Token ids of the prompt of response j."""
        return self.prompt_ids if self.prompts is None else self.prompts[j]

    def part(self, rollouts: slice) -> "Group":
        """The group of these rollouts alone, with all their outputs."""
        kept = np.arange(self.n_rollouts)[rollouts]
        places = np.flatnonzero(np.isin(self.rollouts, kept)).tolist()

        def of(values: Sequence[np.ndarray] | None) -> list[np.ndarray] | None:
            return None if values is None else [values[place] for place in places]

        return Group(
            self.problem_id,
            self.prompt_ids,
            [self.responses[place] for place in places],
            self.rewards[rollouts],
            of(self.logprobs),
            of(self.reference_logprobs),
            of(self.masks),
            of(self.prompts),
            None if self.rollout_of is None else np.searchsorted(kept, self.rollout_of[places]),
        )

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
        return self.solution or bool(differ(self.rewards))

    @property
    def n_written(self) -> np.ndarray:
        """Tokens of each response that the policy wrote, int64 [responses]: the lengths that objectives divide by."""
        if self.masks is None:
            return np.array([len(response) for response in self.responses], dtype=np.int64)
        return np.array([np.count_nonzero(mask) for mask in self.masks], dtype=np.int64)

    def written(self, j: int, values: np.ndarray) -> np.ndarray:
        """The values, one per token of response j, at the tokens that the policy wrote."""
        return values if self.masks is None else values[self.masks[j]]

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest sequence, prompt plus response: the width of the padded group."""
        return max(len(self.prompt_of(j)) + len(response) for j, response in enumerate(self.responses))

    @property
    def n_written_of_rollouts(self) -> np.ndarray:
        """Tokens of each rollout that the policy wrote, over all its outputs, int64 [rollouts]."""
        if self.rollout_of is None:
            return self.n_written
        return np.bincount(self.rollout_of, self.n_written, self.n_rollouts).astype(np.int64)


def _check_outputs(name: str, rollout_of: np.ndarray, n_responses: int, n_rollouts: int) -> None:
    if rollout_of.shape != (n_responses,) or rollout_of.dtype.kind not in "iu":
        raise RequestError(
            f"{name}: rollout_of has shape {rollout_of.shape} and dtype {rollout_of.dtype}, expected "
            f"integers for {n_responses} responses"
        )
    if not np.array_equal(np.unique(rollout_of), np.arange(n_rollouts)):
        raise RequestError(
            f"{name}: rollout_of names rollouts {np.unique(rollout_of).tolist()}, expected each of the "
            f"{n_rollouts} that have a reward"
        )


def differ(rewards_G: np.ndarray) -> np.bool_ | np.ndarray:
    """Whether float64 rewards differ by more than rounding (such as 0.1 + 0.2 and 0.3), at any scale.

    Of one group [G], or of each of several, bool [P] for [P, G].
    """
    found: np.bool_ | np.ndarray = np.ptp(rewards_G, axis=-1) > ROUNDING * np.abs(rewards_G).max(axis=-1)
    return found


def joined(groups: Sequence[Group]) -> Group:
    """Several groups of one problem joined into one, with one baseline; log-probabilities only if all have them."""
    if len(groups) == 1:
        return groups[0]

    def masks_of(group: Group) -> Sequence[np.ndarray]:
        return group.masks or [np.ones(len(response), dtype=bool) for response in group.responses]

    starts = np.cumsum([0, *(group.n_rollouts for group in groups)])

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
        None
        if all(group.prompts is None for group in groups)
        else [group.prompt_of(j) for group in groups for j in range(len(group.responses))],
        None
        if all(group.rollout_of is None for group in groups)
        else np.concatenate([group.rollouts + start for group, start in zip(groups, starts, strict=False)]),
    )
