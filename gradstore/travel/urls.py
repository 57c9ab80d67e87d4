"""URLs of stores, told from paths of this machine."""

import re

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
"""Scheme and the rest."""


def is_url(text: object) -> bool:
    """Whether this is a URL and no path on this machine."""
    return isinstance(text, str) and URL.match(text) is not None
