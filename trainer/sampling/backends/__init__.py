"""Sampling back ends: one small interface, one module per inference library.

A back end turns prompts into sampled responses. It also returns the log-probability of every sampled token under the
policy itself (temperature 1, no truncation), whatever the sampling temperature. Importance weights need this.
"""

import hashlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from gradstore.errors import GradstoreError, check_known


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One sampled response."""

    token_ids: np.ndarray
    """int64 [T], with the end-of-sequence token when the model wrote one."""
    logprobs: np.ndarray
    """Log-probability of each token under the policy at temperature 1, float32 [T]."""
    finish_reason: Literal["stop", "length"]
    """"stop": the model ended the response; "length": the limit of new tokens did."""


class PromptError(Exception):
    """A prompt for which a back end has no responses; `rollout` names its problem."""

    def __init__(self, prompt: int, error: GradstoreError) -> None:
        """prompt: its place in the call of `generate`. error: what was wrong."""
        super().__init__(prompt, error)
        self.prompt, self.error = prompt, error


class Backend(Protocol):
    """Samples responses from one policy."""

    tokenizer: Any
    """The policy's transformers tokenizer."""
    context: int | None
    """Maximum tokens of a prompt plus its response; None when the model sets no limit."""

    def generate(
        self, prompts: list[list[int]], n: int, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[list[Response]]:
        """Sample n responses per prompt, in the prompts' order; the same call returns the same responses.

        prompts: token ids, at least one per prompt. temperature: 0 always takes the most probable token.
        PromptError for an answer of a server that cannot be used.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Settings that affect responses besides the call's arguments (library, weights, dtype), JSON-able.

        They are stored with the rollouts.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Arguments of one `generate`."""

    prompts: list[list[int]]
    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    name: str = ""
    """For messages: `problems 'a' to 'b'`."""

    def of(self, backend: Backend) -> list[list[Response]]:
        """The responses of this back end."""
        return backend.generate(
            self.prompts,
            self.n,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


@runtime_checkable
class ManyAtOnce(Protocol):
    """A back end that answers several calls at the same time."""

    def generate_each(self, calls: Iterable[Call]) -> Iterator[list[list[Response]]]:
        """The responses of each call, in the calls' order; those of a call are as from `generate`."""
        ...


def generate_each(backend: Backend, calls: Iterable[Call]) -> Iterator[list[list[Response]]]:
    """The responses of each call, in the calls' order, by any back end."""
    return backend.generate_each(calls) if isinstance(backend, ManyAtOnce) else (call.of(backend) for call in calls)


BACKENDS = {
    "transformers": ("gradstore.trainer.sampling.backends.hugging_face", "TransformersBackend"),
    "vllm": ("gradstore.trainer.sampling.backends.vllm", "VllmBackend"),
    "server": ("gradstore.trainer.sampling.backends.server", "ServerBackend"),
}


def load_backend(name: str, model: str | Path, **options: Any) -> Backend:
    """Create the back end `name` with a model's weights loaded; options are passed to its `load`.

    Raises RequestError for an unknown name, a library that is not installed, or a model that cannot be loaded.
    """
    check_known("back end", name, BACKENDS)
    module, backend = BACKENDS[name]
    return getattr(importlib.import_module(module), backend).load(model, **options)


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a response, from the model's generation config and the tokenizer."""
    ids = getattr(generation_config, "eos_token_id", None)
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
        listed.append(tokenizer.eos_token_id)
    return listed


def derived_seed(seed: int, *parts: int) -> int:
    """A 63-bit seed for a part of a run, unrelated to the seed of any other part.

    Do not use seed + part instead: neighbouring seeds can share random streams. For example, vLLM samples rollout j of
    a request with seed + j.
    """
    text = ",".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
