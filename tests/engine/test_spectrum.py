"""Directions from sums over rows are the leading eigenvectors of the rows' covariance."""

import numpy as np
import pytest
import torch

from gradstore.engine.sketches.spectrum import WIDEST, Spectrum

CPU = torch.device("cpu")
WIDTHS = [40, WIDEST + 100]
"""A covariance summed whole, and one known by its product with random columns."""


def rows_of(width: int, n: int = 300, seed: int = 0, decay: float = 0.7) -> torch.Tensor:
    """Rows whose energy falls by `decay` squared from one direction to the next, in directions of no axis."""
    random = torch.Generator().manual_seed(seed)
    turned_WW = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0]
    lengths_W = decay ** torch.arange(width, dtype=torch.float64)
    return ((torch.randn(n, width, generator=random, dtype=torch.float64) * lengths_W) @ turned_WW.T).float()


def spectrum_of(rows: torch.Tensor, parts: int, rank: int) -> Spectrum:
    found = Spectrum(rows.shape[1], rank, CPU)
    for part in rows.chunk(parts):
        found.add(part)
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_directions_are_those_of_the_full_covariance(width: int) -> None:
    """Against torch.linalg.eigh of the whole covariance: as much energy, and the same directions, first the largest."""
    rows, rank = rows_of(width), 6
    covariance = rows.double().T @ rows.double()
    energies, vectors = torch.linalg.eigh(covariance)
    best = vectors[:, -rank:].flip(1).numpy()
    found = spectrum_of(rows, 5, rank).leading(rank)
    assert found.shape == (width, rank)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.T @ found, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(np.abs((found * best).sum(0)), 1, atol=2e-3)
    held = np.trace(found.T @ covariance.numpy() @ found)
    assert held == pytest.approx(float(energies[-rank:].sum()), rel=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_slowly_falling_energies_are_held_nearly_as_well(width: int) -> None:
    """Random columns see a flat spectrum least well: a fit on gradients must still lose little."""
    rows, rank = rows_of(width, n=1500, decay=0.97), 6
    covariance = rows.double().T @ rows.double()
    found = spectrum_of(rows, 5, rank).leading(rank)
    held = float(np.trace(found.T @ covariance.numpy() @ found))
    assert held > 0.97 * float(torch.linalg.eigvalsh(covariance)[-rank:].sum())


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_of_parts_add_up(width: int) -> None:
    """Ranks add their sums: together they must give the directions of all rows."""
    rows, rank = rows_of(width), 4
    whole = spectrum_of(rows, 1, rank)
    one, two = (spectrum_of(part, 1, rank) for part in rows.chunk(2))
    one.sum_WK += two.sum_WK
    np.testing.assert_allclose(np.abs((one.leading(rank) * whole.leading(rank)).sum(0)), 1, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_rows_do_not_span_is_no_direction(width: int) -> None:
    """Directions of rounding would take the place of directions of gradients; all of a narrow side may be asked for."""
    rows = rows_of(width)[:3]
    assert spectrum_of(rows, 1, 6).leading(6).shape == (width, 3)
    assert spectrum_of(0 * rows, 1, 6).leading(6).shape == (width, 0)


def test_all_directions_of_a_side_are_a_rotation() -> None:
    """A side that is kept whole loses nothing, whatever its rows span."""
    found = spectrum_of(rows_of(12)[:3], 1, 12).leading(12)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-5)
