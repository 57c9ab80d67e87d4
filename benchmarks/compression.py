"""How far the arrays of real stores compress, by codec: `python -m benchmarks.compression STORE...`.

For every array of a collection, live rows alone: ratio of the bytes as they are to those of each codec.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numcodecs import Blosc, Delta, Zstd

import gradstore
from gradstore.cli.show import print_table
from gradstore.state import State

_LEVEL = 5


def _blosc(shuffle: int) -> Callable[[np.ndarray], int]:
    return lambda part: len(Blosc("zstd", _LEVEL, shuffle).encode(part))


def _delta(part: np.ndarray) -> int:
    differences = Delta(dtype=part.dtype).encode(np.ascontiguousarray(part).ravel())
    return len(Zstd(_LEVEL).encode(np.ascontiguousarray(differences)))


def _pcodec(part: np.ndarray) -> int:
    from numcodecs.pcodec import PCodec

    wide = part.astype(np.int16) if part.dtype == np.int8 else part.astype(np.uint16) if part.itemsize == 1 else part
    return len(PCodec().encode(np.ascontiguousarray(wide).ravel()))  # it takes no numbers of one byte


CODECS: dict[str, Callable[[np.ndarray], int]] = {
    "none": lambda part: part.nbytes,
    "zstd": lambda part: len(Zstd(_LEVEL).encode(np.ascontiguousarray(part))),
    "blosc, no shuffle": _blosc(Blosc.NOSHUFFLE),
    "blosc, shuffle": _blosc(Blosc.SHUFFLE),
    "blosc, bitshuffle": _blosc(Blosc.BITSHUFFLE),
    "delta, zstd": _delta,
    "pcodec": _pcodec,
}


def main(
    stores: Annotated[list[Path], typer.Argument(help="Stores of real sketches.")],
    collection: Annotated[str, typer.Option(help="Collection whose rows are compressed.")] = "pool",
) -> None:
    """Print the ratio of each array and codec."""
    lines = []
    for path in stores:
        view = gradstore.open(path).view(collection)
        live = np.flatnonzero(view.states == State.LIVE)
        codes, scale = view.stored.codes(live)
        arrays = {f"codes, {view.stored.dtype}": codes, "scale": scale}
        arrays |= {name: view.stored.column(name)[live] for name in ("norm", "step", "problem", "pass_rate")}
        for name, array in arrays.items():
            part = np.ascontiguousarray(array)
            ratios = []
            for codec in CODECS.values():
                try:
                    ratios.append(f"{part.nbytes / codec(part):.2f}")
                except (ImportError, TypeError, ValueError):
                    ratios.append("-")
            lines.append([path.name, name, str(len(part)), *ratios])
    print_table("bytes / compressed bytes", ["store", "array", "rows", *CODECS], lines, right=["rows", *CODECS])


if __name__ == "__main__":
    typer.run(main)
