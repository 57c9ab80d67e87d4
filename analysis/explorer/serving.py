"""The HTTP server: waitress, with bounds on what a client can hold.

waitress reads requests in one loop and calls the app from threads only when a request is complete. So a slow client
holds no thread. But it holds a connection, and waitress stops to accept at `connection_limit`, for as long as clients
send a byte now and then. Here:
- a request is checked as soon as its head is complete (access.py); one that is refused is answered, and its body is
  never read;
- a head is at most 32 KiB, a body at most 256 KiB in memory; nothing is written to disk;
- a request must be complete after 20 s, an answer must be taken after 120 s and may not stall for 20 s; an idle
  connection ends after 60 s;
- above 400 connections the server goes on accepting, and drops the one that waits longest, first those without a token;
- requests that are sent before the answer to the last one (pipelining, which no browser does) end the connection.
"""

import contextlib
import resource
import socket
import time
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.utilities import Error

from gradstore.analysis.explorer.access import HARDENED, MOST_BODY, Access, Refusal
from gradstore.errors import RequestError

MOST_HEAD = 32 << 10
MOST_CONNECTIONS = 400
MOST_UNSENT = 128 << 20
"""Bytes of answers in memory that clients have not taken; beyond, the slowest client is dropped."""
THREADS = 96
"""More than may wait for a turn to compute (turns.py), so that files and refusals never wait for those."""
_MAKING_ROOM = Lock()
REQUEST_SECONDS, ANSWER_SECONDS, STALLED_SECONDS, IDLE_SECONDS = 20, 120, 20, 60


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes a free one. RequestError if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{host}: not an address of this machine: {getattr(error, 'strerror', error)}") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def make_server(app: Callable[..., Iterable[bytes]], access: Access, bound: socket.socket) -> "Server":
    """The server for a WSGI app on a bound socket; `run` serves until interrupted."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    settings = Settings(
        threads=THREADS,
        ident=None,
        asyncore_use_poll=True,  # select cannot watch descriptors above 1023
        max_request_header_size=MOST_HEAD,
        max_request_body_size=MOST_BODY,
        recv_bytes=64 << 10,  # each read waits for Python's lock, which a scan may hold
        inbuf_overflow=2 * MOST_BODY,
        outbuf_overflow=MOST_UNSENT,
        cleanup_interval=1,
        connection_limit=1 << 30,  # `Server` drops old connections instead of refusing new ones
        log_socket_errors=False,
    )
    settings.access, settings.most = access, max(8, min(MOST_CONNECTIONS, files // 2))
    about = (bound.family, bound.type, bound.proto, bound.getsockname())
    return Server(app, _sock=bound, adj=settings, bind_socket=False, sockinfo=about)


class Settings(Adjustments):
    """waitress's settings and ours."""

    access = Access()
    most = MOST_CONNECTIONS
    """Most connections."""


class Request(HTTPRequestParser):
    """A request; one that is not allowed, or not HTTP, is complete with its head."""

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a length of 5000 digits, an address with half a bracket
            raise ParsingError(f"the head cannot be read: {type(error).__name__}") from None
        refused = self.adj.access.refusal(
            self.headers.get("HOST", ""),
            self.headers.get("AUTHORIZATION", ""),
            self.headers.get("COOKIE", ""),
            self.query,
        )
        if refused is not None:
            self.error = _RefusedError(refused)
            self.body_rcv, self.chunked, self.content_length, self.expect_continue = None, False, 0, False


class _RefusedError(Error):
    """A refusal as waitress sends it."""

    def __init__(self, refused: Refusal) -> None:
        super().__init__(refused.text)
        self.code, self.reason = refused.status, refused.reason

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        """Status, headers and body."""
        headers = [("Content-Type", "text/plain; charset=utf-8"), *HARDENED]
        return f"{self.code} {self.reason}", headers, self.body.encode(errors="replace")


class Connection(HTTPChannel):
    """One client's connection."""

    parser_class = Request
    allowed = False
    """Whether it has sent a request that was allowed."""
    _began = 0.0
    """When the request in progress began, or the wait for it."""
    _sending_since = 0.0
    """When the last answer began to be sent."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._began = time.time()

    def received(self, data: bytes) -> bool:
        """Read some bytes; called by waitress."""
        if self.request is None and not self.requests:
            self._began = time.time()
        found = bool(super().received(data))
        with self.requests_lock:
            pending = list(self.requests)
        if pending and pending[0].error is None:
            self.allowed = True
        if len(pending) > 1:
            self.drop()
        return found

    def write_soon(self, data: bytes) -> int:
        """Send a part of an answer, or keep it until the client takes it; called from a thread."""
        if not self.total_outbufs_len:
            self._sending_since = time.time()
        self.server.make_room(len(data))
        return int(super().write_soon(data))

    def is_over(self, now: float) -> bool:
        """Whether the client has taken too long."""
        if self.total_outbufs_len:
            return now - self._sending_since > ANSWER_SECONDS or now - self.last_activity > STALLED_SECONDS
        if self.requests:
            return False
        if self.request is not None or not self.allowed:
            return now - self._began > REQUEST_SECONDS
        return now - self.last_activity > IDLE_SECONDS

    def may_be_dropped(self) -> bool:
        """Whether no answer is being computed for it."""
        return not self.will_close and (not self.requests or bool(self.total_outbufs_len))

    def age(self) -> tuple[bool, float]:
        """Sort key: the first is dropped first."""
        if self.total_outbufs_len:
            return self.allowed, self._sending_since
        return self.allowed, self._began if self.request is not None else self.last_activity

    def drop(self) -> None:
        """End the connection. A client that takes nothing would never let waitress close it: `shutdown` does."""
        self.will_close = True
        with contextlib.suppress(OSError):  # it may be gone already
            self.socket.shutdown(socket.SHUT_RDWR)


class Server(TcpWSGIServer):
    """waitress's server with a bound on connections, however long they last."""

    channel_class = Connection

    def handle_accept(self) -> None:
        """Accept a connection; called by waitress."""
        super().handle_accept()
        held = [one for one in list(self.active_channels.values()) if not one.will_close]
        if len(held) > self.adj.most:
            self._first_of(held[:-1] or held).drop()

    def maintenance(self, now: float) -> None:
        """Drop clients that took too long; called every second."""
        for channel in list(self.active_channels.values()):
            if channel.is_over(now):
                channel.drop()

    def make_room(self, n_bytes: int) -> None:
        """Drop the slowest clients while too many bytes wait for them; called from threads."""
        with _MAKING_ROOM:
            held = [one for one in list(self.active_channels.values()) if one.total_outbufs_len and not one.will_close]
            unsent = n_bytes + sum(one.total_outbufs_len for one in held)
            if unsent <= MOST_UNSENT:
                return
            for channel in sorted(held, key=Connection.age):
                unsent -= channel.total_outbufs_len
                channel.drop()
                if unsent <= MOST_UNSENT:
                    return

    @staticmethod
    def _first_of(held: list[Connection]) -> Connection:
        """The connection to drop; the newest if all others are being answered."""
        return min((one for one in held if one.may_be_dropped()), key=Connection.age, default=held[-1])

    def close(self) -> None:
        """Stop listening and close every connection."""
        for channel in list(self.active_channels.values()):
            channel.handle_close()
        super().close()
