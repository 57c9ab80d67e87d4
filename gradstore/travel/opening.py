"""`gradstore.open`: a store in a folder, or at a URL. What reads URLs is loaded for a URL only."""

from pathlib import Path
from typing import cast

from gradstore.errors import RequestError
from gradstore.store import Mode, Store
from gradstore.store import open as open_local
from gradstore.travel.urls import is_url


def open(path: str | Path, mode: Mode = "r", fingerprint: dict | None = None) -> Store:
    """Open the store at `path`, a folder or a URL, for reading ("r") or, in a folder, for writing too ("a").

    A URL is opened in place, in its current state. Everything but the codes is copied to a folder of the cache
    (`GRADSTORE_CACHE`); codes are fetched when they are read, and kept there up to `GRADSTORE_CACHE_BYTES`.
    fingerprint: the settings of the rows that the caller will add; FingerprintError names every field that differs
    from the store's. Raises NotAStoreError if there is no store or its format is newer, RequestError for a bad URL.
    """
    if not is_url(path):
        return open_local(path, mode, fingerprint)
    from gradstore.travel.places import place_at
    from gradstore.travel.pulling import open_url

    if mode != "r" or fingerprint is not None:
        raise RequestError(f"{place_at(str(path)).url}: a store at a URL is only read: pull it, write, and push")
    return open_url(cast(str, path))
