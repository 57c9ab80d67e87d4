"""`push`, `pull`, `open`, and reading commands that are given a URL."""

import json
from pathlib import Path

import pytest

from tests.s3 import S3

URL = "s3://stores/pool.gs"


def test_a_store_travels(cli, s3: S3, small_store, tmp_path: Path) -> None:
    """A query of the URL, of the copy and of the store are one answer."""
    store = small_store(tmp_path / "store")
    status, out, err = cli("push", store, URL, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["changed"]
    assert report["bytes"] > 0
    assert "up to date" in cli("push", store, URL)[1]
    assert cli("pull", URL, tmp_path / "copy")[0] == 0
    answers = []
    for place in (store, tmp_path / "copy", URL):
        status, out, err = cli("query", place, "--against", "bench", "--json")
        assert status == 0, err
        answers.append(json.loads(out))
    assert answers[0] == answers[1] == answers[2]
    assert cli("select", URL, "--against", "bench", "-n", 3, "--out", tmp_path / "picks")[0] == 0
    for command in ("open", "info"):
        assert json.loads(cli(command, URL, "--json")[1])["collections"]["pool"]["rows"] == 16


@pytest.mark.parametrize(
    "arguments",
    [
        ("push", "STORE", "ftp://host/x"),
        ("push", "STORE", "s3://key:hidden@bucket/x"),
        ("push", "STORE", "https://host/x"),
        ("pull", "s3://", "COPY"),
        ("open", "STORE"),
        ("open", "file:///nowhere/at/all"),
        ("verify", "s3://stores/pool.gs"),
        ("compact", "s3://stores/pool.gs"),
    ],
)
def test_wrong_requests(cli, small_store, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Status 2 and one line, without credentials."""
    store = small_store(tmp_path / "store")
    places = {"STORE": str(store), "COPY": str(tmp_path / "copy")}
    status, out, err = cli(*(places.get(one, one) for one in arguments))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "hidden" not in err


@pytest.mark.parametrize("command", ["report", "serve", "fidelity", "probe", "collect", "verify"])
def test_what_needs_a_copy_says_how_to_get_one(cli, command: str) -> None:
    """These read rows many times, or write: they work on a copy."""
    assert "gradstore pull URL FOLDER" in cli(command, URL)[2]
