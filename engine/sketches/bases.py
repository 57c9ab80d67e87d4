"""Fitted projections, kept in the store of their sketches and verified by their digest.

`SketcherFiles` is all that a store needs from a sketcher, and a sketcher from a store. It is a plain value: the model
may be on another machine than the store.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save
from torch import nn

from gradstore import Store, create
from gradstore.attachments import COVERAGE, read_attachment
from gradstore.engine.gradients.coverage import Coverage, measure
from gradstore.engine.gradients.gradient_pass import GradientPass
from gradstore.engine.gradients.optimizer_direction import OptimizerDirection
from gradstore.engine.gradients.sharding import reshard
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.fitting import fit_projection
from gradstore.engine.sketches.projection import Fold, LayerBasis, Projection
from gradstore.engine.sketches.sketcher import Sketcher
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import DamagedError, FingerprintError, RequestError


@dataclass(frozen=True, slots=True)
class SketcherFiles:
    """Data to rebuild a sketcher for a given model; also all that `gradstore.create` needs besides a path."""

    dim: int
    """Dimensions of a sketch."""
    fingerprint: dict
    """Settings that change a row."""
    attachments: dict[str, bytes] = field(default_factory=dict)
    """Files by name: the projection, if it was fitted."""
    coverage: Coverage | None = None
    """Coverage of the gradient by a new store's sketches; None for an existing store."""


def files_of(sketcher: Sketcher, coverage: Coverage | None = None) -> SketcherFiles:
    """The files to create a store for this sketcher's rows. coverage: the result of `measure`."""
    attachments = {}
    if sketcher.projection.kind == "fitted":
        attachments[_name(sketcher.projection.digest())] = _to_bytes(sketcher.projection)
    return SketcherFiles(sketcher.dim, sketcher.fingerprint, attachments, coverage)


def fit_sketcher(
    model: nn.Module, spec: SketchSpec, groups: Sequence[Group], benchmark: Sequence[Group] = ()
) -> tuple[Sketcher, SketcherFiles]:
    """A run's sketcher and the files to create its store, with the coverage measured on the groups.

    A fitted basis is fitted to the groups and to the benchmark's groups (`fit_projection`). Under FSDP2 all ranks call
    this together, with the same groups.
    """
    coverage = measure(GradientPass(model, spec), groups)
    projection = fit_projection(model, groups, spec, benchmark=benchmark) if spec.basis == "fitted" else None
    reshard(model)
    sketcher = Sketcher(model, spec, projection)
    return sketcher, files_of(sketcher, coverage)


def files_in(store: Store, basis: int | None = None) -> SketcherFiles:
    """The sketcher's files for one basis of the store (None: the newest); DamagedError if its projection changed."""
    fingerprint = fingerprint_in(store, basis)
    attachments = {}
    if fingerprint.get("projection", {}).get("kind") == "fitted":
        name = _name(fingerprint["projection"]["basis"])
        attachments[name] = read_attachment(store.path, name)
    return SketcherFiles(store.dim, fingerprint, attachments)


def fingerprint_in(store: Store, basis: int | None = None) -> dict:
    """The fingerprint of the sketcher for one basis of the store (None: the newest)."""
    chosen = store.bases[-1 if basis is None else basis]
    if chosen.number == 0:
        return store.fingerprint
    projection = {**store.fingerprint["projection"], "basis": chosen.digest}
    return {**store.fingerprint, "projection": projection, "layout": [list(segment) for segment in chosen.layout]}


def basis_of(store: Store, fingerprint: dict) -> int:
    """Number of the store's basis for rows of a sketcher with this fingerprint.

    FingerprintError, naming each field with both values, if such rows do not belong in the store.
    """
    for basis in reversed(store.bases):
        if fingerprint_in(store, basis.number) == fingerprint:
            return basis.number
    raise FingerprintError.between(fingerprint_in(store), fingerprint, str(store.path))


def add_basis(store: Store, sketcher: Sketcher, about: Mapping[str, object] | None = None) -> int:
    """Add a sketcher's fitted projection as a further basis of the store; returns its number.

    FingerprintError if anything but the projection differs from the store's settings.
    """
    files = files_of(sketcher)
    theirs, ours = dict(files.fingerprint), dict(store.fingerprint)
    layout = theirs.pop("layout")
    ours.pop("layout", None)
    projection = theirs["projection"]
    ours["projection"] = {**ours.get("projection", {}), "basis": projection["basis"]}
    if theirs != ours or projection["kind"] != "fitted":
        raise FingerprintError.between(store.fingerprint, files.fingerprint, str(store.path))
    segments = [(name, start, stop) for name, start, stop in layout]
    return store.add_basis(projection["basis"], segments, dict(about or {}), files.attachments)


def bases_in_use(store: Store, besides: str | None = None) -> list[int]:
    """Bases of the newest live rows in all collections except `besides`, ascending. Targets are needed in these."""
    if len(store.bases) == 1:
        return [0]
    names = [name for name in store.collections if name != besides]  # halves of a pool are in its bases
    return sorted({basis for name in names for basis in store.view(name).live_bases})


def sketcher_from(
    model: nn.Module, fingerprint: dict, attachments: Mapping[str, bytes], spec: SketchSpec | None = None
) -> Sketcher:
    """The sketcher with this fingerprint.

    spec: its settings, with changes that do not alter a sketch, such as the token budget. FingerprintError, naming each
    field that differs, for a model or settings that give other rows.
    """
    spec = spec or SketchSpec.of(fingerprint)
    projection = _projection(fingerprint, attachments) if spec.basis == "fitted" else None
    sketcher = Sketcher(model, spec, projection)
    if sketcher.fingerprint != fingerprint:
        raise FingerprintError.between(fingerprint, sketcher.fingerprint, "the sketcher")
    return sketcher


def sketcher_of(
    store: Store,
    model: nn.Module,
    spec: SketchSpec | None = None,
    basis: int | None = None,
    optimizer: OptimizerDirection | None = None,
) -> Sketcher:
    """A sketcher whose rows belong in the store: with its settings, and its fitted projection if it has one.

    spec: the store's settings, with changes that do not alter a sketch, such as the token budget. basis: number of the
    store's projection; None: the newest. optimizer: direction of the store's rows, if they are not gradients.
    """
    spec = spec or SketchSpec.of(store.fingerprint)
    kind = store.fingerprint.get("projection", {}).get("kind")
    if kind is not None and spec.basis != kind:
        offered = {"projection": {"kind": spec.basis}}
        raise FingerprintError.between({"projection": {"kind": kind}}, offered, str(store.path))
    return Sketcher(model, spec, load_projection(store, basis) if spec.basis == "fitted" else None, optimizer)


def create_store(path: Path, sketcher: Sketcher, dtype: str = "int8", coverage: Coverage | None = None) -> Store:
    """Create a store for a sketcher's rows, with its projection if fitted and its coverage if given. Without coverage,
    `collect` measures it with the first rows."""
    return create_from(path, files_of(sketcher, coverage), dtype)


def create_from(path: Path, files: SketcherFiles, dtype: str = "int8") -> Store:
    """Create a store for rows that the sketcher of these files makes elsewhere."""
    kept = {} if files.coverage is None else {COVERAGE: files.coverage.to_bytes()}
    return create(path, dim=files.dim, fingerprint=files.fingerprint, dtype=dtype, attachments=files.attachments | kept)


def _to_bytes(projection: Projection) -> bytes:
    arrays = {
        f"{i}.{name}": side
        for i, basis in enumerate(projection.layers)
        for name, side in (("left", basis.left_OR), ("right", basis.right_IR), ("experts", basis.expert_EK))
        if side is not None
    }
    if projection.fold is not None:
        arrays |= {"of": projection.fold.of_M, "to": projection.fold.to_M, "sign": projection.fold.sign_M}
    about = {
        "kind": projection.kind,
        "captured": projection.captured,
        "fidelity": projection.fidelity,
        "layout": projection.layout,
        "layers": [[basis.name, basis.start, basis.stop] for basis in projection.layers],
    }
    # safetensors writes an array's memory in whatever order it has; a transposed array would be read back scrambled.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save(contiguous, {"projection": json.dumps(about)})


def load_projection(store: Store, basis: int | None = None) -> Projection:
    """A fitted projection of the store (None: the newest); DamagedError if its digest does not match."""
    files = files_in(store, basis)
    return _projection(files.fingerprint, files.attachments, f"{store.path}: ")


def _projection(fingerprint: dict, attachments: Mapping[str, bytes], where: str = "") -> Projection:
    digest = fingerprint["projection"]["basis"]
    if _name(digest) not in attachments:
        raise RequestError(f"{where}the fitted projection {digest} of these rows is not among the files given")
    data = attachments[_name(digest)]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about, arrays = json.loads(header["__metadata__"]["projection"]), load(data)
    layers = [
        LayerBasis(name, arrays.get(f"{i}.left"), arrays.get(f"{i}.right"), start, stop, arrays.get(f"{i}.experts"))
        for i, (name, start, stop) in enumerate(about["layers"])
    ]
    fold = Fold(arrays["of"], arrays["to"], arrays["sign"]) if "of" in arrays else None
    layout = [(name, start, stop) for name, start, stop in about["layout"]]
    projection = Projection(about["kind"], layers, fold, layout, about["captured"], about.get("fidelity"))
    if projection.digest() != digest:
        raise DamagedError(f"{where}the projection kept is not the one its rows were made with ({digest})")
    return projection


def _name(digest: str) -> str:
    return f"projection-{digest}.safetensors"
