"""One rank of a probe under FSDP2, run by test_probe: python probe_ranks.py RANK WORLD FOLDER."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from conftest import random_groups, random_model
from ranks import sharded

from gradstore.engine import Probe, validation_gradient
from gradstore.engine.gradients.sharding import own_part, reshard

EPS = 5e-3


def main(rank: int, world: int, folder: Path) -> None:
    model = sharded(random_model("qwen2"), rank, world, folder)
    bench, pool = random_groups(5, seed=7), random_groups(7, seed=8)
    # Budgets that make the ranks' numbers of micro-batches differ: the shorter one has to keep step.
    direction = validation_gradient(model, bench[rank::world], token_budget=30)
    assert all(isinstance(tensor, DTensor) for tensor in direction.tensors.values())
    reshard(model)
    before = {name: own_part(p).numpy().tobytes() for name, p in model.named_parameters()}
    given = Probe(model, direction, eps=EPS, token_budget=30).probe(pool[rank::world])
    probe = Probe(model, direction, token_budget=50)
    found = probe.probe(pool[rank::world])
    calibration = probe.calibration
    assert calibration is not None
    base = probe.probe(pool[rank::world], probe.logprobs(pool[rank::world]))
    reshard(model)
    after = {name: own_part(p).numpy().tobytes() for name, p in model.named_parameters()}
    branch = Probe(model, direction, rank=64).probe(pool[rank::world])
    result = {
        "norm": direction.norm,
        "n_problems": direction.n_problems,
        "derivatives": [d_G.tolist() for d_G in given.derivatives],
        "dots": found.dots.tolist(),
        "one_sided": base.dots.tolist(),
        "branch": branch.dots.tolist(),
        "eps": calibration.central,
        "relative_error": calibration.relative_error,
        "n_checked": len(calibration.exact),
        "restored": before == after,
        "without_gradients": all(p.grad is None for p in model.parameters()),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    np.seterr(all="raise")
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
