import numpy as np
from typing_extensions import Buffer

def supported() -> bool: ...
def score_int8(
    rows: Buffer, width: int, digits: Buffer, starts: Buffer, weights: Buffer, scale: Buffer, out: np.ndarray, /
) -> None: ...
def score_pairs(
    rows: Buffer,
    width: int,
    places: Buffer,
    queries: Buffer,
    digits: Buffer,
    starts: Buffer,
    weights: Buffer,
    scale: Buffer,
    out: Buffer,
    /,
) -> None: ...
