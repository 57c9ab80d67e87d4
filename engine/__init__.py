"""Gradients to sketches, targets, search and selection, over a gradstore store.

Names are loaded when first used, so that searching a store does not wait for torch.
"""

from typing import TYPE_CHECKING

from gradstore.lazy import names_of

if TYPE_CHECKING:
    from engine.gradients.directions import Direction as Direction
    from engine.gradients.directions import validation_gradient as validation_gradient
    from engine.gradients.exact import ExactBatch as ExactBatch
    from engine.gradients.exact import LayerGradients as LayerGradients
    from engine.gradients.exact import exact_dots as exact_dots
    from engine.gradients.exact import layer_gradients as layer_gradients
    from engine.gradients.logprobs import Reference as Reference
    from engine.gradients.objectives import PRESETS as PRESETS
    from engine.gradients.objectives import Objective as Objective
    from engine.gradients.objectives import objective as objective
    from engine.gradients.optimizer_direction import AdamState as AdamState
    from engine.gradients.optimizer_direction import OptimizerDirection as OptimizerDirection
    from engine.indexes import Index as Index
    from engine.indexes import IndexWarning as IndexWarning
    from engine.indexes import index_for as index_for
    from engine.probing.batch import ProbeBatch as ProbeBatch
    from engine.probing.probe import Probe as Probe
    from engine.searching.fusion import FusedHits as FusedHits
    from engine.searching.fusion import fuse_scores as fuse_scores
    from engine.searching.fusion import search_each as search_each
    from engine.searching.fusion import search_fused as search_fused
    from engine.searching.query import Hits as Hits
    from engine.searching.query import search as search
    from engine.searching.shares import layer_contributions as layer_contributions
    from engine.searching.targets import Target as Target
    from engine.searching.targets import target as target
    from engine.searching.where import Where as Where
    from engine.selecting.candidates import Candidates as Candidates
    from engine.selecting.candidates import Scored as Scored
    from engine.selecting.candidates import Selector as Selector
    from engine.selecting.diversity import Diversity as Diversity
    from engine.selecting.history import History as History
    from engine.selecting.selection import Selection as Selection
    from engine.selecting.selection import select as select
    from engine.selecting.selectors import SELECTORS as SELECTORS
    from engine.sketches.bases import add_basis as add_basis
    from engine.sketches.bases import bases_in_use as bases_in_use
    from engine.sketches.bases import create_store as create_store
    from engine.sketches.bases import sketcher_of as sketcher_of
    from engine.sketches.collector import CollectReport as CollectReport
    from engine.sketches.collector import collect as collect
    from engine.sketches.faithfulness import Fidelity as Fidelity
    from engine.sketches.faithfulness import fidelity as fidelity
    from engine.sketches.fitting import fit_projection as fit_projection
    from engine.sketches.halves import Reliability as Reliability
    from engine.sketches.halves import exact_scores as exact_scores
    from engine.sketches.halves import reliability as reliability
    from engine.sketches.halves import sketch_scores as sketch_scores
    from engine.sketches.kept_halves import StoredHalves as StoredHalves
    from engine.sketches.kept_halves import collect_halves as collect_halves
    from engine.sketches.kept_halves import stored_halves as stored_halves
    from engine.sketches.refitting import Refit as Refit
    from engine.sketches.refitting import refit as refit
    from engine.sketches.sketcher import SketchBatch as SketchBatch
    from engine.sketches.sketcher import Sketcher as Sketcher
    from engine.sketches.sketcher import SketchSpec as SketchSpec

_MODULE_OF = {
    "add_basis": "sketches.bases",
    "bases_in_use": "sketches.bases",
    "create_store": "sketches.bases",
    "sketcher_of": "sketches.bases",
    "AdamState": "gradients.optimizer_direction",
    "Candidates": "selecting.candidates",
    "CollectReport": "sketches.collector",
    "Direction": "gradients.directions",
    "ExactBatch": "gradients.exact",
    "Fidelity": "sketches.faithfulness",
    "Index": "indexes",
    "IndexWarning": "indexes",
    "Diversity": "selecting.diversity",
    "FusedHits": "searching.fusion",
    "History": "selecting.history",
    "Hits": "searching.query",
    "LayerGradients": "gradients.exact",
    "Objective": "gradients.objectives",
    "Reference": "gradients.logprobs",
    "OptimizerDirection": "gradients.optimizer_direction",
    "PRESETS": "gradients.objectives",
    "Probe": "probing.probe",
    "ProbeBatch": "probing.batch",
    "Refit": "sketches.refitting",
    "Reliability": "sketches.halves",
    "StoredHalves": "sketches.kept_halves",
    "collect_halves": "sketches.kept_halves",
    "refit": "sketches.refitting",
    "stored_halves": "sketches.kept_halves",
    "SELECTORS": "selecting.selectors",
    "Selection": "selecting.selection",
    "Scored": "selecting.candidates",
    "Selector": "selecting.candidates",
    "SketchBatch": "sketches.sketcher",
    "SketchSpec": "sketches.sketcher",
    "Sketcher": "sketches.sketcher",
    "Target": "searching.targets",
    "Where": "searching.where",
    "collect": "sketches.collector",
    "exact_dots": "gradients.exact",
    "exact_scores": "sketches.halves",
    "fidelity": "sketches.faithfulness",
    "fit_projection": "sketches.fitting",
    "index_for": "indexes",
    "layer_contributions": "searching.shares",
    "layer_gradients": "gradients.exact",
    "objective": "gradients.objectives",
    "fuse_scores": "searching.fusion",
    "reliability": "sketches.halves",
    "search": "searching.query",
    "search_each": "searching.fusion",
    "search_fused": "searching.fusion",
    "select": "selecting.selection",
    "sketch_scores": "sketches.halves",
    "target": "searching.targets",
    "validation_gradient": "gradients.directions",
}

__all__ = sorted(_MODULE_OF)
__getattr__ = names_of(__name__, _MODULE_OF)
