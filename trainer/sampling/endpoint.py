"""One HTTP endpoint that answers in JSON: requests with a total deadline and a maximum size, retries, checked answers.

The judge and the server back end send their requests through it. The endpoint is not trusted: a try ends after
`timeout` seconds even if bytes keep coming; an answer of more than `max_bytes`, a compressed one and a redirect are
refused; the JSON is checked against a schema. What the endpoint writes is shown in one line, without control
characters and without the key. Errors have no chain: the exceptions of the HTTP package hold the request, and with it
the key.
"""

import asyncio
import json
import math
import os
import random
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from http.cookiejar import DefaultCookiePolicy
from time import time
from typing import Any, TypeVar
from urllib.request import getproxies

import httpx
from pydantic import ValidationError

from gradstore.errors import GradstoreError, RequestError
from gradstore.trainer.sampling.secrecy import Address, Secrets, secrets_of

T = TypeVar("T")
LONGEST_PAUSE_S = 60.0
"""Maximum pause that an endpoint can ask for with Retry-After."""
SHOWN = 200
"""Characters shown of an endpoint's message."""
_ERROR_BYTES = 65_536
"""Bytes read of an error's body."""
_BUSY = (408, 409, 429)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the requests to an endpoint."""

    concurrency: int
    """Requests in parallel."""
    timeout: float
    """Seconds within which one try must have its whole answer, from connecting to the last byte."""
    retries: int
    """Retries after HTTP 408, 409, 429, 5xx, a timeout or a broken connection; pauses grow from 0.5 to 8 s."""
    max_bytes: int
    """Maximum size of one answer, in bytes."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and how its answer is read."""

    path: str
    """Below the endpoint's URL, such as /chat/completions."""
    body: object | None
    """JSON to POST; None: GET."""
    what: str
    """What the answer should be, such as "chat completion"."""
    where: str
    """The beginning of error messages: whose request it is."""
    max_bytes: int | None = None
    """Maximum size of the answer; None: that of the limits."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A try without an answer."""

    problem: str
    """What happened, in our words."""
    detail: str = ""
    """What the endpoint or the system says of it."""
    again: bool = False
    """Whether another try may help."""
    pause: float | None = None
    """Seconds that the endpoint asks to wait."""
    refused: bool = False
    """Whether the request itself was wrong."""


class Endpoint:
    """Sends requests to one endpoint. The constructor raises RequestError, without a request, for a bad key or URL.

    To be used within one event loop.
    """

    def __init__(self, who: str, address: Address, key_variable: str, limits: Limits) -> None:
        """who: the endpoint's role in messages. key_variable: environment variable with the API key; may be unset."""
        self.address, self._key_variable, self._limits = address, key_variable, limits
        self._auth, secrets = _authorization(who, key_variable, address)
        self._secrets: Secrets = secrets_of(*secrets)
        self._places = asyncio.Semaphore(limits.concurrency)
        # One client for each request under way: httpx's time for a request grows with the connections of its client.
        self._idle: list[httpx.AsyncClient] = []
        try:
            self._url("")
            self._idle.append(self._client())
            return
        except (httpx.InvalidURL, ValueError, ImportError, OSError) as error:
            kind = type(error).__name__  # its text may hold a proxy's password
        raise RequestError(f"{who} at {self.address}: its URL or a proxy of the environment cannot be used: {kind}")

    async def ask(self, question: Question, read: Callable[[bytes], T]) -> T:
        """The answer to a request, as `read` reads it.

        read: the body -> the answer; pydantic's ValidationError becomes a GradstoreError, and keys are masked in its
        errors. GradstoreError that begins with the question's `where` if there is no answer; RequestError if the
        endpoint refuses the request.
        """
        content = None if question.body is None else json.dumps(question.body).encode()
        tries = 0
        async with self._places:
            client = self._idle.pop() if self._idle else self._client()
            try:
                while True:
                    outcome = await self._try(client, question, content)
                    if not isinstance(outcome, _Failure):
                        break
                    tries += 1
                    if not outcome.again or tries > self._limits.retries:
                        break
                    await asyncio.sleep(_backoff(tries) if outcome.pause is None else outcome.pause)
            finally:
                self._idle.append(client)
        if not isinstance(outcome, _Failure):
            try:
                return read(outcome)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False, include_context=False)[0]
                found = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
                outcome = _Failure(f"its answer is no {question.what}", self._shown(found))
            except GradstoreError as error:
                outcome = _Failure("its answer", self._shown(str(error)))
        problem = f"{outcome.problem}{f' after {tries} tries' if outcome.again else ''}"
        kind = RequestError if outcome.refused else GradstoreError
        raise kind(f"{question.where} at {self.address}: {problem}{f': {outcome.detail}' if outcome.detail else ''}")

    async def close(self) -> None:
        """Close the connections."""
        for client in self._idle:
            await client.aclose()

    def _client(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            auth=self._auth, headers=_HEADERS, verify=_trusted(), timeout=None, follow_redirects=False
        )
        client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        return client

    def _url(self, path: str) -> httpx.URL:
        return httpx.URL(f"{self.address.url}{path}{f'?{self.address.query}' if self.address.query else ''}")

    async def _try(self, client: httpx.AsyncClient, question: Question, content: bytes | None) -> bytes | _Failure:
        """One request, within the time of one try: the answer's body."""
        try:
            async with (
                asyncio.timeout(self._limits.timeout),
                client.stream(
                    "GET" if content is None else "POST", self._url(question.path), content=content
                ) as response,
            ):
                if response.is_success:
                    return await self._body(response, question.max_bytes or self._limits.max_bytes)
                return self._refusal(response, await _read(response, _ERROR_BYTES))
        except TimeoutError:
            return _Failure(f"no answer within {self._limits.timeout:g} s", again=True)
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError, ValueError) as error:
            causes = list(_causes(error))
            reason = next(filter(None, map(_system_reason, causes)), "") or str(error) or type(error).__name__
            untrusted = any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes)
            return _Failure("cannot be reached", self._shown(reason), again=not untrusted)

    async def _body(self, response: httpx.Response, limit: int) -> bytes | _Failure:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            return _Failure(f"its answer is compressed ({self._shown(encoding)}), though it was asked for plain text")
        body = await _read(response, limit + 1)
        return _Failure(f"its answer has more than max_bytes={limit} bytes") if len(body) > limit else bytes(body)

    def _refusal(self, response: httpx.Response, body: bytearray) -> _Failure:
        """What a status other than 2xx means."""
        status = response.status_code
        if status in _BUSY or status >= 500:
            return _Failure(f"HTTP {status}", again=True, pause=_asked_pause(response.headers))
        if status == 401:
            key = "the URL's password" if self.address.credentials else f"the key in ${self._key_variable}"
            return _Failure(f"HTTP 401, {key} is refused or missing", refused=True)
        if 300 <= status < 400:
            target = self._shown(response.headers.get("location", ""))
            problem = f"HTTP {status}, a redirect to {target!r} is not followed; name the right URL"
            return _Failure(problem, refused=True)
        return _Failure(f"HTTP {status}", self._shown(_message(body)), refused=True)

    def masked(self, text: str) -> str:
        """A foreign text without the key and other secrets."""
        return self._secrets.masked(text)

    def _shown(self, text: str) -> str:
        """A foreign text in one line, without control characters and secrets."""
        plain = " ".join("".join(c if c.isprintable() else " " for c in text[: 50 * SHOWN]).split())
        return self.masked(plain)[:SHOWN]


_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json"}


class _Bearer(httpx.Auth):
    """Adds the API key, or nothing, to a request."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Any:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


def _authorization(who: str, variable: str, address: Address) -> tuple[httpx.Auth, list[str]]:
    """How requests are authorized, and all that must not be shown. RequestError for an impossible key."""
    key = os.environ.get(variable) or ""
    wrong = re.search(r"[^\x21-\x7e]", key)
    if wrong:
        kind = "a line break or control character" if ord(wrong[0]) < 32 else "a space or a character beyond ASCII"
        raise RequestError(
            f"{who}: the key in ${variable} holds {kind} (character {wrong.start() + 1} of {len(key)}), which no key "
            "has; set it again without"
        )
    secrets = [key, *address.secrets()]
    for proxy in getproxies().values():
        secrets += re.findall(r"//([^/@]+)@", proxy)
    if address.credentials:
        user, _, password = address.credentials.partition(":")
        return httpx.BasicAuth(user, password), secrets
    return _Bearer(key), secrets


async def _read(response: httpx.Response, limit: int) -> bytearray:
    """The first `limit` bytes of a body, as they were sent."""
    body = bytearray()
    async for part in response.aiter_raw():
        body += part[: limit - len(body)]
        if len(body) >= limit:
            break
    return body


def _message(body: bytearray) -> str:
    """The message of an error's body: as OpenAI, vLLM and FastAPI put it, else the body's text."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else text


def _asked_pause(headers: httpx.Headers) -> float | None:
    """Seconds to wait as the endpoint asks, at most LONGEST_PAUSE_S; None if it does not ask, or for nonsense."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "")[:100]
        try:
            pause = float(text) * unit
        except ValueError:
            try:
                pause = parsedate_to_datetime(text).timestamp() - time()
            except (ValueError, TypeError, OverflowError, IndexError):
                continue
        if math.isfinite(pause):
            return min(max(pause, 0.0), LONGEST_PAUSE_S)
    return None


def _backoff(tries: int) -> float:
    """The pause after failed tries: 0.5 s, doubled each time, up to 8 s; up to a quarter less, at random."""
    return 0.25 * 2 ** min(tries, 5) * random.uniform(0.75, 1)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _system_reason(error: BaseException) -> str:
    """What the system says of an error, such as "Connection refused"; nothing for other errors."""
    if not isinstance(error, OSError) or not error.errno:
        return ""
    own = isinstance(error, ssl.SSLError | socket.gaierror)  # their numbers are not the system's
    return error.strerror or "" if own else os.strerror(error.errno)


@cache
def _trusted() -> ssl.SSLContext:
    """The certificates that are trusted; reading them takes a tenth of a second."""
    return httpx.create_ssl_context()
