"""Gradients to sketches, targets, search and selection, over a gradstore store.

Names are loaded when first used, so that searching a store does not wait for torch.
"""

from typing import TYPE_CHECKING

from gradstore.lazy import names_of

if TYPE_CHECKING:
    from engine.bases import create_store as create_store
    from engine.bases import sketcher_of as sketcher_of
    from engine.collector import CollectReport as CollectReport
    from engine.collector import collect as collect
    from engine.directions import Direction as Direction
    from engine.directions import validation_gradient as validation_gradient
    from engine.diversity import Diversity as Diversity
    from engine.exact import ExactBatch as ExactBatch
    from engine.exact import LayerGradients as LayerGradients
    from engine.exact import exact_dots as exact_dots
    from engine.exact import layer_gradients as layer_gradients
    from engine.faithfulness import Fidelity as Fidelity
    from engine.faithfulness import fidelity as fidelity
    from engine.fitting import fit_projection as fit_projection
    from engine.fusion import FusedHits as FusedHits
    from engine.fusion import fuse_scores as fuse_scores
    from engine.fusion import search_each as search_each
    from engine.fusion import search_fused as search_fused
    from engine.halves import Reliability as Reliability
    from engine.halves import exact_scores as exact_scores
    from engine.halves import reliability as reliability
    from engine.halves import sketch_scores as sketch_scores
    from engine.indexes import Index as Index
    from engine.indexes import IndexWarning as IndexWarning
    from engine.indexes import index_for as index_for
    from engine.objectives import PRESETS as PRESETS
    from engine.objectives import Objective as Objective
    from engine.objectives import objective as objective
    from engine.optimizer_direction import AdamState as AdamState
    from engine.optimizer_direction import OptimizerDirection as OptimizerDirection
    from engine.probe import Probe as Probe
    from engine.probe_batch import ProbeBatch as ProbeBatch
    from engine.query import Hits as Hits
    from engine.query import search as search
    from engine.selection import Selection as Selection
    from engine.selection import select as select
    from engine.selectors import SELECTORS as SELECTORS
    from engine.selectors import Candidates as Candidates
    from engine.selectors import Selector as Selector
    from engine.shares import layer_contributions as layer_contributions
    from engine.sketcher import SketchBatch as SketchBatch
    from engine.sketcher import Sketcher as Sketcher
    from engine.sketcher import SketchSpec as SketchSpec
    from engine.targets import Target as Target
    from engine.targets import target as target
    from engine.where import Where as Where

_MODULE_OF = {
    "create_store": "bases",
    "sketcher_of": "bases",
    "AdamState": "optimizer_direction",
    "Candidates": "selectors",
    "CollectReport": "collector",
    "Direction": "directions",
    "ExactBatch": "exact",
    "Fidelity": "faithfulness",
    "Index": "indexes",
    "IndexWarning": "indexes",
    "Diversity": "diversity",
    "FusedHits": "fusion",
    "Hits": "query",
    "LayerGradients": "exact",
    "Objective": "objectives",
    "OptimizerDirection": "optimizer_direction",
    "PRESETS": "objectives",
    "Probe": "probe",
    "ProbeBatch": "probe_batch",
    "Reliability": "halves",
    "SELECTORS": "selectors",
    "Selection": "selection",
    "Selector": "selectors",
    "SketchBatch": "sketcher",
    "SketchSpec": "sketcher",
    "Sketcher": "sketcher",
    "Target": "targets",
    "Where": "where",
    "collect": "collector",
    "exact_dots": "exact",
    "exact_scores": "halves",
    "fidelity": "faithfulness",
    "fit_projection": "fitting",
    "index_for": "indexes",
    "layer_contributions": "shares",
    "layer_gradients": "exact",
    "objective": "objectives",
    "fuse_scores": "fusion",
    "reliability": "halves",
    "search": "query",
    "search_each": "fusion",
    "search_fused": "fusion",
    "select": "selection",
    "sketch_scores": "halves",
    "target": "targets",
    "validation_gradient": "directions",
}

__all__ = sorted(_MODULE_OF)
__getattr__ = names_of(__name__, _MODULE_OF)
