"""Errors reach another process whole: workers' exceptions are pickled on their way."""

import pickle

import pytest

from gradstore import errors


@pytest.mark.parametrize(
    "error",
    [
        errors.FingerprintError.between({"seed": 0}, {"seed": 1}, "store"),
        *[
            kind("row 3: wrong")
            for kind in vars(errors).values()
            if isinstance(kind, type) and issubclass(kind, errors.GradstoreError)
        ],
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: errors.GradstoreError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_status) == (type(error), str(error), error.exit_status)


def test_a_line_has_an_end() -> None:
    """A name of a megabyte does not make a line of one; begin and end stay."""
    error = errors.RequestError(f"file.jsonl, row 3: id {'x' * 1_000_000!r} is there twice; use one")
    assert len(str(error)) <= errors.LONGEST_LINE
    assert str(error).startswith("file.jsonl, row 3")
    assert str(error).endswith("use one")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
