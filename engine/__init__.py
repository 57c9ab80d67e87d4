"""Gradients to sketches, targets, search and selection, over a gradstore store.

Names are loaded when first used, so that searching a store does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Sketcher": "engine.sketcher",
    "SketchSpec": "engine.sketcher",
    "SketchBatch": "engine.sketcher",
    "Objective": "engine.objectives",
    "PRESETS": "engine.objectives",
    "objective": "engine.objectives",
    "collect": "engine.collector",
    "CollectReport": "engine.collector",
    "Target": "engine.targets",
    "target": "engine.targets",
    "Hits": "engine.query",
    "search": "engine.query",
    "Where": "engine.where",
    "FlatIndex": "engine.index",
    "layer_contributions": "engine.shares",
    "SELECTORS": "engine.selectors",
    "Selector": "engine.selectors",
    "Candidates": "engine.selectors",
    "Selection": "engine.selection",
    "select": "engine.selection",
}

if TYPE_CHECKING:
    from engine.collector import CollectReport, collect
    from engine.index import FlatIndex
    from engine.objectives import PRESETS, Objective, objective
    from engine.query import Hits, search
    from engine.selection import Selection, select
    from engine.selectors import SELECTORS, Candidates, Selector
    from engine.shares import layer_contributions
    from engine.sketcher import SketchBatch, Sketcher, SketchSpec
    from engine.targets import Target, target
    from engine.where import Where

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
