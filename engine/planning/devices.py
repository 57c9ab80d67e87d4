"""Arithmetic, memory and bandwidth of devices, from data sheets, and the assumed utilisation.

Peaks are dense rates without sparsity, from the makers' data sheets. The share of a peak that a run reaches is an
assumption, stated with every plan. A CPU is measured; this takes a second.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradstore.errors import check_known


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device."""

    name: str
    flops: float
    """Peak FLOP/s of matrix products in the weights' dtype."""
    flops_float32: float
    """Peak FLOP/s in float32, in which projections are computed."""
    memory: int
    """Memory in bytes."""
    bandwidth: float
    """Peak memory bandwidth in bytes per second."""
    utilisation: float = 0.4
    """Share of the peak FLOP/s that matrix products reach."""
    bandwidth_used: float = 0.6
    """Share of the peak bandwidth that all other operations reach."""
    is_gpu: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype, as in `load_model`."""
        return torch.bfloat16 if self.is_gpu else torch.float32


GPUS = {
    "h100": Hardware("h100", 989e12, 67e12, 80 * 10**9, 3.35e12),
    "h200": Hardware("h200", 989e12, 67e12, 141 * 10**9, 4.8e12),
    "a100-80gb": Hardware("a100-80gb", 312e12, 19.5e12, 80 * 10**9, 2.04e12),
    "a100-40gb": Hardware("a100-40gb", 312e12, 19.5e12, 40 * 10**9, 1.56e12),
    "l40s": Hardware("l40s", 362e12, 91.6e12, 48 * 10**9, 0.864e12),
    "4090": Hardware("4090", 165e12, 82.6e12, 24 * 10**9, 1.01e12),
}


def hardware(name: str) -> Hardware:
    """The device of this name; `cpu` is measured on this machine. RequestError for an unknown name."""
    if name == "cpu":
        return _this_cpu()
    check_known("--device", name, ["cpu", *GPUS])
    return GPUS[name]


def _this_cpu() -> Hardware:
    """This machine's CPU, measured now by a product of float32 matrices and a copy larger than its caches."""
    from os import sysconf

    left, right = torch.ones(512, 1024), torch.ones(1024, 1024)
    flops = 2 * 512 * 1024 * 1024 / _seconds(lambda: left @ right)
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    bandwidth = 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source))
    memory = sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", flops, flops, memory, bandwidth, 1.0, 1.0, is_gpu=False)


def _seconds(job: Callable[[], object]) -> float:
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        job()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
