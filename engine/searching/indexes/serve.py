"""index_for: provides the index for a search; opens, extends, builds or refuses it."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from gradstore import Store, View
from gradstore.engine.searching.indexes.auto import Situation, choose
from gradstore.engine.searching.indexes.folder import IndexFolder, Kept, Refusal
from gradstore.engine.searching.indexes.index import Index
from gradstore.engine.searching.indexes.kinds import KINDS, check_kind, installed
from gradstore.engine.searching.indexes.recall import rung, self_test
from gradstore.engine.searching.products import registers
from gradstore.errors import GradstoreError

_SAVE_SHARE = 1 / 64
"""Share of new entries above which an extended index is written again; below it, adding them again is faster."""

log = logging.getLogger(__name__)
_open: WeakKeyDictionary[Store, dict[Path, Kept]] = WeakKeyDictionary()
_lock = threading.RLock()


def index_for(
    view: View,
    k: int = 100,
    *,
    metric: str = "cosine",
    kind: str = "auto",
    n_queries: int = 1,
    together: bool = False,
    recall: float = 0.99,
    queries: np.ndarray | None = None,
    keep: bool = True,
) -> Index | None:
    """The index to search this view with, or None if the exact scan should answer.

    kind: one of KINDS; `auto`: the fastest way to answer n_queries queries, one after the other
    or together, which may be `scan`. metric: cosine, dot
    or fisher. recall: least mean recall at k, in the self-test, against the exact scan. An index below it is refused
    with a warning, and the refusal is remembered. queries: float [Q, D], test queries instead of sampled ones.
    keep: read and write the index in the collection's folder; if that is not writable, the index is only in memory.
    RequestError for an unknown kind or a missing library.
    """
    n_live = int(view.live.sum())
    k = min(k, n_live)
    if kind == "scan" or k == 0:
        return None
    if kind == "auto":
        kind = _chosen(view, n_live, k, metric, n_queries, together)
        if kind == "scan":
            return None
    check_kind(kind)
    folder = IndexFolder(view, kind, metric)
    if queries is not None:
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    with _lock:
        opened = _open.setdefault(view.store, {})
        kept = opened.get(folder.path) or (folder.read() if keep else None)
        if kept is not None and _usable(kept, view, k, n_live, recall):
            opened[folder.path] = kept
            return _offer(kept, kind, k, n_live, recall)

        def make(found: Kept | None) -> Kept:
            return _made(found, view, kind, metric, rung(k, n_live), recall, queries)

        kept = _kept_on_disk(folder, make, kept) if keep else make(kept)
        opened[folder.path] = kept
        return _offer(kept, kind, k, n_live, recall)


def _chosen(view: View, n_live: int, k: int, metric: str, n_queries: int, together: bool = False) -> str:
    available = {name for name in KINDS if installed(name)}
    built = frozenset(name for name in available if IndexFolder(view, name, metric).exists())
    asked = Situation(n_live, view.dim, k, n_queries, built, _gpu_bytes(), together, registers())
    return choose(asked, available)


def _gpu_bytes() -> int:
    """Free memory of the GPU in bytes; 0 if FAISS finds none."""
    if not Path("/dev/nvidia0").exists() or not installed("flat"):
        return 0
    import faiss

    if not hasattr(faiss, "get_num_gpus") or not faiss.get_num_gpus():
        return 0
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def _usable(kept: Kept, view: View, k: int, n_live: int, recall: float) -> bool:
    """Whether no build, test or write is needed; adds new rows."""
    if _refusal(kept, k, n_live, recall) is not None:
        return True
    index = kept.index
    if index is None or (kept.recall < recall and not index.kind.exact) or not index.holds(view) or index.worn(view):
        return False
    index.extend(view)
    return index.n_candidates(k) is not None and not index.due() and len(index) <= (1 + _SAVE_SHARE) * kept.n_saved


def _refusal(kept: Kept, k: int, n_live: int, recall: float) -> Refusal | None:
    """A refusal that still applies: its recall is below the requested, its k no larger, its row count similar."""
    for refusal in kept.refusals:
        if recall > refusal.recall and rung(k, n_live) >= refusal.k and 0.8 < n_live / max(1, refusal.n_rows) < 1.25:
            return refusal
    return None


def _made(
    kept: Kept | None, view: View, kind: str, metric: str, k: int, recall: float, queries: np.ndarray | None
) -> Kept:
    """Extend or build the index and test it at k."""
    index = kept.index if kept is not None else None
    if kept is None or index is None or not index.holds(view) or index.worn(view):
        index = Index.build(view, kind, metric)
        kept = Kept(index, recall)
    else:
        index.extend(view)
    if index.due() or kept.recall < recall:
        index.tested = ()
    kept.recall = max(recall, kept.recall) if index.tested else recall
    if index.kind.exact:
        index.n_tested = len(index)
        return kept
    result = self_test(index, view, recall, k, queries)
    index.n_tested = len(index)
    if result.recall >= recall:
        index.tested = tuple(sorted({*(t for t in index.tested if t.k != k), result}, key=lambda t: t.k))
    else:
        refusal = Refusal(k, result.recall, recall, int(view.live.sum()))
        kept.refusals = (refusal, *(r for r in kept.refusals if r.k != refusal.k))
        if not index.tested:
            kept.index = None
    return kept


def _kept_on_disk(folder: IndexFolder, make: Callable[[Kept | None], Kept], kept: Kept | None) -> Kept:
    """Make the index under the folder's lock and write it; if it cannot be written, it stays in memory only.

    In place of an index that cannot be read and cannot be replaced the scan answers: no command should build it anew.
    """
    with folder.building() as writable:
        kept = kept or folder.read()
        if kept is None and folder.fault:
            then = "it is built anew" if writable else "its folder cannot be written, so the exact scan serves"
            log.warning("%s: this index cannot be used (%s): %s", folder.path, folder.fault, then)
            if not writable:
                return Kept(None, 0.0)
        kept = make(kept)
        try:
            if writable:
                folder.write(kept)
        except GradstoreError as error:
            log.warning("the %s index is not kept: %s", folder.kind, error)
    return kept


def _offer(kept: Kept, kind: str, k: int, n_live: int, recall: float) -> Index | None:
    refusal = _refusal(kept, k, n_live, recall)
    if refusal is None:
        return kept.index
    log.warning(
        "the %s index is refused: recall %.3f at k %d in its self-test, asked for %s; the exact scan serves",
        kind,
        refusal.recall,
        refusal.k,
        recall,
    )
    return None
