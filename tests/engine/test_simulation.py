"""The simulation of Ray workers: what can be said beforehand of a run's time holds."""

import pytest

from benchmarks.simulation import Job, simulate


def test_one_worker_does_all_the_work() -> None:
    found = simulate(Job(windows=50, work=2.0, use={"write": 0.1}), 1)
    assert found.seconds == pytest.approx(100.1)  # only the last window's use is not hidden behind work
    assert found.workers_busy == pytest.approx(100 / 100.1)


def test_few_workers_share_the_work_and_many_wait_for_the_driver() -> None:
    job = Job(windows=2000, work=1.0, submit={"read": 0.004, "send": 0.001}, take={"take": 0.001}, use={"write": 0.004})
    assert job.driver == pytest.approx(0.01)
    for workers in (1, 2, 4, 16, 50):
        assert simulate(job, workers).seconds == pytest.approx(2000 / workers, rel=0.06)
    for workers in (200, 1000):
        found = simulate(job, workers)
        assert found.seconds == pytest.approx(20, rel=0.08)
        assert found.driver_busy > 0.9


def test_spread_costs_time_but_not_work() -> None:
    """Results are used in order: a slow window holds back others, as far as there is room for them."""
    even, uneven = (Job(windows=2000, work=1.0, spread=spread) for spread in (0.0, 0.5))
    assert simulate(even, 8).seconds == pytest.approx(250)
    assert 250 * 0.9 < simulate(uneven, 8).seconds < 250 * 1.3


def test_a_slow_link_and_publications_count() -> None:
    job = Job(windows=1000, work=0.1, sent=1e6)
    assert simulate(job, 64, 1e7).seconds == pytest.approx(100, rel=0.01)
    assert simulate(job, 64, 1e7).link_busy == pytest.approx(1, rel=0.01)
    with_commits = Job(windows=1000, work=0.1, publish=2.5, every=5.0)
    assert simulate(with_commits, 1).seconds >= simulate(Job(windows=1000, work=0.1), 1).seconds
    assert simulate(with_commits, 1).driver_busy == pytest.approx(1 / 3, rel=0.05)
