"""verl 0.7's sampler interface: with a stand-in of it, and with verl 0.7.0's own class where that is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradstore
from gradstore.engine.rollouts import read_rollouts

HERE = Path(__file__).parent
REAL = Path(sys.prefix) / "verl-0.7.0"
"""Where `make test-verl` puts verl 0.7.0, which cannot be installed beside 0.9."""

STAND_IN = """
from torch.utils.data import Sampler
class AbstractSampler(Sampler):
    pass
class AbstractCurriculumSampler(AbstractSampler):
    def update(self, batch):
        raise NotImplementedError
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A pool of 12 problems, and a benchmark that points along the first three's gradients and a little to others."""
    path = tmp_path / "store"
    made = gradstore.create(path, dim=8, fingerprint={"model": "none"}, dtype="fp32")
    random = np.random.default_rng(0)
    sketches_PD = random.standard_normal((12, 8)).astype(np.float32)
    rows = [{"id": str(i), "prompt": f"{i}+1="} for i in range(12)]
    made.add_problems("pool", rows)
    with made.writer("pool", step=0) as writer:
        writer.append([row["id"] for row in rows], sketches_PD)
    made.add_problems("validation", [{"id": "v", "prompt": "v"}])
    with made.writer("validation", step=0) as writer:
        writer.append(["v"], sketches_PD[:3].sum(axis=0, keepdims=True))
    return path


@pytest.mark.parametrize("which", ["stand-in", pytest.param("verl 0.7.0", marks=pytest.mark.verl)])
def test_picks_and_state(which: str, store: Path, tmp_path: Path) -> None:
    """verl 0.7 saves its checkpoint before the sampler hears of the step: what the sampler draws next must not depend
    on whether it heard."""
    from gradstore.engine import select, target

    package = REAL
    if which == "stand-in":
        package = tmp_path / "package"
        folder = package / "verl" / "experimental" / "dataset"
        folder.mkdir(parents=True)
        for parent in (folder, folder.parent, folder.parent.parent):
            (parent / "__init__.py").write_text("")
        (folder / "sampler.py").write_text(STAND_IN)
    assert (package / "verl").is_dir(), f"{package}: make test-verl puts verl 0.7.0 there"
    found = subprocess.run(
        [sys.executable, str(HERE / "run_sampler_07.py"), str(store), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    drawn = json.loads((tmp_path / "found.json").read_text())
    best = select(gradstore.open(store), "pool", target(gradstore.open(store), "validation"), 4).ids
    first = [row for batch in drawn["undisturbed"][:2] for row in batch]
    assert sorted(map(str, first)) == sorted(best)
    assert drawn["resumed"] == drawn["undisturbed"][1:]
    rollouts = list(read_rollouts(tmp_path / "rollouts" / "step-000002.jsonl").rollouts())
    assert {group[0].problem_id for group in rollouts} == {str(row) for row in drawn["undisturbed"][2]}
    row = rollouts[0][0]
    assert row.prompt_ids is not None
    assert row.response_ids is not None
    assert (row.prompt_ids.tolist(), row.response_ids.tolist()) == ([5, 6 + int(row.problem_id)], [8, 9])
    assert ([row.reward for row in rollouts[0]], row.step) == ([0.0, 1.0], 2)
    assert row.reference_logprobs is not None
    assert row.reference_logprobs.tolist() == [-0.125, -0.25], "verl's own reference, where a KL term had it computed"
