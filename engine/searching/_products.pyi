import numpy as np
from typing_extensions import Buffer

def supported() -> bool: ...
def score_int8(
    rows: Buffer, width: int, digits: Buffer, starts: Buffer, weights: Buffer, scale: Buffer, out: np.ndarray, /
) -> None: ...
def pick_int8(
    width: int,
    rows: Buffer,
    places: Buffer,
    scale: Buffer,
    weights: Buffer,
    first: Buffer,
    rest: Buffer,
    starts: Buffer,
    steps: Buffer,
    left: Buffer,
    least: Buffer,
    queries: Buffer,
    numbers: Buffer,
    scores: Buffer,
    /,
) -> int: ...
