"""A fit divided over the ranks of a sharded model is the fit of one process."""

import numpy as np
import pytest

from gradstore.engine import Sketcher, SketchSpec
from gradstore.engine.sketches.bases import _projection
from gradstore.engine.sketches.fitting import fit
from gradstore.engine.sketches.projection import Projection
from tests.engine.ranks import run_ranks

WORLD = 2
SPEC = SketchSpec(rank=6, basis="fitted", dim=60, token_budget=40)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[tuple[dict[str, np.ndarray], Projection]]:
    """What each rank saved, and its projection."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("fit_ranks.py", WORLD, folder)
    found = []
    for rank in range(WORLD):
        saved = dict(np.load(folder / f"rank-{rank}.npz"))
        digest = str(saved["digest"])
        files = {f"projection-{digest}.safetensors": (folder / f"rank-{rank}.safetensors").read_bytes()}
        found.append((saved, _projection({"projection": {"basis": digest}}, files)))
    return found


def test_every_rank_has_the_same_bases(ranks) -> None:
    """Rows of ranks with bases of their own would be compared with each other and mean nothing."""
    (one, _), (two, _) = ranks
    assert str(one["digest"]) == str(two["digest"])
    assert str(one["plain"]) == str(two["plain"]) != str(one["digest"])
    assert bool(one["clean"])
    assert bool(two["clean"])


def test_the_bases_are_those_of_one_process(ranks, make_model, make_groups) -> None:
    """Every problem counts once: a share left out or counted twice would turn the sides."""
    groups, bench = make_groups(19, seed=1), make_groups(1, seed=2)
    alone = fit(make_model("qwen2"), groups, SPEC, benchmark=bench).projection
    together = ranks[0][1]
    assert together.captured == pytest.approx(alone.captured, rel=1e-4)
    assert together.layout == alone.layout
    np.testing.assert_array_equal(together.fold.of_M, alone.fold.of_M)
    for one, other in zip(together.layers, alone.layers, strict=True):
        for side, expected in ((one.left_OR, other.left_OR), (one.right_IR, other.right_IR)):
            same = np.abs((side * expected).sum(0)) / np.square(expected).sum(0)
            assert side.shape == expected.shape
            np.testing.assert_allclose(same, 1, atol=1e-3, err_msg=one.name)


def test_each_rank_has_the_rows_of_its_share(ranks, make_model, make_groups) -> None:
    """The rows that fall out of a fit are the sketches of their problems."""
    groups = {group.problem_id: group for group in make_groups(19, seed=1)}
    ids = [str(problem_id) for saved, _ in ranks for problem_id in saved["ids"]]
    assert sorted(ids) == sorted(groups)
    for saved, projection in ranks:
        expected = Sketcher(make_model("qwen2"), SPEC, projection).sketch([groups[str(i)] for i in saved["ids"]])
        np.testing.assert_allclose(saved["rows"], expected.sketches, atol=1e-5 * np.abs(expected.sketches).max())
