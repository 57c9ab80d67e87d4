"""What is kept of a store's coverage is written once, whoever comes first."""

from concurrent.futures import ThreadPoolExecutor

import gradstore
from gradstore.attachments import keep_coverage, read_coverage

COVERED = b'{"gradient": %d, "parameters": 1, "n_groups": 4, "left_out": []}'


def test_the_first_to_measure_is_kept(tmp_path) -> None:
    """Two processes may collect into a new store at once; two answers would be one too many."""
    path = tmp_path / "store"
    store = gradstore.create(path, dim=4, fingerprint={})
    assert read_coverage(path) is None
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: keep_coverage(path, COVERED % n), range(8)))
    (kept,) = (path / "attachments").iterdir()
    keep_coverage(path, COVERED % 99)
    assert list((path / "attachments").iterdir()) == [kept]
    assert read_coverage(path)["gradient"] in range(8)
    assert store.verify().ok
