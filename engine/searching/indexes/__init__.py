"""Indexes over the rows of a collection: approximate candidates first, exact scores from the stored rows second.

    kinds.py       the interface of an index kind, and the kinds by name
    flat_kind.py, turbovec_kind.py   the kinds
    index.py       Index: maps entries to stored rows, adds new rows, searches and rescores
    recall.py      self-test at the end of every build; it also sets how many candidates are fetched
    folder.py      an index on disk, in its collection's folder
    auto.py        choice of the fastest way to answer, given N, D, k, queries and device
    serve.py       index_for: open, extend, build or refuse

Every returned score is computed from the stored row; an index only decides which rows are read.
"""

from gradstore.engine.searching.indexes.index import Index
from gradstore.engine.searching.indexes.kinds import KINDS
from gradstore.engine.searching.indexes.serve import index_for

__all__ = ["KINDS", "Index", "index_for"]
