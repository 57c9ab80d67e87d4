"""Ranks of a model sharded by FSDP2, each a process of its own that talks to the others by gloo over files."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

HERE = Path(__file__).parent


def run_ranks(script: str, world: int, folder: Path) -> None:
    """Runs `python SCRIPT RANK WORLD FOLDER` for every rank to its end; what one that fails said is shown."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(rank), str(world), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(errors)


def sharded(model: nn.Module, rank: int, world: int, folder: Path) -> nn.Module:
    """In a rank: joins the others, and shards the model among them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.set_num_threads(1)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)
