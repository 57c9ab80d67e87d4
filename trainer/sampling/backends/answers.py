"""What is sent to an inference server and what it must answer: token ids and their log-probabilities, nothing less.

Two dialects. `vllm`: completions of the OpenAI API with vLLM's `return_token_ids` (0.10.2 and later; earlier versions
name the ids in `tokens`, by `return_tokens_as_token_ids`). `sglang`: SGLang's own `/generate`. Text is never tokenised
again, for that can give other tokens than were sampled. Servers are not trusted: every number is checked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from gradstore.errors import GradstoreError
from gradstore.trainer.sampling.backends import Response

Dialect = Literal["vllm", "sglang"]
DIALECTS = ("vllm", "sglang")
TOKEN_BYTES = 640
"""Most bytes that a token of a response may take in an answer: ids, log-probabilities, and texts with escapes."""
_TOKEN_ID = re.compile(r"token_id:([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is asked for: n responses of one prompt."""

    prompt: list[int]
    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    top_k: int = -1
    """-1: no limit."""

    @property
    def max_bytes(self) -> int:
        """Largest answer that is read."""
        return (1 << 20) + 16 * len(self.prompt) * self.n + TOKEN_BYTES * self.max_new_tokens * self.n


@dataclass(frozen=True, slots=True)
class Policy:
    """What is known of the model that is served."""

    served_model: str
    vocabulary: int | None
    """Token ids are below it."""
    end_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One response as the server gave it, not checked yet."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str


class _Logprobs(BaseModel):
    token_logprobs: list[float]
    tokens: list[str] = Field(default_factory=list)


class _Choice(BaseModel):
    index: int = 0
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    model: str | None = None


class _Finish(BaseModel):
    type: str


class _Meta(BaseModel):
    finish_reason: _Finish | None = None
    output_token_logprobs: list[tuple[float, int, str | None] | tuple[float, int]] | None = None


class _Generated(BaseModel):
    meta_info: _Meta
    output_ids: list[int] | None = None


class Models(BaseModel):
    """Answer of /v1/models."""

    class Model(BaseModel):
        """A model that is served."""

        id: str
        max_model_len: int | None = None

    data: list[Model]


_GENERATED = TypeAdapter(list[_Generated])


def request(dialect: Dialect, sampling: Sampling, policy: Policy) -> tuple[str, dict[str, Any]]:
    """Path and body of a request. All that could change the distribution is said, for servers have defaults of their
    own, such as those of the model's generation_config.json."""
    same: dict[str, Any] = {
        "n": sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(policy.end_ids),
    }
    if dialect == "sglang":
        # No sampling_seed: the n responses of a request would be equal where the server samples by it.
        params = same | {"max_new_tokens": sampling.max_new_tokens}
        return "/generate", {"input_ids": sampling.prompt, "sampling_params": params, "return_logprob": True}
    body = same | {
        "model": policy.served_model,
        "prompt": sampling.prompt,
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    return "/v1/completions", body


def responses(dialect: Dialect, body: bytes, sampling: Sampling, policy: Policy) -> list[Response]:
    """The n responses of an answer; GradstoreError, naming the field, for what no server that samples gives."""
    answers = _of_sglang(body, sampling) if dialect == "sglang" else _of_vllm(body, sampling, policy)
    if len(answers) != sampling.n:
        raise _wrong(f"it gave {len(answers)} responses, expected {sampling.n}")
    return [_checked(answer, f"response {j}", sampling, policy) for j, answer in enumerate(answers)]


def _of_vllm(body: bytes, sampling: Sampling, policy: Policy) -> list[_Answer]:
    found = _Completion.model_validate_json(body, strict=True)
    if found.model is not None and found.model != policy.served_model:
        raise _wrong(f"model is {found.model!r:.100}, expected {policy.served_model!r}")
    choices = sorted(found.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(len(choices))):
        raise _wrong("choices.index does not count the responses")
    answers = []
    for j, choice in enumerate(choices):
        where = f"choices.{j}"
        if choice.logprobs is None:
            raise _wrong(f"{where}.logprobs is missing: the server must return log-probabilities")
        ids = choice.token_ids
        if ids is None:
            named = [_TOKEN_ID.fullmatch(token) for token in choice.logprobs.tokens]
            ids = [int(match[1]) for match in named if match is not None]
            if not named or len(ids) != len(named):
                raise _wrong(
                    f"{where}.token_ids is missing: the server must return token ids, as vLLM 0.10.2 and later do, and "
                    "SGLang with --server-api sglang"
                )
        if choice.prompt_token_ids is not None and choice.prompt_token_ids != sampling.prompt:
            raise _wrong(f"{where}.prompt_token_ids is another prompt than was sent")
        answers.append(_Answer(ids, choice.logprobs.token_logprobs, choice.finish_reason or ""))
    return answers


def _of_sglang(body: bytes, sampling: Sampling) -> list[_Answer]:
    text = body.strip()
    found = _GENERATED.validate_json(text if text.startswith(b"[") else b"[" + text + b"]", strict=True)
    answers = []
    for j, one in enumerate(found):
        pairs = one.meta_info.output_token_logprobs
        if pairs is None:
            raise _wrong(f"{j}.meta_info.output_token_logprobs is missing: the server must return log-probabilities")
        ids = [pair[1] for pair in pairs]
        if one.output_ids is not None and one.output_ids != ids:
            raise _wrong(f"{j}.output_ids are other tokens than those of output_token_logprobs")
        finish = one.meta_info.finish_reason
        answers.append(_Answer(ids, [pair[0] for pair in pairs], "" if finish is None else finish.type))
    return answers


def _checked(answer: _Answer, where: str, sampling: Sampling, policy: Policy) -> Response:
    n, most = len(answer.token_ids), sampling.max_new_tokens
    if n != len(answer.logprobs):
        raise _wrong(f"{where} has {n} token ids and {len(answer.logprobs)} log-probabilities")
    if not 0 < n <= most:
        raise _wrong(f"{where} has {n} tokens, expected 1 to {most}")
    limit = policy.vocabulary or 1 << 31
    wrong = next((one for one in answer.token_ids if not 0 <= one < limit), None)
    if wrong is not None:
        raise _wrong(f"{where}: token id {wrong}, expected one below {limit}, the model's vocabulary")
    with np.errstate(over="ignore"):
        logprobs_T = np.asarray(answer.logprobs, np.float64).astype(np.float32)
    bad = ~(np.isfinite(logprobs_T) & (logprobs_T <= 0))
    if bad.any():
        place = int(np.argmax(bad))
        value = answer.logprobs[place]
        raise _wrong(f"{where}: log-probability {place} is {value}, expected a finite number of at most 0")
    ended = answer.token_ids[-1] in policy.end_ids
    if answer.finish_reason not in ("stop", "length"):
        raise _wrong(f"{where}: finish_reason is {answer.finish_reason!r:.100}, expected 'stop' or 'length'")
    if answer.finish_reason == "stop" and not ended:
        raise _wrong(
            f"{where} stops after token {answer.token_ids[-1]}, which is no end token of the model "
            f"({', '.join(map(str, policy.end_ids))}): the server stops elsewhere, or leaves the end token out"
        )
    if not ended and n < most:
        raise _wrong(f"{where} was cut off after {n} of {most} tokens: is the server's context too short?")
    return Response(np.asarray(answer.token_ids, np.int64), logprobs_T, "stop" if ended else "length")


def _wrong(what: str) -> GradstoreError:
    return GradstoreError(what)
