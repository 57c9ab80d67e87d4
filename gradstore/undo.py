"""Undo the creation of a store if the first that was to fill it fails: a failed command leaves no half of a store."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstore.store import Store


@contextmanager
def undone_on(errors: type[BaseException], store: "Store") -> Iterator[None]:
    """Remove a store that was just created if the block raises one of these errors and no collection began."""
    try:
        yield
    except errors:
        if not store.collections:
            shutil.rmtree(store.path, ignore_errors=True)
        raise
