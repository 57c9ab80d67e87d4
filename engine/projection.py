"""Two-sided projections of a layer's gradient: G [O, I] becomes left^T G right, [R, R].

A random basis has entries +-1/sqrt(R), so that inner products are kept in expectation: E<Pa, Pb> = <a, b>. A side no
wider than the rank is kept as it is (the narrow side of a LoRA matrix, a small head). The signs are bits of a Philox
counter keyed by seed, layer and side: the same on every machine, device and version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class LayerBasis:
    """The two sides of one layer's projection and the sketch dimensions they fill."""

    name: str
    left_OR: np.ndarray | None
    """float32 [O, R]; None keeps the output side."""
    right_IR: np.ndarray | None
    """float32 [I, R]; None keeps the input side."""
    start: int
    stop: int


def random_bases(layers: Sequence[tuple[str, int, int]], rank: int, seed: int) -> list[LayerBasis]:
    """Seeded sign bases for layers given as (name, outputs, inputs)."""
    bases: list[LayerBasis] = []
    start = 0
    for name, n_outputs, n_inputs in layers:
        left_OR = None if n_outputs <= rank else _signs(n_outputs, rank, seed, name, "left")
        right_IR = None if n_inputs <= rank else _signs(n_inputs, rank, seed, name, "right")
        stop = start + min(n_outputs, rank) * min(n_inputs, rank)
        bases.append(LayerBasis(name, left_OR, right_IR, start, stop))
        start = stop
    return bases


def basis_hash(bases: Sequence[LayerBasis]) -> str:
    """SHA-256 over names, ranges and entries: two sketchers with the same hash project alike."""
    digest = hashlib.sha256()
    for basis in bases:
        digest.update(f"{basis.name}:{basis.start}:{basis.stop}".encode())
        for side in (basis.left_OR, basis.right_IR):
            digest.update(b"identity" if side is None else np.ascontiguousarray(side, "<f4").tobytes())
    return digest.hexdigest()[:16]


def _signs(width: int, rank: int, seed: int, name: str, side: str) -> np.ndarray:
    key = hashlib.sha256(f"{seed}/{name}/{side}".encode()).digest()[:16]
    stream = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    words = stream.random_raw(-(-width * rank // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=width * rank)
    return ((bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(rank))).reshape(width, rank)
