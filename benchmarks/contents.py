"""What two runs of the same work must have in common: the bytes of a store, but for what counts its publications."""

import json
from pathlib import Path


def contents(store: Path) -> dict[str, bytes]:
    """Path inside the store -> bytes, of every file that says something of its rows.

    Left out are a manifest's commit number and checksum, which depend on how often rows were published, and the files
    that name processes (the lock, the readers' lease).
    """
    found = {}
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.name not in ("LOCK", "IN-USE"):
            data = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(data)
                manifest.pop("crc32c", None)
                manifest["manifest"].pop("commit")
                data = json.dumps(manifest, sort_keys=True).encode()
            found[str(path.relative_to(store))] = data
    return found
