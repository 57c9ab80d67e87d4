"""A feed as prime-rl's `TaskSampler`: the orchestrator's curriculum draws tasks, and tells the sampler of every group.

    curriculum.sampler = FeedSampler(feed, tasks, batch=64)

prime-rl chooses a sampler by its own configuration; until that takes one by path, set it on the orchestrator's
`Curriculum`. A task's `key` is its problem id. Nothing of prime-rl or verifiers is imported.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError
from gradstore.trainer.feed import Feed


class FeedSampler(Iterator[Any]):
    """Has the methods of `prime_rl.orchestrator.curriculum.samplers.TaskSampler`."""

    def __init__(self, feed: Feed, tasks: Sequence[Any], batch: int) -> None:
        """tasks: the environment's, all of them, with distinct keys. batch: groups that are handed to the feed
        together, as one step; prime-rl trains asynchronously, and tells of groups one by one."""
        self._feed, self._batch = feed, batch
        self._tasks = {task.key: task for task in tasks}
        if len(self._tasks) < len(tasks) or None in self._tasks:
            raise RequestError("every task needs a key of its own: it is the problem's id")
        self._waiting: list[Group] = []
        self._step = 0

    def __next__(self) -> Any:
        (name,) = self._feed.draw(1)
        if name not in self._tasks:
            raise RequestError(f"the feed picked problem {name!r}, which is no task of this environment")
        return self._tasks[name]

    def observe(self, group: Sequence[Any]) -> None:
        """Take a finished group of episodes; those with errors and untrained agents have no part in it."""
        found = _group(group)
        if found is None:
            return
        if any(found.problem_id == other.problem_id for other in self._waiting):
            self._hand_over()
        self._waiting.append(found)
        if len(self._waiting) >= self._batch:
            self._hand_over()

    def state_dict(self) -> dict[str, Any]:
        """The feed's state; groups that wait for a full batch are not in it."""
        return {"feed": self._feed.state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._feed.load_state_dict(state_dict["feed"])
        self._step, self._waiting = int(state_dict["step"]), []

    def metrics(self) -> dict[str, float]:
        return {"gradstore/steps_observed": float(self._step)}

    def _hand_over(self) -> None:
        self._feed.observe(self._waiting, self._step)
        self._step, self._waiting = self._step + 1, []


def _group(episodes: Sequence[Any]) -> Group | None:
    """The trainable single-branch traces of a group; None if there are none."""
    prompts, responses, masks, rewards = [], [], [], []
    for episode in episodes:
        for trace in episode.traces if episode.ok else ():
            if trace.has_error or not trace.agent.trainable or len(trace.branches) != 1:
                continue
            tokens = np.array(trace.branches[0].token_ids, dtype=np.int64)
            written = np.array(trace.branches[0].sampled_mask, dtype=bool)
            if not written.any():
                continue
            start = int(written.argmax())  # the prompt ends where the policy begins
            prompts.append(tokens[:start])
            responses.append(tokens[start:])
            masks.append(written[start:])
            rewards.append(float(trace.reward))
    if not rewards or any(not np.array_equal(prompt, prompts[0]) for prompt in prompts):
        return None
    kept = None if all(mask.all() for mask in masks) else masks
    return Group(episodes[0].task.key, prompts[0], responses, np.array(rewards), masks=kept)
