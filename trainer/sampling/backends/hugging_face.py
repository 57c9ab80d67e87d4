"""Sampling with transformers: any causal LM, on CPU or one GPU, no other package needed.

Rollouts are sorted by prompt length, cut into batches of at most `batch_tokens` tokens, padded on the left and sampled
with the KV cache. Each prompt and each shared prefix is computed once (decoding.py). Models whose state is more than a
KV cache use transformers' own `generate`.

Log-probabilities come from each step's logits, before temperature and top-p. Only one step's logits are in memory,
because all steps would need steps x batch x vocabulary. The model's own sampling defaults (repetition penalty, top-k
and so on) are ignored: they would change the distribution that is sampled from.

Dimension suffixes: B sequences, R rollouts, T tokens, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from gradstore.engine.gradients.budget import sampled_tokens
from gradstore.engine.gradients.hooks import evaluating
from gradstore.engine.gradients.models import load_model, load_tokenizer, weights_digest
from gradstore.engine.gradients.retrying import is_out_of_memory, release
from gradstore.errors import RequestError, check_number
from gradstore.trainer.sampling.backends import Response, derived_seed, end_tokens
from gradstore.trainer.sampling.backends.decoding import decodes, sample

log = logging.getLogger(__name__)

LOGIT_BYTES = 1 << 29
"""Maximum bytes of one step's float32 logits; limits the rollouts per batch if the vocabulary is large."""

_Rollout = tuple[int, int, int]
"""(prompt tokens, problem, rollout number)."""


class TransformersBackend:
    """Samples from a model in memory.

    The model is in eval mode while it generates; its mode is restored afterwards. So a trainer may pass the policy that
    it is training.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int | None = None) -> None:
        """batch_tokens: maximum tokens (prompts and responses) per batch; None: as many as the free memory allows
        now."""
        if batch_tokens is not None:
            check_number("batch_tokens", batch_tokens, least=1)
        self.model, self.tokenizer = model, tokenizer
        self._batch_tokens = self._fitting = sampled_tokens(model) if batch_tokens is None else batch_tokens
        """Tokens per batch that fit in memory, as far as known."""
        text_config = model.config.get_text_config()
        self._most_rollouts = max(1, LOGIT_BYTES // (4 * text_config.vocab_size))
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self._end_ids = end_tokens(model.generation_config, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad_id = pad if pad is not None else self._end_ids[0] if self._end_ids else 0

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> "TransformersBackend":
        """device: torch's name for it; None: the GPU if there is one. dtype: "auto" is the checkpoint's dtype.

        trust_remote_code: run Python code that the model's folder brings.
        """
        policy = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        return cls(policy, tokenizer, batch_tokens=batch_tokens)

    def settings(self) -> dict[str, Any]:
        return {
            "backend": "transformers",
            "model": self.model.config.name_or_path,
            "weights": weights_digest(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "batch_tokens": self._batch_tokens,
        }

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], n: int, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[list[Response]]:
        rollouts = sorted(((len(ids), p, j) for p, ids in enumerate(prompts) for j in range(n)), key=lambda r: r[0])
        responses: list[list[Any]] = [[None] * n for _ in prompts]
        with evaluating(self.model):
            if decodes(self.model):
                for batch in self._batches(rollouts, max_new_tokens):
                    decode = partial(self._decode, prompts=prompts, temperature=temperature, top_p=top_p, seed=seed)
                    for (_, p, j), response in self._decoded(batch, decode, max_new_tokens):
                        responses[p][j] = response
                return responses
            config = self._generation_config(max_new_tokens, temperature, top_p)
            device = self.model.device
            own_randomness = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
            with _own_sampling(self.model, config), own_randomness:
                for number, batch in enumerate(self._batches(rollouts, max_new_tokens)):
                    torch.manual_seed(derived_seed(seed, number))
                    found = self._generate([prompts[p] for _, p, _ in batch], config)
                    for (_, p, j), response in zip(batch, found, strict=True):
                        responses[p][j] = response
        return responses

    def _batches(self, rollouts: list[_Rollout], max_new_tokens: int) -> Iterator[list[_Rollout]]:
        """Cut rollouts, sorted by prompt length, into batches within the token budget."""
        batch: list[_Rollout] = []
        for rollout in rollouts:
            tokens = (rollout[0] + max_new_tokens) * (len(batch) + 1)
            if batch and (tokens > min(self._batch_tokens, self._fitting) or len(batch) == self._most_rollouts):
                yield batch
                batch = []
            batch.append(rollout)
        if batch:
            yield batch

    def _decoded(
        self, batch: list[_Rollout], decode: Callable[[list[_Rollout], int], list[Response]], max_new_tokens: int
    ) -> Iterator[tuple[_Rollout, Response]]:
        """Every rollout of a batch with its response; a batch that runs out of memory is halved and tried again."""
        waiting = [batch]
        while waiting:
            part, found = waiting.pop(), None
            tokens = (part[-1][0] + max_new_tokens) * len(part)
            try:
                found = decode(part, max_new_tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            if found is not None:
                yield from zip(part, found, strict=True)
                continue
            release()  # the error object, which kept the batch's cache alive, is gone here
            if len(part) == 1:
                raise RequestError(
                    f"one rollout of {part[0][0]} tokens of prompt and {max_new_tokens} of response does not fit into "
                    "memory: ask for shorter responses, or use a smaller dtype or a larger machine"
                )
            self._fitting = tokens // 2
            log.warning(
                "out of memory sampling %d tokens at once: from here on they are %d at most", tokens, self._fitting
            )
            waiting += [part[len(part) // 2 :], part[: len(part) // 2]]

    def _decode(
        self,
        batch: list[_Rollout],
        max_new_tokens: int,
        prompts: list[list[int]],
        temperature: float,
        top_p: float,
        seed: int,
    ) -> list[Response]:
        """Sample a response for each rollout of a batch."""
        places = {p: u for u, p in enumerate(dict.fromkeys(p for _, p, _ in batch))}
        draws_RT = torch.empty(len(batch), max_new_tokens, dtype=torch.float64)
        generator = torch.Generator()
        for r, (_, p, j) in enumerate(batch):
            draws_RT[r].uniform_(generator=generator.manual_seed(derived_seed(seed, p, j)))
        ids_RT, logprobs_RT, length_R = sample(
            self.model,
            [prompts[p] for p in places],
            draws_RT,
            torch.tensor([places[p] for _, p, _ in batch]),
            temperature=temperature,
            top_p=top_p,
            pad_id=self._pad_id,
            end_ids=self._end_ids,
        )
        return [self._response(*rollout) for rollout in zip(ids_RT, logprobs_RT, length_R.tolist(), strict=True)]

    def _response(self, ids_T: np.ndarray, logprobs_T: np.ndarray, length: int) -> Response:
        ids_T = ids_T[:length].astype(np.int64)
        reason: Literal["stop", "length"] = "stop" if int(ids_T[-1]) in self._end_ids else "length"
        return Response(ids_T, logprobs_T[:length].astype(np.float32), reason)

    def _generate(self, prompts: list[list[int]], config: Any) -> list[Response]:
        """One response per prompt of a batch, by transformers' own `generate`."""
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), config.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for b, ids in enumerate(prompts):
            ids_BT[b, width - len(ids) :] = torch.tensor(ids)
            mask_BT[b, width - len(ids) :] = 1
        recorder = _LogprobRecorder()
        output_BT = self.model.generate(
            ids_BT.to(self.model.device),
            attention_mask=mask_BT.to(self.model.device),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([recorder.before]),
            stopping_criteria=transformers.StoppingCriteriaList([recorder.after]),
        )
        new_BT = output_BT[:, width:].cpu().numpy().astype(np.int64)
        logprobs_BT = recorder.logprobs()
        ends_BT = np.isin(new_BT, self._end_ids)
        lengths = [int(ends_T.argmax()) + 1 if ends_T.any() else len(ends_T) for ends_T in ends_BT]
        return [self._response(*rollout) for rollout in zip(new_BT, logprobs_BT, lengths, strict=True)]

    def _generation_config(self, max_new_tokens: int, temperature: float, top_p: float) -> Any:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        return transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self._end_ids or None,
            pad_token_id=self._pad_id,
            use_cache=True,
            **({"do_sample": False} | sampling),
        )


class _LogprobRecorder:
    """Keeps each step's logits until the token is sampled, then only that token's log-probability."""

    def __init__(self) -> None:
        self._logits_BV: torch.Tensor | None = None
        self._logprobs_B: list[torch.Tensor] = []

    def before(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """A logits processor that changes nothing."""
        self._logits_BV = logits_BV
        return logits_BV

    def after(self, ids_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """A stopping criterion that never stops."""
        if self._logits_BV is not None:
            logprobs_BV = self._logits_BV.float().log_softmax(-1)
            self._logprobs_B.append(logprobs_BV.gather(1, ids_BT[:, -1:])[:, 0])
            self._logits_BV = None
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

    def logprobs(self) -> np.ndarray:
        """float32 [B, T] over the new tokens."""
        return torch.stack(self._logprobs_B, 1).cpu().numpy()


@contextmanager
def _own_sampling(model: Any, config: Any) -> Iterator[None]:
    """Replace the model's generation defaults for a while: `generate` merges them into every config it gets."""
    defaults = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = defaults
