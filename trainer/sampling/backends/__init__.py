"""What samples the responses: one small interface, one module per inference library.

A back end turns prompts into sampled responses with the log-probability of every sampled token under the policy as it
is (temperature 1, no truncation), whatever temperature they were sampled at: what importance weights need.
"""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from gradstore.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """One sampled response."""

    token_ids: np.ndarray
    """int64 [T], with the end-of-sequence token when the model wrote one."""
    logprobs: np.ndarray
    """Log-probability of each token under the policy at temperature 1, float32 [T]."""
    finish_reason: Literal["stop", "length"]
    """"stop": the model ended the response; "length": the limit of new tokens did."""


class Backend(Protocol):
    """Samples responses from one policy."""

    tokenizer: Any
    """The policy's transformers tokenizer."""
    context: int | None
    """The most tokens a prompt and its response may have together; None when the model sets no limit."""

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[list[Response]]:
        """n responses to each prompt, in the prompts' order; the same call gives the same responses again.

        prompts: token ids, each with at least one. temperature 0 takes the most probable token always.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """What decides the responses beside the call: library, weights, dtype. JSON-able; kept with the rollouts."""
        ...


BACKENDS = {
    "transformers": ("gradstore.trainer.sampling.backends.hugging_face", "TransformersBackend"),
    "vllm": ("gradstore.trainer.sampling.backends.vllm", "VllmBackend"),
}


def load_backend(name: str, model: str | Path, **options: Any) -> Backend:
    """The back end of this name with a model's weights loaded; options are those of its `load`.

    Raises RequestError for an unknown name, a library that is not installed, a model that cannot be loaded.
    """
    if name not in BACKENDS:
        raise RequestError(f"unknown back end {name!r}, expected {' or '.join(BACKENDS)}")
    module, backend = BACKENDS[name]
    return getattr(importlib.import_module(module), backend).load(model, **options)


def end_tokens(generation_config: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a response: those of the model's generation config and the tokenizer's."""
    ids = getattr(generation_config, "eos_token_id", None)
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in listed:
        listed.append(tokenizer.eos_token_id)
    return listed


def derived_seed(seed: int, *parts: int) -> int:
    """A seed of 63 bits for a part of a run, unrelated to that of any other part.

    Never seed + part: the streams of neighbouring seeds can be shared, as between vLLM's requests, whose rollout j is
    sampled with seed + j.
    """
    text = ",".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
