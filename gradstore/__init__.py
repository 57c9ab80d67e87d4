"""The store of policy-gradient sketches: versioned, append-only, crash-safe, plain Zarr v3.

    store = gradstore.create("pool.gs", dim=4096, fingerprint={...})
    store.add_problems("pool", gradstore.read_problems("pool.jsonl"))
    with store.writer("pool", step=0) as writer:
        writer.append(ids, sketches)
    view = store.view("pool", at=0)

The public names load on first use, so that `import gradstore` costs nothing and never imports torch, zarr or
pyarrow. docs/format.md describes the files.
"""

from typing import TYPE_CHECKING

from gradstore.lazy import names_of

if TYPE_CHECKING:
    from gradstore.budget import RowFormat as RowFormat
    from gradstore.budget import row_format as row_format
    from gradstore.compact import CompactReport as CompactReport
    from gradstore.errors import DamagedError as DamagedError
    from gradstore.errors import FingerprintError as FingerprintError
    from gradstore.errors import GradstoreError as GradstoreError
    from gradstore.errors import LockedError as LockedError
    from gradstore.errors import NotAStoreError as NotAStoreError
    from gradstore.errors import RequestError as RequestError
    from gradstore.problems import read_problems as read_problems
    from gradstore.problems import to_verl as to_verl
    from gradstore.remote import mirror as mirror
    from gradstore.remote import open_remote as open_remote
    from gradstore.rounds import Round as Round
    from gradstore.state import State as State
    from gradstore.store import Store as Store
    from gradstore.store import create as create
    from gradstore.store import open as open
    from gradstore.verify import Finding as Finding
    from gradstore.verify import Report as Report
    from gradstore.view import View as View
    from gradstore.writer import Writer as Writer

_MODULE_OF = {
    "CompactReport": "compact",
    "DamagedError": "errors",
    "Finding": "verify",
    "FingerprintError": "errors",
    "GradstoreError": "errors",
    "LockedError": "errors",
    "NotAStoreError": "errors",
    "Report": "verify",
    "RequestError": "errors",
    "Round": "rounds",
    "RowFormat": "budget",
    "State": "state",
    "Store": "store",
    "View": "view",
    "Writer": "writer",
    "create": "store",
    "mirror": "remote",
    "open": "store",
    "open_remote": "remote",
    "read_problems": "problems",
    "row_format": "budget",
    "to_verl": "problems",
}

__all__ = sorted(_MODULE_OF)
__getattr__ = names_of(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
