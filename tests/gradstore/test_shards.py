"""The rule of shards: every problem in exactly one, none empty, and of nearly the same size."""

import numpy as np
import pytest

from gradstore import RequestError, Shard


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
def test_each_problem_is_in_one_shard(count: int) -> None:
    """For files of every size from as many problems as shards."""
    for n in [*range(count, 40), 63, 64, 65, 447, 448, 449, 1000, 5000]:
        if n < count:
            continue
        parts = [Shard(index, count).places(n, "file") for index in range(count)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(n))
        block = Shard(0, count).block(n)
        assert block == Shard(count - 1, count).block(n) <= 64
        assert all(len(part) for part in parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 2 * block


def test_a_block_keeps_its_number() -> None:
    """Cut into pieces of `block`, a shard's problems are whole blocks of the file, under their own numbers."""
    n, count = 1000, 3
    for index in range(count):
        shard = Shard(index, count)
        size, places = shard.block(n), shard.places(n, "file")
        for number, start in enumerate(range(0, len(places), size)):
            whole = shard.number(number)
            assert places[start : start + size].tolist() == list(range(n))[whole * size : (whole + 1) * size]


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "1/0", "a/b", "1/4/5", "0.5/2", "1 /4", "٣/4"])
def test_what_names_no_shard(text: str) -> None:
    with pytest.raises(RequestError, match=r"expected I/N with 0 <= I < N"):
        Shard.parse(text)


def test_more_shards_than_problems() -> None:
    with pytest.raises(RequestError, match="file: has 3 problems, too few for 4 shards"):
        Shard(0, 4).places(3, "file")
