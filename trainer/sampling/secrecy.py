"""Keys and credentials, kept out of all that is shown: messages, representations, settings files and logs.

`Address` splits an endpoint's URL into what may be shown and what may not. `Secrets` removes keys from texts that a
server wrote, in the encodings in which a server may repeat them, and from the log records of the HTTP packages.
"""

import base64
import html
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from gradstore.errors import RequestError

URL_VARIABLE = "GRADSTORE_JUDGE_URL"
HIDDEN = "***"
WINDOW = 8
"""A text that repeats this many letters and digits of a key, in their order, is not shown at all."""
SHORTEST = 4
"""Shorter secrets are not searched for: they would hide ordinary words."""
LOGGERS = ("httpx", "httpcore", *(f"httpcore.{name}" for name in ("connection", "http11", "http2", "proxy", "socks")))
"""Loggers of the HTTP packages, which print addresses and a server's headers."""


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """An endpoint's URL in parts."""

    url: str
    """Scheme, host, port and path: what may be written to files."""
    credentials: str = ""
    """`user:password`, decoded, or nothing."""
    query: str = ""
    """Parameters of every request; they may hold a key."""

    @classmethod
    def of(cls, base_url: str, what: str = "judge: base_url", variable: str = URL_VARIABLE) -> "Address":
        """Split a URL; credentials and parameters left out are taken from the environment if it names this URL.

        what: the URL's name in messages. variable: environment variable with the URL that has them.
        RequestError, without the URL's text, for one that cannot be read.
        """
        address, known = _split(base_url, what), os.environ.get(variable)
        if known and not address.credentials and not address.query:
            other = _split(known, what)
            return other if other.url == address.url else address
        return address

    def __str__(self) -> str:
        """The URL as it may be shown."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{f'{HIDDEN}@' if self.credentials else ''}{rest}{f'?{HIDDEN}' if self.query else ''}"

    __repr__ = __str__

    def secrets(self) -> Iterator[str]:
        """Texts of the URL that must not be shown."""
        if self.credentials:
            yield self.credentials
            yield from self.credentials.split(":", 1)
        if self.query:
            yield self.query
            yield from (value for _, value in parse_qsl(self.query))


def _split(base_url: str, what: str) -> Address:
    wrong = RequestError(
        f"{what} is no address, expected http://HOST:PORT/v1 or https://HOST/v1; percent-encode special "
        "characters of a password (its text is not shown here)"
    )
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None  # the error quotes the URL, and must not be this one's context
    plain = re.fullmatch(r"[\x21-\x7e]+", base_url) and not re.search(r"[\\<>\"^`{|}]", base_url)
    if not plain or parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.path or parts.fragment:
        raise wrong
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    user, _, _ = parts.netloc.rpartition("@")
    url = f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}{parts.path.rstrip('/')}"
    return Address(url, unquote(user), parts.query)


def without_credentials(text: str) -> str:
    """A text with the credentials and parameters of all URLs in it hidden."""
    text = re.sub(r"(?<=://)[^\s]*@", f"{HIDDEN}@", text)
    return re.sub(r"(://[^\s?,]*\?)[^\s,]*", rf"\1{HIDDEN}", text)


class Secrets:
    """Texts to hide. `masked` also finds them percent-encoded, in base64, in hexadecimal, and cut or spaced out."""

    def __init__(self, *secrets: str) -> None:
        kept = sorted({secret for secret in secrets if len(secret) >= SHORTEST}, key=len, reverse=True)
        forms = sorted({form for secret in kept for form in _forms(secret)}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, forms)), re.IGNORECASE) if forms else None
        self._windows = frozenset(window for form in forms for window in _windows(_squeezed(form)))

    def __repr__(self) -> str:
        return "Secrets()"

    def masked(self, text: str) -> str:
        """The text with `***` for each secret; if parts of one are left, only a note instead of the text."""
        if self._pattern is None:
            return text
        shown = self._pattern.sub(HIDDEN, text)
        for read in {shown, unquote(shown), html.unescape(shown)}:
            if not self._windows.isdisjoint(_windows(_squeezed(read))):
                return "(a text that repeats the key: not shown)"
        return shown


@cache
def secrets_of(*secrets: str) -> Secrets:
    """The secrets, which from now on are also hidden in the log records of the HTTP packages."""
    found = Secrets(*secrets)
    hide = _Hide(found)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(hide)
    return found


class _Hide(logging.Filter):
    """Masks secrets in log records."""

    def __init__(self, secrets: Secrets) -> None:
        super().__init__()
        self.secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        shown = self.secrets.masked(text)
        if shown != text:
            record.msg, record.args = shown, None
        return True


def _forms(secret: str) -> Iterator[str]:
    """The encodings of a secret."""
    raw = secret.encode(errors="surrogateescape")
    yield secret
    yield from (quote(secret, safe="", errors="surrogateescape"), quote_plus(secret, errors="surrogateescape"))
    yield from (html.escape(secret), raw.hex())
    for before in range(3):  # inside a longer text, base64 has one of three forms, by the place
        text = base64.b64encode(b"\0" * before + raw).decode()
        whole = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        if len(whole) >= WINDOW:
            yield from (whole, whole.replace("+", "-").replace("/", "_"))


def _squeezed(text: str) -> str:
    return "".join(filter(str.isalnum, text)).lower()


def _windows(squeezed: str) -> Iterator[str]:
    if len(squeezed) < WINDOW:  # a short key: whole or not at all, and then the pattern finds it
        return
    for start in range(len(squeezed) - WINDOW + 1):
        yield squeezed[start : start + WINDOW]
