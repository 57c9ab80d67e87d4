"""Threads of torch in a command, so that other jobs on the same cores do not stop it.

Torch divides an operation over all cores (OpenMP) and waits at its end for the slowest thread. By default the waiting
thread spins for some milliseconds. Beside another job it so keeps the core from the thread that it waits for, and an
operation of a millisecond takes a second. Therefore:

- threads sleep while they wait (`OMP_WAIT_POLICY`), which changes no result;
- a small model gets one thread: its operations are too short to be divided. The number of threads decides the last
  bits of results, so it depends on the model alone, never on the load of the machine.

Whoever sets one of these environment variables decides alone. `python -m benchmarks.neighbours` measures it.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SMALL = 1 << 18
"""Numbers in the largest weight matrix of a block, 512 x 512, below which one thread is as fast as two."""


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait. Call it before torch is loaded, which reads the variable once."""
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def suit_threads(model: "nn.Module") -> None:
    """Give torch one thread, for the rest of the process, if the model is small and on the CPU."""
    import torch

    if any(name in os.environ for name in COUNTS):
        return
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [own for own in model.modules() if isinstance(own, torch.nn.Linear) and own is not head]
    if all(own.weight.numel() < SMALL and own.weight.device.type == "cpu" for own in layers):
        torch.set_num_threads(1)
