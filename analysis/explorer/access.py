"""Access control: on loopback any local user may connect, on other addresses only holders of the token.

The token may be in the Authorization header, in a cookie, or once in the address; from there it is moved to the cookie.
On loopback, the Host header must name this machine. Otherwise a foreign page could reach the explorer through its own
host name (DNS rebinding).
"""

import hmac
import ipaddress
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

if TYPE_CHECKING:
    from flask import Flask

COOKIE = "gradstore-token"
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'"
)


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
    return hmac.compare_digest(given.encode(), token.encode())


def guard(server: "Flask", token: str | None) -> None:
    """Check every request to the server. token: None: loopback only."""
    from flask import Response, redirect, request

    def check() -> Any:
        if token is None:
            if is_loopback(urlsplit(f"//{request.host}").hostname or ""):
                return None
            return Response(f"{request.host}: this server answers on loopback names only\n", 403, mimetype="text/plain")
        given = request.args.get("token", "")
        if given and same(given, token):
            rest = {name: value for name, value in request.args.items() if name != "token"}
            answer = redirect("/" + request.path.lstrip("/") + (f"?{urlencode(rest)}" if rest else ""))
            answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
            return answer
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(bearer.strip(), token):
            return None
        if same(request.cookies.get(COOKIE, ""), token):
            return None
        return Response(
            "the token is missing or wrong: open the address that was printed\n", 401, mimetype="text/plain"
        )

    def harden(response: Any) -> Any:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    server.before_request(check)
    server.after_request(harden)
