"""The pool of workers: results in order, a bounded number in flight, lost workers replaced, errors told."""

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradstore import RequestError
from gradstore.engine.cluster import pool as pools
from gradstore.engine.cluster.pool import DEPTH, HELD, Pool, Window
from gradstore.engine.cluster.ray_start import connected
from gradstore.errors import GradstoreError


def _windows(n: int) -> list[Window]:
    return [Window((i,), 3, f"window {i}") for i in range(n)]


def _doubling(folder: Path, deadly: frozenset[int] = frozenset(), always: bool = False) -> Callable:
    """make() of workers that double a number, later numbers sooner; at a deadly one the process is killed, once."""

    def make() -> Callable[[int], int]:
        def double(i: int) -> int:
            mark = folder / f"killed-{i}"
            if i in deadly and (always or not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.02 * (3 - i % 4))
            return 2 * i

        return double

    return make


@pytest.fixture(scope="module")
def two(ray_here: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Pool(_doubling(tmp_path_factory.mktemp("two")), workers=2) as pool:
        yield pool


def test_results_come_in_order_and_the_source_is_not_read_far_ahead(two: Pool) -> None:
    """Without a bound a million problems would be in memory at once."""
    taken = []

    def source() -> Any:
        for window in _windows(40):
            taken.append(window)
            yield window

    found, most = [], 0
    before = sum(cost.windows for cost in two.costs)
    for result in two.map(source()):
        found.append(result)
        most = max(most, len(taken) - len(found))
    assert found == [2 * i for i in range(40)]
    assert 2 < most <= 2 * (DEPTH + HELD)
    assert sum(cost.windows for cost in two.costs) - before == 40
    assert all(cost.seconds > 0 and cost.problems == 3 * cost.windows for cost in two.costs)
    assert list(two.map([])) == []


def test_lost_workers_are_replaced_and_their_windows_done_again(
    ray_here: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Pool(_doubling(tmp_path, frozenset({0, 7, 8})), workers=2) as pool:
        assert list(pool.map(_windows(12))) == [2 * i for i in range(12)]
        assert sum(cost.lost for cost in pool.costs) == 3
        assert sum(cost.windows for cost in pool.costs) == 12
    assert caplog.text.count("was lost at ") == 3
    assert "window 7" in caplog.text


def test_a_window_that_kills_every_worker_ends_the_run(
    ray_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named; the windows before it are delivered."""
    monkeypatch.setattr(pools, "ATTEMPTS", 2)
    found = []
    with (
        Pool(_doubling(tmp_path, frozenset({3}), always=True), workers=2) as pool,
        pytest.raises(GradstoreError, match=r"2 workers were lost at window 3; the last was worker \d \(process"),
    ):
        found.extend(pool.map(_windows(3)))
        pool_results = pool.map(_windows(6))
        for result in pool_results:
            found.append(result)
    assert found[:3] == [0, 2, 4]


def test_errors_and_warnings_of_workers_are_told(ray_here: Any, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Callable[[int], int]:
        def function(i: int) -> int:
            logging.getLogger("gradstore.there").warning("window %d is odd", i)
            if i == 2:
                raise RequestError(f"problem {i}: it is not wanted")
            return i

        return function

    with Pool(make, workers=1) as pool, pytest.raises(RequestError, match=r"^problem 2: it is not wanted$"):
        list(pool.map(_windows(5)))
    assert "worker 0: window 1 is odd" in caplog.messages


def test_workers_that_cannot_load_or_differ_are_refused(ray_here: Any) -> None:
    def broken() -> Callable:
        raise RequestError("there is no such folder")

    with Pool(broken, workers=1) as pool, pytest.raises(RequestError, match=r"^worker 0 \(.*\): there is no such"):
        pool.about()

    def own() -> Callable:
        def function(i: int) -> int:
            time.sleep(0.1)
            return i

        function.about = os.getpid()  # type: ignore[attr-defined]
        return function

    with Pool(own, workers=2) as pool, pytest.raises(RequestError, match="results would depend on the worker"):
        list(pool.map(_windows(100)))
    with pytest.raises(RequestError, match="no room for a worker of 1 CPUs and 1 GPUs: it has 8 CPUs and 0 GPUs"):
        Pool(own, workers=1, gpus=1)
    with pytest.raises(RequestError, match="workers is 0"):
        Pool(own, workers=0)


def test_what_ray_prints_when_it_ends_is_not_the_commands_output(
    ray_here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its report of a lost worker can come that late, and `--json` would no longer be JSON."""
    monkeypatch.setattr(ray_here, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_here, "init", lambda **_: None)
    monkeypatch.setattr(ray_here, "shutdown", lambda: print("(raylet) a worker died\nso it is"))
    with connected("local", 1):
        print("inside")
    print("{}")
    assert capsys.readouterr().out == "{}\n"
