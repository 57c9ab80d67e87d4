"""Preconditioning a query by the second moment of a view: score_i = g_i^T (M/n + lambda I)^-1 q (docs/methods.md).

Only the query changes, so every scan and index works as before. M is the sum of g g^T over the view's n live rows. How
the damped system is solved depends on the sizes, all to about the rounding of float32 products:

    many rows, few queries   conjugate gradients (conjugate.py) with passes over the rows (moment.py), preconditioned
                             with the moment of a sample: some ten passes instead of a whole matrix
    D <= 8192                M [D, D] and a direct solve; also where the passes do not converge, or were as many in this
                             process as the matrix takes
    n <= 8192, n < D         Woodbury through the Gram matrix [n, n]
    else                     conjugate gradients without a sample, memory for a few vectors [D]

M, its sample and the Gram matrix are cached for their set of rows, in memory and in the collection's folder. M is used
wherever it is cached.

P rows of a block, N live rows, D sketch dimensions.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from gradstore import Store, View
from gradstore.durable import crc32c, whole_file, writing
from gradstore.engine.searching.blocks import blocks_of, only_basis
from gradstore.engine.searching.conjugate import Solution, Times, solve
from gradstore.engine.searching.moment import Moment
from gradstore.errors import GradstoreError, RequestError, check_number
from gradstore.inside import check_folder, names_inside, read_inside, remove_file
from gradstore.layout import COLLECTIONS, INDEXES, store_of

log = logging.getLogger(__name__)

DAMPING = 0.1
"""Lambda in units of the mean eigenvalue of M/n."""
LARGEST_MATRIX = 8192
"""Largest side of a matrix that is formed and solved."""
_BLOCK_BYTES = 64 << 20
TOLERANCE = 1e-6
"""Relative error at which conjugate gradients end (conjugate.py)."""
_MOST_STEPS = 2000
_SAMPLE = 1 << 15
"""Rows of the sample to precondition with; an error then shrinks by about sqrt(D / rows) a pass."""
_MANY = 4 * _SAMPLE
"""From this number of rows on, a sample and a few passes take less time than the matrix."""
_PASSES_PER_DIM = 1 / 8
"""Passes over the rows that take as long as their matrix, per sketch dimension (measured: docs/benchmarks.md)."""
_EXPECTED = 20
"""Passes set aside for a query."""
_KEPT = 2
"""Matrices kept in memory for each open store."""
_MOST_COUNTED = 64

_matrices: WeakKeyDictionary[Store, OrderedDict[str, np.ndarray]] = WeakKeyDictionary()
_passes: WeakKeyDictionary[Store, OrderedDict[str, int]] = WeakKeyDictionary()
"""Passes that were made over a set of rows so far, per query, for each open store."""


def preconditioned(view: View, query: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """(M/n + lambda I)^-1 q for a query [D] or queries [Q, D]: float32 of the same shape.

    damping: lambda over the mean eigenvalue of M/n, which is mean |g|^2 / D; above 0. The same view, query and damping
    give the same numbers to TOLERANCE, and the same bytes as long as they are solved in the same way (above).
    RequestError for a damping that is not positive and finite, or a view without live rows.
    """
    check_number("damping", damping, above=0)
    live = view.live_positions
    if not len(live):
        raise RequestError(f"collection {view.collection!r} has no live row in this view: fisher needs some")
    if view.n_bases > 1:
        return _in_its_basis(view, np.atleast_2d(np.asarray(query, np.float32)), damping).reshape(np.shape(query))
    return _solved(view, live, query, damping)


def _in_its_basis(view: View, queries_QW: np.ndarray, damping: float) -> np.ndarray:
    """Precondition the block of the rows' basis; the other blocks become NaN (unknown)."""
    basis = only_basis(view, "fisher")
    block_QD = blocks_of(queries_QW, view.dim, view.n_bases)[basis]
    solved_QBD = np.full((len(queries_QW), view.n_bases, view.dim), np.nan, np.float32)
    if queries_QW.shape[1] == view.dim:
        if basis != view.n_bases - 1:
            raise RequestError(f"the query is in basis {view.n_bases - 1}, the rows of this view in basis {basis}")
        return _solved(view, view.live_positions, queries_QW, damping)
    solved_QBD[:, basis] = _solved(view, view.live_positions, block_QD, damping)
    return solved_QBD.reshape(queries_QW.shape)


def _solved(view: View, live: np.ndarray, query: np.ndarray, damping: float) -> np.ndarray:
    query_QD = np.atleast_2d(np.asarray(query, np.float64))
    # Lengths in units of their root mean square: squares of tiny norms would vanish in float32.
    scale = float(np.sqrt(np.mean(view.norms[live].astype(np.float64) ** 2)))
    ridge = damping / view.dim
    if view.dim <= LARGEST_MATRIX and (len(live) >= view.dim or len(live) > LARGEST_MATRIX):
        solved_QD = _by_passes(view, live, scale, query_QD, ridge)
        if solved_QD is None:
            solved_QD = _by_moment(view, live, scale, query_QD, ridge)
    elif len(live) <= LARGEST_MATRIX:
        solved_QD = _by_gram(view, live, scale, query_QD, ridge)
    else:
        solved_QD = _without_sample(view, live, scale, query_QD, ridge)
    result = (solved_QD / scale**2).astype(np.float32)
    return result if np.ndim(query) == 2 else result[0]


def _by_passes(view: View, live: np.ndarray, scale: float, query_QD: np.ndarray, ridge: float) -> np.ndarray | None:
    """Solve with a sample's moment and passes over the rows; None where the matrix is there, pays, or has to serve."""
    most = int(view.dim * _PASSES_PER_DIM)
    if len(live) < _MANY or _EXPECTED * len(query_QD) > most:
        return None
    key, counted = _key(view, live, "moment"), _passes.setdefault(view.store, OrderedDict())
    place = str(_folder(view) / key)
    if counted.get(place, 0) + _EXPECTED * len(query_QD) > most or _found(view, key, (view.dim, view.dim)) is not None:
        return None
    moment = Moment(view, live, scale)
    damped_DD = _kept(view, live, "sample", (view.dim, view.dim), lambda: moment.sampled(_SAMPLE)).copy()
    damped_DD.flat[:: view.dim + 1] += ridge
    inverse_DD = np.linalg.inv(np.linalg.cholesky(damped_DD))  # of the lower factor L: P^-1 = L^-T L^-1

    found = _conjugate(moment, ridge, lambda vectors_QD: vectors_QD @ inverse_DD.T @ inverse_DD, query_QD, most)
    counted[place] = counted.pop(place, 0) + found.n_products
    while len(counted) > _MOST_COUNTED:
        counted.popitem(last=False)
    if found.solved:
        log.debug("fisher: %d passes, relative error %.1e", found.n_products, found.error)
        return found.vectors_QD
    log.warning(
        "fisher: %d passes over the rows of %r left a relative error of %.1e (wanted: %.0e); the whole second moment "
        "is computed instead, which takes longer",
        *(found.n_products, view.collection, found.error, TOLERANCE),
    )
    return None


def _without_sample(view: View, live: np.ndarray, scale: float, query_QD: np.ndarray, ridge: float) -> np.ndarray:
    mean = 1 / view.dim + ridge  # eigenvalue
    most = _MOST_STEPS * len(query_QD)
    found = _conjugate(Moment(view, live, scale), ridge, lambda vectors_QD: vectors_QD / mean, query_QD, most)
    if found.solved:
        return found.vectors_QD
    raise GradstoreError(
        f"fisher: {found.n_products} passes over the rows of {view.collection!r} did not solve the damped system "
        f"(relative error {found.error:.1e}, wanted: {TOLERANCE:.0e}); use a larger damping"
    )


def _conjugate(moment: Moment, ridge: float, roughly: Times, query_QD: np.ndarray, most: int) -> Solution:
    """Conjugate gradients for M/n + ridge; queries that are not finite stay unknown."""
    known_Q = np.isfinite(query_QD).all(axis=1)
    lengths_Q1 = np.linalg.norm(query_QD[known_Q], axis=1, keepdims=True)
    lengths_Q1[lengths_Q1 == 0] = 1

    def times(vectors_QD: np.ndarray) -> np.ndarray:
        return moment.times(vectors_QD) + ridge * vectors_QD

    found = solve(times, roughly, query_QD[known_Q] / lengths_Q1, TOLERANCE, most)
    vectors_QD = np.full_like(query_QD, np.nan)
    vectors_QD[known_Q] = found.vectors_QD * lengths_Q1
    return replace(found, vectors_QD=vectors_QD)


def _by_moment(view: View, live: np.ndarray, scale: float, query_QD: np.ndarray, ridge: float) -> np.ndarray:
    damped_DD = _kept(view, live, "moment", (view.dim, view.dim), lambda: _moment(view, live, scale)).copy()
    damped_DD.flat[:: view.dim + 1] += ridge
    return np.linalg.solve(damped_DD, query_QD.T).T


def _by_gram(view: View, live: np.ndarray, scale: float, query_QD: np.ndarray, ridge: float) -> np.ndarray:
    """(G^T G/n + r I)^-1 q = (q - G^T (G G^T + n r I)^-1 G q) / r, G [N, D]."""
    n = len(live)
    damped_NN = _kept(view, live, "gram", (n, n), lambda: _gram(view, live, scale)).copy()
    damped_NN.flat[:: n + 1] += n * ridge
    products_NQ = np.concatenate([rows_PD @ query_QD.T for rows_PD in _blocks(view, live, scale, np.float64)])
    weights_NQ = np.linalg.solve(damped_NN, products_NQ)
    back_DQ, done = np.zeros(query_QD.T.shape), 0
    for rows_PD in _blocks(view, live, scale, np.float64):
        back_DQ += rows_PD.T @ weights_NQ[done : done + len(rows_PD)]
        done += len(rows_PD)
    return (query_QD - back_DQ.T) / ridge


def _blocks(view: View, live: np.ndarray, scale: float, dtype: type) -> Iterator[np.ndarray]:
    for positions, units_PD in view.scan(live, max(1, _BLOCK_BYTES // (4 * view.dim))):
        units_PD *= (view.norms[positions] / np.float32(scale))[:, None]
        yield units_PD.astype(dtype, copy=False)


def _moment(view: View, live: np.ndarray, scale: float) -> np.ndarray:
    total_DD = np.zeros((view.dim, view.dim))
    for rows_PD in _blocks(view, live, scale, np.float32):
        total_DD += rows_PD.T @ rows_PD
    return total_DD / len(live)


def _gram(view: View, live: np.ndarray, scale: float) -> np.ndarray:
    gram_NN, top = np.empty((len(live), len(live))), 0
    for rows_PD in _blocks(view, live, scale, np.float32):
        left = 0
        for others_PD in _blocks(view, live[: top + len(rows_PD)], scale, np.float32):
            products = rows_PD @ others_PD.T
            gram_NN[top : top + len(rows_PD), left : left + len(others_PD)] = products
            gram_NN[left : left + len(others_PD), top : top + len(rows_PD)] = products.T
            left += len(others_PD)
        top += len(rows_PD)
    return gram_NN


def _folder(view: View) -> Path:
    return view.store.path.resolve() / COLLECTIONS / view.collection / INDEXES / "fisher"


def _key(view: View, live: np.ndarray, name: str) -> str:
    """Name of a matrix of exactly these rows."""
    rows = crc32c(np.ascontiguousarray(view.stored.numbers[live]))
    return f"{name}-g{view.stored.generation}-{len(live)}-{rows:08x}-{crc32c(view.norms[live]):08x}"


def _found(view: View, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """The matrix of this name from memory or from the collection's folder; None without one."""
    in_memory, folder = _matrices.setdefault(view.store, OrderedDict()), _folder(view)
    place = str(folder / key)
    if place not in in_memory:
        matrix = _read(folder, key, shape)
        if matrix is None:
            return None
        _remember(in_memory, place, matrix)
    in_memory.move_to_end(place)
    return in_memory[place]


def _remember(in_memory: OrderedDict[str, np.ndarray], place: str, matrix: np.ndarray) -> None:
    in_memory[place] = matrix
    while len(in_memory) > _KEPT:
        in_memory.popitem(last=False)


def _kept(
    view: View, live: np.ndarray, name: str, shape: tuple[int, int], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """The matrix of exactly these rows: from memory, from the collection's folder, or computed and cached."""
    key = _key(view, live, name)
    matrix = _found(view, key, shape)
    if matrix is None:
        matrix = make()
        _write(_folder(view), name, key, matrix)
        _remember(_matrices[view.store], str(_folder(view) / key), matrix)
    return matrix


def _read(folder: Path, key: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Read a cached matrix whose size and checksum (in the file name) match; None without one."""
    store = store_of(folder.parent.parent)
    try:
        names = [name for name in names_inside(folder, store) if name.startswith(f"{key}-") and name.endswith(".f64")]
        for path in (folder / name for name in names):
            if path.lstat().st_size == 8 * shape[0] * shape[1]:
                matrix = np.frombuffer(read_inside(path, store), "<f8")
                if path.stem.endswith(f"-{crc32c(matrix):08x}") and np.isfinite(matrix).all():
                    return matrix.reshape(shape)
    except (GradstoreError, OSError) as error:
        log.warning("%s: the matrices kept here are not read (%s)", folder, error)
    return None


def _write(folder: Path, name: str, key: str, matrix: np.ndarray) -> None:
    """Cache a matrix on disk and remove the one of other rows. The cache only saves time: a failed write only warns."""
    path = folder / f"{key}-{crc32c(np.ascontiguousarray(matrix)):08x}.f64"
    try:
        check_folder(folder, store_of(folder.parent.parent))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            matrix.astype("<f8", copy=False).tofile(unfinished)
        store = store_of(folder.parent.parent)
        for other in names_inside(folder, store):
            if other != path.name and re.fullmatch(rf"{re.escape(name)}-g.*\.f64", other):
                remove_file(folder / other, store)
    except (GradstoreError, OSError) as error:
        log.warning("%s: the %s matrix is not kept (%s)", folder, name, error)
