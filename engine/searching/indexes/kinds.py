"""Interface of an index kind, and the kinds by name.

Q queries, N entries, M candidates, D sketch dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from gradstore.errors import RequestError

Rows = Literal["unit", "gradient"]
"""Content of the entries: unit rows, or unit rows times their norms."""


@dataclass(frozen=True, slots=True, order=True)
class Effort:
    """How much of the index a search reads; the self-test picks the smallest effort with enough recall."""

    factor: float = 1.0
    """Candidates fetched per requested result."""
    probes: int = 0
    """Inverted lists read, for kinds that have lists."""


class Kind(ABC):
    """Base class of index kinds: finds the entries with the largest inner products; numbers them in order of `add`."""

    name: ClassVar[str]
    masks: ClassVar[bool] = True
    """True: a search can be restricted to some entries."""
    exact: ClassVar[bool] = False
    scaled: ClassVar[bool] = False
    """True: stays accurate on gradients with heavy-tailed norms. False: a search by inner product first gets the
    cosine of every entry, then multiplies by the norms."""

    def __init__(self, dim: int, n_expected: int) -> None:
        self.dim = dim
        self.n_expected = n_expected

    @abstractmethod
    def __len__(self) -> int:
        """Number of entries."""

    @abstractmethod
    def add(self, rows_PD: np.ndarray) -> None:
        """Append entries, float32 [P, D]."""

    @abstractmethod
    def search(
        self, queries_QD: np.ndarray, m: int, effort: Effort, mask_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Approximate inner products [Q, M] and entries int64 [Q, M], -1 where there are fewer than m."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write to a new file."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> "Kind":
        """Open a file written by `save`; memory-mapped if the library can."""

    def train(self, sample_PD: np.ndarray) -> None:  # noqa: B027 - most kinds learn nothing
        """Train on a sample of rows, once, before the first `add`."""

    def efforts(self) -> list[Effort]:
        """Efforts that the self-test tries, cheapest first."""
        return [Effort(1.5), Effort(2), Effort(3), Effort(5), Effort(8), Effort(16)]


_MODULE_OF = {
    "flat": ("gradstore.engine.searching.indexes.faiss_kinds", "Flat", "faiss"),
    "sq": ("gradstore.engine.searching.indexes.faiss_kinds", "ScalarQuantizer", "faiss"),
    "rabitq": ("gradstore.engine.searching.indexes.faiss_kinds", "RaBitQ", "faiss"),
    "rabitq_fastscan": ("gradstore.engine.searching.indexes.faiss_kinds", "RaBitQFastScan", "faiss"),
    "ivf": ("gradstore.engine.searching.indexes.faiss_kinds", "InvertedLists", "faiss"),
    "turbovec": ("gradstore.engine.searching.indexes.turbovec_kind", "Turbovec", "turbovec"),
}

KINDS: Mapping[str, str] = {
    "flat": "float32 rows, exact (FAISS)",
    "sq": "8 bits a dimension (FAISS)",
    "rabitq": "1 bit a dimension (FAISS)",
    "rabitq_fastscan": "1 bit a dimension, SIMD layout (FAISS); loses its recall at thousands of dimensions",
    "ivf": "inverted lists of 8-bit rows (FAISS)",
    "turbovec": "4 bits a dimension (turbovec)",
}
"""The kinds of index and a description of their entries."""


def installed(name: str) -> bool:
    """Whether the library of a kind is installed; does not import it."""
    return find_spec(_MODULE_OF[name][2]) is not None


def kind_class(name: str) -> type[Kind]:
    """The class of a kind; RequestError if the kind is unknown or its library is not installed."""
    if name not in _MODULE_OF:
        raise RequestError(f"index {name!r} is not one of {', '.join(KINDS)}")
    module, attribute, library = _MODULE_OF[name]
    if not installed(name):
        package = "'gradstore[cpu]' or 'gradstore[gpu]'" if library == "faiss" else library
        raise RequestError(f"the {name} index needs {library}: pip install {package}")
    found: type[Kind] = getattr(import_module(module), attribute)
    return found
