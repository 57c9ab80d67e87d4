"""Indexes over the rows of a collection: approximate candidates first, exact scores from the stored rows second.

    kinds.py       what an index kind must do, and the kinds by name
    faiss_kinds.py, turbovec_kind.py   the kinds
    rows.py        Index: which stored row each entry is, extension by new rows, search with rescoring
    recall.py      the self-test every build ends in; it also sets how many candidates are fetched
    folder.py      an index beside its collection, on disk
    auto.py        which way of answering is the fastest for N, D, k, queries and device
    serve.py       index_for: open, extend, build or refuse

Every score returned is computed from the stored row; an index only decides which rows are looked at.
"""

from gradstore.engine.searching.indexes.index import Index
from gradstore.engine.searching.indexes.kinds import KINDS
from gradstore.engine.searching.indexes.serve import index_for

__all__ = ["KINDS", "Index", "index_for"]
