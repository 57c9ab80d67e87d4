"""Access control: who may ask the explorer, decided from a request's head alone.

By default every request must carry the token, on loopback too, because every user of a machine can reach its loopback
addresses. The token may be in the Authorization header, in a cookie, or once in the address; from there it is moved to
the cookie. On loopback the Host header must also name this machine. Otherwise a foreign page could reach the explorer
through its own host name (DNS rebinding). serving.py asks here before it reads a body, `guard` again before the app.
"""

import hmac
import ipaddress
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

from werkzeug.http import parse_cookie
from werkzeug.wrappers import Response

MOST_BODY = 256 << 10
"""Largest body in bytes. A page sends the values of its controls, some kilobytes."""
HARDENED = (
    (
        "Content-Security-Policy",
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)
_Wsgi = Callable[[dict[str, Any], Callable], Iterable[bytes]]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Answer to a request that is not allowed."""

    status: int
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Access:
    """Rules of one server."""

    token: str | None = None
    """Every request must carry it; None: nobody is asked."""
    loopback: bool = True
    """Whether the server listens on a loopback address, so that the Host header must name one."""
    port: int = 0
    """Browsers share cookies between the ports of a host; the port in the cookie's name separates two explorers."""

    @property
    def cookie(self) -> str:
        """Name of the cookie that carries the token."""
        return f"gradstore-token-{self.port}"

    def refusal(self, host: str, authorization: str, cookies: str, query: str) -> Refusal | None:
        """Why the request is refused; None: it is allowed. Arguments: three headers, and the address after `?`."""
        if self.loopback and not is_loopback(_name_of(host)):
            return Refusal(403, "Forbidden", f"{host}: this server answers on loopback names only\n")
        if self.token is None:
            return None
        scheme, _, bearer = authorization.partition(" ")
        given = [*parse_cookie(cookies).getlist(self.cookie), *parse_qs(query).get("token", ())]
        if scheme.lower() == "bearer":
            given.append(bearer.strip())
        if any(same(one, self.token) for one in given):
            return None
        return Refusal(401, "Unauthorized", "the token is missing or wrong: open the address that was printed\n")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """A token that cannot be guessed: 256 random bits."""
    return secrets.token_urlsafe(32)


def same(given: str, token: str) -> bool:
    """Compare a given token with the right one in constant time."""
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def guard(app: _Wsgi, access: Access) -> _Wsgi:
    """A WSGI app that passes only allowed requests to `app`, moves the token to the cookie, and hardens all answers."""

    def guarded(environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        def hardened(status: str, headers: list, *more: Any) -> Any:
            return start_response(status, [*headers, *HARDENED], *more)

        return (_answer(environ, access) or app)(environ, hardened)

    return guarded


def _answer(environ: dict[str, Any], access: Access) -> Response | None:
    """The answer to a request that never reaches the app; None for the others."""
    query = environ.get("QUERY_STRING", "")
    refused = access.refusal(
        environ.get("HTTP_HOST", ""), environ.get("HTTP_AUTHORIZATION", ""), environ.get("HTTP_COOKIE", ""), query
    )
    if refused is not None:
        return Response(refused.text, refused.status, mimetype="text/plain")
    length = environ.get("CONTENT_LENGTH") or "0"
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > MOST_BODY:
        return Response(f"the body is too large: at most {MOST_BODY} bytes\n", 413, mimetype="text/plain")
    given = parse_qsl(query, keep_blank_values=True)
    if access.token is None or "token" not in dict(given):
        return None
    rest = urlencode([(name, value) for name, value in given if name != "token"])
    place = "/" + quote(environ.get("PATH_INFO", "").encode("latin-1").lstrip(b"/"))
    moved = Response(status=302, headers={"Cache-Control": "no-store"})
    moved.location = place + (f"?{rest}" if rest else "")
    moved.set_cookie(access.cookie, access.token, httponly=True, samesite="Strict")
    return moved


def _name_of(host: str) -> str:
    """The name in a Host header, without the port; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
