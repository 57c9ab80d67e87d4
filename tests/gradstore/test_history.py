"""`Store.history`: every row ever, against a list kept by hand."""

import numpy as np
import pytest

import gradstore
from gradstore import State
from gradstore.errors import RequestError


@pytest.fixture
def store(tmp_path):
    return gradstore.create(tmp_path / "store", dim=4, fingerprint={})


def test_every_row_oldest_first(store) -> None:
    """A measurement that is lost or out of order tilts every posterior made from the history."""
    random = np.random.default_rng(0)
    ids = [f"p{i}" for i in range(9)]
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in ids])
    written = []
    for step in (0, 20, 10, 20):
        some = list(random.permutation(ids)[:5])
        states = random.choice([State.LIVE, State.NO_SIGNAL, State.FAILED], 5)
        rates = random.random(5).astype(np.float32)
        counts = random.integers(1, 9, 5)
        with store.writer("pool", step=step) as writer:
            reasons = ["broken" if state == State.FAILED else "" for state in states]
            writer.append(
                some, random.normal(size=(5, 4)), state=states, pass_rate=rates, n_rollouts=counts, reason=reasons
            )
        view = store.view("pool")
        for name, state, rate, count in zip(some, states, rates, counts, strict=True):
            written.append((name, step, State(state).name.lower(), float(rate), int(count)))
        assert len(view) == len({name for name, *_ in written})
    expected = sorted(written, key=lambda row: row[1])
    columns = ("id", "step", "state", "pass_rate", "n_rollouts")
    found = [tuple(row[name] for name in columns) for row in store.history("pool").to_pylist()]
    assert found == expected
    early = [tuple(row[name] for name in columns) for row in store.history("pool", at=10).to_pylist()]
    assert early == [row for row in expected if row[1] <= 10]


def test_norms_and_unknown_pass_rates(store) -> None:
    """What was not measured stays unknown; norms are those of the view."""
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in "ab"])
    with store.writer("pool", step=3) as writer:
        writer.append(["b", "a"], np.array([[3.0, 4, 0, 0], [0, 0, 0, 2]]))
    rows = store.history("pool").to_pylist()
    assert [(row["id"], row["norm"]) for row in rows] == [("b", 5.0), ("a", 2.0)]
    assert all(np.isnan(row["pass_rate"]) and row["n_rollouts"] == 0 for row in rows)


def test_deleted_problems_have_no_history(store) -> None:
    """What was deleted must not come back through its old rows; what is appended again begins anew."""
    store.add_problems("pool", [{"id": name, "prompt": "?"} for name in "abc"])
    for step in (0, 1):
        with store.writer("pool", step=step) as writer:
            writer.append(list("abc"), np.ones((3, 4)))
    store.delete("pool", ["a", "b"])
    with store.writer("pool", step=2) as writer:
        writer.append(["b"], np.ones((1, 4)))
    table = store.history("pool")
    assert list(zip(table["id"].to_pylist(), table["step"].to_pylist(), strict=True)) == [("c", 0), ("c", 1), ("b", 2)]


def test_empty_and_unknown(store) -> None:
    """No rows is a table with the columns; no collection is an error."""
    store.add_problems("pool", [{"id": "a", "prompt": "?"}])
    table = store.history("pool")
    assert table.num_rows == 0
    assert table.column_names == ["id", "step", "state", "norm", "pass_rate", "n_rollouts"]
    with pytest.raises(RequestError, match="no collection 'nothing'"):
        store.history("nothing")
