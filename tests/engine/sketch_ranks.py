"""One rank of a sketcher under FSDP2, run by test_fsdp: python sketch_ranks.py RANK WORLD FOLDER."""

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from conftest import random_groups, random_model
from ranks import sharded

from gradstore.engine import Sketcher, SketchSpec, exact_dots, layer_gradients
from gradstore.engine.gradients.coverage import measure


def main(rank: int, world: int, folder: Path) -> None:
    model = sharded(random_model("qwen2").train(), rank, world, folder)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reduced: list[str] = []
    reduce = dist.reduce_scatter_tensor
    dist.reduce_scatter_tensor = lambda *given, **named: reduced.append("") or reduce(*given, **named)
    # Seven groups over two ranks and a budget that splits them: the ranks' numbers of micro-batches differ.
    groups = random_groups(7, seed=8)[rank::world]
    spec = SketchSpec(rank=6, token_budget=40)
    sketcher = Sketcher(model, spec)
    found = sketcher.sketch(groups)
    none = sketcher.sketch(groups if rank == 0 else [])
    coverage = measure(sketcher.gradients, groups)
    head = Sketcher(model, SketchSpec(rank=6, head_only=True)).sketch(groups)
    target = layer_gradients(model, random_groups(2, seed=9), spec)
    exact = exact_dots(model, groups, target, spec)
    formed = exact_dots(model, groups, target, spec, norms=True)
    same = {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    clean = model.training and same and all(parameter.grad is None for parameter in model.parameters())
    np.savez(
        folder / f"rank-{rank}.npz",
        sketches=found.sketches,
        alone=none.sketches,
        head=head.sketches,
        exact=exact.dots,
        formed=formed.dots,
        clean=clean,
        coverage=json.dumps(coverage.describe()),
        n_reduced=len(reduced),
        fingerprint=repr(sketcher.fingerprint),
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
