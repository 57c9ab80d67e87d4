"""Digest of a fitted projection, by which a fingerprint names it, and its comparison with the stored file.

A store keeps projections as safetensors files (docs/format.md). Reading rows needs none of them; `verify` compares each
with the digest that its rows were made with.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gradstore.attachments import ATTACHMENTS, read_attachment
from gradstore.bases import Basis
from gradstore.durable import crc32c
from gradstore.errors import GradstoreError, first_line

Segment = tuple[str, int, int]
"""Layer name and its range of dimensions."""
Sides = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]
"""Left [O, R], right [I, R] and experts [E, K]; None: the side is kept whole, or the layer has no experts."""
FoldArrays = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of, to and sign: where each core dimension is added."""


def projection_digest(
    layout: Sequence[Segment], layers: Iterable[tuple[Segment, Sides]], fold: FoldArrays | None
) -> str:
    """The first 16 hexadecimal digits of a SHA-256 over names, ranges and entries.

    Projections with equal digests give equal sketches.
    """
    digest = hashlib.sha256(repr(list(layout)).encode())
    for (name, start, stop), (left_OR, right_IR, expert_EK) in layers:
        digest.update(f"{name}:{start}:{stop}".encode())
        for side in (left_OR, right_IR):
            digest.update(b"identity" if side is None else np.ascontiguousarray(side, "<f4").tobytes())
        if expert_EK is not None:
            digest.update(b"experts" + np.ascontiguousarray(expert_EK, "<f4").tobytes())
    if fold is not None:
        of_M, to_M, sign_M = fold
        digest.update(of_M.astype("<i8").tobytes() + to_M.astype("<i8").tobytes() + sign_M.astype("<f4").tobytes())
    return digest.hexdigest()[:16]


def changed_projections(store: Path, fingerprint: dict, bases: Sequence[Basis]) -> Iterator[tuple[Path, str]]:
    """Each kept projection whose content is not the one its rows were made with, and how. Needs safetensors."""
    projection = fingerprint.get("projection")
    if not isinstance(projection, dict) or projection.get("kind") != "fitted":
        return
    for basis in bases:
        name = f"projection-{basis.digest}.safetensors"
        path = store / ATTACHMENTS / name
        try:
            data = read_attachment(store, name)
            path = path.with_name(f"{name}.{crc32c(data):08x}")
        except GradstoreError:
            continue  # Missing or changed: its own finding.
        try:
            found = _digest_of(data)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield path, f"cannot be read as a projection ({first_line(error)})"
            continue
        if found != basis.digest:
            yield path, f"has the digest {found}, but the rows were made with {basis.digest}"


def _digest_of(data: bytes) -> str:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["projection"])
    layers = (
        ((name, start, stop), (arrays.get(f"{i}.left"), arrays.get(f"{i}.right"), arrays.get(f"{i}.experts")))
        for i, (name, start, stop) in enumerate(about["layers"])
    )
    fold = (arrays["of"], arrays["to"], arrays["sign"]) if "of" in arrays else None
    return projection_digest([(name, start, stop) for name, start, stop in about["layout"]], layers, fold)
