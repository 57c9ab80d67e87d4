"""Bounds on what the explorer computes: few answers at once, the others wait in line, and each answer is kept.

An answer is a function of the request's body and of what the store has published. So many readers of one page cost one
computation. When too many wait, or one waits too long, the answer is 503 with Retry-After.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, Semaphore
from typing import Any

from werkzeug.wrappers import Response

PATH = "/_dash-update-component"
"""Where Dash's pages send the values of their controls."""
_Wsgi = Callable[[dict[str, Any], Callable], Iterable[bytes]]


class BusyError(Exception):
    """Too many requests wait."""


class Turns:
    """A line for computations: `at_once` run, at most `waiting` wait, each at most `patience` seconds."""

    def __init__(self, at_once: int = 2, waiting: int = 64, patience: float = 10.0) -> None:
        self._running, self._lock, self._n_waiting = Semaphore(at_once), Lock(), 0
        self._most_waiting, self._patience = waiting, patience

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and hold it for the block. BusyError if the line is full or does not move."""
        with self._lock:
            if self._n_waiting >= self._most_waiting:
                raise BusyError
            self._n_waiting += 1
        try:
            came = self._running.acquire(timeout=self._patience)
        finally:
            with self._lock:
                self._n_waiting -= 1
        if not came:
            raise BusyError
        try:
            yield
        finally:
            self._running.release()


class Answers:
    """A WSGI app that computes answers in turns and keeps them until `version()` changes."""

    def __init__(
        self, app: _Wsgi, version: Callable[[], Hashable], turns: Turns | None = None, most_bytes: int = 64 << 20
    ) -> None:
        """version: what a kept answer depends on beside the request. most_bytes: of kept answers, the oldest go."""
        self._app, self._version, self._turns, self._most_bytes = app, version, turns or Turns(), most_bytes
        self._kept: OrderedDict[tuple, tuple[str, list, bytes]] = OrderedDict()
        self._n_bytes, self._lock = 0, Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        """Answer a request."""
        if environ.get("PATH_INFO") != PATH or environ.get("REQUEST_METHOD") != "POST":
            return self._app(environ, start_response)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        try:
            status, headers, content = self._answer(environ, body)
        except BusyError:
            refused = Response("too many requests wait: try again\n", 503, mimetype="text/plain")
            refused.headers["Retry-After"] = "2"
            return refused(environ, start_response)
        start_response(status, headers)
        return [content]

    def _answer(self, environ: dict[str, Any], body: bytes) -> tuple[str, list, bytes]:
        key = (hashlib.sha256(body).digest(), environ.get("CONTENT_TYPE"), self._version())
        if found := self._find(key):
            return found
        with self._turns.turn():
            if found := self._find(key):  # the one before in the line asked the same
                return found
            computed = _called(self._app, environ | {"wsgi.input": io.BytesIO(body)})
        if computed[0].startswith("200"):
            self._keep(key, computed)
        return computed

    def _find(self, key: tuple) -> tuple[str, list, bytes] | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple, answer: tuple[str, list, bytes]) -> None:
        with self._lock:
            if key not in self._kept:
                self._n_bytes += len(answer[2])
            self._kept[key] = answer
            while self._n_bytes > self._most_bytes:
                self._n_bytes -= len(self._kept.popitem(last=False)[1][2])


def _called(app: _Wsgi, environ: dict[str, Any]) -> tuple[str, list, bytes]:
    """Status, headers and content of a WSGI app's answer."""
    told: list[tuple[str, list]] = []
    parts = app(environ, lambda status, headers, *_: told.append((status, headers)))
    try:
        content = b"".join(parts)
    finally:
        if hasattr(parts, "close"):
            parts.close()  # type: ignore[attr-defined]
    return *told[-1], content
