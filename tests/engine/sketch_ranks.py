"""One rank of a sketcher under FSDP2, run by test_fsdp: python sketch_ranks.py RANK WORLD FOLDER."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from conftest import random_groups, random_model
from ranks import sharded

from gradstore.engine import Sketcher, SketchSpec, exact_dots, layer_gradients
from gradstore.engine.gradients import sharding
from gradstore.engine.gradients.coverage import measure
from gradstore.engine.gradients.exact import exact_against


def parameter_groups(model: nn.Module) -> list[Any]:
    """FSDP2's parameter groups of the decoder layers, which `fully_shard` reshards after the forward."""
    return [group for layer in model.model.layers for group in sharding._parameter_groups(layer)]


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
    pool, bench = random_groups(7, seed=8), random_groups(3, seed=9)
    against = [exact_against(model, pool, bench, spec)]
    resharded = [parameter_group.post_forward_mesh_info is not None for parameter_group in parameter_groups(model)]
    sharding._has_room = lambda model: rank == 0  # one rank has no room for the whole model: none gathers it
    by_layer = sketcher.sketch(groups)
    coverage = measure(sketcher.gradients, groups)
    head = Sketcher(model, SketchSpec(rank=6, head_only=True)).sketch(groups)
    against.append(exact_against(model, pool, bench, spec))
    target = layer_gradients(model, random_groups(2, seed=9), spec)
    exact = exact_dots(model, groups, target, spec)
    formed = exact_dots(model, groups, target, spec, norms=True)
    same = {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    clean = model.training and same and all(parameter.grad is None for parameter in model.parameters())
    np.savez(
        folder / f"rank-{rank}.npz",
        sketches=found.sketches,
        alone=none.sketches,
        by_layer=by_layer.sketches,
        resharded=resharded,
        head=head.sketches,
        exact=exact.dots,
        formed=formed.dots,
        against=[batch.cosines[:, 0] for batch in against],
        clean=clean,
        coverage=json.dumps(coverage.describe()),
        n_reduced=len(reduced),
        fingerprint=repr(sketcher.fingerprint),
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
