"""The file of verdicts: shared, private, and not believed."""

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradstore.errors import RequestError
from gradstore.trainer.sampling.judge import Judge, Verdicts
from tests.trainer.judge_server import Endpoint, box, problem

Make = Callable[..., Judge]


def ask(judge: Judge) -> float:
    return judge.reward()(problem(), box("x"), 0)


def test_two_judges_share_a_cache(tmp_path: Path) -> None:
    """Rollout workers of one run write the same file."""
    caches = [Verdicts(tmp_path / "v.sqlite") for _ in range(2)]

    def fill(cache: Verdicts, name: str) -> None:
        for i in range(8):
            cache.put(f"{name}{i}", 1.0, "")
            cache.put(f"both{i}", float(name == "a"), "")

    threads = [threading.Thread(target=fill, args=pair) for pair in zip(caches, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        assert caches[0].get(f"b{i}") == caches[1].get(f"a{i}") == 1.0
        assert caches[0].get(f"both{i}") == caches[1].get(f"both{i}") in (0.0, 1.0)
    assert len(caches[0].get_many(f"{name}{i}" for name in ("a", "b", "both", "none") for i in range(1000))) == 24


def test_a_cache_that_is_none(judge: Make, tmp_path: Path) -> None:
    """One line that names the file, which stays as it was."""
    path = tmp_path / "other.sqlite"
    path.write_text("no database, but long enough to be told from an empty one" * 20)
    with pytest.raises(RequestError, match=r"other\.sqlite: no cache of verdicts: file is not a database"):
        judge(cache=str(path))
    path.unlink()
    for sql in (
        "CREATE TABLE cookies (host TEXT)",
        "CREATE TABLE verdicts (key TEXT)",
        "CREATE TABLE verdicts (key TEXT PRIMARY KEY, score REAL NOT NULL, reply TEXT NOT NULL); "
        "CREATE TRIGGER pay AFTER INSERT ON verdicts BEGIN UPDATE verdicts SET score = 1; END",
        "CREATE VIEW verdicts AS SELECT 'k' AS key, 1.0 AS score, '' AS reply",
    ):
        with sqlite3.connect(path) as connection:
            connection.executescript(sql)
        connection.close()
        before = path.read_bytes()
        with pytest.raises(RequestError, match=r"other\.sqlite: a database of something else"):
            judge(cache=str(path))
        assert path.read_bytes() == before
        path.unlink()
    os.mkfifo(path)
    with pytest.raises(RequestError, match=r"other\.sqlite: no cache of verdicts can be kept there: it is no regular"):
        judge(cache=str(path))
    with pytest.raises(RequestError, match="no cache of verdicts can be kept there"):
        judge(cache=str(tmp_path))


def test_a_damaged_cache(endpoint: Endpoint, judge: Make, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    with_rows = Verdicts(path)
    with_rows.put_many([(f"key {i}", 1.0, "x" * 500) for i in range(200)])
    with_rows.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(RequestError, match=r"verdicts\.sqlite: the cache of verdicts cannot be .*: .* delete this one"):
        ask(judge())


@pytest.mark.parametrize("score", ["0.5", "2.0", "-1.0", "'yes'", "x'00'", "9e999", "'nan'"])
def test_impossible_scores_are_ignored(endpoint: Endpoint, judge: Make, tmp_path: Path, score: str) -> None:
    """Anyone who can write the file could pay any reward; no more than 1 at least."""
    made = judge()
    assert ask(made) == 1.0
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as connection:
        connection.execute(f"UPDATE verdicts SET score = {score}")
    connection.close()
    assert ask(made) == 1.0
    assert len(endpoint.requests) == 2
    assert ask(judge()) == 1.0  # the row was replaced
    assert len(endpoint.requests) == 2


def test_a_cache_that_fills_the_disk(endpoint: Endpoint, judge: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that cannot be kept stops the run, which would pay for it again."""

    def full(*_: Any) -> None:
        raise RequestError("v.sqlite: the cache of verdicts cannot be written: database or disk is full")

    made = judge(concurrency=2)
    monkeypatch.setattr(Verdicts, "put_many", full)
    with pytest.raises(RequestError, match="disk is full"):
        made.score([(problem(), box(f"answer {j}"), j) for j in range(50)])
    assert len(endpoint.requests) < 50
