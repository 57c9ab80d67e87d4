"""What the benchmarks say that a command took."""

import sys

import pytest

from benchmarks.peaks import outcome

MB = 1_000_000


def _held(megabytes: int) -> int:
    return outcome([sys.executable, "-c", f"held = bytearray({megabytes} * {MB}); held[::4096] = held[::4096]"]).peak


def test_the_peak_is_the_commands_own() -> None:
    """Linux starts a child's peak at its parent's: without the small process between, a large caller would show."""
    ours = bytearray(300 * MB)
    ours[::4096] = b"x" * len(ours[::4096])
    assert _held(0) < 100 * MB
    assert _held(200) - _held(0) == pytest.approx(200 * MB, abs=20 * MB)


def test_a_failure_is_an_outcome() -> None:
    done = outcome([sys.executable, "-c", "import sys; print('a\\nb'); sys.exit('what went wrong')"])
    assert (done.status, done.out, done.said) == (1, "a\nb\n", "what went wrong\n")
    assert done.seconds > 0
    assert done.processor > 0


def test_a_signal_is_an_outcome() -> None:
    assert outcome([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).status == -9
