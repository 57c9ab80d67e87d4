"""Sampling from a running server (vLLM, SGLang): prompts as token ids out, token ids and log-probabilities in.

One request for each problem, `concurrency` at a time, through the judge's HTTP client. The user names the policy
version that the server holds; it is kept with the rollouts, and a run is not continued under another. Before anything
is sampled a request of one token shows whether the server returns what is needed.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from gradstore.engine.gradients.models import load_tokenizer, vocabulary_size
from gradstore.errors import GradstoreError, RequestError, check_known, check_number, needing
from gradstore.trainer.sampling.backends import Call, PromptError, Response, derived_seed, end_tokens
from gradstore.trainer.sampling.backends.answers import (
    DIALECTS,
    Dialect,
    Models,
    Policy,
    Sampling,
    request,
    responses,
)
from gradstore.trainer.sampling.backends.vllm import generation_config
from gradstore.trainer.sampling.own_loop import OwnLoop, all_done
from gradstore.trainer.sampling.secrecy import Address

with needing("sampling from a server", "gradstore[judge]"):
    from gradstore.trainer.sampling.endpoint import Endpoint, Limits, Question

KEY_VARIABLE = "GRADSTORE_SERVER_KEY"
"""Environment variable with the server's API key; servers without one need none."""
URL_VARIABLE = "GRADSTORE_SERVER_URL"
"""Environment variable with the URL, for a password or parameters that should not stand on a command line."""
_AHEAD = 2
"""Calls that have begun while one before them is waited for."""
_NAME = 500
"""Most characters in a served model's name."""
_RAW = 0.05
"""Largest difference of a log-probability at two temperatures that is the noise of the server's arithmetic."""


class ServerBackend:
    """Samples from the model of a server. The constructor raises an error, naming what is missing, for a server that
    cannot be used."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        server: str,
        policy_version: str,
        served_model: str | None = None,
        server_api: Dialect = "vllm",
        concurrency: int = 64,
        server_timeout: float = 600.0,
        retries: int = 6,
        model: str = "",
        vocabulary: int | None = None,
        end_ids: tuple[int, ...] = (),
    ) -> None:
        """tokenizer: of the model that is served.

        server: URL, with or without /v1. policy_version: name of the weights that the server holds. served_model: the
        server's name for them, where it serves several. server_api: vllm or sglang (answers.py). concurrency: problems
        asked for at once. server_timeout: seconds for all responses of a problem. retries: after HTTP 408, 409, 429,
        5xx, a timeout or a broken connection. vocabulary, end_ids: of the model.
        """
        check_known("server_api", server_api, DIALECTS)
        for name, value in {"concurrency": concurrency, "server_timeout": server_timeout}.items():
            check_number(name, value, above=0)
        check_number("retries", retries, least=0)
        if not policy_version:
            raise RequestError("a server holds weights that only you can name: give --policy-version NAME")
        self.tokenizer, self.context = tokenizer, None
        address = Address.of(server, "--server", URL_VARIABLE)
        address = Address(address.url.removesuffix("/v1"), address.credentials, address.query)
        self._open = partial(_Line, address, concurrency=concurrency, timeout=server_timeout, retries=retries)
        self._api, self._concurrency = server_api, concurrency
        self._line = self._open()
        served = self._served(served_model)
        self._policy = Policy(served.id, vocabulary, end_ids)
        self.context = served.max_model_len
        self._settings = {
            "backend": "server",
            "api": server_api,
            "model": model,
            "served_model": served.id,
            "policy_version": policy_version,
        }
        self._raw: set[tuple[float, float]] = {(1.0, 1.0)}
        """Temperature and top_p at which log-probabilities are known to be the policy's own."""
        self._first_tokens(1.0, 1.0, top_k=-1)

    @classmethod
    def load(cls, model: str | Path, *, trust_remote_code: bool = False, **settings: Any) -> "ServerBackend":
        """model: folder or name of the served model; its tokenizer and configuration are read, not its weights."""
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        return cls(
            tokenizer,
            model=str(model),
            vocabulary=vocabulary_size(model, trust_remote_code=trust_remote_code),
            end_ids=tuple(end_tokens(generation_config(model), tokenizer)),
            **settings,
        )

    def settings(self) -> dict[str, Any]:
        return self._settings

    def close(self) -> None:
        """Close the connections."""
        self._line.loop.close()

    def generate(
        self, prompts: list[list[int]], n: int, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[list[Response]]:
        call = Call(
            prompts=prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        return next(self.generate_each([call]))

    def generate_each(self, calls: Iterable[Call]) -> Iterator[list[list[Response]]]:
        """The responses of each call; a call begins before the one before it has ended, so that the server stays busy.

        All calls together ask for `concurrency` problems at once.
        """
        if self._line.loop.process != os.getpid():
            self._line = self._open()
        begun: deque[Future[list[list[Response]]]] = deque()
        try:
            for call in calls:
                self._check_raw(call.temperature, call.top_p)
                begun.append(self._line.loop.begin(self._sample(call)))
                if len(begun) > _AHEAD:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    async def _sample(self, call: Call) -> list[list[Response]]:
        found: list[list[Response]] = [[] for _ in call.prompts]

        async def sample(place: int) -> None:
            own = derived_seed(call.seed, place)
            asked = Sampling(call.prompts[place], call.n, call.max_new_tokens, call.temperature, call.top_p, own)
            try:
                found[place] = await self._ask(asked)
            except GradstoreError as error:
                raise PromptError(place, error) from None

        work = (partial(sample, place) for place in range(len(call.prompts)))
        await all_done(work, min(self._concurrency, len(call.prompts)))
        return found

    async def _ask(self, asked: Sampling) -> list[Response]:
        path, body = request(self._api, asked, self._policy)
        question = Question(path, body, "answer with token ids and log-probabilities", "the server", asked.max_bytes)
        return await self._line.endpoint.ask(question, lambda data: responses(self._api, data, asked, self._policy))

    def _served(self, wanted: str | None) -> Models.Model:
        """The model that is served; RequestError if it is not the wanted one, or it is one of several."""
        question = Question("/v1/models", None, "list of models", "the server")

        async def ask() -> Models:
            return await self._line.endpoint.ask(question, lambda data: Models.model_validate_json(data, strict=True))

        models = self._line.loop.wait(ask()).data
        if any(self._line.endpoint.masked(one.id) != one.id or not 0 < len(one.id) <= _NAME for one in models):
            raise RequestError(f"the server at {self._line.address} serves a model whose name cannot be kept")
        names = ", ".join(repr(one.id) for one in models[:5]) + (", ..." if len(models) > 5 else "")
        chosen = [one for one in models if wanted in (None, one.id)]
        if len(chosen) == 1:
            return chosen[0]
        if wanted is None:
            raise RequestError(f"the server at {self._line.address} serves {names or 'no model'}: give --served-model")
        raise RequestError(f"the server at {self._line.address} does not serve {wanted!r}, but {names or 'no model'}")

    def _first_tokens(self, temperature: float, top_p: float, top_k: int, n: int = 1) -> dict[int, float]:
        """First tokens of n responses to a prompt that leaves much open, with their log-probabilities."""
        prompt = list(self.tokenizer("The", add_special_tokens=False)["input_ids"])
        found = self._line.loop.wait(self._ask(Sampling(prompt, n, 1, temperature, top_p, 0, top_k)))
        return {int(one.token_ids[0]): float(one.logprobs[0]) for one in found}

    def _check_raw(self, temperature: float, top_p: float) -> None:
        """RequestError for a server whose log-probabilities are not the policy's own, at temperature 1 without top_p.

        A server that counts the cuts gives the only token of top_k=1 a probability of 1. One that counts the
        temperature gives a token another number at another one; of 16 draws from the best two, one is the best.
        """
        if (temperature, top_p) in self._raw:
            return
        cut = 0.0 in self._first_tokens(1.0, 1.0, 1).values()
        plain, own = self._first_tokens(1.0, 1.0, 2, 16), self._first_tokens(temperature, top_p, 2, 16)
        apart = [
            abs(plain[token] - own[token]) > _RAW * max(1.0, abs(plain[token])) for token in plain.keys() & own.keys()
        ]
        if cut or any(apart) or not apart:
            raise RequestError(
                f"the server at {self._line.address} gives log-probabilities after temperature and top_p, not the "
                "policy's own: start vLLM with --logprobs-mode raw_logprobs, SGLang with "
                "SGLANG_RETURN_ORIGINAL_LOGPROB=1, or sample at temperature 1 and top_p 1"
            )
        self._raw.add((temperature, top_p))


class _Line:
    """The connections, with their event loop."""

    def __init__(self, address: Address, *, concurrency: int, timeout: float, retries: int) -> None:
        self.address = address
        limits = Limits(concurrency, timeout, retries, max_bytes=1 << 20)
        self.endpoint = Endpoint("the server", address, KEY_VARIABLE, limits)
        self.loop = OwnLoop("server", self.endpoint.close)
