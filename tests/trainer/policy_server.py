"""An inference server on loopback that samples a toy model through the transformers back end, in two dialects."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from gradstore.trainer.sampling.backends import Response
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from tests.trainer.judge_server import Endpoint


class PolicyServer(Endpoint):
    """Answers as vLLM and SGLang do. `change(answer, body)` may spoil an answer before it is sent."""

    def __init__(self, backend: TransformersBackend) -> None:
        super().__init__()
        self.backend, self._one = backend, threading.Lock()
        self.models: Any = {"object": "list", "data": [{"id": "toy", "object": "model", "max_model_len": 500}]}
        self.change: Callable[[Any, dict[str, Any]], Any] = lambda answer, body: answer
        self.counts_temperature = self.counts_cuts = False
        self.answer = self._answer
        handler = self.server.RequestHandlerClass
        handler.do_GET = self._get(handler.do_POST)  # type: ignore[attr-defined]

    def _get(self, post: Callable) -> Callable:
        def get(request: Any) -> None:
            request.headers["Content-Length"] = "2"
            request.rfile = _Nothing()
            post(request)

        return get

    def _answer(self, number: int, body: dict[str, Any]) -> Any:
        if not body:
            return 200, self.models
        settings = body.get("sampling_params", body)
        prompt = body.get("prompt", body.get("input_ids"))
        assert settings["repetition_penalty"] == 1.0
        responses = self._sample(prompt, settings, body.get("seed", 0))
        answer = _as_sglang(responses) if "input_ids" in body else _as_vllm(responses, body)
        changed = self.change(answer, body)
        return changed if isinstance(changed, tuple) or callable(changed) else (200, changed)

    def _sample(self, prompt: list[int], settings: dict[str, Any], seed: int) -> list[Response]:
        """The local back end's responses; of top_k only what the check of log-probabilities asks is there."""
        temperature, n = settings["temperature"], settings["n"]
        most = settings.get("max_tokens", settings.get("max_new_tokens"))
        greedy = temperature if settings["top_k"] == -1 else 0.0
        with self._one:
            found = self.backend.generate(
                [prompt], n, max_new_tokens=most, temperature=greedy, top_p=settings["top_p"], seed=seed
            )[0]
        if self.counts_temperature and temperature:
            found = [
                Response(one.token_ids, one.logprobs / np.float32(temperature), one.finish_reason) for one in found
            ]
        if self.counts_cuts and settings["top_k"] == 1:
            found = [Response(one.token_ids, one.logprobs * 0, one.finish_reason) for one in found]
        return found


class _Nothing:
    """The body of a request without one."""

    def read(self, n: int) -> bytes:
        return b"{}"

    def readline(self, n: int = -1) -> bytes:
        return b""

    def close(self) -> None:
        pass


def _as_vllm(responses: list[Response], body: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {
            "index": j,
            "text": "never read",
            "token_ids": one.token_ids.tolist(),
            "prompt_token_ids": body["prompt"],
            "logprobs": {
                "token_logprobs": one.logprobs.tolist(),
                "tokens": [f"token_id:{token}" for token in one.token_ids],
                "top_logprobs": None,
            },
            "finish_reason": one.finish_reason,
            "stop_reason": None,
        }
        for j, one in enumerate(responses)
    ]
    return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1], "usage": {}}


def _as_sglang(responses: list[Response]) -> Any:
    answers = [
        {
            "text": "never read",
            "output_ids": one.token_ids.tolist(),
            "meta_info": {
                "finish_reason": {"type": one.finish_reason},
                "output_token_logprobs": [
                    [logprob, token, None]
                    for logprob, token in zip(one.logprobs.tolist(), one.token_ids.tolist(), strict=True)
                ],
            },
        }
        for one in responses
    ]
    return answers if len(answers) > 1 else answers[0]
