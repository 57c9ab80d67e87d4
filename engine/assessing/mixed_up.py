"""Signs that rollouts are collected under a wrong name: one nearly that of a collection, or with another's problems."""

from collections.abc import Collection

from gradstore import Store
from gradstore.errors import near_miss
from gradstore.layout import DERIVED


def mixed_up(store: Store, collection: str, ids: Collection[str]) -> str | None:
    """A sentence if problems with these ids are probably not meant for this collection; None if all looks right."""
    others = [name for name in store.collections if name != collection and not name.endswith(DERIVED)]
    if collection not in store.collections:
        near = near_miss(collection, others)
        return (
            f"{collection!r} is a new collection of {store.path}, which has {', '.join(others)}{near}" if near else None
        )
    if not set(store.view(collection).ids.tolist()).isdisjoint(ids):
        return None
    for name in others:
        if set(ids) <= set(store.view(name).ids.tolist()):
            return f"all of these problems are in {name!r}, and none was in {collection!r} so far: is that meant?"
    return None
