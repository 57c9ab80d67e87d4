"""Interleaved timing of alternatives, so that other load on the machine slows all of them equally."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from gradstore.cli.show import print_table


def interleaved(jobs: Mapping[str, Callable[[], object]], repeats: int, warm: int = 1) -> dict[str, np.ndarray]:
    """Seconds of each job, [repeats], after `warm` runs of each that are not counted.

    A job that returns a float has timed itself. Each repeat uses a different order; otherwise the same job would always
    profit from what another leaves in the caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(warm + repeats):
        for place in np.random.default_rng(repeat).permutation(len(jobs)):
            name, job = list(jobs.items())[place]
            started = time.perf_counter()
            told = job()
            took = time.perf_counter() - started
            if repeat >= warm:
                seconds[name].append(told if isinstance(told, float) else took)
    return {name: np.array(values) for name, values in seconds.items()}


def print_times(title: str, seconds: Mapping[str, np.ndarray], base: str) -> None:
    """Print median and range of the times, and of their ratios to `base` in the same repeat."""
    rows = []
    for name, values in seconds.items():
        ratio = values / seconds[base]
        rows.append(
            [
                name,
                f"{np.median(values) * 1e3:.1f}",
                f"{values.min() * 1e3:.1f}-{values.max() * 1e3:.1f}",
                f"{np.median(ratio):.2f}",
                f"{ratio.min():.2f}-{ratio.max():.2f}",
            ]
        )
    print_table(title, ["what", "median ms", "range", f"x {base}", "range"], rows, right=["median ms"])
