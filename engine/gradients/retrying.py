"""Retry after an out-of-memory error: the pass starts again with micro-batches of half the size.

A failed backward has already added a part of its gradients. So the pass keeps nothing: its sums are reset and all its
groups run again. Micro-batches run longest first, so an error comes early. The smaller size is kept for every later
pass of the model.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gradstore.engine.gradients.budget import give_back, micro_batch_tokens
from gradstore.engine.gradients.microbatch import MicroBatch
from gradstore.engine.gradients.sharding import is_sharded
from gradstore.engine.rollouts.group import Group
from gradstore.errors import RequestError

log = logging.getLogger(__name__)

T = TypeVar("T")

_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory")
"""Out-of-memory messages of torch's allocators that come as a plain RuntimeError."""

_MOST: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()
"""Largest micro-batch in tokens after an out-of-memory error, per model and whether layer inputs are kept."""


class DoesNotFit(Exception):  # noqa: N818
    """There was not enough memory for a micro-batch."""

    def __init__(self, batch: MicroBatch) -> None:
        super().__init__(batch.n_tokens, len(batch.problem_B), int(batch.problem_B[0]))


@contextmanager
def noticing(batch: MicroBatch) -> Iterator[None]:
    """Turn an out-of-memory error in the context into DoesNotFit; other errors pass through."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(batch) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def release() -> None:
    """Return a failed attempt's memory to the device. Call it after its exception, which holds tensors, is dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TokenBudget:
    """Micro-batch size of a model in tokens: as given, else as memory allows; smaller after an out-of-memory error."""

    def __init__(self, model: nn.Module, given: int | None) -> None:
        self._model, self._given = model, given
        self._derived: dict[bool, int] = {}

    def tokens(self, inputs_kept: bool = False) -> int:
        """Tokens of a micro-batch, padding included. inputs_kept: for a pass with weight gradients."""
        if self._given is None and inputs_kept not in self._derived:
            self._derived[inputs_kept] = micro_batch_tokens(self._model, inputs_kept=inputs_kept)
        tokens = self._derived[inputs_kept] if self._given is None else self._given
        return min(tokens, _MOST.get(self._model, {}).get(inputs_kept, tokens))

    def fitting(self, attempt: Callable[[int], T], groups: Sequence[Group], *, inputs_kept: bool = False) -> T:
        """Call `attempt` with a micro-batch size in tokens until memory suffices; returns its result.

        attempt: a pass over the groups that runs each micro-batch under `noticing`. A repeated call must discard the
        results of the call before. RequestError naming the problem if a single response does not fit. RequestError for
        a model sharded by FSDP2: its other ranks wait in the middle of the pass.
        """
        while True:
            tokens = self.tokens(inputs_kept)
            try:
                found = attempt(tokens)
                give_back(self._model)
                return found
            except DoesNotFit as error:
                failed, n_rollouts, problem = error.args
            self._shrink(failed, n_rollouts, groups[problem].problem_id if problem < len(groups) else "", inputs_kept)

    def _shrink(self, failed: int, n_rollouts: int, problem_id: str, inputs_kept: bool) -> None:
        """Halve the size of the failed micro-batch; called after its exception, which held tensors, is dropped."""
        release()
        if is_sharded(self._model):
            raise RequestError(
                f"out of memory in a micro-batch of {failed} tokens on a rank of a sharded model: lower token_budget"
            )
        if n_rollouts == 1:
            raise RequestError(
                f"problem {problem_id!r}: one response and its prompt, {failed} tokens with padding, do not fit into "
                "memory: leave the problem out, cut its responses, or use a smaller dtype or a larger machine"
            )
        tokens = max(1, failed // 2)
        log.warning("out of memory in a micro-batch of %d tokens: from here on they have %d at most", failed, tokens)
        _MOST.setdefault(self._model, {})[inputs_kept] = tokens
