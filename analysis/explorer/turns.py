"""Bounds on what the explorer computes: few answers at once, the others wait in line, and each answer is kept.

An answer is a function of the request's body and of what the store has published. So many readers of one page cost one
computation. Scans of a whole pool, which take longest, have a line of their own: whoever waits there lets others pass.
When too many wait, or one waits too long, the answer is 503 with Retry-After.
"""

import hashlib
import io
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, Semaphore, local
from typing import Any

from werkzeug.wrappers import Response

PATH = "/_dash-update-component"
"""Where Dash's pages send the values of their controls."""
FRESH_SECONDS = 0.25
"""How long after a publication answers of before may be given."""
_Wsgi = Callable[[dict[str, Any], Callable], Iterable[bytes]]


class BusyError(Exception):
    """Too many requests wait."""


class Line:
    """A line for computations: `at_once` run, at most `waiting` wait, each at most `patience` seconds."""

    def __init__(self, at_once: int, waiting: int, patience: float) -> None:
        self.running, self._lock, self._n_waiting = Semaphore(at_once), Lock(), 0
        self._most_waiting, self._patience = waiting, patience

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and hold it for the block. BusyError if the line is full or does not move."""
        with self._lock:
            if self._n_waiting >= self._most_waiting:
                raise BusyError
            self._n_waiting += 1
        try:
            came = self.running.acquire(timeout=self._patience)
        finally:
            with self._lock:
                self._n_waiting -= 1
        if not came:
            raise BusyError
        try:
            yield
        finally:
            self.running.release()


class Turns:
    """The lines for answers and for scans."""

    def __init__(self, answers: Line | None = None, scans: Line | None = None) -> None:
        self._answers, self._scans = answers or Line(2, 64, 10.0), scans or Line(1, 24, 20.0)
        self._thread = local()

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Wait for a turn to compute an answer, and hold it for the block. BusyError as for a `Line`."""
        with self._answers.turn():
            self._thread.answers = True
            try:
                yield
            finally:
                self._thread.answers = False

    @contextmanager
    def scan(self) -> Iterator[None]:
        """Wait for a turn to scan a pool, and hold it for the block; an answer that needs it lets others pass."""
        passing = getattr(self._thread, "answers", False)
        if passing:
            self._answers.running.release()
        try:
            with self._scans.turn():
                yield
        finally:
            if passing:
                self._answers.running.acquire()


class Answers:
    """A WSGI app that computes answers in turns and keeps them until `version()` changes."""

    def __init__(
        self, app: _Wsgi, version: Callable[[], Hashable], turns: Turns | None = None, most_bytes: int = 64 << 20
    ) -> None:
        """version: what a kept answer depends on beside the request. most_bytes: of kept answers, the oldest go."""
        self._app, self._turns, self._most_bytes = app, turns or Turns(), most_bytes
        self._version, self._known_until = version, 0.0
        self._known: Hashable = None
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
            return busy()(environ, start_response)
        start_response(status, headers)
        return [content]

    def _answer(self, environ: dict[str, Any], body: bytes) -> tuple[str, list, bytes]:
        key = (hashlib.sha256(body).digest(), environ.get("CONTENT_TYPE"), self._newest())
        if found := self._find(key):
            return found
        with self._turns.answer():
            if found := self._find(key):  # the one before in the line asked the same
                return found
            computed = _called(self._app, environ | {"wsgi.input": io.BytesIO(body)})
        if computed[0].startswith("200"):
            self._keep(key, computed)
        return computed

    def _newest(self) -> Hashable:
        """The version, looked up four times a second: a lookup reads files, each of which waits for Python's lock."""
        if time.monotonic() >= self._known_until:
            self._known_until = time.monotonic() + FRESH_SECONDS
            self._known = self._version()
        return self._known

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


def busy(*_: object) -> Response:
    """The answer to one that cannot wait."""
    headers = {"Retry-After": "2"}
    return Response("too many requests wait: try again\n", 503, headers, mimetype="text/plain")


def _called(app: _Wsgi, environ: dict[str, Any]) -> tuple[str, list, bytes]:
    """Status, headers and content of a WSGI app's answer."""
    told: list[tuple[str, list]] = []
    parts = app(environ, lambda status, headers, *_: told.append((status, headers)))
    try:
        content = b"".join(parts)
    finally:
        if hasattr(parts, "close"):
            parts.close()
    return *told[-1], content
