"""Interface of an index kind, and the kinds by name.

Q queries, N entries, M candidates, D sketch dimensions.
"""

from abc import ABC, abstractmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np

from gradstore.errors import RequestError, check_known


class Kind(ABC):
    """Base class of index kinds: finds the entries with the largest inner products; numbers them in order of `add`.

    A kind stays accurate on gradients with heavy-tailed norms.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    factors: ClassVar[tuple[float, ...]] = ()
    """Candidates fetched per requested result, as the self-test tries them, ascending; none for an exact kind."""

    @abstractmethod
    def __init__(self, dim: int) -> None:
        """An empty index of rows with `dim` dimensions."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of entries."""

    @abstractmethod
    def add(self, rows_PD: np.ndarray) -> None:
        """Append entries, float32 [P, D]."""

    @abstractmethod
    def search(self, queries_QD: np.ndarray, m: int, mask_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Approximate inner products [Q, M] and entries int64 [Q, M], -1 where there are fewer than m.

        mask_N: bool [N], the entries to search among; None: all.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write to a new file."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path, n: int, dim: int) -> "Kind":
        """Open a file written by `save`, of n entries of `dim` dimensions; memory-mapped if the library can.

        ValueError, OSError or RuntimeError for another file, such as one of another version of the library.
        """


_MODULE_OF = {
    "flat": ("gradstore.engine.searching.indexes.flat_kind", "Flat", "faiss", "'gradstore[cpu]' or 'gradstore[gpu]'"),
    "turbovec": ("gradstore.engine.searching.indexes.turbovec_kind", "Turbovec", "turbovec", "turbovec"),
}
"""Module, class, library and what to install."""

KINDS = tuple(_MODULE_OF)
_DROPPED = ("ivf", "rabitq", "rabitq_fastscan", "sq")


def installed(name: str) -> bool:
    """Whether the library of a kind is installed; does not import it."""
    return find_spec(_MODULE_OF[name][2]) is not None


def check_kind(name: str) -> None:
    """RequestError for an unknown kind; for one of earlier versions it says what to build instead."""
    if name in _DROPPED:
        raise RequestError(
            f"index {name!r} is gone, because a scan is faster: rebuild it as turbovec (`--index turbovec`), or let "
            f"auto choose. Its folders `indexes/{name}-*` beside the collection may be removed"
        )
    check_known("index", name, ("auto", "scan", *KINDS))


def kind_class(name: str) -> type[Kind]:
    """The class of a kind; RequestError if the kind is unknown or its library is not installed."""
    check_kind(name)
    module, attribute, library, package = _MODULE_OF[name]
    if not installed(name):
        raise RequestError(f"the {name} index needs {library}: pip install {package}")
    found: type[Kind] = getattr(import_module(module), attribute)
    return found
