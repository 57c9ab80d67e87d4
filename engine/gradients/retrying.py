"""Micro-batches that grow no larger than memory lets them: after an out-of-memory error a pass starts again with half.

A failed backward has added a part of its gradients already, so that nothing of the pass is kept: what it adds to is
reset and all its groups are run again. Micro-batches come longest first, which is where it happens if it does, and the
smaller size stays for every later pass of the model.
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
"""How torch's allocators say it where the error is a plain RuntimeError."""

_MOST: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()
"""Tokens of a micro-batch that each model was found to have memory for, without and with its layers' inputs kept."""


class DoesNotFit(Exception):  # noqa: N818
    """There was not enough memory for a micro-batch."""

    def __init__(self, batch: MicroBatch) -> None:
        super().__init__(batch.n_tokens, len(batch.problem_B), int(batch.problem_B[0]))


@contextmanager
def noticing(batch: MicroBatch) -> Iterator[None]:
    """Raises DoesNotFit for an out-of-memory error of the block; others pass."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(batch) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def release() -> None:
    """Gives what a failed attempt held back to the device; called when its error is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TokenBudget:
    """Tokens of a model's micro-batches: as given, else as memory allows; less after an out-of-memory error."""

    def __init__(self, model: nn.Module, given: int | None) -> None:
        self._model, self._given = model, given
        self._derived: dict[bool, int] = {}

    def tokens(self, inputs_kept: bool = False) -> int:
        """Tokens of a micro-batch, padding included; inputs_kept: of one that gives weight gradients."""
        if self._given is None and inputs_kept not in self._derived:
            self._derived[inputs_kept] = micro_batch_tokens(self._model, inputs_kept=inputs_kept)
        tokens = self._derived[inputs_kept] if self._given is None else self._given
        return min(tokens, _MOST.get(self._model, {}).get(inputs_kept, tokens))

    def fitting(self, attempt: Callable[[int], T], groups: Sequence[Group], *, inputs_kept: bool = False) -> T:
        """What an attempt at a pass over the groups returns, given the tokens of its micro-batches.

        attempt: runs each micro-batch under `noticing`; called again, it forgets what it did before. RequestError
        naming the problem where a single response does not fit, and for a model sharded by FSDP2, whose other ranks
        wait in the middle of the pass.
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
        """Half of the micro-batch that failed; called when the error, which held its tensors, is gone."""
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
