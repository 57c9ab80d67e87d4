"""Empty stores like another one: with its fingerprint, row format and projections, for rows that can be merged."""

from pathlib import Path

from gradstore.attachments import ORIGIN, all_attachments
from gradstore.errors import FingerprintError, RequestError
from gradstore.store import Store, create, open


def create_like(path: str | Path, like: str | Path) -> Store:
    """Create an empty store at `path` with the settings and the attachments of the store at `like`; open it to write.

    Its fitted projections, further bases and coverage are those of `like`, so that rows of both can be merged.
    """
    other = open(like)
    other.check_files()
    header = other._header
    kept = {name: data for name, data in all_attachments(other.path).items() if name != ORIGIN}
    return create(
        path,
        dim=header.dim,
        fingerprint=header.fingerprint,
        dtype=header.dtype,
        chunk_rows=header.chunk_rows,
        column_rows=header.column_rows,
        attachments=kept,
    )


def check_like(store: Store, like: str | Path) -> None:
    """RequestError unless a store has the row format, fingerprint and bases of the store at `like`."""
    other = open(like)
    if store.fingerprint != other.fingerprint:
        raise FingerprintError.between(other.fingerprint, store.fingerprint, f"{store.path}, unlike {other.path}")
    for name, ours, theirs in (
        ("dtype", store.dtype, other.dtype),
        ("bases", [one.digest for one in store.bases], [one.digest for one in other.bases]),
    ):
        if ours != theirs:
            raise RequestError(f"{store.path}: {name} is {ours!r}, but {theirs!r} in {other.path}")
