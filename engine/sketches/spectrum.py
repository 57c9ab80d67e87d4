"""Leading directions of rows that arrive in batches, computed from a sum over the rows only.

Up to `WIDEST` columns, the sum is the covariance itself. For wider rows it is the covariance times K random columns.
The Nystroem approximation then gives the leading eigenvectors (Halko, Martinsson and Tropp 2011, section 5.5; Tropp et
al. 2017, algorithm 3), with W x K memory instead of W x W. Partial sums, such as those of ranks, can be added up.

Dimension letters: N rows of a batch, W their width, K columns kept, R directions.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WIDEST = 512
"""Width up to which a whole covariance is summed: 1 MB of float32."""
COLUMNS = 8
"""Random columns per requested direction."""
_RELATIVE = 1e-6
"""Energy of a direction, relative to the largest, that counts as rounding error of the float32 sums."""
_TINY = 1e-300
"""Avoids a division by zero for a sum of zeros."""
_SEED = 0


class Spectrum:
    """Sum of rows^T rows, in full or times random columns; sums of equal width and rank can be added up."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        """rank: number of directions that will be requested."""
        n_columns = COLUMNS * rank
        whole = width <= max(WIDEST, n_columns)
        self._columns_WK = None if whole else _columns(width, n_columns, device)
        self.sum_WK = torch.zeros(width, width if whole else n_columns, device=device)
        """The covariance, or its product with the random columns, float32."""

    def add(self, rows_NW: Tensor) -> None:
        """Adds float32 [N, W] rows."""
        right_NK = rows_NW if self._columns_WK is None else rows_NW @ self._columns_WK
        self.sum_WK.addmm_(rows_NW.T, right_NK)

    def leading(self, rank: int) -> np.ndarray:
        """Orthonormal directions, those of most energy first, float32 [W, rank].

        Fewer if the rows span fewer, unless all W are requested; none if all rows are zero.
        """
        sum_WK = self.sum_WK.double()
        scale = sum_WK.norm()
        scaled_WK = sum_WK / torch.where(scale > 0, scale, 1)
        if self._columns_WK is None:
            energies_K, vectors_WK = torch.linalg.eigh(scaled_WK)  # ascending
        else:
            energies_K, vectors_WK = _nystroem(scaled_WK, self._columns_WK.double())
        found_XR = torch.cat([energies_K[None], vectors_WK])[:, -rank:].cpu().numpy()  # one wait for the GPU
        energies_R, vectors_WR = found_XR[0, ::-1], found_XR[1:, ::-1]
        least = _RELATIVE * energies_R[0] if rank < len(vectors_WR) else -np.inf
        kept_WR = vectors_WR[:, energies_R > least] if energies_R[0] > 0 else vectors_WR[:, :0]
        return np.ascontiguousarray(np.linalg.qr(kept_WR)[0], np.float32)


@lru_cache
def _columns(width: int, n: int, device: torch.device) -> Tensor:
    """Random columns, the same for all sums of one width, so that they are stored once."""
    random = torch.Generator().manual_seed(_SEED)
    return torch.randn(width, n, generator=random).to(device)


def _nystroem(product_WK: Tensor, columns_WK: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and eigenvectors of a covariance, from its product with random columns.

    A small shift is added to the diagonal, so that the inner product with the columns is positive definite. It is
    subtracted from the eigenvalues again.
    """
    shift = product_WK.norm() * 1e-7
    shifted_WK = product_WK + shift * columns_WK
    inner_KK = columns_WK.T @ shifted_WK
    energies_K, vectors_KK = torch.linalg.eigh((inner_KK + inner_KK.T) / 2)
    energies_K = torch.maximum(energies_K, energies_K[-1:] * 1e-14 + _TINY)
    root_WK = shifted_WK @ (vectors_KK / energies_K.sqrt())
    squares_K, turned_KK = torch.linalg.eigh(root_WK.T @ root_WK)  # decomposing all W rows takes far longer
    vectors_WK = root_WK @ (turned_KK / (squares_K.clamp(min=0) + _TINY).sqrt())
    return (squares_K - shift).clamp(min=0), vectors_WK
