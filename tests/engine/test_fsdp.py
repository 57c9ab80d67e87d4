"""Sketches of a model sharded by FSDP2, and of one in bfloat16, are those of the plain model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gradstore.engine import Sketcher, SketchSpec, exact_dots, layer_gradients
from gradstore.engine.gradients.coverage import Coverage, measure
from gradstore.engine.gradients.exact import exact_against
from tests.engine.ranks import run_ranks

WORLD = 2


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_each_rank_sketches_its_own_problems(make_model, make_groups, tmp_path: Path) -> None:
    """A live trainer's policy is sharded: its ranks share the work, differ in their numbers of micro-batches, and must
    neither wait for each other forever nor add up gradients of different problems."""
    run_ranks("sketch_ranks.py", WORLD, tmp_path)
    model, groups = make_model("qwen2"), make_groups(7, seed=8)
    spec = SketchSpec(rank=6)
    sketcher = Sketcher(model, spec)
    expected = sketcher.sketch(groups).sketches
    head = Sketcher(model, SketchSpec(rank=6, head_only=True)).sketch(groups).sketches
    dots = exact_dots(model, groups, layer_gradients(model, make_groups(2, seed=9)), spec).dots
    cosines = exact_against(model, groups, make_groups(3, seed=9), spec).cosines[:, 0]
    for rank in range(WORLD):
        found = np.load(tmp_path / f"rank-{rank}.npz")
        assert str(found["fingerprint"]) == repr(sketcher.fingerprint)
        assert relative_error(found["sketches"], expected[rank::WORLD]) < 1e-5
        assert relative_error(found["by_layer"], expected[rank::WORLD]) < 1e-5
        assert found["resharded"].all(), "the trainer's own setting is put back"
        assert relative_error(found["head"], head[rank::WORLD]) < 1e-5
        for way in ("exact", "formed"):
            assert np.abs(found[way] - dots[rank::WORLD]).max() < 1e-5 * np.abs(dots).max()
        for found_P in found["against"]:  # with the whole model gathered, and layer by layer
            np.testing.assert_allclose(found_P, cosines, atol=1e-5, err_msg="all ranks get the scores of all")
        assert len(found["alone"]) == (4 if rank == 0 else 0)
        assert Coverage.of(json.loads(str(found["coverage"]))) == measure(sketcher.gradients, [])
        assert bool(found["clean"])
        assert int(found["n_reduced"]) == 0
    assert relative_error(np.load(tmp_path / "rank-0.npz")["alone"], expected[0::WORLD]) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_bfloat16(make_model, make_groups, architecture: str) -> None:
    """A policy kept in bfloat16: the sums are float32, so a sketch is off by the model's own rounding, a few percent
    in norm, and the cosine with the float32 sketch stays above 0.99."""
    groups = make_groups(5)
    spec = SketchSpec(rank=8)
    expected = Sketcher(make_model(architecture), spec).sketch(groups).sketches
    found = Sketcher(make_model(architecture).to(torch.bfloat16), spec).sketch(groups).sketches
    assert found.dtype == np.float32
    for one, other in zip(found, expected, strict=True):
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99
        assert relative_error(one, other) < 0.15
