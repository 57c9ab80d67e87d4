"""Statistics of a collection, for `Store.info` and `gradstore info`."""

from typing import Any

import numpy as np

from gradstore.durable import folder_bytes
from gradstore.lock import describe_holder, is_running, read_holder
from gradstore.snapshot import Snapshot
from gradstore.state import State


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """Describe a collection as a dict for JSON; states count each problem's newest row."""
    newest = snapshot.newest(None)
    states = snapshot.column("state")[newest[newest >= 0]]
    holder = read_holder(snapshot.collection)
    return {
        "problems": len(snapshot.problems),
        "deleted": len(snapshot.deleted()),
        "rows": snapshot.manifest.rows,
        "states": {state.name.lower(): int(np.sum(states == state)) for state in State},
        "steps": snapshot.rows_by_step(),
        "commit": snapshot.manifest.commit,
        "generation": snapshot.manifest.folder,
        "bytes": folder_bytes(snapshot.collection, on_disk=True),
        "writer": describe_holder(holder) if is_running(holder) else "",
        "interrupted_writer": "" if is_running(holder) else describe_holder(holder),
    }
