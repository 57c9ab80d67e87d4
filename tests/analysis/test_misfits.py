"""Requests to the explorer that no page of it sends."""

from typing import Any

import pytest

import gradstore
from gradstore.analysis.explorer.app import make_app
from gradstore.analysis.explorer.catalogue import Catalogue

_INPUTS = [
    {"id": "problem-id", "property": "value", "value": "p0001"},
    {"id": "problem-metric", "property": "value", "value": "cosine"},
    {"id": "problem-step", "property": "value", "value": "newest"},
    {"id": "problem-rollouts", "property": "value", "value": "all"},
    {"id": "theme", "property": "data", "value": "light"},
]


def _asked(**changes: Any) -> dict[str, Any]:
    inputs = [part | {"value": changes.get(part["id"], part["value"])} for part in _INPUTS]
    outputs = [{"id": name, "property": "children"} for name in ("problem-view", "problem-found")]
    output = "..problem-view.children...problem-found.children.."
    return {"output": output, "outputs": outputs, "inputs": inputs, "changedPropIds": [], "state": []}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"null",
        b"{}",
        _asked(**{"problem-step": "secret"}),
        _asked(**{"problem-step": ["a"]}),
        _asked(**{"problem-id": ["p0001"]}),
        _asked() | {"output": "nobody.children"},
        _asked() | {"inputs": [1, 2]},
        _asked() | {"outputs": []},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_body_that_does_not_fit_is_one_line(history: Any, body: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A status of 500 and a traceback in the server's terminal for each of them were what any page could cause."""
    client = make_app(Catalogue(gradstore.open(history.store.path), "pool", ("bench",))).server.test_client()
    given = {"data": body, "content_type": "application/json"} if isinstance(body, bytes) else {"json": body}
    answer = client.post("/_dash-update-component", base_url="http://localhost", **given)
    assert answer.status_code == 400
    assert len(answer.text.splitlines()) == 1
    assert all(record.exc_info is None for record in caplog.records)


def test_a_body_that_fits_is_answered(history: Any) -> None:
    client = make_app(Catalogue(gradstore.open(history.store.path), "pool", ("bench",))).server.test_client()
    answer = client.post("/_dash-update-component", base_url="http://localhost", json=_asked())
    assert answer.status_code == 200
    assert "p0001" in answer.text
    assert client.get("/_dash-component-suites/os/x.js", base_url="http://localhost").status_code == 404
    assert client.get("/nothing.js", base_url="http://localhost").status_code == 404
