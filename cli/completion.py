"""What a shell completes: the names of collections in the store on the line. An error completes to nothing."""

from pathlib import Path

import typer


def collections(context: typer.Context, incomplete: str) -> list[str]:
    """Collections of the line's store that begin with this; a store at a URL, or a broken one, gives none."""
    from gradstore.layout import COLLECTIONS, DERIVED

    # Behind an option that still lacks its value nothing is parsed, and the store is one of the words that are left.
    words = [context.params.get("store"), *context.args]
    folders = [Path(str(word)) / COLLECTIONS for word in words if word is not None]
    try:
        names = [folder.name for place in folders if place.is_dir() for folder in place.iterdir() if folder.is_dir()]
    except OSError:
        return []
    return sorted(name for name in names if name.startswith(incomplete) and not name.endswith(DERIVED))
