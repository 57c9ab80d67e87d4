"""What a pass rate says of a row."""

import numpy as np
import pytest

from gradstore.engine.forecasting.pass_rates import effective, slack


def test_rollouts_count_by_what_they_tell() -> None:
    """All of them at a rate of one half, few at a rate near 0 or 1, and all where the rate is not known."""
    rates = np.array([0.5, 1 / 16, np.nan, -1.0])
    assert effective(np.full(4, 16.0), rates) == pytest.approx([16, 64 * 15 / 256, 16, 16])
    assert slack(rates) == pytest.approx([0.25, 15 / 256, np.nan, np.nan], nan_ok=True)
