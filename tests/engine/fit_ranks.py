"""One rank of a fit under FSDP2, run by test_fitting_ranks: python fit_ranks.py RANK WORLD FOLDER."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import random_groups, random_model
from ranks import sharded

from gradstore.engine import SketchSpec
from gradstore.engine.sketches.bases import _to_bytes
from gradstore.engine.sketches.fitting import fit

SPEC = SketchSpec(rank=6, basis="fitted", dim=60, token_budget=40)


def main(rank: int, world: int, folder: Path) -> None:
    model = sharded(random_model("qwen2").train(), rank, world, folder)
    # Nineteen problems and one of a benchmark over two ranks: their windows differ in number, and one has no benchmark.
    found = fit(model, random_groups(19, seed=1), SPEC, benchmark=random_groups(1, seed=2))
    (folder / f"rank-{rank}.safetensors").write_bytes(_to_bytes(found.projection))
    rows = [
        (problem_id, row) for batch in found.rows for problem_id, row in zip(batch.ids, batch.sketches, strict=True)
    ]
    plain = fit(model, random_groups(5, seed=3), replace(SPEC, seed=1))
    np.savez(
        folder / f"rank-{rank}.npz",
        digest=found.projection.digest(),
        plain=plain.projection.digest(),
        ids=[problem_id for problem_id, _ in rows],
        rows=np.stack([row for _, row in rows]),
        clean=model.training and all(parameter.grad is None for parameter in model.parameters()),
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
