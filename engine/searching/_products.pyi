import numpy as np
from typing_extensions import Buffer

def registers(most: int = ..., /) -> int: ...
def digits_int8(width: int, queries: Buffer, digits: Buffer, steps: Buffer, /) -> None: ...
def score_int8(
    rows: Buffer, width: int, digits: Buffer, starts: Buffer, weights: Buffer, scale: Buffer, out: np.ndarray, /
) -> None: ...
def score_apart_int8(
    arrays: list[np.ndarray],
    array_of: Buffer,
    within: Buffer,
    width: int,
    digits: Buffer,
    starts: Buffer,
    weights: Buffer,
    scale: Buffer,
    out: np.ndarray,
    /,
) -> None: ...
def score_pairs_int8(
    arrays: list[np.ndarray],
    array_of: Buffer,
    within: Buffer,
    query_of: Buffer,
    width: int,
    digits: Buffer,
    starts: Buffer,
    steps: Buffer,
    scale: Buffer,
    out: np.ndarray,
    /,
) -> None: ...
def pick_int8(
    width: int,
    rows: Buffer,
    places: Buffer,
    scale: Buffer,
    weights: Buffer,
    first: Buffer,
    digits: Buffer,
    starts: Buffer,
    steps: Buffer,
    left: Buffer,
    least: Buffer,
    queries: Buffer,
    numbers: Buffer,
    scores: Buffer,
    /,
) -> int: ...
