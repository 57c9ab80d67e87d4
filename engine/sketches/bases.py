"""Fitted projections kept with the store they made, frozen under their digest."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save
from torch import nn

from engine.sketches.projection import Fold, LayerBasis, Projection
from engine.sketches.sketcher import Sketcher, SketchSpec
from gradstore import Store, create
from gradstore.attachments import read_attachment
from gradstore.errors import DamagedError, FingerprintError


def sketcher_of(store: Store, model: nn.Module, spec: SketchSpec | None = None) -> Sketcher:
    """A sketcher whose rows belong in the store: its settings, and its own fitted projection where it has one.

    spec: settings of the store with changes that do not alter a sketch, such as the token budget.
    """
    spec = spec or SketchSpec.of(store.fingerprint)
    kind = store.fingerprint.get("projection", {}).get("kind")
    if kind is not None and spec.basis != kind:
        offered = {"projection": {"kind": spec.basis}}
        raise FingerprintError({"projection": {"kind": kind}}, offered, str(store.path))
    return Sketcher(model, spec, load_projection(store) if spec.basis == "fitted" else None)


def create_store(path: Path, sketcher: Sketcher, dtype: str = "int8") -> Store:
    """A new store for a sketcher's rows, keeping its projection where that was fitted."""
    attachments = {}
    if sketcher.projection.kind == "fitted":
        attachments[_name(sketcher.projection.digest())] = _to_bytes(sketcher.projection)
    return create(path, dim=sketcher.dim, fingerprint=sketcher.fingerprint, dtype=dtype, attachments=attachments)


def _to_bytes(projection: Projection) -> bytes:
    arrays = {}
    for i, basis in enumerate(projection.layers):
        if basis.left_OR is not None:
            arrays[f"{i}.left"] = basis.left_OR
        if basis.right_IR is not None:
            arrays[f"{i}.right"] = basis.right_IR
    if projection.fold is not None:
        arrays |= {"of": projection.fold.of_M, "to": projection.fold.to_M, "sign": projection.fold.sign_M}
    about = {
        "kind": projection.kind,
        "captured": projection.captured,
        "layout": projection.layout,
        "layers": [[basis.name, basis.start, basis.stop] for basis in projection.layers],
    }
    # safetensors writes the memory of an array whatever its order, so a transposed one would come back scrambled.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, {"projection": json.dumps(about)})


def load_projection(store: Store) -> Projection:
    """The fitted projection of the store's rows; DamagedError when it is not the one the fingerprint names."""
    digest = store.fingerprint["projection"]["basis"]
    data = read_attachment(store.path, _name(digest))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about, arrays = json.loads(header["__metadata__"]["projection"]), load(data)
    layers = [
        LayerBasis(name, arrays.get(f"{i}.left"), arrays.get(f"{i}.right"), start, stop)
        for i, (name, start, stop) in enumerate(about["layers"])
    ]
    fold = Fold(arrays["of"], arrays["to"], arrays["sign"]) if "of" in arrays else None
    layout = [(name, start, stop) for name, start, stop in about["layout"]]
    projection = Projection(about["kind"], layers, fold, layout, about["captured"])
    if projection.digest() != digest:
        raise DamagedError(f"{store.path}: the projection kept is not the one its rows were made with ({digest})")
    return projection


def _name(digest: str) -> str:
    return f"projection-{digest}.safetensors"
